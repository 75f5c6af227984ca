"""`chat`, `batch` and `bench` with a process per stage do what they do in one process."""

import io
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.conftest import Finished, RunCommand
from tests.runtime.distributed.nursery import Nursery

Exports = Callable[[int], Path]
Run = Callable[..., Finished]
PLAIN = ["--temp", 0, "--speed", "reference", "--threads", 1]


@pytest.fixture
def run_forked(nursery: Nursery, tmp_path: Path) -> Run:
    """Run `llamarun` in a process of its own, which is free to fork its workers."""

    def run(*words: object, reads: bytes = b"") -> Finished:
        (tmp_path / "in").write_bytes(reads)
        child = nursery.start(["llamarun", *words], reads=tmp_path / "in", output=tmp_path / "said")
        return Finished(child.end(within=120)[0], child.text, child.said)

    return run


def test_a_chat_gives_the_same_answers_and_reads_no_more_of_the_prompt(
    exports: Exports, run_command: RunCommand, run_forked: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines, words = b"hello\nand more\n/undo\nagain\n/reset\nhello\n", ["chat", exports(3), *PLAIN, "-n", 12]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))

    def answers(done: Finished) -> str:
        assert done.code == 0, done.err
        read = next(line for line in done.err.splitlines() if "prompt tokens read" in line)
        return done.out + read[: read.index("; time")]

    assert answers(run_forked(*words, "--processes", reads=lines)) == answers(run_command("llamarun", *words))


def test_a_batch_gives_the_same_results_with_several_in_flight(
    exports: Exports, run_command: RunCommand, run_forked: Run, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    texts = ["def ", "import os\n", "class A:\n    def f(self", "x", "for i in ", "    return"]
    prompts.write_text("".join(json.dumps({"prompt": text, "seed": 3}) + "\n" for text in texts))
    found = []
    for run, options in ((partial(run_command, "llamarun"), []), (run_forked, ["--processes", "--in-flight", 3])):
        output = tmp_path / f"out{len(found)}.jsonl"
        settings = ["-o", output, "--batch-size", 2, "-n", 9, "--temp", 0.8, "--speed", "reference", "--threads", 1]
        done = run("batch", exports(2), prompts, *settings, *options)
        assert done.code == 0, done.err
        found.append(sorted((json.loads(line) for line in output.read_text().splitlines()), key=lambda r: r["index"]))
    assert found[0] == found[1]
    assert len(found[0]) == len(texts)


def test_a_trace_shows_every_step_of_every_stage_side_by_side(
    exports: Exports, run_forked: Run, tmp_path: Path
) -> None:
    trace = tmp_path / "trace.json"
    options = ["--processes", "--in-flight", 2, "--prompt-tokens", 12, "-n", 6, "--repeats", 1, "--prefill-chunk", 4]
    done = run_forked("bench", exports(3), *options, *PLAIN[2:], "--trace", trace, "--json")
    assert done.code == 0, done.err
    document = json.loads(done.out)
    assert document["in_flight"] == 2
    assert document["pipelined_tokens_per_second"] > 0
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event["ph"] == "X"]
    tracks = {(event["pid"], event["tid"]) for event in events}
    assert tracks == {(pid, tid) for pid in (1, 2) for tid in (1, 2, 3)}
    for pid, steps in ((1, 3), (2, 5)):
        names = [event["name"] for event in events if (event["pid"], event["tid"]) == (pid, 3)]
        assert len(names) == len(set(names)) == 2 * steps
    for event in events:  # a stage starts a step after the stage before it ended it
        before = [e for e in events if e["name"] == event["name"] and e["tid"] == event["tid"] - 1]
        assert all(e["ts"] + e["dur"] <= event["ts"] + 1000 for e in before)


def test_one_stage_or_several_batches_in_one_process_are_usage_errors(
    exports: Exports, run_command: RunCommand, shipped: Path, tmp_path: Path
) -> None:
    alone = run_command("llamarun", "generate", shipped, "-p", "x", "-n", 1, "--processes")
    assert (alone.code, "only one stage" in alone.err) == (2, True)
    options = ["--prompt-tokens", 2, "-n", 2]
    flight = run_command("llamarun", "bench", exports(2), *options, "--in-flight", 2)
    assert (flight.code, "add --processes" in flight.err) == (2, True)
    trace = run_command("llamarun", "bench", exports(2), *options, "--trace", tmp_path / "t.json")
    assert (trace.code, "add --processes" in trace.err) == (2, True)
