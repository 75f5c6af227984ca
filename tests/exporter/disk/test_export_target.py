"""Where an export may be written, what the files look like there, and what the machine can refuse."""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from export_helpers import ROOT, as_ordinary_user, make_plan, names, run_python, tensor_bytes, tree

from exporter import export, verify
from plans.checkpoint.header import read_header
from plans.errors import MachineError, UsageError
from plans.export.opening import open_export
from plans.plan import Plan


@pytest.fixture(scope="module")
def model(models: Callable[..., Path]) -> Path:
    return models()


@pytest.fixture(scope="module")
def plan(model: Path) -> Plan:
    return make_plan(model, [2, 3])


@pytest.fixture(scope="module")
def plan_file(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    path.write_text(plan.to_json())
    return path


def other_files(out: Path) -> None:
    out.mkdir()
    (out / "precious.txt").write_text("mine")


def half_an_export(out: Path) -> None:
    out.mkdir()
    (out / "model-00001-of-00002.safetensors").write_bytes(b"half")


TARGETS: dict[str, Callable[[Path], object]] = {
    "other files": other_files,
    "half an export": half_an_export,
    "a file": lambda out: out.write_text("mine"),
    "a link to a folder": lambda out: ((out.parent / "real").mkdir(), out.symlink_to(out.parent / "real")),
    "a dangling link": lambda out: out.symlink_to(out.parent / "nowhere"),
    "a pipe": os.mkfifo,
}
NEVER_REPLACED = {"a link to a folder", "a dangling link"}


@pytest.mark.parametrize("kind", TARGETS)
def test_a_target_that_exists_is_refused_and_keeps_every_byte(
    model: Path, plan: Plan, tmp_path: Path, kind: str
) -> None:
    TARGETS[kind](tmp_path / "out")
    before = {path: path.lstat() for path in tmp_path.rglob("*")}
    with pytest.raises(MachineError, match="out"):
        export(plan, model=model, output=tmp_path / "out")
    after = {path: path.lstat() for path in tmp_path.rglob("*")}
    assert before.keys() == after.keys()
    assert all(before[path].st_mtime_ns == after[path].st_mtime_ns for path in before if path.name != "out")


@pytest.mark.parametrize("kind", TARGETS)
def test_force_replaces_folders_and_files_but_never_a_link(model: Path, plan: Plan, tmp_path: Path, kind: str) -> None:
    TARGETS[kind](tmp_path / "out")
    if kind in NEVER_REPLACED:
        with pytest.raises(MachineError, match="symbolic link"):
            export(plan, model=model, output=tmp_path / "out", force=True)
        assert (tmp_path / "out").is_symlink()
    else:
        export(plan, model=model, output=tmp_path / "out", force=True)
        assert tensor_bytes(tmp_path / "out") == tensor_bytes(model)
        assert names(tmp_path) == ["out"]


def test_an_empty_folder_is_filled(model: Path, plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    export(plan, model=model, output=tmp_path / "out")
    assert verify(tmp_path / "out", model=model).num_stages == 2


def test_force_keeps_the_old_export_when_the_new_one_fails(
    model: Path, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(plan, model=model, output=tmp_path / "out")
    before = tree(tmp_path)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MachineError):
        export(make_plan(model, [5]), model=model, output=tmp_path / "out", force=True)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("place", [".", "..", "sub", "via link", "holds the shards"])
def test_an_output_that_overlaps_the_model_is_refused_even_with_force(
    model: Path, plan: Plan, tmp_path: Path, place: str
) -> None:
    copy = tmp_path / "outer" / "snapshots" / "model"
    shutil.copytree(model, copy)
    output = {
        ".": copy,
        "..": copy.parent,
        "sub": copy / "out",
        "via link": tmp_path / "link",
        "holds the shards": tmp_path / "outer" / "blobs",
    }[place]
    if place == "via link":
        (tmp_path / "link").symlink_to(copy)
        output = tmp_path / "link" / "out"
    if place == "holds the shards":
        output.mkdir()
        for shard in copy.glob("*.safetensors"):  # as the Hugging Face cache does
            shutil.move(shard, output)
            shard.symlink_to(output / shard.name)
    before = tree(tmp_path)
    with pytest.raises(UsageError, match="the model"):
        export(plan, model=copy, output=output, force=True)
    assert tree(tmp_path) == before


def test_the_current_and_the_home_folder_are_never_replaced(
    model: Path, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, use in (("home", lambda path: monkeypatch.setenv("HOME", str(path))), ("current", monkeypatch.chdir)):
        folder = tmp_path / name
        (folder / "deeper").mkdir(parents=True)
        use(folder / "deeper")
        with pytest.raises(MachineError, match="never replaced"):
            export(plan, model=model, output=folder, force=True)
        assert names(folder) == ["deeper"]


def test_a_missing_parent_is_named(model: Path, plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"parent folder does not exist.*create .*/no/where first"):
        export(plan, model=model, output=tmp_path / "no" / "where" / "out")
    assert names(tmp_path) == []


def test_a_parent_that_cannot_be_written_is_named(plan: Plan, models: Callable[..., Path]) -> None:
    # pytest's own folders are closed to other users, so this one lies beside them.
    with tempfile.TemporaryDirectory() as place:
        base = Path(place)
        base.chmod(0o755)
        shutil.copytree(models(), base / "model")
        for path in (base / "model", *(base / "model").iterdir()):
            path.chmod(0o755)
        (base / "closed").mkdir(mode=0o555)
        with as_ordinary_user(), pytest.raises(MachineError, match=r"closed.*mkdir failed: Permission denied"):
            export(plan, model=base / "model", output=base / "closed" / "out")


@pytest.mark.row("C2")
@pytest.mark.parametrize("unreadable", ["config.json", "model.safetensors", "."])
def test_an_unreadable_model_is_the_machines_fault(plan: Plan, models: Callable[..., Path], unreadable: str) -> None:
    with tempfile.TemporaryDirectory() as place:
        base = Path(place)
        base.chmod(0o777)
        shutil.copytree(models(), base / "model")
        (base / "model" / unreadable).chmod(0)
        with as_ordinary_user(), pytest.raises(MachineError, match=r"errno 13|Permission denied"):
            export(plan, model=base / "model", output=base / "out")
        assert names(base) == ["model"]


@pytest.mark.parametrize("name", ["with space", "new\nline", "-dash", "ümläut", "x" * 255, "~", "trailing/", "a.b."])
def test_unusual_names_work(model: Path, plan: Plan, tmp_path: Path, name: str) -> None:
    export(plan, model=model, output=tmp_path / name)
    assert verify(tmp_path / name).num_stages == 2
    assert names(tmp_path) == [name.rstrip("/")]


def test_a_name_that_is_not_utf8_works(model: Path, plan: Plan, tmp_path: Path) -> None:
    output = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    export(plan, model=model, output=output)
    assert verify(output).num_stages == 2


@pytest.mark.parametrize("name", ["x" * 256, "a/" * 2100 + "b", "nul\0"])
def test_impossible_names_are_refused(model: Path, plan: Plan, tmp_path: Path, name: str) -> None:
    with pytest.raises((UsageError, MachineError)):
        export(plan, model=model, output=tmp_path / name)
    assert names(tmp_path) == []


def test_a_relative_output_and_a_parent_behind_a_link_work(
    model: Path, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.chdir(tmp_path)
    export(plan, model=model, output=Path("link/out"))
    export(plan, model=model, output=Path("./out"))
    assert tree(tmp_path / "real" / "out") == tree(tmp_path / "out")


@pytest.mark.row("E7")
@pytest.mark.parametrize("swap_for", ["a link", "another folder", "nothing"])
def test_a_parent_swapped_during_the_export_is_refused(model: Path, plan: Plan, tmp_path: Path, swap_for: str) -> None:
    place, aside, elsewhere = tmp_path / "place", tmp_path / "aside", tmp_path / "elsewhere"
    place.mkdir()
    elsewhere.mkdir()

    def swap(done: int, total: int) -> None:
        if not aside.exists():
            place.rename(aside)
            if swap_for == "a link":
                place.symlink_to(elsewhere)
            elif swap_for == "another folder":
                place.mkdir()

    with pytest.raises(MachineError, match="moved or replaced"):
        export(plan, model=model, output=place / "out", progress=swap)
    assert names(aside) == []
    assert names(elsewhere) == []
    assert not (place / "out").exists()


@pytest.mark.row("E11")
@pytest.mark.parametrize("umask", [0o000, 0o022, 0o027, 0o077], ids=oct)
def test_modes_follow_the_umask_and_nothing_is_executable(model: Path, plan: Plan, tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        export(plan, model=model, output=tmp_path / "out")
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o7777 == 0o777 & ~umask
    assert {path.stat().st_mode & 0o7777 for path in (tmp_path / "out").iterdir()} == {0o666 & ~umask}


@pytest.mark.row("E13")
def test_file_names_are_plain_and_unique_on_any_filesystem(model: Path, plan: Plan, tmp_path: Path) -> None:
    export(plan, model=model, output=tmp_path / "out")
    found = names(tmp_path / "out")
    assert len({name.lower() for name in found}) == len(found)
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", name) for name in found)
    assert all(name == name.lower() for name in found if name.endswith((".safetensors", ".json")))


EXPORT = """
import sys
from pathlib import Path
from exporter import export
from plans.check import read_plan
export(read_plan(Path(sys.argv[1])), model=Path(sys.argv[2]), output=Path(sys.argv[3]), force="force" in sys.argv)
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""


def run_export(*arguments: object, environment: dict[str, str] | None = None, **options: object) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-c", EXPORT, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **options,  # type: ignore[call-overload]
    )
    return done.returncode, done.stderr


@pytest.mark.row("E15")
def test_the_same_bytes_come_out_under_another_umask_hash_seed_locale_and_time_zone(
    model: Path, plan_file: Path, tmp_path: Path
) -> None:
    settings = [
        {"PYTHONHASHSEED": "0", "TZ": "UTC", "LC_ALL": "C", "PYTHONUTF8": "0"},
        {"PYTHONHASHSEED": "4242", "TZ": "Asia/Kathmandu", "LC_ALL": "C.UTF-8", "COLUMNS": "33"},
    ]
    for number, environment in enumerate(settings):
        out = tmp_path / f"out{number}"
        code, said = run_export(plan_file, model, out, environment=environment, umask=[0o077, 0o002][number])
        assert (code, said) == (0, "")
        for path in out.iterdir():
            os.utime(path, ns=(0, 0))
    assert tree(tmp_path / "out0") == tree(tmp_path / "out1")


def limit(kind: int, value: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(kind, (value, value))


@pytest.mark.row("E2")
def test_a_file_size_limit_is_an_error_and_leaves_nothing(model: Path, plan_file: Path, tmp_path: Path) -> None:
    size = limit(resource.RLIMIT_FSIZE, 20_000)
    code, said = run_export(plan_file, model, tmp_path / "out", preexec_fn=size)
    assert code == 1
    assert "MachineError" in said
    assert "write failed: File too large" in said
    assert names(tmp_path) == []


@pytest.mark.row("E16")
def test_a_thousand_shards_are_read_with_64_descriptors(tmp_path: Path, models: Callable[..., Path]) -> None:
    model = models(
        num_hidden_layers=112,
        hidden_size=8,
        intermediate_size=8,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=16,
    )
    model = one_shard_per_tensor(model, tmp_path / "model")
    assert len(list(model.glob("*.safetensors"))) > 1000
    plan = tmp_path / "plan.json"
    plan.write_text(make_plan(model, [5] * 22 + [2]).to_json())
    files = limit(resource.RLIMIT_NOFILE, 64)
    assert run_export(plan, model, tmp_path / "out", preexec_fn=files) == (0, "")
    assert tensor_bytes(tmp_path / "out") == tensor_bytes(model)


def one_shard_per_tensor(model: Path, folder: Path) -> Path:
    """Write a checkpoint again with every tensor in a file of its own."""
    import json

    folder.mkdir()
    shutil.copy(model / "config.json", folder)
    header = read_header(model / "model.safetensors")
    data = (model / "model.safetensors").read_bytes()
    weight_map = {}
    for number, (name, entry) in enumerate(header.tensors.items()):
        weight_map[name] = f"model-{number:05d}.safetensors"
        row = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [0, entry.size_bytes]}
        text = json.dumps({name: row}).encode()
        body = data[entry.begin : entry.end]
        (folder / weight_map[name]).write_bytes(len(text).to_bytes(8, "little") + text + body)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


MEASURE = """
import resource, sys
from pathlib import Path
from exporter import export
from plans.check import read_plan
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
export(read_plan(Path(sys.argv[1])), model=Path(sys.argv[2]), output=Path(sys.argv[3]), stages=[0])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) << 10)
"""


@pytest.mark.row("E14")
def test_memory_stays_bounded_whatever_the_size_of_the_tensors(tmp_path: Path, models: Callable[..., Path]) -> None:
    # 600 MB of holes: the head alone is larger than what the export may use. Only the small first stage is written.
    from plans.checkpoint.folder import open_checkpoint

    model = tmp_path / "model"
    shutil.copytree(models(tie_word_embeddings=True), model)
    write_sparse_head(model, rows=96, columns=32)
    grow_vocabulary(model)
    assert max(t.entry.size_bytes for t in open_checkpoint(model).tensors.values()) > 256 << 20
    plan = tmp_path / "plan.json"
    plan.write_text(make_plan(model, [2, 3]).to_json())

    def limits() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))

    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(plan), str(model), str(tmp_path / "out")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        preexec_fn=limits,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 100 << 20


def write_sparse_head(model: Path, *, rows: int, columns: int) -> None:
    """Make the model untied; the tables follow in `grow_vocabulary`."""
    from export_helpers import edit_json

    edit_json(model / "config.json", tie_word_embeddings=False)
    assert (rows, columns) == (96, 32)


def grow_vocabulary(model: Path, *, rows: int = 4_600_000) -> None:
    """Replace embedding and head by tables full of holes."""
    import json

    from export_helpers import edit_json

    path = model / "model.safetensors"
    data, header = path.read_bytes(), read_header(path)
    small = {name: entry for name, entry in header.tensors.items() if name != "model.embed_tokens.weight"}
    table, position, bodies = {}, 0, []
    for name, entry in small.items():
        table[name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [position, position + entry.size_bytes],
        }
        bodies.append(data[entry.begin : entry.end])
        position += entry.size_bytes
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        size = rows * 32 * 2
        table[name] = {"dtype": "BF16", "shape": [rows, 32], "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(table).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + b"".join(bodies))
        file.truncate(8 + len(text) + position)
    edit_json(model / "config.json", vocab_size=rows)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mount memory filesystems of a given size; skips where mounting is not permitted."""
    mounted: list[Path] = []

    def mount(size: int) -> Path:
        place = tmp_path / f"disk{len(mounted)}"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("mounting a filesystem is not permitted here")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.row("E1")
def test_too_small_a_disk_is_refused_before_anything_is_written(
    shipped: Path, small_disk: Callable[[int], Path]
) -> None:
    place = small_disk(4 << 20)
    with pytest.raises(MachineError, match=r"need \d+ bytes .* free 4\d+"):
        export(make_plan(shipped, [3, 4]), model=shipped, output=place / "out")
    assert names(place) == []


@pytest.mark.row("E1")
@pytest.mark.parametrize("size", range(64 << 10, 7 << 20, 1 << 20))
def test_a_disk_that_fills_up_meanwhile_leaves_nothing_and_the_old_export_as_it_was(
    shipped: Path, small_disk: Callable[[int], Path], size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = small_disk(size + (60 << 10))
    (place / "out").mkdir()
    (place / "out" / "precious.txt").write_text("mine")
    # Another program may take the space after the check: pretend that it did.
    monkeypatch.setattr("exporter.disk.target.Target.check_space", lambda *_: None)
    with pytest.raises(MachineError, match="No space left"):
        export(make_plan(shipped, [3, 4]), model=shipped, output=place / "out", force=True)
    assert list(tree(place)) == ["out/", "out/precious.txt"]


def test_a_mount_point_is_not_replaced(shipped: Path, small_disk: Callable[[int], Path]) -> None:
    place = small_disk(32 << 20)
    for force in (False, True):
        with pytest.raises(MachineError, match="is a mount point"):
            export(make_plan(shipped, [7]), model=shipped, output=place, force=force)
    assert names(place) == []


def test_another_filesystem_than_the_models_is_fine(shipped: Path, small_disk: Callable[[int], Path]) -> None:
    place = small_disk(32 << 20)
    export(make_plan(shipped, [3, 4]), model=shipped, output=place / "out")
    assert verify(place / "out", model=shipped).num_stages == 2


COMMAND = """
import sys, time
import exporter.job
from planner.cli import main

class Slow(exporter.job.Job):
    __slots__ = ()
    def run(self, *arguments, **options):
        print("started", flush=True)
        time.sleep(30)
        return super().run(*arguments, **options)

import exporter.write
exporter.write.Job = Slow
main()
"""


@pytest.mark.row("E4")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_the_command_and_removes_the_staging_folder(
    model: Path, plan_file: Path, tmp_path: Path, number: int, code: int
) -> None:
    arguments = ["export", str(plan_file), "--model", str(model), "-o", str(tmp_path / "out")]
    process = run_python(f"import sys; sys.argv = ['llamaplan', *{arguments!r}]\n{COMMAND}")
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    assert len(names(tmp_path)) == 1
    began = time.monotonic()
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert process.returncode == code
    assert time.monotonic() - began < 10
    assert "Traceback" not in said
    assert names(tmp_path) == []


def test_a_stage_of_an_export_made_elsewhere_is_opened_without_the_others(
    model: Path, plan: Plan, tmp_path: Path
) -> None:
    export(plan, model=model, output=tmp_path / "out")
    host = tmp_path / "host"
    host.mkdir()
    for path in (tmp_path / "out").iterdir():
        if "-of-" not in path.name or "00002-of" in path.name:
            shutil.copy(path, host)
    assert open_export(host, stage=1).bundles.keys() == {1}
