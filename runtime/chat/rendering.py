"""The process in which a chat template runs, started by `runtime.chat.template`: conversations in, token ids out.

It loads the same tokenizer and lets transformers render and encode, so that the ids are those of `apply_chat_template`.
Everything in it, the encoding of hostile text included, is bounded by whoever started it; it bounds its own memory
before it sees a template.
"""

import inspect
import json
import resource
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plans.commands.children import die_with
from plans.commands.collector import resting_collector
from plans.errors import InputError, LlamaplanError, UsageError, printable
from runtime.chat.template import MAX_BYTES, MAX_OUTPUT_CHARACTERS, broken, special_tokens_in
from runtime.distributed.control.channel import receive_frame, send_frame

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def main() -> None:
    """Answer until the other end closes."""
    folder, vocab_size, descriptor, parent = sys.argv[1:]
    die_with(int(parent))
    connection = socket.socket(fileno=int(descriptor))
    tokenizer = _load(Path(folder), vocab_size=int(vocab_size))
    _bound_memory()
    send_frame(connection, b"{}")
    while (data := receive_frame(connection, max_bytes=1 << 32)) is not None:
        send_frame(connection, json.dumps(_answer(tokenizer, json.loads(data))).encode())


def _load(folder: Path, *, vocab_size: int) -> "PreTrainedTokenizerBase":
    sys.modules["torch"] = None  # type: ignore[assignment] # seconds and hundreds of MiB, for what tokenizers do not use
    from runtime.reading.tokenizer import load_tokenizer

    with resting_collector():
        return load_tokenizer(folder, vocab_size=vocab_size)


def _bound_memory() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = max(MAX_BYTES, used + MAX_BYTES // 2)  # a large vocabulary takes its own
    resource.setrlimit(resource.RLIMIT_AS, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _answer(tokenizer: "PreTrainedTokenizerBase", asked: list[dict[str, str]] | str) -> dict[str, Any]:
    from runtime.reading.tokenizer import encode_prompt

    fault: LlamaplanError
    try:
        if isinstance(asked, str):
            return {"ids": encode_prompt(tokenizer, asked, parses_special=False)}
        return {"ids": _encode(tokenizer, asked)}
    except (InputError, UsageError) as error:
        fault = error
    except (MemoryError, OverflowError):
        fault = broken(f"needs more than {MAX_BYTES >> 20} MiB")
    except Exception as error:  # a template can provoke any of them
        from jinja2 import TemplateError

        kind = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
        fault = broken(f"fails: {kind}{printable(error, limit=200)}")
    return {
        "what": fault.what,
        "where": fault.where,
        "expected": fault.expected,
        "hint": fault.hint,
        "code": fault.code,
    }


def _encode(tokenizer: "PreTrainedTokenizerBase", messages: list[dict[str, str]]) -> list[int]:
    library: Any = tokenizer
    special = special_tokens_in(tokenizer, messages)
    if special and "sanitize_control_tokens" not in inspect.signature(library.apply_chat_template).parameters:
        raise InputError(
            f"a message holds the special token {special[0]}",
            hint="this version of transformers cannot encode it as plain text; write it differently",
            code="E-SPECIAL",
        )
    text = library.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    if len(text) > MAX_OUTPUT_CHARACTERS:
        raise broken(f"writes {len(text)} characters", expected=f"at most {MAX_OUTPUT_CHARACTERS}")
    if not special:
        return list(library(text, add_special_tokens=False)["input_ids"])
    return list(
        library.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False, sanitize_control_tokens=True
        )
    )


if __name__ == "__main__":
    main()
