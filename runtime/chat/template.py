"""Turn a conversation into token ids with the checkpoint's own chat template, which nobody has to trust.

transformers renders it in a sandbox; here its time, memory and output are bounded too. Text that a person wrote never
becomes a special token: it is encoded as plain text.
"""

import inspect
import resource
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import psutil

from plans.errors import InputError, printable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_SECONDS = 2.0
MAX_EXTRA_BYTES = 512 << 20
MAX_OUTPUT_CHARACTERS = 16 << 20

Message = Mapping[str, str]
"""`role` and `content`."""


def check_template(tokenizer: "PreTrainedTokenizerBase", *, folder: Path) -> None:
    """Require a chat template that renders a short conversation.

    Raises:
        InputError: there is none, or it does not work.
    """
    if not tokenizer.chat_template:
        raise InputError(
            "this model has no chat template",
            where=folder,
            hint="it was not made for conversations; continue a text with llamarun generate",
            code="E-TEMPLATE",
        )
    from jinja2 import Environment

    with _explained():
        source = tokenizer.get_chat_template()
        # A power of large integers is one operation that no alarm interrupts; templates have no use for it.
        if any(kind == "operator" and text == "**" for _line, kind, text in Environment().lex(source)):
            raise _broken("uses the operator **", expected="a template without powers")
    encode_chat(tokenizer, [{"role": "user", "content": "x"}])


def encode_chat(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message]) -> list[int]:
    """Return the token ids of a conversation up to where the next answer begins.

    Raises:
        InputError: the template fails, takes too long, or writes too much.
    """
    library: Any = tokenizer
    conversation = [dict(message) for message in messages]
    special = special_tokens_in(tokenizer, messages)
    if special and "sanitize_control_tokens" not in inspect.signature(library.apply_chat_template).parameters:
        raise InputError(
            f"a message holds the special token {special[0]}",
            hint="this version of transformers cannot encode it as plain text; write it differently",
            code="E-SPECIAL",
        )
    with _explained():
        with _time_limit(), _memory_limit():
            text = library.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
        if len(text) > MAX_OUTPUT_CHARACTERS:
            raise _broken(f"writes {len(text)} characters", expected=f"at most {MAX_OUTPUT_CHARACTERS}")
        if not special:
            return list(library(text, add_special_tokens=False)["input_ids"])
        return list(
            library.apply_chat_template(
                conversation, add_generation_prompt=True, return_dict=False, sanitize_control_tokens=True
            )
        )


def special_tokens_in(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message]) -> list[str]:
    """Return the special tokens whose names occur in the messages' text."""
    names = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return sorted(name for name in names if any(name in message["content"] for message in messages))


class _TimeUpError(Exception):
    """The template took too long."""


@contextmanager
def _explained() -> Iterator[None]:
    """Turn whatever a template does wrong into one error."""
    from jinja2 import TemplateError

    try:
        yield
    except _TimeUpError:
        raise _broken(f"takes longer than {MAX_SECONDS:g} s") from None
    except (MemoryError, OverflowError):
        raise _broken(f"needs more than {MAX_EXTRA_BYTES >> 20} MiB") from None
    except TemplateError as error:
        raise _broken(f"fails: {printable(error, limit=200)}") from None
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError, LookupError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise _broken(f"fails: {type(error).__name__}: {printable(error, limit=200)}") from None


@contextmanager
def _time_limit() -> Iterator[None]:
    def ring(_number: int, _frame: FrameType | None) -> None:
        raise _TimeUpError

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _memory_limit() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = psutil.Process().memory_info().vms + MAX_EXTRA_BYTES
    limits = [wanted, *(limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY)]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _broken(what: str, *, expected: str = "") -> InputError:
    return InputError(what, where="chat template", expected=expected, code="E-TEMPLATE")
