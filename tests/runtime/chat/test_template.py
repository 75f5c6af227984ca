"""Chat templates run in a process of their own: the ids that transformers gives, and bounds that none defeats."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from transformers import AutoTokenizer

from plans.errors import InputError, MachineError
from runtime.chat.template import ChatTemplate
from tests.conftest import RunCommand

VOCAB_SIZE = 2048
CONTRACT_SECONDS, INTERRUPTED_SECONDS = 10, 2
HELLO = [{"role": "user", "content": "x"}]
LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
HOSTILE = {
    "a comparison of huge lists": "{% set s=c*20000000 %}{% set t=c*20000000 %}{{ ([s]*1000000) == ([t]*1000000) }}",
    "a sum of lists": "{{ ([[c]]*100000)|sum(start=[]) }}" + LOOPS,
    "a test that swallows every exception": "{% for i in range(99999)|map('center', 99999)|select('sequence') %}"
    "{% if loop is sequence %}{% endif %}{% endfor %}" + LOOPS,
    "rounding with a huge exponent": "{{ c|length|round(300000000, 'floor') }}",
    "a string that doubles": "{% set n = namespace(s=c) %}{% for _ in range(99) %}{% set n.s = n.s * 2 %}{% endfor %}",
    "lists within lists": "{% set n = namespace(s=[]) %}{% for _ in range(9999) %}{% set n.s = [n.s] %}{% endfor %}"
    "{{ n.s }}",
    "a million results": "{{ 'a ' * 9000000 }}",
}


@pytest.fixture
def with_template(shipped: Path, tmp_path: Path) -> Callable[..., Path]:
    """A tokenizer whose template turns hostile at every message but "x"."""

    def make(text: str, *, name: str = "model", is_lurking: bool = True) -> Path:
        folder = tmp_path / name
        shutil.copytree(shipped, folder)
        (folder / "chat_template.jinja").unlink()
        lurking = "{% set c = messages[0].content %}{% if c != 'x' %}" + text + "{% endif %}ok"
        (folder / "chat_template.jinja").write_text(lurking if is_lurking else text)
        return folder

    return make


@contextmanager
def running(folder: Path) -> Iterator[tuple[ChatTemplate, psutil.Process]]:
    before = set(psutil.Process().children())
    with ChatTemplate(folder, vocab_size=VOCAB_SIZE) as template:
        template.encode(HELLO)
        (child,) = set(psutil.Process().children()) - before
        yield template, child
    assert not child.is_running()


@pytest.mark.row("P11", "K5")
def test_ids_are_those_of_apply_chat_template_and_one_process_serves_them_all(shipped: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shipped)
    with running(shipped) as (template, child):
        messages: list[dict[str, str]] = [{"role": "system", "content": "Be brief."}]
        for turn in range(100):
            messages.append({"role": "user", "content": f" hello {turn} ünï 🦙\n"})
            plain = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            assert template.encode(messages) == list(plain)
            messages.append({"role": "assistant", "content": "x" * turn})
        assert child.is_running()
        assert "libtorch" not in Path(f"/proc/{child.pid}/maps").read_text()
        assert child.rlimit(resource.RLIMIT_AS)[0] <= 1 << 30


@pytest.mark.row("P11", "K5")
def test_no_template_defeats_the_bounds(with_template: Callable[..., Path]) -> None:
    def fall_into_it(template: ChatTemplate) -> tuple[float, str]:
        started = time.monotonic()
        with pytest.raises(InputError) as caught:
            template.encode([{"role": "user", "content": "ab"}])
        return time.monotonic() - started, caught.value.line()

    folders = [with_template(text, name=str(place)) for place, text in enumerate(HOSTILE.values())]
    with ThreadPoolExecutor(len(folders)) as threads:
        templates = [ChatTemplate(folder, vocab_size=VOCAB_SIZE) for folder in folders]
        list(threads.map(lambda template: template.encode(HELLO), templates))
        for what, (seconds, line) in zip(HOSTILE, threads.map(fall_into_it, templates), strict=True):
            assert seconds < CONTRACT_SECONDS, what
            assert line.startswith("chat template: "), what
        assert templates[0].encode(HELLO)  # started again
    for template in templates:
        template.__exit__(None, None, None)
    assert not [child for child in psutil.Process().children() if "runtime.chat.rendering" in child.cmdline()]


def test_a_process_that_does_not_start_is_named(tmp_path: Path) -> None:
    with ChatTemplate(tmp_path, vocab_size=VOCAB_SIZE) as template, pytest.raises(MachineError, match="exit code 1"):
        template.encode(HELLO)


@pytest.mark.row("P11")
def test_a_line_of_a_batch_whose_template_does_not_end_is_refused(
    with_template: Callable[..., Path], run_command: RunCommand, tmp_path: Path
) -> None:
    lines = [{"messages": HELLO}, {"messages": [{"role": "user", "content": "ab"}]}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = run_command(
        "llamarun", "batch", with_template("{{ 'a' * 10000000000 }}"), tmp_path / "in.jsonl", "-o", tmp_path / "out"
    )
    assert done.code == 3
    assert "in.jsonl:2: chat template: needs more than 1024 MiB" in done.err
    assert not (tmp_path / "out").exists()


SCRIPT = """
from pathlib import Path
from sys import argv
from runtime.chat.template import ChatTemplate
with ChatTemplate(Path(argv[1]), vocab_size=2048) as template:
    template.encode([{"role": "user", "content": "x"}])
"""


@pytest.mark.row("P11")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_ctrl_c_does_not_wait_for_a_template_and_no_process_is_left(
    with_template: Callable[..., Path], number: signal.Signals
) -> None:
    command = [sys.executable, "-c", SCRIPT, str(with_template(LOOPS, is_lurking=False))]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, cwd=Path(__file__).parents[3]) as parent:
        child = wait_for_busy_child(parent.pid)
        pressed = time.monotonic()
        os.kill(parent.pid, number)
        assert parent.wait(timeout=20) == -number
        _, alive = psutil.wait_procs([child], timeout=INTERRUPTED_SECONDS)
        assert not alive
        assert time.monotonic() - pressed < INTERRUPTED_SECONDS


def wait_for_busy_child(pid: int) -> psutil.Process:
    """Wait until a chat's template runs."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for child in psutil.Process(pid).children():
            # Loaded, and its memory bounded: what it does now is the template's doing.
            if "runtime.chat.rendering" in child.cmdline() and child.rlimit(resource.RLIMIT_CORE) == (0, 0):
                return child
        time.sleep(0.05)
    raise AssertionError("waited in vain")
