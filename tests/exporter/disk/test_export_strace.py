"""The real thing: the kernel kills the export, or fails it, at chosen system calls (injected by strace).

The same promises are checked exhaustively and fast in `test_export_atomic`; here nothing is simulated inside Python.
`LLAMAPLAN_EVERY_CALL=1` visits every call instead of a sample.
"""

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from export_helpers import ROOT, make_plan, names, tree

from exporter import export

CHANGING = ("mkdir", "mkdirat", "write", "fsync", "rename", "renameat", "renameat2", "unlink", "unlinkat", "rmdir")
SAMPLE = 1 if os.environ.get("LLAMAPLAN_EVERY_CALL") else 4

EXPORT = """
import sys
from planner.cli import main
sys.argv = ["llamaplan", "export", "-q", *sys.argv[1:]]
main()
"""


def strace_works() -> bool:
    if shutil.which("strace") is None:
        return False
    done = subprocess.run(["strace", "-f", "-o", os.devnull, "true"], capture_output=True, check=False)
    return done.returncode == 0


pytestmark = pytest.mark.skipif(not strace_works(), reason="strace is not installed or may not trace here")


@pytest.fixture(scope="module")
def work(models: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, str]]:
    """A model, a plan file, and the files its export consists of."""
    folder = tmp_path_factory.mktemp("strace")
    model = models()
    plan = make_plan(model, [2, 3])
    (folder / "plan.json").write_text(plan.to_json())
    export(plan, model=model, output=folder / "reference")
    return model, folder / "plan.json", tree(folder / "reference")


def traced(options: list[str], model: Path, plan: Path, output: Path) -> subprocess.CompletedProcess[str]:
    """Run `llamaplan export` under strace."""
    command = [sys.executable, "-c", EXPORT, str(plan), "--model", str(model), "-o", str(output)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        ["strace", "-f", "-qq", *options, *command],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.fixture(scope="module")
def calls(work: tuple[Path, Path, dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """How often the busiest thread makes each call; strace counts per thread."""
    model, plan, expected = work
    folder = tmp_path_factory.mktemp("calls")
    log = folder / "log"
    done = traced(["-o", str(log), "-e", "trace=" + ",".join(CHANGING)], model, plan, folder / "out")
    assert done.returncode == 0, done.stderr
    assert tree(folder / "out") == expected
    counts: dict[str, Counter[str]] = {}
    for line in log.read_text().splitlines():
        match = re.match(r"(\d+) +(\w+)\(", line)
        if match:
            counts.setdefault(match[2], Counter())[match[1]] += 1
    return {name: max(counter.values()) for name, counter in counts.items()}


@pytest.mark.row("E3")
def test_killed_by_the_kernel_the_target_is_absent_or_complete(
    work: tuple[Path, Path, dict[str, str]], calls: dict[str, int], tmp_path: Path
) -> None:
    model, plan, expected = work
    points = [(name, at) for name, count in sorted(calls.items()) for at in range(1, count + 1)]
    killed = 0
    for name, at in points[::SAMPLE]:
        folder = tmp_path / f"{name}{at}"
        folder.mkdir()
        done = traced(["-o", os.devnull, "-e", f"inject={name}:signal=KILL:when={at}"], model, plan, folder / "out")
        killed += done.returncode not in {0, 6}
        if (folder / "out").exists():
            assert tree(folder / "out") == expected, (name, at)
        export_again(model, plan, folder / "out")
        assert tree(folder / "out") == expected, (name, at)
        assert names(folder) == ["out"], (name, at)
    assert killed


def export_again(model: Path, plan: Path, output: Path) -> None:
    from plans.check import read_plan

    export(read_plan(plan), model=model, output=output, force=True)


@pytest.mark.row("E2")
@pytest.mark.parametrize("error", ["EIO", "ENOSPC", "EDQUOT"])
@pytest.mark.parametrize("call", ["write", "fsync", "mkdir", "rename"])
def test_an_error_from_the_kernel_ends_in_one_sentence_and_leaves_nothing(
    work: tuple[Path, Path, dict[str, str]], calls: dict[str, int], tmp_path: Path, call: str, error: str
) -> None:
    model, plan, _ = work
    family = [name for name in (call, call + "at", call + "at2") if name in calls]
    for at in {1, max(1, calls[family[0]] // 2)}:
        inject = f"inject={','.join(family)}:error={error}:when={at}"
        done = traced(["-o", os.devnull, "-e", inject], model, plan, tmp_path / "out")
        assert done.returncode == 6, (at, done.stderr)
        assert re.search(rf"^error\[E-[A-Z]+\]: .*{call}.* failed: .*errno", done.stderr, re.MULTILINE), done.stderr
        assert "Traceback" not in done.stderr
        assert names(tmp_path) == []


@pytest.mark.row("E10")
def test_a_read_error_from_the_kernel_names_file_and_offset(
    work: tuple[Path, Path, dict[str, str]], tmp_path: Path
) -> None:
    model, plan, _ = work
    inject = "inject=preadv,preadv2:error=EIO:when=4"
    done = traced(["-o", os.devnull, "-e", inject], model, plan, tmp_path / "out")
    assert done.returncode == 6, done.stderr
    assert re.search(r"model\.safetensors: read error at byte \d+: Input/output error \(errno 5\)", done.stderr)
    assert names(tmp_path) == []


@pytest.mark.row("C9")
def test_exporting_never_opens_python_code_of_the_checkpoint(
    work: tuple[Path, Path, dict[str, str]], tmp_path: Path
) -> None:
    source, plan, _ = work
    model = tmp_path / "model"
    shutil.copytree(source, model)
    (model / "modeling_own.py").write_text("raise SystemExit(99)")
    config = (model / "config.json").read_text().rstrip().removesuffix("}")
    (model / "config.json").write_text(config + ', "auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}}')
    log = tmp_path / "log"
    done = traced(["-o", str(log), "-e", "trace=openat,open,execve"], model, plan, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "never run" in done.stderr
    assert "modeling_own" not in log.read_text()
    assert not list((tmp_path / "out").glob("*.py"))
