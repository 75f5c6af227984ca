"""Damaged, truncated, swapped, mixed and hostile bundles: refused when they are opened, each with its exit code."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from export_helpers import as_ordinary_user, make_plan
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter import export, verify
from plans.errors import ExitCode, InputError, IntegrityError, LlamaplanError, MachineError, UsageError
from plans.export.manifest import Manifest
from plans.export.opening import check_fast, check_unchanged, open_export

WEIGHTS = "model-{:05d}-of-00003.safetensors"
STAGE = "stage-{:05d}-of-00003.json"
FILES = [
    *(WEIGHTS.format(i) for i in (1, 2, 3)),
    *(STAGE.format(i) for i in (1, 2, 3)),
    "manifest.json",
    "plan.json",
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
]


def load(folder: Path) -> None:
    """What a run does before its first token."""
    opened = open_export(folder)
    for stage in opened.bundles:
        check_fast(opened, stage=stage)


@contextmanager
def changed(path: Path, data: bytes) -> Iterator[None]:
    """Give a file other content for a while."""
    before = path.read_bytes()
    path.write_bytes(data)
    try:
        yield
    finally:
        path.write_bytes(before)


@pytest.fixture(scope="module")
def fixed(shipped: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One export for all tests that put back what they change."""
    folder = tmp_path_factory.mktemp("fixed") / "shards"
    export(make_plan(shipped, [3, 2, 2]), model=shipped, output=folder)
    load(folder)
    return folder


@settings(max_examples=100, deadline=None)
@given(name=st.sampled_from(FILES), where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_one_flipped_bit_anywhere_is_refused(fixed: Path, name: str, where: float, bit: int) -> None:
    data = bytearray((fixed / name).read_bytes())
    data[int(where * len(data))] ^= 1 << bit
    with changed(fixed / name, bytes(data)), pytest.raises(LlamaplanError) as refused:
        load(fixed)
    # A manifest that is no valid JSON any more is bad input; everything else is a mismatch.
    allowed = {ExitCode.INTEGRITY} | ({ExitCode.BAD_INPUT} if name == "manifest.json" else set())
    assert refused.value.exit_code in allowed


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(FILES), where=st.floats(0, 1, exclude_max=True), kind=st.sampled_from(["cut", "zeros"]))
def test_truncation_at_any_length_and_zero_filled_tails_are_refused(
    fixed: Path, name: str, where: float, kind: str
) -> None:
    data = (fixed / name).read_bytes()
    keep = int(where * len(data))
    damaged = data[:keep] + (bytes(len(data) - keep) if kind == "zeros" else b"")
    if damaged == data:
        return
    with changed(fixed / name, damaged), pytest.raises(LlamaplanError) as refused:
        load(fixed)
    assert refused.value.exit_code in {ExitCode.INTEGRITY, ExitCode.BAD_INPUT}
    assert name == "manifest.json" or refused.value.exit_code == ExitCode.INTEGRITY


@pytest.mark.parametrize("name", FILES)
def test_appended_bytes_are_refused(fixed: Path, name: str) -> None:
    with changed(fixed / name, (fixed / name).read_bytes() + b"\n"), pytest.raises(LlamaplanError) as refused:
        load(fixed)
    assert refused.value.exit_code in {ExitCode.INTEGRITY, ExitCode.BAD_INPUT}


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(shards: Path, name: str) -> None:
    (shards / name).unlink()
    with pytest.raises(LlamaplanError) as refused:
        load(shards)
    assert refused.value.exit_code == (ExitCode.BAD_INPUT if name == "manifest.json" else ExitCode.INTEGRITY)
    assert name in str(refused.value)


def test_a_run_needs_only_the_files_of_its_own_stage(shards: Path) -> None:
    for index in (1, 3):
        (shards / WEIGHTS.format(index)).unlink()
        (shards / STAGE.format(index)).unlink()
    opened = open_export(shards, stage=1)
    check_fast(opened, stage=1)
    assert opened.num_stages == 3
    with pytest.raises(IntegrityError, match="00001-of-00003"):
        open_export(shards)


def test_a_file_that_is_not_the_models_only_warns(shards: Path) -> None:
    (shards / "notes \x1b[31m.txt").write_text("mine")
    opened = open_export(shards)
    assert len(opened.warnings) == 1
    assert "notes" in opened.warnings[0]
    assert "\x1b" not in opened.warnings[0]
    load(shards)


def swap(first: Path, second: Path) -> None:
    aside = first.with_suffix(".aside")
    first.rename(aside)
    second.rename(first)
    aside.rename(second)


def test_two_stages_of_equal_shape_swapped_are_refused(shipped: Path, tmp_path: Path) -> None:
    export(make_plan(shipped, [0, 2, 2, 3]), model=shipped, output=tmp_path / "out")
    first, second = (tmp_path / "out" / f"model-0000{i}-of-00004.safetensors" for i in (2, 3))
    assert first.stat().st_size == second.stat().st_size
    swap(first, second)
    with pytest.raises(IntegrityError, match="llamaplan_stage 2, this place needs 1"):
        open_export(tmp_path / "out")
    swap(*(tmp_path / "out" / f"stage-0000{i}-of-00004.json" for i in (2, 3)))
    with pytest.raises(IntegrityError, match="describes stage 2"):
        open_export(tmp_path / "out")


@pytest.mark.parametrize("change", ["dtype", "plan", "weights"])
def test_files_mixed_from_two_exports_are_refused(
    shipped: Path, models: Callable[..., Path], tmp_path: Path, change: str
) -> None:
    models_of = {"weights": (models(seed=1), models(seed=2))}.get(change, (shipped, shipped))
    cuts = [[3, 2, 2], [2, 3, 2]] if change == "plan" else [[3, 2, 2], [3, 2, 2]]
    if change == "weights":
        cuts = [[1, 2, 2], [1, 2, 2]]
    dtypes = [None, "fp16"] if change == "dtype" else [None, None]
    folders = [tmp_path / "a", tmp_path / "b"]
    for model, cut, dtype, folder in zip(models_of, cuts, dtypes, folders, strict=True):
        export(make_plan(model, cut), model=model, output=folder, dtype=dtype)
    for names in ([WEIGHTS.format(2)], [STAGE.format(2)], [WEIGHTS.format(2), STAGE.format(2)], ["manifest.json"]):
        shutil.copytree(folders[0], tmp_path / "mixed", dirs_exist_ok=True)
        for name in names:
            shutil.copy(folders[1] / name, tmp_path / "mixed" / name)
        with pytest.raises(IntegrityError):
            load(tmp_path / "mixed")
        shutil.rmtree(tmp_path / "mixed")


def test_another_exports_tokenizer_is_refused(shards: Path) -> None:
    path = shards / "tokenizer.json"
    document = json.loads(path.read_text())
    document["version"] = "1.1"
    path.write_text(json.dumps(document))
    with pytest.raises(IntegrityError, match=r"tokenizer\.json"):
        open_export(shards)


def test_the_export_id_that_is_known_from_elsewhere_pins_the_content(shards: Path) -> None:
    known = open_export(shards).export_id
    assert open_export(shards, expect_id=known).export_id == known
    forge(shards, lambda manifest: manifest["source"][0].update(size=1))
    with pytest.raises(IntegrityError) as refused:
        open_export(shards, expect_id=known)
    assert known in str(refused.value)


def forge(folder: Path, change: Callable[[dict[str, Any]], object], *, stages: bool = True) -> None:
    """Change the manifest and make everything that is derived from it agree, as an attacker would."""
    document = json.loads((folder / "manifest.json").read_text())
    change(document)
    draft = Manifest.model_validate_json(json.dumps(document))
    manifest = draft.model_copy(update={"export_id": draft.derived_id()})
    (folder / "manifest.json").write_text(manifest.to_json())
    for index in range(len(manifest.stages) if stages else 0):
        (folder / STAGE.format(index + 1)).write_text(manifest.stage_json(index))


MANIFESTS: dict[str, Callable[[dict[str, Any]], object]] = {
    "traversal": lambda m: m["files"][0].update(path="../x"),
    "absolute": lambda m: m["files"][0].update(path="/etc/passwd"),
    "folder": lambda m: m["files"][0].update(path="a/b"),
    "backslash": lambda m: m["files"][0].update(path="a\\b"),
    "nul": lambda m: m["files"][0].update(path="a\0b"),
    "itself": lambda m: m["files"][0].update(path="manifest.json"),
    "a stage file": lambda m: m["files"][0].update(path=STAGE.format(1)),
    "digest in capitals": lambda m: m["files"][0].update(sha256=m["files"][0]["sha256"].upper()),
    "short digest": lambda m: m["files"][0].update(sha256="ab"),
    "negative size": lambda m: m["files"][0].update(size=-1),
    "float size": lambda m: m["files"][0].update(size=1.0),
    "duplicate entry": lambda m: m["files"].append(m["files"][0]),
    "duplicate in other case": lambda m: m["files"].append({**m["files"][0], "path": m["files"][0]["path"].upper()}),
    "unknown key": lambda m: m.update(comment="hello"),
    "missing key": lambda m: m.pop("plan_sha256"),
    "future version": lambda m: m.update(schema_version=2),
    "version as text": lambda m: m.update(schema_version="1"),
    "no stages": lambda m: m["stages"].clear(),
    "stage file of another number": lambda m: m["stages"][0].update(file=WEIGHTS.format(2)),
    "not a number": lambda m: m["files"][0].update(size=float("nan")),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_hostile_manifest_is_refused(shards: Path, case: str) -> None:
    document = json.loads((shards / "manifest.json").read_text())
    MANIFESTS[case](document)
    (shards / "manifest.json").write_text(json.dumps(document, sort_keys=True, indent=2))
    with pytest.raises(InputError):
        open_export(shards)


def test_a_version_this_program_does_not_know_names_the_one_it_does(shards: Path) -> None:
    document = json.loads((shards / "manifest.json").read_text())
    (shards / "manifest.json").write_text(json.dumps({**document, "schema_version": 7, "new_key": 1}))
    with pytest.raises(InputError, match="written for schema_version 7; expected schema_version 1"):
        open_export(shards)


def test_a_manifest_of_50_megabytes_is_refused_unread(shards: Path) -> None:
    os.truncate(shards / "manifest.json", 50 << 20)
    with pytest.raises(InputError, match="52428800 bytes"):
        open_export(shards)


@pytest.mark.parametrize("name", ["manifest.json", WEIGHTS.format(1), STAGE.format(1), "config.json", "plan.json"])
@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_anything_but_a_regular_file_is_refused_without_waiting(shards: Path, name: str, kind: str) -> None:
    path = shards / name
    aside = shards.parent / "aside"
    path.rename(aside)
    {"link": lambda: path.symlink_to(aside), "pipe": lambda: os.mkfifo(path), "folder": path.mkdir}[kind]()
    with pytest.raises(InputError) as refused:
        open_export(shards)
    assert name in str(refused.value)


FORGERIES: dict[str, Callable[[dict[str, Any]], object]] = {
    "other layers": lambda m: (m["stages"][0].update(end_layer=2), m["stages"][1].update(start_layer=2)),
    "other device": lambda m: m["stages"][0].update(device="cuda:7"),
    "other dtype": lambda m: m.update(dtype="fp16"),
    "other plan": lambda m: m.update(plan_sha256="0" * 64),
}


@pytest.mark.parametrize("case", FORGERIES)
def test_a_manifest_with_a_matching_id_must_still_match_plan_and_weights(shards: Path, case: str) -> None:
    forge(shards, FORGERIES[case])
    with pytest.raises(IntegrityError):
        open_export(shards)


def test_weights_of_the_same_size_but_another_dtype_are_refused(shipped: Path, tmp_path: Path) -> None:
    plan = make_plan(shipped, [3, 2, 2])
    export(plan, model=shipped, output=tmp_path / "bf16")
    other = export(plan, model=shipped, output=tmp_path / "fp16", dtype="fp16")
    name = WEIGHTS.format(2)
    assert (tmp_path / "bf16" / name).stat().st_size == (tmp_path / "fp16" / name).stat().st_size
    shutil.copy(tmp_path / "fp16" / name, tmp_path / "bf16" / name)
    entry = other.file(name).model_dump()
    files = {file["path"]: file for file in json.loads((tmp_path / "bf16" / "manifest.json").read_text())["files"]}
    position = sorted(files).index(name)
    forge(tmp_path / "bf16", lambda m: m["files"].__setitem__(position, entry))
    with pytest.raises(IntegrityError, match="is F16, the manifest says bf16"):
        open_export(tmp_path / "bf16")


def test_weights_of_another_shape_are_refused_even_when_all_hashes_agree(
    models: Callable[..., Path], tmp_path: Path
) -> None:
    first, second = models(), models(intermediate_size=64)
    for model, name in ((first, "a"), (second, "b")):
        export(make_plan(model, [1, 2, 2]), model=model, output=tmp_path / name)
    foreign = open_export(tmp_path / "b")
    for name in [WEIGHTS.format(2)]:
        data = (tmp_path / "b" / name).read_bytes()
        ours = open_export(tmp_path / "a").manifest.plan_sha256
        data = data.replace(foreign.manifest.plan_sha256.encode(), ours.encode())
        (tmp_path / "a" / name).write_bytes(data)
        record_again(tmp_path / "a", name)
    with pytest.raises(IntegrityError, match="not those the plan was made for"):
        open_export(tmp_path / "a")


def record_again(folder: Path, name: str) -> None:
    """Write a file's true size and digests into the manifest."""
    from plans.reading.digest import digest_file

    found = digest_file(folder / name)
    entry = {"path": name, "size": found.size, "sha256": found.sha256, "xxh3_128": found.xxh3_128}
    forge(folder, lambda m: m.update(files=[entry if file["path"] == name else file for file in m["files"]]))


def test_a_stage_that_does_not_exist_is_a_usage_error(shards: Path) -> None:
    with pytest.raises(UsageError, match="no stage 3"):
        open_export(shards, stage=3)


@pytest.mark.row("B9")
@pytest.mark.parametrize("name", FILES)
def test_an_unreadable_file_is_the_machines_fault(fixed: Path, name: str) -> None:
    # pytest's own folders are closed to other users, so the copy lies beside them.
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "shards"
        shutil.copytree(fixed, folder)
        Path(place).chmod(0o755)
        (folder / name).chmod(0)
        with as_ordinary_user(), pytest.raises(MachineError, match="errno 13"):
            load(folder)


@pytest.mark.row("B9")
@pytest.mark.parametrize(("mode", "says"), [(0o755, "is executable"), (0o666, "can be written by everybody")])
@pytest.mark.parametrize("name", [WEIGHTS.format(1), "config.json"])
def test_an_unusual_mode_warns(shards: Path, name: str, mode: int, says: str) -> None:
    (shards / name).chmod(mode)
    assert [text for text in open_export(shards).warnings if says in text and name in text]


@pytest.mark.row("B13")
def test_an_export_behind_a_link_and_on_read_only_storage_is_opened_and_left_alone(
    shards: Path, tmp_path: Path
) -> None:
    for path in shards.iterdir():
        path.chmod(0o444)
    shards.chmod(0o555)
    before = {path.name: path.stat() for path in shards.iterdir()}
    (tmp_path / "link").symlink_to(shards)
    load(tmp_path / "link")
    verify(tmp_path / "link")
    after = {path.name: path.stat() for path in shards.iterdir()}
    shards.chmod(0o755)
    assert before.keys() == after.keys()
    assert all(before[name].st_mtime_ns == after[name].st_mtime_ns for name in before)


@pytest.mark.row("B10")
def test_a_bundle_changed_while_running_is_noticed_at_the_end(shards: Path) -> None:
    opened = open_export(shards)
    check_unchanged(opened, stage=0)
    os.truncate(shards / WEIGHTS.format(1), 4096)
    with pytest.raises(IntegrityError, match="changed while in use"):
        check_unchanged(opened, stage=0)
    (shards / WEIGHTS.format(2)).unlink()
    with pytest.raises(IntegrityError, match="vanished"):
        check_unchanged(opened, stage=1)


@pytest.mark.row("B11")
def test_a_failing_disk_is_named_with_the_offset(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_export(shards)
    real = os.preadv

    def failing(fd: int, buffers: Any, offset: int) -> int:
        if offset >= 1 << 20:
            raise OSError(5, "Input/output error")
        return real(fd, [buffers[0][: (1 << 20) - offset]], offset)

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(MachineError, match=r"read error at byte 1048576.*errno 5"):
        check_fast(opened, stage=1)


def test_a_folder_without_a_manifest_is_no_export(shipped: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no manifest\.json"):
        open_export(shipped)
    with pytest.raises(InputError, match="no such folder"):
        open_export(tmp_path / "nowhere")
