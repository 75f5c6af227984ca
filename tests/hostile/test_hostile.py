"""Every hostile checkpoint and bundle is refused: the right exit code, one clean line, quickly, leaving nothing."""

import os
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from breaking import Collection
from hostile_bundles import BUNDLES
from hostile_checkpoints import CHECKPOINTS

from exporter import export, verify
from plans.errors import LlamaplanError
from plans.export.opening import check_fast, open_export

sys.path.append(str(Path(__file__).parents[1] / "exporter"))
from export_helpers import make_llama, make_plan, tree


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint with a tokenizer file, and an export of it."""
    folder = tmp_path_factory.mktemp("good")
    model = make_llama(folder / "model")
    (model / "tokenizer.json").write_text("{}")
    export(make_plan(model, [2, 1, 2]), model=model, output=folder / "shards")
    return folder


@contextmanager
def refused(code: int, *, leaving: Path) -> Iterator[None]:
    """Expect a clean refusal, in little time and memory, that changes nothing."""
    before = names_of(leaving)
    began, peak = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(LlamaplanError) as error:
        yield
    assert error.value.exit_code == code, error.value
    assert error.value.line().isprintable()
    assert len(error.value.line()) < 2100
    assert time.process_time() - began < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 300 << 10
    assert names_of(leaving) == before


def with_rows(cases: Collection) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.row(case.row)) for name, case in cases.items()]


def names_of(folder: Path) -> list[str]:
    return sorted(os.fspath(path) for path in folder.rglob("*"))


@pytest.mark.parametrize("name", with_rows(CHECKPOINTS))
def test_a_hostile_checkpoint_is_refused(good: Path, tmp_path: Path, name: str) -> None:
    plan = make_plan(good / "model", [2, 1, 2])
    shutil.copytree(good / "model", tmp_path / "model")
    CHECKPOINTS[name].break_folder(tmp_path / "model")
    with refused(CHECKPOINTS[name].code, leaving=tmp_path):
        export(plan, model=tmp_path / "model", output=tmp_path / "out")


@pytest.mark.parametrize("name", with_rows(BUNDLES))
def test_a_hostile_bundle_is_refused(good: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(good / "shards", tmp_path / "shards")
    BUNDLES[name].break_folder(tmp_path / "shards")
    with refused(BUNDLES[name].code, leaving=tmp_path):
        opened = open_export(tmp_path / "shards")
        for stage in opened.bundles:
            check_fast(opened, stage=stage)
    with refused(BUNDLES[name].code, leaving=tmp_path):
        verify(tmp_path / "shards")


def test_the_good_ones_are_accepted(good: Path, tmp_path: Path) -> None:
    verify(good / "shards", model=good / "model")
    export(make_plan(good / "model", [2, 1, 2]), model=good / "model", output=tmp_path / "out")
    assert tree(tmp_path / "out") == tree(good / "shards")
