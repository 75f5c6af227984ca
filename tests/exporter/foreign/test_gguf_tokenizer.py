"""The tokenizer in a GGUF file becomes the files that transformers reads."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from exporter.foreign.gguf.tokenizer import tokenizer_files
from plans.errors import InputError
from plans.gguf.header import read_gguf_header

GgufOf = Callable[[str], Path]
TEXTS = ("def add(a, b):\n    return a + b\n", "  x\t y\r\n\r\nz", "don't <|user|> stop", "\u00e9\u4e2d\U0001f600", "")


@pytest.fixture(scope="module")
def metadata(gguf_of: GgufOf) -> dict[str, Any]:
    return dict(read_gguf_header(gguf_of("F16")).metadata)


def loaded(found: dict[str, bytes], folder: Path) -> Any:
    folder.mkdir()
    for name, data in found.items():
        (folder / name).write_bytes(data)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return AutoTokenizer.from_pretrained(folder)


def made(metadata: dict[str, Any], **changes: Any) -> tuple[dict[str, bytes], list[str]]:
    said: list[str] = []
    changed = metadata | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    kept = {key: value for key, value in changed.items() if value is not None}
    return tokenizer_files(kept, architecture="llama", where="a.gguf", warn=said.append), said


def test_tokens_and_chats_are_the_originals(metadata: dict[str, Any], shipped: Path, tmp_path: Path) -> None:
    found, said = made(metadata)
    ours, original = loaded(found, tmp_path / "t"), AutoTokenizer.from_pretrained(shipped)
    for text in TEXTS:
        assert ours(text).input_ids == original(text).input_ids
        assert ours.decode(ours(text).input_ids) == original.decode(original(text).input_ids)
    chat = [{"role": "user", "content": "hello"}]
    assert ours.apply_chat_template(chat, tokenize=False) == original.apply_chat_template(chat, tokenize=False)
    assert (ours.bos_token, ours.eos_token) == (original.bos_token, original.eos_token)
    assert said == []


def test_transformers_own_reading_of_the_file_is_the_same(
    gguf_of: GgufOf, metadata: dict[str, Any], tmp_path: Path
) -> None:
    path = gguf_of("F16")
    ours = loaded(made(metadata)[0], tmp_path / "t")
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in TEXTS:
        assert ours(text).input_ids == theirs(text).input_ids


def test_digits_stand_alone_where_llama_cpp_has_them_alone(metadata: dict[str, Any], tmp_path: Path) -> None:
    ours = loaded(made(metadata, pre="smollm")[0], tmp_path / "t")
    alone = [ours(digit, add_special_tokens=False).input_ids for digit in "2024"]
    assert ours("2024", add_special_tokens=False).input_ids == [number for ids in alone for number in ids]


@pytest.mark.parametrize(("flag", "pre", "begins"), [(None, "llama-bpe", True), (None, "default", False),
                                                     (False, "llama-bpe", False), (True, "default", True)])  # fmt: skip
def test_a_first_token_is_put_as_llama_cpp_puts_it(
    metadata: dict[str, Any], tmp_path: Path, flag: bool | None, pre: str, begins: bool
) -> None:
    ours = loaded(made(metadata, add_bos_token=flag, pre=pre)[0], tmp_path / "t")
    assert (ours("x").input_ids[0] == ours.bos_token_id) == begins


def test_a_file_without_a_tokenizer_says_so(metadata: dict[str, Any]) -> None:
    assert made(metadata, model=None) == ({}, ["the file holds no tokenizer: prompts of text need one in the folder"])


def test_an_unknown_way_to_split_is_warned_about(metadata: dict[str, Any]) -> None:
    assert "tokenizer.ggml.pre nobody-knows is not known" in made(metadata, pre="nobody-knows")[1][0]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a kind": ({"model": "bert"}, "model is bert"),
    "numbers for tokens": ({"tokens": [1, 2]}, "tokens is"),
    "types that are too few": ({"token_type": [1]}, "token_type is a list of 1"),
    "no merges and no scores": ({"merges": None}, "without merges or scores"),
    "a merge of three": ({"merges": ["a b c"]}, "merges is a list with other texts"),
    "a flag that is a number": ({"add_bos_token": 1}, "add_bos_token is 1"),
    "merges of tokens there are not": ({"merges": ["zzzzzz qqqqqq"]}, "transformers makes no tokenizer of it"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named(metadata: dict[str, Any], case: str) -> None:
    changes, words = WRONG[case]
    with pytest.raises(InputError, match=words):
        made(metadata, **changes)
