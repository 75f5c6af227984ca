"""`llamarun batch`: right tokens, strict lines, and a result file that survives a kill at any moment."""

import fcntl
import json
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from plans.errors import IntegrityError, MachineError
from plans.run import BatchRun
from runtime.batch import output as batch_output
from runtime.batch.output import ResultFile
from tests.conftest import Finished, RunCommand

TEXTS = (
    "import os\n",
    "def __init__(self, ",
    "class Error(Exception):\n",
    "x",
    "for name in sorted(names):\n    if name.startswith('_'):\n        continue\n",
    "return [",
    "The quick brown fox",
)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "prompts.jsonl", [{"prompt": text} for text in TEXTS])


def write_lines(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def read_results(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def batch(shipped: Path, run_command: RunCommand, tmp_path: Path) -> Callable[..., Finished]:
    """Run a batch in fp32, where rounding does not depend on who shares a batch."""

    def run(prompts: Path, *options: object, out: str = "out.jsonl") -> Finished:
        return run_command(
            "llamarun", "batch", shipped, prompts, "-o", tmp_path / out, "--dtype", "fp32", "-n", 8, *options
        )

    return run


def texts_of(path: Path) -> list[tuple[int, ...]]:
    return [tuple(result["token_ids"]) for result in read_results(path)]


# --- results -------------------------------------------------------------------------------------------------------


def test_every_line_gets_the_tokens_of_generate_in_the_order_of_the_input(
    shipped: Path, prompts: Path, batch: Callable[..., Finished], run_command: RunCommand, tmp_path: Path
) -> None:
    done = batch(prompts, "--temp", 0, "--batch-size", 3)
    assert done.code == 0, done.err
    assert done.out == ""
    assert "tokens/s" in done.err
    results = read_results(tmp_path / "out.jsonl")
    assert [result["index"] for result in results] == list(range(len(TEXTS)))
    for text, result in zip(TEXTS, results, strict=True):
        alone = run_command(
            "llamarun", "generate", shipped, "-p", text, "-n", 8, "--temp", 0, "--dtype", "fp32", "--json"
        )
        expected = json.loads(alone.out)["sequences"][0]
        assert {key: result[key] for key in expected} == expected


def test_random_draws_do_not_depend_on_how_lines_are_batched(
    prompts: Path, batch: Callable[..., Finished], tmp_path: Path
) -> None:
    for size in (1, 2, 7):
        assert batch(prompts, "--batch-size", size, "--seed", 5, out=f"{size}.jsonl").code == 0
    assert texts_of(tmp_path / "1.jsonl") == texts_of(tmp_path / "2.jsonl") == texts_of(tmp_path / "7.jsonl")
    assert batch(prompts, "--seed", 6, out="other.jsonl").code == 0
    assert texts_of(tmp_path / "other.jsonl") != texts_of(tmp_path / "1.jsonl")


def test_a_line_has_its_own_settings_and_id(
    shipped: Path, batch: Callable[..., Finished], run_command: RunCommand, tmp_path: Path
) -> None:
    lines = [
        {"prompt": "x"},
        {"id": "b", "prompt": "import ", "max_tokens": 3, "seed": 9, "temperature": 1.2, "top_k": 30},
        {"id": 7, "messages": [{"role": "user", "content": "What is a tuple?"}], "temperature": 0},
        {"prompt": "x", "max_tokens": 0},
    ]
    assert batch(write_lines(tmp_path / "p.jsonl", lines)).code == 0
    results = read_results(tmp_path / "out.jsonl")
    assert [result.get("id") for result in results] == [None, "b", 7, None]
    assert results[3]["token_ids"] == []
    options = ["-n", 3, "--seed", 9, "--temp", 1.2, "--top-k", 30, "--dtype", "fp32", "--json"]
    alone = json.loads(run_command("llamarun", "generate", shipped, "-p", "import ", *options).out)
    assert results[1]["token_ids"] == alone["sequences"][0]["token_ids"]


def test_the_numbers_come_as_json_on_request(prompts: Path, batch: Callable[..., Finished]) -> None:
    out = batch(prompts, "--json").out
    document = json.loads(out)
    assert BatchRun.from_json(out.encode(), where="stdout").as_json() == document
    assert document["lines"] == len(TEXTS)
    assert document["tokens_per_second"] > 0
    assert document["kind"] == "batch"


# --- going on after a kill -----------------------------------------------------------------------------------------


def run_and_kill(command: list[str], *, moment: str, chance: random.Random) -> int:
    """Run the command in a fork that kills itself with SIGKILL at some moment; return how it ended."""
    countdown = chance.randrange(1, 14) if moment == "step" else 1
    child = os.fork()
    if child == 0:
        _arm(moment, countdown, chance)
        sys.argv = command
        from runtime.cli import main

        try:
            main()
        except SystemExit as leave:
            os._exit(int(leave.code or 0))
        os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _arm(moment: str, countdown: int, chance: random.Random) -> None:
    """Make the `countdown`-th call of something the last thing this process does."""
    from runtime.steps.local import LocalSteps

    module, name = {
        "step": (LocalSteps, "send"),
        "torn write": (batch_output.os, "write"),
        "fsync": (batch_output.os, "fsync"),
        "replace": (os, "replace"),
    }[moment]
    real: Any = getattr(module, name)
    left = [countdown]

    def fatal(*arguments: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0]:
            return real(*arguments, **options)
        if moment == "torn write":
            fd, data = arguments
            real(fd, bytes(data)[: chance.randrange(len(data))])
        os.kill(os.getpid(), signal.SIGKILL)
        return None

    setattr(module, name, fatal)


def test_killed_at_ten_moments_and_started_again_every_line_is_there_once(
    shipped: Path, batch: Callable[..., Finished], tmp_path: Path
) -> None:
    lines = [{"id": f"{i}: {text}", "prompt": f"{text} {i}"} for i in range(4) for text in TEXTS]
    prompts = write_lines(tmp_path / "many.jsonl", lines)
    assert batch(prompts, "--batch-size", 4, out="undisturbed.jsonl").code == 0
    chance = random.Random(1)
    command = ["llamarun", "batch", shipped, prompts, "-o", tmp_path / "out.jsonl", "--dtype", "fp32", "-n", 8]
    command += ["--batch-size", 4, "-q"]
    moments = ["step", "torn write", "fsync"] * 3
    chance.shuffle(moments)
    sizes = []
    for moment in [*moments, "replace"]:
        assert run_and_kill(list(map(str, command)), moment=moment, chance=chance) == -signal.SIGKILL, moment
        sizes.append((tmp_path / "out.jsonl").stat().st_size)
    assert sizes[-1] > sizes[0]
    done = batch(prompts, "--batch-size", 4)
    assert done.code == 0, done.err
    assert read_results(tmp_path / "out.jsonl") == read_results(tmp_path / "undisturbed.jsonl")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["many.jsonl", "out.jsonl", "undisturbed.jsonl"]


def test_a_finished_file_is_left_as_it_is(prompts: Path, batch: Callable[..., Finished], tmp_path: Path) -> None:
    assert batch(prompts).code == 0
    before = ((tmp_path / "out.jsonl").read_bytes(), (tmp_path / "out.jsonl").stat().st_mtime_ns)
    done = batch(prompts)
    assert done.code == 0, done.err
    assert "7 of 7 lines are done already" in done.err
    assert ((tmp_path / "out.jsonl").read_bytes(), (tmp_path / "out.jsonl").stat().st_mtime_ns) == before


def test_results_of_other_settings_are_not_taken_over(
    prompts: Path, batch: Callable[..., Finished], tmp_path: Path
) -> None:
    assert batch(prompts, "--seed", 1).code == 0
    before = (tmp_path / "out.jsonl").read_bytes()
    done = batch(prompts, "--seed", 2)
    assert done.code == 5
    assert "other settings" in done.err
    assert (tmp_path / "out.jsonl").read_bytes() == before
    write_lines(prompts, [{"prompt": "another"}, *({"prompt": text} for text in TEXTS[1:])])
    assert batch(prompts, "--seed", 1).code == 5


@pytest.mark.parametrize("content", ["hello\nworld\n", '{"mine": 1}\n', "[1]\n"])
def test_a_file_that_is_no_result_is_not_touched(
    prompts: Path, batch: Callable[..., Finished], tmp_path: Path, content: str
) -> None:
    (tmp_path / "out.jsonl").write_text(content)
    assert batch(prompts).code == 3
    assert (tmp_path / "out.jsonl").read_text() == content


def test_two_processes_do_not_write_one_file(prompts: Path, batch: Callable[..., Finished], tmp_path: Path) -> None:
    with (tmp_path / "out.jsonl").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        done = batch(prompts)
    assert done.code == 6
    assert "another process" in done.err


def test_a_full_disk_leaves_whole_lines_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.jsonl"
    real = os.write

    def short(fd: int, data: bytes) -> int:
        if path.stat().st_size > 100:
            raise OSError(28, "No space left on device")
        return real(fd, bytes(data)[:50])

    with ResultFile(path, expected=["a", "b", "c"]) as results:
        results.append([{"index": 1, "request_sha256": "b"}])
        before = path.read_bytes()
        monkeypatch.setattr(batch_output.os, "write", short)
        with pytest.raises(MachineError, match="No space left"):
            results.append([{"index": 0, "request_sha256": "a", "text": "x" * 200}])
        assert path.read_bytes() == before
        assert results.done == {1}


def test_a_torn_line_is_dropped_and_a_foreign_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    whole = '{"index": 1, "request_sha256": "b"}\n'
    path.write_text(whole + '{"index": 0, "requ')
    with ResultFile(path, expected=["a", "b"]) as results:
        assert results.done == {1}
    assert path.read_text() == whole
    with pytest.raises(IntegrityError, match="another input"), ResultFile(path, expected=["a", "c"]):
        pass


# --- strict lines --------------------------------------------------------------------------------------------------

GOOD = '{"prompt": "x"}'


@pytest.mark.parametrize(
    ("line", "code", "says"),
    [
        ('{"prompt": "x", "max_token": 3}', 3, "max_token"),
        ('{"prompt": "x", "messages": [{"role": "user", "content": "y"}]}', 3, "either"),
        ("{}", 3, "either"),
        ('{"prompt": "x"', 3, "JSON"),
        ('{"prompt": "x", "prompt": "y"}', 3, "duplicate"),
        ('{"prompt": 3}', 3, "/prompt"),
        ('{"prompt": "x", "max_tokens": -1}', 3, "/max_tokens"),
        ('{"prompt": "x", "max_tokens": 1.0}', 3, "/max_tokens"),
        ('{"prompt": "x", "stop": [""]}', 3, "/stop"),
        ('{"messages": []}', 3, "/messages"),
        ('{"messages": [{"role": "tool", "content": "y"}]}', 3, "/messages/0/role"),
        ('{"id": "same", "prompt": "x"}', 3, "same"),
        ('{"prompt": "x", "temperature": -1}', 2, "temperature"),
        ('{"prompt": "x", "top_k": 5000}', 2, "2048"),
        ('{"prompt": "x", "seed": -1}', 2, "seed"),
        (json.dumps({"prompt": "x = 1\n" * 900}), 2, "1024"),
        ('{"prompt": "x", "max_tokens": 1024}', 2, "1024"),
    ],
)
def test_a_line_that_is_wrong_is_named_before_anything_runs(
    shipped: Path, run_command: RunCommand, tmp_path: Path, line: str, code: int, says: str
) -> None:
    (tmp_path / "p.jsonl").write_text(f'{{"id": "same", "prompt": "x"}}\n\n{line}\n{GOOD}\n')
    done = run_command("llamarun", "batch", shipped, tmp_path / "p.jsonl", "-o", tmp_path / "out.jsonl")
    assert done.code == code, done.err
    errors = [text for text in done.err.splitlines() if text.startswith("error[E-")]
    assert len(errors) == 1
    assert f"{tmp_path / 'p.jsonl'}:3" in errors[0]
    assert says in errors[0]
    assert not (tmp_path / "out.jsonl").exists()


def test_the_prompts_are_never_overwritten(prompts: Path, shipped: Path, run_command: RunCommand) -> None:
    before = prompts.read_bytes()
    assert run_command("llamarun", "batch", shipped, prompts, "-o", prompts).code == 2
    assert prompts.read_bytes() == before
