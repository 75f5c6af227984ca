"""Tokenizers whose steps could make a long text of a short one, beside usual ones that load."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from plans.errors import InputError
from runtime.reading.tokenizer import load_tokenizer
from tests.conftest import SHIPPED

VOCAB_SIZE = 4096
Step = dict[str, Any]


def replaced(pattern: dict[str, str], content: str) -> Step:
    return {"type": "Replace", "pattern": pattern, "content": content}


FOURFOLD, NOTHING = replaced({"String": "a"}, "aaaa"), replaced({"String": "b"}, "")


def with_normalizer(folder: Path, steps: list[Step]) -> Path:
    """The shipped tokenizer, its text changed before by some steps."""
    document = json.loads((SHIPPED / "tokenizer.json").read_text())
    document["normalizer"] = {"type": "Sequence", "normalizers": steps}
    shutil.copy(SHIPPED / "tokenizer_config.json", folder)
    (folder / "tokenizer.json").write_text(json.dumps(document))
    return folder


@pytest.mark.parametrize(
    "steps",
    [
        [FOURFOLD] * 8,
        [NOTHING, *[FOURFOLD] * 8],
        [replaced({"Regex": "(?=.)"}, "x")] * 9,
        [replaced({"String": ""}, "\u2581" * 99)],
    ],
    ids=["longer", "and taken away", "between characters", "of nothing"],
)
def test_steps_that_can_make_long_text_of_short_are_refused(steps: list[Step], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="normalizer makes text many times as long"):
        load_tokenizer(with_normalizer(tmp_path, steps), vocab_size=VOCAB_SIZE)


def test_usual_steps_load(tmp_path: Path) -> None:
    usual = [replaced({"String": " "}, "\u2581"), replaced({"Regex": " {2,}"}, " "), NOTHING, FOURFOLD]
    tokenizer = load_tokenizer(with_normalizer(tmp_path, usual), vocab_size=VOCAB_SIZE)
    assert tokenizer.decode(tokenizer("cab").input_ids, skip_special_tokens=True) == "caaaa"
