"""The tokenizer in a GGUF file -> the files that transformers reads, by transformers' own converter.

Three things the converter (5.23) leaves out are put in, as llama.cpp has them for the same `tokenizer.ggml.pre`:
digits that stand alone, words that are one token whatever the merges say, and a first token that no flag asks for.
"""

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from plans.errors import InputError, printable

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Warn = Callable[[str], None]

PREFIX = "tokenizer.ggml."
TEMPLATE_KEY = "tokenizer.chat_template"
_KEYS = {
    "model": "tokenizer_type",
    "pre": "pre_tokenizer_type",
    "tokens": "tokens",
    "scores": "scores",
    "token_type": "token_type",
    "merges": "merges",
}
"""What the converter asks for -> what it calls it."""
_LISTS = {"tokens": str, "merges": str, "scores": float, "token_type": int}
_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_MODELS = ("gpt2", "llama")
_LONE_DIGITS = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})
_WHOLE_WORDS = frozenset(["llama3", "llama-v3", "llama-bpe", "falcon3"])
_AS_GPT2 = frozenset(["default", "gpt-2", "gpt2", "phi-2", "mpt", "olmo", "jais"])


def tokenizer_files(metadata: Mapping[str, Any], *, architecture: str, where: object, warn: Warn) -> dict[str, bytes]:
    """Return `tokenizer.json`, `tokenizer_config.json` and, if there is one, `chat_template.jinja`.

    Args:
        metadata: of the (first) file.
        architecture: `general.architecture`.
        where: the file, for errors.
        warn: called with one sentence where tokens may differ from the original's.

    Returns:
        The files by name; nothing of a file without a tokenizer.

    Raises:
        InputError: lists that do not fit together, a kind that is not known, or what the converter does not take.
    """
    if metadata.get(f"{PREFIX}model") in (None, "none", "no_vocab"):
        warn("the file holds no tokenizer: prompts of text need one in the folder")
        return {}
    table = _table(metadata, where)
    _warn_about_splitting(table, warn)
    settings = _settings(metadata, table, where)
    data = _converted(table, settings, architecture, where)
    files = {"tokenizer.json": data.encode(), "tokenizer_config.json": _written(settings)}
    template = metadata.get(TEMPLATE_KEY)
    if isinstance(template, str):
        files["chat_template.jinja"] = template.encode()
    return files


def _table(metadata: Mapping[str, Any], where: object) -> dict[str, Any]:
    table = {name: metadata[PREFIX + key] for key, name in _KEYS.items() if PREFIX + key in metadata}
    if table["tokenizer_type"] not in _MODELS:
        raise _refused("model", table["tokenizer_type"], " or ".join(_MODELS), where)
    for name, kind in _LISTS.items():
        found = table.get(name)
        if found is not None and not (isinstance(found, list) and all(type(item) is kind for item in found)):
            raise _refused(name, found, f"a list of {kind.__name__}", where)
    tokens = table.get("tokens") or []
    for name in ("scores", "token_type"):
        if len(table.get(name, tokens)) != len(tokens):
            raise _refused(name, f"a list of {len(table[name])}", f"one for each of {len(tokens)} tokens", where)
    if not tokens or ("merges" not in table and "scores" not in table):
        raise _refused("tokens", f"a list of {len(tokens)} without merges or scores", "a vocabulary", where)
    if not all(merge.count(" ") == 1 for merge in table.get("merges", ())):
        raise _refused("merges", "a list with other texts", "pairs", where)
    return table


def _warn_about_splitting(table: Mapping[str, Any], warn: Warn) -> None:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    kind = table.get("pre_tokenizer_type", "default")
    known = _LONE_DIGITS | _AS_GPT2 | GGUF_PRE_TOKENIZER_SPLITS.keys()
    if table["tokenizer_type"] == "gpt2" and kind not in known:
        warn(
            f"{PREFIX}pre {printable(kind, limit=40)} is not known: text is split as GPT-2 does, and tokens may differ"
        )


def _settings(metadata: Mapping[str, Any], table: Mapping[str, Any], where: object) -> dict[str, Any]:
    """`tokenizer_config.json`: names of special tokens, and which of them are put around a text."""
    tokens = table["tokens"]
    found: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for name, key in _SPECIAL.items():
        number = metadata.get(f"{PREFIX}{key}_token_id")
        if type(number) is int and 0 <= number < len(tokens):
            found[name] = tokens[number]
    is_first_usual = table["tokenizer_type"] == "llama" or table.get("pre_tokenizer_type") in _WHOLE_WORDS
    for name, usual in (("bos", is_first_usual), ("eos", False)):
        flag = metadata.get(f"{PREFIX}add_{name}_token", usual)
        if type(flag) is not bool:
            raise _refused(f"add_{name}_token", flag, "true or false", where)
        found[f"add_{name}_token"] = flag and f"{name}_token" in found
    return found


def _converted(table: dict[str, Any], settings: Mapping[str, Any], architecture: str, where: object) -> str:
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer

    wrap: Any = PreTrainedTokenizerFast

    given = {key: value for key, value in settings.items() if key.endswith("_token")}
    try:
        backend, _ = convert_gguf_tokenizer(architecture, table)
        _as_llama_cpp(backend, table.get("pre_tokenizer_type"))
        made = wrap(tokenizer_object=backend, **given).backend_tokenizer
        return str(made.to_str(pretty=True))
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # the Rust core panics with exceptions that are no Exception
        raise InputError(
            f"transformers makes no tokenizer of it: {printable(error, limit=200)}", where=where, code="E-TOKENIZER"
        ) from None


def _as_llama_cpp(backend: "Tokenizer", pre: object) -> None:
    from tokenizers import pre_tokenizers

    if pre in _LONE_DIGITS:
        digits, usual = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, usual])
    if pre in _WHOLE_WORDS:
        backend.model.ignore_merges = True


def _written(settings: Mapping[str, Any]) -> bytes:
    return (json.dumps(settings, indent=2, ensure_ascii=False, sort_keys=True) + "\n").encode()


def _refused(key: str, found: object, expected: str, where: object) -> InputError:
    return InputError(
        f"{PREFIX}{key} is {printable(found, limit=40)}", where=where, expected=expected, code="E-TOKENIZER"
    )
