"""All or nothing: killed, interrupted, out of space or raced, the target is absent or complete."""

import errno
import os
import signal
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from export_helpers import make_plan, names, tree

from exporter import export
from exporter.disk.owner import PREFIX, Owner
from plans.errors import IntegrityError, MachineError
from plans.export.opening import check_fast, open_export
from plans.plan import Plan

WRITE_CALLS = ("open", "write", "fsync", "rename", "mkdir", "unlink", "rmdir")
Prepared = tuple[Path, Plan, dict[str, str]]


@pytest.fixture(scope="module")
def prepared(models: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """A tiny model, a plan for it, and what its export must look like."""
    model = models(shard="30KB")
    plan = make_plan(model, [2, 1, 2])
    folder = tmp_path_factory.mktemp("reference") / "out"
    export(plan, model=model, output=folder)
    return model, plan, tree(folder)


class Counter:
    """Counts write-class calls and acts on one of them."""

    def __init__(self, act: Callable[[], None], *, at: int) -> None:
        self.act, self.at, self.count = act, at, 0

    def __call__(self) -> None:
        self.count += 1
        if self.count == self.at:
            self.act()


@contextmanager
def watched(counter: Counter) -> Iterator[None]:
    """Call `counter` before every system call that changes a filesystem."""
    import exporter.disk.staging

    real: dict[str, Any] = {name: getattr(os, name) for name in WRITE_CALLS}
    real_exchange = exporter.disk.staging.exchange

    def wrap(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if name != "open" or (len(arguments) > 1 and arguments[1] & os.O_CREAT):
                counter()
            return real[name](*arguments, **options)

        return call

    def exchange(*arguments: Any, **options: Any) -> Any:
        counter()
        return real_exchange(*arguments, **options)

    for name in WRITE_CALLS:
        setattr(os, name, wrap(name))
    exporter.disk.staging.exchange = exchange  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for name in WRITE_CALLS:
            setattr(os, name, real[name])
        exporter.disk.staging.exchange = real_exchange  # type: ignore[attr-defined]


def in_child(action: Callable[[], None]) -> int:
    """Run `action` in a forked process and return its wait status."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1]


def is_whole(folder: Path) -> bool:
    """Whether the folder is a complete export."""
    opened = open_export(folder)
    for stage in opened.bundles:
        check_fast(opened, stage=stage)
    return True


def left_behind(folder: Path) -> list[str]:
    return [name for name in names(folder) if name.startswith(PREFIX)]


def count_calls(run: Callable[[], object]) -> int:
    counter = Counter(lambda: None, at=0)
    with watched(counter):
        run()
    return counter.count


@pytest.mark.row("E3")
def test_killed_at_any_write_call_the_target_is_absent_or_complete_and_a_rerun_works(
    prepared: Prepared, tmp_path: Path
) -> None:
    model, plan, expected = prepared
    total = count_calls(lambda: export(plan, model=model, output=tmp_path / "count"))
    assert total > 50
    for at in range(1, total + 1):
        folder = tmp_path / f"at{at}"
        folder.mkdir()

        def run(folder: Path = folder, at: int = at) -> None:
            with watched(Counter(lambda: os.kill(os.getpid(), signal.SIGKILL), at=at)):
                export(plan, model=model, output=folder / "out")

        status = in_child(run)
        assert os.WIFSIGNALED(status), at
        if (folder / "out").exists():
            assert tree(folder / "out") == expected, at
            with pytest.raises(MachineError, match="already holds an export"):
                export(plan, model=model, output=folder / "out")
        else:
            export(plan, model=model, output=folder / "out")
        assert tree(folder / "out") == expected, at
        assert names(folder) == ["out"], at


@pytest.mark.parametrize("can_exchange", [True, False])
def test_killed_while_replacing_the_old_export_or_the_new_one_is_there(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool
) -> None:
    model, plan, expected = prepared
    if not can_exchange:
        monkeypatch.setattr("exporter.disk.staging.exchange", lambda *_, **__: False)
    export(make_plan(model, [5]), model=model, output=tmp_path / "count")
    old = tree(tmp_path / "count")
    total = count_calls(lambda: export(plan, model=model, output=tmp_path / "count", force=True))
    assert tree(tmp_path / "count") == expected
    for at in range(total - 16, total + 1):
        folder = tmp_path / f"at{at}"
        folder.mkdir()
        export(make_plan(model, [5]), model=model, output=folder / "out")

        def run(folder: Path = folder, at: int = at) -> None:
            with watched(Counter(lambda: os.kill(os.getpid(), signal.SIGKILL), at=at)):
                export(plan, model=model, output=folder / "out", force=True)

        assert os.WIFSIGNALED(in_child(run)), at
        if can_exchange:
            assert tree(folder / "out") in (old, expected), at
        else:
            # Without an atomic exchange there is one instant with neither; the next run puts the old one back.
            assert not (folder / "out").exists() or tree(folder / "out") in (old, expected), at
            with pytest.raises(MachineError, match="already holds an export"):
                export(plan, model=model, output=folder / "out")
            assert tree(folder / "out") in (old, expected), at
        export(plan, model=model, output=folder / "out", force=True)
        assert tree(folder / "out") == expected, at
        assert names(folder) == ["out"], at


@pytest.mark.row("E2")
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS], ids=errno.errorcode.get)
def test_an_error_of_any_write_call_leaves_nothing_behind(prepared: Prepared, tmp_path: Path, number: int) -> None:
    model, plan, expected = prepared
    total = count_calls(lambda: export(plan, model=model, output=tmp_path / "count"))

    def fail() -> None:
        raise OSError(number, os.strerror(number))

    for at in range(1, total + 1, 1 if number == errno.ENOSPC else 5):
        folder = tmp_path / f"at{at}"
        folder.mkdir()
        said = ""
        with watched(Counter(fail, at=at)):
            try:
                export(plan, model=model, output=folder / "out")
            except MachineError as error:
                said = str(error)
        if said:
            assert f"errno {number}" in said, at
            assert str(folder) in said or "journal" in said, at
            assert names(folder) == [], at
        else:
            # Only what comes after the rename may fail without failing the export: removing the empty staging folder.
            assert tree(folder / "out") == expected, at


def test_a_second_run_keeps_the_files_that_are_whole(prepared: Prepared, tmp_path: Path) -> None:
    model, plan, expected = prepared

    def run() -> None:
        def die(done: int, total: int) -> None:
            if done > 0.7 * total:
                time.sleep(0.3)  # let the first file reach the disk
                os.kill(os.getpid(), signal.SIGKILL)

        export(plan, model=model, output=tmp_path / "out", progress=die)

    assert os.WIFSIGNALED(in_child(run))
    (staging,) = left_behind(tmp_path)
    first = next((tmp_path / staging / "files").glob("model-00001-*"))
    inode = first.stat().st_ino
    written: list[str] = []
    real = os.open

    def watch(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
        if flags & os.O_CREAT:
            written.append(os.fspath(path))
        return real(path, flags, *arguments, **options)

    os.open = watch
    notes: list[str] = []
    try:
        export(plan, model=model, output=tmp_path / "out", note=notes.append)
    finally:
        os.open = real
    assert any("stage files that an interrupted run had finished" in text for text in notes)
    assert (tmp_path / "out" / "model-00001-of-00003.safetensors").stat().st_ino == inode
    assert "model-00001-of-00003.safetensors" not in written
    assert "model-00003-of-00003.safetensors" in written
    assert tree(tmp_path / "out") == expected
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("damage", ["flip", "cut", "other plan", "source touched"])
def test_staged_files_that_are_not_whole_are_written_again(prepared: Prepared, tmp_path: Path, damage: str) -> None:
    import shutil

    source, plan, expected = prepared
    model = tmp_path / "model"
    shutil.copytree(source, model)
    shards = tmp_path / "made"
    shards.mkdir()

    def run() -> None:
        with watched(Counter(lambda: os.kill(os.getpid(), signal.SIGKILL), at=40)):
            export(plan, model=model, output=shards / "out")

    assert os.WIFSIGNALED(in_child(run))
    (staging,) = left_behind(shards)
    staged = sorted((shards / staging / "files").glob("model-*"))
    if damage == "flip":
        data = bytearray(staged[0].read_bytes())
        data[-1] ^= 1
        staged[0].write_bytes(data)
    elif damage == "cut":
        os.truncate(staged[0], staged[0].stat().st_size - 1)
    elif damage == "other plan":
        plan = make_plan(model, [3, 1, 1])
    else:
        os.utime(next(model.glob("*.safetensors")))
    manifest = export(plan, model=model, output=shards / "out")
    assert is_whole(shards / "out")
    assert names(shards) == ["out"]
    if damage != "other plan":
        assert tree(shards / "out") == expected
    assert manifest.plan_sha256 == plan.sha256


def test_what_a_killed_replacement_left_behind_does_not_leak_into_the_next_export(
    prepared: Prepared, tmp_path: Path
) -> None:
    model, plan, expected = prepared
    out = tmp_path / "out"
    (out / "folder" / "deeper").mkdir(parents=True)
    (out / "precious.txt").write_text("mine")
    out.chmod(0o700)

    def die_after_the_exchange() -> None:
        import exporter.disk.staging

        real = exporter.disk.staging.exchange

        def exchange(*arguments: Any, **options: Any) -> bool:
            real(*arguments, **options)
            os.kill(os.getpid(), signal.SIGKILL)
            return True

        exporter.disk.staging.exchange = exchange  # type: ignore[attr-defined]
        export(plan, model=model, output=out, force=True)

    assert os.WIFSIGNALED(in_child(die_after_the_exchange))
    assert tree(out) == expected
    (staging,) = left_behind(tmp_path)
    assert (tmp_path / staging / "files" / "precious.txt").exists()
    export(plan, model=model, output=out, force=True)
    assert tree(out) == expected
    (tmp_path / "plain").mkdir()
    assert out.stat().st_mode == (tmp_path / "plain").stat().st_mode
    (tmp_path / "plain").rmdir()
    assert names(tmp_path) == ["out"]


def staging_name(target: str, **changes: Any) -> str:
    own = Owner.this_process(target)
    from dataclasses import replace

    return replace(own, **changes).new_name()


def dead_pid() -> int:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return pid


@pytest.mark.row("E17")
def test_staging_of_a_dead_process_is_reclaimed_even_if_its_pid_lives_again(prepared: Prepared, tmp_path: Path) -> None:
    model, plan, _ = prepared
    for name in (staging_name("out", pid=dead_pid()), staging_name("out", mark="0" * 12)):
        (tmp_path / name / "files").mkdir(parents=True)
        (tmp_path / name / "files" / "model-00001-of-00003.safetensors").write_bytes(b"half")
    export(plan, model=model, output=tmp_path / "out")
    assert names(tmp_path) == ["out"]


@pytest.mark.row("E17")
@pytest.mark.parametrize("changes", [{}, {"host": "0" * 8}], ids=["a live process", "another host"])
def test_staging_that_may_be_in_use_is_left_alone_and_named(
    prepared: Prepared, tmp_path: Path, changes: dict[str, Any]
) -> None:
    model, plan, _ = prepared
    name = staging_name("out", **changes)
    (tmp_path / name).mkdir()
    warnings: list[str] = []
    export(plan, model=model, output=tmp_path / "out", warn=warnings.append)
    assert names(tmp_path) == [name, "out"]
    assert any(name in text for text in warnings)


def test_staging_of_another_target_is_not_touched(prepared: Prepared, tmp_path: Path) -> None:
    model, plan, _ = prepared
    name = staging_name("other", pid=dead_pid())
    (tmp_path / name).mkdir()
    export(plan, model=model, output=tmp_path / "out")
    assert names(tmp_path) == [name, "out"]


@pytest.mark.row("E8")
@pytest.mark.parametrize("force", [False, True])
def test_of_two_exports_to_one_target_exactly_one_wins(prepared: Prepared, tmp_path: Path, force: bool) -> None:
    model, plan, expected = prepared
    started = tmp_path / "started"
    folder = tmp_path / "made"
    folder.mkdir()

    def run(number: int) -> None:
        def meet(done: int, total: int) -> None:
            (tmp_path / f"started{number}").touch()
            deadline = time.monotonic() + 20
            while not (tmp_path / f"started{1 - number}").exists() and time.monotonic() < deadline:
                time.sleep(0.001)

        try:
            export(plan, model=model, output=folder / "out", progress=meet, force=force)
        except MachineError as error:
            os._exit(6 if "E-EXISTS" in error.code else 1)
        os._exit(0)

    pids = []
    for number in (0, 1):
        pid = os.fork()
        if pid == 0:
            try:
                run(number)
            finally:
                os._exit(1)
        pids.append(pid)
    codes = sorted(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids)
    assert codes == ([0, 0] if force else [0, 6])
    assert tree(folder / "out") == expected
    assert names(folder) == ["out"]
    assert not started.exists()


CHANGES: dict[str, Callable[[Path], object]] = {
    "touched": lambda path: os.utime(path, ns=(1, 1)),
    "appended": lambda path: path.open("ab").write(b"x"),
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 100),
    "cut to nothing": lambda path: os.truncate(path, 0),
    "deleted": lambda path: path.unlink(),
    "replaced by equal bytes": lambda path: (data := path.read_bytes(), path.unlink(), path.write_bytes(data)),
    "flipped in place": lambda path: flip_last_bit(path),
}


def flip_last_bit(path: Path) -> None:
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.row("E9")
@pytest.mark.parametrize("when", [0.01, 0.99], ids=["early", "late"])
@pytest.mark.parametrize("shard", [0, -1], ids=["first shard", "last shard"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_source_changed_during_the_export_is_refused(
    prepared: Prepared, tmp_path: Path, change: str, shard: int, when: float
) -> None:
    import shutil

    source, plan, _ = prepared
    model, made = tmp_path / "model", tmp_path / "made"
    shutil.copytree(source, model)
    made.mkdir()
    victim = sorted(model.glob("*.safetensors"))[shard]
    changed = []

    def meddle(done: int, total: int) -> None:
        if not changed and done > when * total:
            changed.append(CHANGES[change](victim))

    with pytest.raises(IntegrityError, match="changed during the export"):
        export(plan, model=model, output=made / "out", progress=meddle)
    assert changed
    assert names(made) == []


@pytest.mark.row("E10")
def test_a_read_error_of_the_source_names_file_and_offset(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, plan, _ = prepared

    def fail(fd: int, buffers: Any, offset: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(MachineError, match=r"safetensors: read error at byte \d+.*errno 5"):
        export(plan, model=model, output=tmp_path / "out")
    assert names(tmp_path) == []


@pytest.mark.row("E12")
def test_a_filesystem_that_cannot_flush_folders_is_fine(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, plan, expected = prepared
    real = os.fsync

    def refuse_folders(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        real(fd)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    export(plan, model=model, output=tmp_path / "out")
    assert tree(tmp_path / "out") == expected


def test_a_folder_whose_entries_may_be_lost_in_a_power_cut_is_warned_about(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, plan, expected = prepared
    real = os.fsync

    def fail_on_the_parent(fd: int) -> None:
        if os.path.sameopenfile(fd, parent):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(fd)

    parent = os.open(tmp_path, os.O_RDONLY)
    monkeypatch.setattr(os, "fsync", fail_on_the_parent)
    warnings: list[str] = []
    export(plan, model=model, output=tmp_path / "out", warn=warnings.append)
    os.close(parent)
    assert any("may not survive a power cut" in text for text in warnings)
    assert tree(tmp_path / "out") == expected
