"""generation_config.json as the commands read it: done as `generate()` does it, or said by name, or refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from tests.conftest import RunCommand

PROMPT = "def __init__(self, "
logging.set_verbosity_error()
SAMPLED = {"do_sample": True, "temperature": 0.8, "top_k": 30}

Change = Callable[..., Path]


@pytest.fixture(scope="module")
def asking(shipped: Path, tmp_path_factory: pytest.TempPathFactory) -> Change:
    """A copy of the shipped checkpoint whose generation_config.json says what it is given, and nothing else."""
    model = tmp_path_factory.mktemp("asking") / "model"
    shutil.copytree(shipped, model)

    def change(**wishes: Any) -> Path:
        plain = {"eos_token_id": [2, 7], "pad_token_id": 3}
        (model / "generation_config.json").write_text(json.dumps(plain | wishes))
        return model

    return change


def generated(run_command: RunCommand, model: Path, *options: object) -> dict[str, Any]:
    done = run_command("llamarun", "generate", model, "-p", PROMPT, "--seed", 5, "--json", *options)
    assert done.code == 0, done.err
    sequence: dict[str, Any] = json.loads(done.out)["sequences"][0]
    return sequence


def promised(model: Path, **options: Any) -> list[int]:
    tokenizer, unsplit = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    torch.manual_seed(5)
    result: list[int] = unsplit.generate(ids, tokenizer=tokenizer, **options)[0, ids.shape[1] :].tolist()
    return result


@pytest.mark.row("P18")
@pytest.mark.parametrize(
    "wishes",
    [
        {"max_new_tokens": 12, "no_repeat_ngram_size": 2, "suppress_tokens": [330, 12], "min_new_tokens": 5},
        {"max_length": 22, "forced_eos_token_id": 2, **SAMPLED, "typical_p": 0.9, "eta_cutoff": 1e-3},
        {"max_new_tokens": 40, "stop_strings": ["self", ":\n"], "begin_suppress_tokens": [2, 7]},
    ],
    ids=["greedy", "sampled", "stops"],
)
def test_generate_prints_the_tokens_of_generate(
    wishes: dict[str, Any], asking: Change, run_command: RunCommand
) -> None:
    model = asking(**wishes)
    assert generated(run_command, model)["token_ids"] == promised(model)


@pytest.mark.row("P18")
def test_batch_lines_get_what_generate_gets_unless_they_say_otherwise(
    asking: Change, run_command: RunCommand, tmp_path: Path
) -> None:
    model = asking(max_new_tokens=9, no_repeat_ngram_size=1, stop_strings="zzzz")
    (tmp_path / "in.jsonl").write_text(
        "".join(json.dumps({"prompt": PROMPT, "seed": 5, **own}) + "\n" for own in ({}, {"max_tokens": 4}))
    )
    assert run_command("llamarun", "batch", model, tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl").code == 0
    results = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    found = {result["index"]: result["token_ids"] for result in results}
    assert found == {0: promised(model), 1: promised(model, max_new_tokens=4)}


@pytest.mark.row("P18")
def test_an_answer_in_a_chat_has_the_length_that_the_checkpoint_asks(
    asking: Change, run_command: RunCommand, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "lines").write_text("hello\n")
    with (tmp_path / "lines").open() as lines:
        monkeypatch.setattr("sys.stdin", lines)
        done = run_command("llamarun", "chat", asking(max_new_tokens=3, eos_token_id=None))
    assert (done.code, "1 answers, 3 tokens" in done.err) == (0, True), done.err


@pytest.mark.row("P18")
def test_what_is_not_done_is_said_once_by_name(asking: Change, run_command: RunCommand) -> None:
    model = asking(num_beams=4, guidance_scale=1.5, penalty_alpha=0.6, max_new_tokens=2)
    done = run_command("llamarun", "generate", model, "-p", PROMPT)
    assert done.code == 0
    assert done.err.count("warning: ") == 1
    assert "asks for guidance_scale (1.5), num_beams (4), penalty_alpha (0.6)" in done.err


@pytest.mark.row("P18")
def test_an_end_beyond_the_vocabulary_is_ignored_with_a_warning(asking: Change, run_command: RunCommand) -> None:
    done = run_command("llamarun", "generate", asking(eos_token_id=[2, 4096]), "-p", PROMPT, "-n", 1, "--temp", 0)
    assert done.code == 0
    assert "warning: eos_token_id 4096 is outside the vocabulary (0 to 2047) and ends nothing" in done.err


@pytest.mark.row("P18", "P20")
@pytest.mark.parametrize(
    ("wish", "key"),
    [
        ({"forced_eos_token_id": 4096}, "forced_eos_token_id"),
        ({"bad_words_ids": []}, "bad_words_ids"),
        ({"do_sample": True, "top_p": 0}, "top_p is 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_done_is_refused_by_name(
    wish: dict[str, Any], key: str, asking: Change, run_command: RunCommand
) -> None:
    done = run_command("llamarun", "generate", asking(**wish), "-p", PROMPT, "-n", 1)
    assert (done.code, key in done.err, "generation_config.json" in done.err) == (3, True, True), done.err


@pytest.mark.row("P20")
@pytest.mark.parametrize("text", ["not JSON", "[]", '{"temperature": NaN}', '{"top_k": 1, "top_k": 2}', ""])
def test_a_file_that_is_no_object_is_refused(text: str, asking: Change, run_command: RunCommand) -> None:
    model = asking()
    (model / "generation_config.json").write_text(text)
    done = run_command("llamarun", "generate", model, "-p", PROMPT, "-n", 1)
    assert (done.code, "generation_config.json" in done.err) == (3, True), done.err
