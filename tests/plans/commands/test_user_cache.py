"""The user's cache folder: private, whole files, and nothing of anybody else."""

import stat
from pathlib import Path

import pytest

from plans.commands.user_cache import cache_folder, keep, recall
from plans.workload import Request

VALUE = Request(arrival_seconds=0.5, prompt_tokens=1, new_tokens=1)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "llamaplan"


def test_what_is_kept_comes_back_and_only_its_owner_may_read_it(folder: Path) -> None:
    assert keep("value.json", VALUE)
    assert recall(Request, "value.json") == VALUE
    assert stat.S_IMODE((folder / "value.json").stat().st_mode) == 0o600
    assert [path.name for path in folder.iterdir()] == ["value.json"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema_version": 2}', "\0", "{}" * 1_000_000])
def test_a_damaged_file_counts_as_none_and_is_made_again(text: str, folder: Path) -> None:
    cache_folder()
    (folder / "value.json").write_text(text)
    assert recall(Request, "value.json") is None
    assert keep("value.json", VALUE)
    assert recall(Request, "value.json") == VALUE


def test_a_file_that_others_may_write_or_that_leads_elsewhere_counts_as_none(folder: Path, tmp_path: Path) -> None:
    keep("value.json", VALUE)
    (folder / "value.json").rename(tmp_path / "elsewhere.json")
    (folder / "value.json").symlink_to(tmp_path / "elsewhere.json")
    assert recall(Request, "value.json") is None
    (folder / "value.json").unlink()
    keep("value.json", VALUE)
    (folder / "value.json").chmod(0o622)
    assert recall(Request, "value.json") is None


def test_without_a_folder_nothing_is_kept_and_nothing_fails(folder: Path, tmp_path: Path) -> None:
    folder.write_text("a file in its place")
    assert not keep("value.json", VALUE)
    assert recall(Request, "value.json") is None
