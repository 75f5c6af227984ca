"""`llamarun generate` and `check`, run as their users run them."""

import io
import json
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from exporter import export
from plans.run import Run
from runtime import session
from runtime.reading import capacity
from runtime.steps.runner import StageRunner
from tests.conftest import RunCommand
from tests.exporter.export_helpers import make_plan
from tests.runtime.distributed.jobs import started

PROMPT = "def __init__(self, "
CUTS = ([7], [2, 4, 1], [0, 7, 0])


@pytest.fixture(scope="module")
def shards(shipped: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Exports of the shipped checkpoint, by their cut."""
    folder = tmp_path_factory.mktemp("exports")
    for cut in CUTS:
        export(make_plan(shipped, cut), model=shipped, output=folder / "-".join(map(str, cut)))
    return {path.name: path for path in folder.iterdir()}


def generate(run: RunCommand, target: object, *arguments: object) -> dict[str, object]:
    done = run("llamarun", "generate", target, "--device-map", "cpu", "--json", *arguments)
    assert done.code == 0, done.err
    return json.loads(done.out)["sequences"][0]


def test_sampled_tokens_are_those_of_the_unsplit_model_with_the_same_seed(
    shipped: Path, shards: dict[str, Path], run_command: RunCommand
) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(shipped), AutoModelForCausalLM.from_pretrained(shipped)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    torch.manual_seed(7)
    settings = {"temperature": 0.9, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.1}
    expected = model.generate(ids, do_sample=True, max_new_tokens=24, **settings)[0, ids.shape[1] :].tolist()
    options = ["--temp", 0.9, "--top-k", 40, "--top-p", 0.9, "--repetition-penalty", 1.1, "--seed", 7, "-n", 24]
    for folder in shards.values():
        assert generate(run_command, folder, "-p", PROMPT, *options)["token_ids"] == expected


def test_the_checkpoint_defaults_apply_until_an_option_replaces_them(shipped: Path, run_command: RunCommand) -> None:
    defaults = json.loads((shipped / "generation_config.json").read_text())
    assert defaults["do_sample"] is True
    sampled = {tuple(generate(run_command, shipped, "-p", PROMPT, "-n", 12, "--seed", s)["token_ids"]) for s in (1, 2)}
    greedy = {
        tuple(generate(run_command, shipped, "-p", PROMPT, "-n", 12, "--seed", s, "--temp", 0)["token_ids"])
        for s in (1, 2)
    }
    assert (len(sampled), len(greedy)) == (2, 1)


def test_a_plan_with_its_checkpoint_gives_the_tokens_of_the_export(
    shipped: Path, shards: dict[str, Path], run_command: RunCommand
) -> None:
    exported = generate(run_command, shards["2-4-1"], "-p", PROMPT, "-n", 16, "--seed", 3)
    straight = generate(
        run_command, shards["2-4-1"] / "plan.json", "--model", shipped, "-p", PROMPT, "-n", 16, "--seed", 3
    )
    assert straight == exported


def test_text_goes_to_stdout_and_numbers_to_stderr(shards: dict[str, Path], run_command: RunCommand) -> None:
    options = ["-p", PROMPT, "-n", 8, "--temp", 0, "--device-map", "cpu"]
    done = run_command("llamarun", "generate", shards["2-4-1"], *options)
    text = generate(run_command, shards["2-4-1"], "-p", PROMPT, "-n", 8, "--temp", 0)["text"]
    assert done.out == f"{text}\n"
    for part in ("time to first token", "tokens/s", "peak memory", "stage 0 on cpu", "stage 2 on cpu", "ms/token"):
        assert part in done.err


def test_quiet_prints_nothing_but_the_text(shards: dict[str, Path], run_command: RunCommand) -> None:
    done = run_command("llamarun", "generate", shards["7"], "-p", "x", "-n", 2, "--device-map", "cpu", "-q")
    assert (done.code, done.err) == (0, "")


def test_the_run_document_names_every_stage_with_its_seconds(shards: dict[str, Path], run_command: RunCommand) -> None:
    arguments = ["-p", "x", "-n", 3, "--ignore-eos", "--device-map", "cpu", "--json"]
    out = run_command("llamarun", "generate", shards["2-4-1"], *arguments).out
    document = json.loads(out)
    assert Run.from_json(out.encode(), where="stdout").as_json() == document
    assert [(s["start_layer"], s["end_layer"]) for s in document["stages"]] == [(0, 2), (2, 6), (6, 7)]
    assert all(s["decode_compute_seconds"] > 0 for s in document["stages"])
    assert document["new_tokens"] == 3
    assert document["peak_memory_bytes"] > 50_000_000


def test_the_prompt_may_come_from_stdin_or_a_file(
    shipped: Path, run_command: RunCommand, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options = ["-n", 6, "--temp", 0]
    given = generate(run_command, shipped, "-p", PROMPT, *options)
    (tmp_path / "prompt.txt").write_text(PROMPT)
    assert generate(run_command, shipped, "--file", tmp_path / "prompt.txt", *options) == given
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(PROMPT.encode())))
    assert generate(run_command, shipped, "-p", "-", *options) == given


@pytest.mark.row("R4")
def test_a_prompt_that_just_fits_the_context_runs_and_one_token_more_does_not(
    shipped: Path, run_command: RunCommand
) -> None:
    prompt_tokens = len(AutoTokenizer.from_pretrained(shipped)(PROMPT).input_ids)
    codes = [
        run_command("llamarun", "generate", shipped, "-p", PROMPT, "-n", 5, "-c", context).code
        for context in (prompt_tokens + 6, prompt_tokens + 5, prompt_tokens + 4)
    ]
    assert codes == [0, 0, 2]


def test_an_empty_prompt_starts_from_the_begin_of_sequence_token(shipped: Path, run_command: RunCommand) -> None:
    assert len(generate(run_command, shipped, "-p", "", "-n", 3, "--temp", 0, "--ignore-eos")["token_ids"]) == 3


def test_zero_new_tokens_is_an_answer(shipped: Path, run_command: RunCommand) -> None:
    assert generate(run_command, shipped, "-p", "x", "-n", 0)["token_ids"] == []


def test_a_stop_string_ends_the_text_and_is_not_part_of_it(shipped: Path, run_command: RunCommand) -> None:
    text = str(generate(run_command, shipped, "-p", PROMPT, "-n", 24, "--temp", 0)["text"])
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    stopped = generate(run_command, shipped, "-p", PROMPT, "-n", 24, "--temp", 0, "--stop", stop)
    assert stopped["text"] == text[: text.index(stop)]
    assert stopped["finish_reason"] == "stop_string"


def test_special_tokens_in_a_prompt_are_text_unless_asked_for(shipped: Path, run_command: RunCommand) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shipped)
    arguments = ["-p", tokenizer.eos_token, "-n", 1, "--json"]
    counts = [
        json.loads(run_command("llamarun", "generate", shipped, *arguments, *extra).out)["prompt_tokens"]
        for extra in ([], ["--special"])
    ]
    assert counts[1] == 2
    assert counts[0] > 2


def test_the_wrong_export_id_is_refused(shards: dict[str, Path], run_command: RunCommand) -> None:
    right = json.loads((shards["7"] / "manifest.json").read_text())["export_id"]
    options = ["-p", "x", "-n", 1, "--device-map", "cpu", "--expect-id"]
    assert run_command("llamarun", "generate", shards["7"], *options, right).code == 0
    assert run_command("llamarun", "generate", shards["7"], *options, "0" * 64).code == 5


def test_check_says_identical_for_a_split_and_tells_a_different_model(
    shipped: Path, shards: dict[str, Path], run_command: RunCommand, tmp_path: Path
) -> None:
    same = run_command("llamarun", "check", shards["2-4-1"], "--against", shipped, "--device-map", "cpu", "-n", 8)
    assert same.code == 0, same.err
    assert same.out.count("identical") == 3
    other = AutoModelForCausalLM.from_pretrained(shipped)
    with torch.no_grad():
        other.model.layers[6].mlp.down_proj.weight[0, 0] += 1
    other.save_pretrained(tmp_path / "other")
    different = run_command(
        "llamarun", "check", shards["2-4-1"], "--against", tmp_path / "other", "--device-map", "cpu", "-n", 8
    )
    assert different.code == 5
    assert "differ" in different.out


def long_text(model: Path) -> list[object]:
    return ["generate", model, "-p", PROMPT, "-n", 900, "--ignore-eos"]


def test_ctrl_c_keeps_the_text_so_far_and_leaves_with_130(shipped: Path) -> None:
    with started(*long_text(shipped), is_held=True) as job:
        first = job.first_text()
        job.process.send_signal(signal.SIGINT)
        code, rest, said = job.end(within=30)
    assert code == 130, said
    assert first + rest
    assert "Traceback" not in said


@pytest.mark.row("R14")
def test_a_reader_that_goes_away_stops_the_run(shipped: Path) -> None:
    with started(*long_text(shipped), is_held=True) as job:
        job.first_text()
        job.stdout.close()
        said = job.stderr.read()
        assert job.process.wait(timeout=60) == 141, said
    assert b"Traceback" not in said


@pytest.fixture
def own_signals() -> Iterator[None]:
    """A command leaves its signal handlers behind; put ours back."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.row("R13")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize(
    ("place", "name", "call"), [(session, "_load", 1), (StageRunner, "run", 1), (StageRunner, "run", 6)]
)
def test_a_signal_in_any_phase_ends_the_run_and_keeps_the_text_so_far(
    shards: dict[str, Path],
    run_command: RunCommand,
    monkeypatch: pytest.MonkeyPatch,
    own_signals: None,
    place: Any,
    name: str,
    call: int,
    number: signal.Signals,
) -> None:
    options = ["-p", PROMPT, "-n", 20, "--temp", 0, "--device-map", "cpu"]
    whole = run_command("llamarun", "generate", shards["2-4-1"], *options, "-q").out
    real, calls = getattr(place, name), []

    def signalled(*arguments: Any, **settings: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            signal.raise_signal(number)
        return real(*arguments, **settings)

    monkeypatch.setattr(place, name, signalled)
    done = run_command("llamarun", "generate", shards["2-4-1"], *options)
    assert done.code == 128 + number
    assert "Traceback" not in done.err
    assert whole.startswith(done.out)
    assert bool(done.out) == (call > 1)


def test_token_ids_are_a_prompt_too(shipped: Path, run_command: RunCommand) -> None:
    ids = AutoTokenizer.from_pretrained(shipped)(PROMPT).input_ids
    options = ["-n", 6, "--temp", 0]
    given = generate(run_command, shipped, "--prompt-ids", ",".join(map(str, ids)), *options)
    assert given == generate(run_command, shipped, "-p", PROMPT, *options)


@pytest.mark.row("R6")
def test_a_prompt_file_with_crlf_is_kept_as_it_is(shipped: Path, run_command: RunCommand, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_bytes(b"a\r\nb")
    arguments = ["-n", 1, "--json"]
    found = json.loads(run_command("llamarun", "generate", shipped, "-f", tmp_path / "prompt.txt", *arguments).out)
    assert found["prompt_tokens"] == len(AutoTokenizer.from_pretrained(shipped)("a\r\nb").input_ids)


@pytest.mark.row("K3", "R12")
def test_an_end_of_sequence_list_and_one_that_comes_first_are_answers(
    shipped: Path, run_command: RunCommand, tmp_path: Path
) -> None:
    first = generate(run_command, shipped, "-p", PROMPT, "-n", 1, "--temp", 0)["token_ids"][0]
    model = tmp_path / "model"
    shutil.copytree(shipped, model)
    config = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": [2, first]}))
    ended = generate(run_command, model, "-p", PROMPT, "-n", 9, "--temp", 0)
    assert (ended["token_ids"], ended["text"], ended["finish_reason"]) == ([first], "", "eos")


@pytest.mark.row("R16")
def test_two_runs_on_one_bundle_at_once_are_both_right(shards: dict[str, Path], run_command: RunCommand) -> None:
    options = ["-p", PROMPT, "-n", "8", "--temp", "0", "--device-map", "cpu", "-q"]
    expected = run_command("llamarun", "generate", shards["2-4-1"], *options).out
    command = ["generate", shards["2-4-1"], *options]
    with started(*command) as one, started(*command) as other:
        assert [job.end(within=120)[1].decode() for job in (one, other)] == [expected, expected]


@pytest.mark.row("R2")
def test_memory_that_runs_out_while_loading_or_generating_is_said(
    shipped: Path, run_command: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_arguments: Any, **_settings: Any) -> Any:
        return torch.empty(1 << 60)

    for place, name, doing in ((session, "_load", "loading"), (StageRunner, "run", "computing a step")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, fails)
            done = run_command("llamarun", "generate", shipped, "-p", "x", "-n", 4, "--ignore-eos")
        assert done.code == 6
        assert f"memory ran out while {doing}" in done.err


@pytest.mark.row("R2")
def test_only_the_cache_that_is_asked_for_has_to_fit(
    shipped: Path, run_command: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long context is no reason to refuse a short text."""
    weights = sum(path.stat().st_size for path in shipped.glob("*.safetensors"))
    monkeypatch.setattr(capacity, "free_bytes", lambda _device: weights + 200_000)
    short = run_command("llamarun", "generate", shipped, "-p", "x", "-n", 20)
    assert short.code == 0, short.err
    long = run_command("llamarun", "generate", shipped, "-p", "x", "-n", 1000)
    assert long.code == 6
    assert f"({weights + 200_000} bytes) are free" in long.err


def test_damage_is_found_while_loading_unless_checks_are_turned_off(
    shards: dict[str, Path], run_command: RunCommand, tmp_path: Path
) -> None:
    folder = tmp_path / "shards"
    shutil.copytree(shards["2-4-1"], folder)
    bundle = sorted(folder.glob("*.safetensors"))[1]
    data = bytearray(bundle.read_bytes())
    data[-3] ^= 1
    bundle.write_bytes(data)
    options = ["-p", "x", "-n", 1, "--device-map", "cpu"]
    done = run_command("llamarun", "generate", folder, *options)
    assert (done.code, done.out) == (5, "")
    assert bundle.name in done.err
    assert run_command("llamarun", "generate", folder, *options, "--no-verify").code == 0
