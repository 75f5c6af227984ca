"""Commands behind pipes, without a terminal, without colours, in the C locale."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runtime.distributed.nursery import the_nursery

pytestmark = pytest.mark.row("X6")

EXAMPLE = Path(__file__).parents[2] / "plans" / "examples" / "demo.plan.json"
MODULES = {"llamaplan": "planner.cli", "llamarun": "runtime.cli"}
KEPT = {name: os.environ[name] for name in ("PATH", "HOME", "OMP_NUM_THREADS", "LLAMAPLAN_PROBE") if name in os.environ}
PLAIN = {"HOME": "/", **KEPT}


def start(command: str, *arguments: object, **settings: str) -> "subprocess.Popen[bytes]":
    line = [sys.executable, "-m", MODULES[command], *map(str, arguments)]
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(line, env=PLAIN | settings, **streams)  # type: ignore[call-overload, no-any-return]


COMMANDS = {
    "analyze": ("llamaplan", "analyze"),
    "devices": ("llamaplan", "devices"),
    "generate": ("llamarun", "generate", "-p", "x", "-n", 2),
}


def arguments_of(name: str, shipped: Path) -> tuple[object, ...]:
    command, verb, *rest = COMMANDS[name]
    return (command, verb, *rest) if verb == "devices" else (command, verb, shipped, *rest)


@pytest.mark.parametrize("name", COMMANDS)
def test_in_the_c_locale_the_text_is_plain_and_whole(name: str, shipped: Path) -> None:
    with start(*arguments_of(name, shipped), LANG="C", LC_ALL="C", PYTHONUTF8="0") as process:  # type: ignore[arg-type]
        out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert out
    assert b"\x1b[" not in out + errors  # not a terminal: no colours, no progress bar


@pytest.mark.parametrize("name", COMMANDS)
def test_a_closed_stdout_ends_the_command_without_a_traceback(name: str, shipped: Path, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    said = tmp_path / "said"
    with Path(os.devnull).open() as nothing, said.open("w") as err:
        process = the_nursery().fork(arguments_of(name, shipped), streams=[nothing.fileno(), writer, err.fileno()])
    os.close(writer)
    assert process.wait(timeout=120) in (0, 141)
    assert "Traceback" not in said.read_text()
    assert "BrokenPipe" not in said.read_text()


def test_no_color_is_obeyed_on_a_terminal() -> None:
    pty = pytest.importorskip("pty")
    shown = {}
    for colours in ({}, {"NO_COLOR": "1"}):
        parent, child = pty.openpty()
        line = [sys.executable, "-m", "planner.cli", "show", str(EXAMPLE)]
        with subprocess.Popen(
            line, stdout=child, stderr=child, env=PLAIN | {"TERM": "xterm-256color"} | colours
        ) as done:
            os.close(child)
            text = b""
            while piece := _read(parent):
                text += piece
        os.close(parent)
        assert done.returncode == 0
        shown[bool(colours)] = text
    colours_of = re.compile(rb"\x1b\[(?:\d+;)*(?:3|9)\d")
    assert colours_of.search(shown[False])
    assert not colours_of.search(shown[True])


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except OSError:  # the other end of a terminal was closed
        return b""


LEAVING_SLOWLY = """
import atexit, signal, sys, typer
from plans.commands.console import leave, run_command

app = typer.Typer()

@app.command()
def wait() -> None:
    atexit.register(lambda: (print("leaving", flush=True), signal.pause()))
    print("ready", flush=True)
    signal.pause()

sys.argv = ["wait"]
leave(run_command(app, name="wait"))
"""


@pytest.mark.row("R13")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_a_command_that_is_slow_to_leave(number: signal.Signals) -> None:
    line = [sys.executable, "-c", LEAVING_SLOWLY]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=PLAIN) as process:
        assert process.stdout is not None
        for expected in (b"ready\n", b"leaving\n"):
            assert process.stdout.readline() == expected
            process.send_signal(number)
        assert process.wait(timeout=60) == -number
