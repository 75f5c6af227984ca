"""How long a generation may become, and whether the prompts fit."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from plans.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """When to stop, and how the prompt is read.

    Attributes:
        context_tokens: prompt and new tokens of a sequence together never exceed this.
        max_tokens: new tokens per sequence; None goes on until end-of-sequence or the context's end.
        default_max_tokens: new tokens where `max_tokens` is None, as far as they fit: the checkpoint's max_new_tokens.
        max_length: prompt and new tokens together where both are None: the checkpoint's max_length.
        eos_token_ids: tokens that end a sequence.
        stop_strings: strings that end a sequence; they need `decode`.
        is_stop: asked with all ids, prompt included, whether the last of them ends the sequence beside that.
        prefill_chunk_tokens: prompt tokens per forward; None reads the prompt at once.
    """

    context_tokens: int
    max_tokens: int | None = None
    default_max_tokens: int | None = None
    max_length: int | None = None
    eos_token_ids: frozenset[int] = frozenset()
    stop_strings: tuple[str, ...] = ()
    is_stop: Callable[[Sequence[int]], bool] | None = None
    prefill_chunk_tokens: int | None = None


def check_prompts(
    prompts: Sequence[Sequence[int]], *, limits: Sequence[Limits], vocab_size: int, has_decode: bool
) -> list[int]:
    """Return how many new tokens each prompt may get under its own limits.

    Raises:
        UsageError: no prompt, an empty one, a token id outside the vocabulary, or more tokens than the context holds.
    """
    if not prompts:
        raise UsageError("there is no prompt", expected="at least one", code="E-PROMPT")
    if not has_decode and any(limit.stop_strings for limit in limits):
        raise UsageError("stop strings need a tokenizer", hint="give decode", code="E-STOP")
    pairs = enumerate(zip(prompts, limits, strict=True))
    return [
        check_prompt(prompt, limit, vocab_size=vocab_size, where=f"prompt {index}") for index, (prompt, limit) in pairs
    ]


def check_prompt(prompt: Sequence[int], limits: Limits, *, vocab_size: int, where: object) -> int:
    """Return how many new tokens a prompt may get; errors as `check_prompts`, naming `where`."""
    if not prompt:
        raise UsageError(
            "has no tokens", where=where, hint="give some text, or a tokenizer that adds a first token", code="E-PROMPT"
        )
    bad = next((token for token in prompt if type(token) is not int or not 0 <= token < vocab_size), None)
    if bad is not None:
        raise UsageError(
            f"token id {bad} is not in the vocabulary",
            where=where,
            expected=f"integers from 0 to {vocab_size - 1}",
            code="E-PROMPT",
        )
    room = limits.context_tokens - len(prompt)
    wanted = limits.max_tokens or 0
    if room < wanted or room < 0:
        raise UsageError(
            f"{len(prompt)} prompt tokens and {wanted} new ones are {wanted - room} more than the context holds"
            f" ({limits.context_tokens})",
            where=where,
            hint=f"shorten the prompt, or ask for at most {max(room, 0)} new tokens, or raise --ctx-size",
            code="E-CONTEXT",
        )
    if limits.max_tokens is not None:
        return limits.max_tokens
    return min(room, _default_room(len(prompt), limits, where=where, otherwise=room))


def _default_room(num_prompt_tokens: int, limits: Limits, *, where: object, otherwise: int) -> int:
    """Return how many new tokens the checkpoint asks for; max_new_tokens goes before max_length, as in `generate()`."""
    if limits.default_max_tokens is not None:
        return limits.default_max_tokens
    if limits.max_length is None:
        return otherwise
    if num_prompt_tokens >= limits.max_length:
        raise UsageError(
            f"has {num_prompt_tokens} tokens, and generation_config.json ends every sequence at max_length "
            f"{limits.max_length}",
            where=where,
            hint="shorten the prompt, or ask for new tokens with --max-tokens",
            code="E-CONTEXT",
        )
    return limits.max_length - num_prompt_tokens
