"""How far is a model from the one its weights were rounded from? Mean KL per token, and the tokens that differ.

Shapes: S tokens, V vocabulary.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from plans.errors import InputError, NumericalError

ROWS = 128
"""Positions whose distributions are compared at once."""


@dataclass(frozen=True, slots=True)
class Distance:
    """What was found at the positions of some texts."""

    num_tokens: int
    mean_kl: float
    """Of the original's distribution over the next token to the model's, in nats."""
    num_different: int
    """Positions at which another token is the likeliest."""


def measure_distance(model: Any, original: Any, texts: Iterable[Sequence[int]]) -> Distance:
    """Let both models read the same texts and compare what they expect next, at every position.

    Args:
        model: any causal language model of transformers, such as a chain.
        original: what its weights were rounded from.
        texts: token ids, each text read on its own.

    Raises:
        InputError: the two have different vocabularies.
        NumericalError: one of the two computes NaN.
    """
    num_tokens, total, num_different = 0, 0.0, 0
    with torch.inference_mode():
        for ids in texts:
            for ours, theirs in _rows(_logits(model, ids), _logits(original, ids)):
                mine, expected = torch.log_softmax(ours.float(), -1), torch.log_softmax(theirs.float(), -1)
                total += float((expected.exp() * (expected - mine)).sum(-1).double().sum())
                num_different += int((ours.argmax(-1) != theirs.argmax(-1)).sum())
            num_tokens += len(ids)
    if total != total:
        raise NumericalError("one of the two models computes NaN")
    return Distance(num_tokens, max(total, 0.0) / num_tokens, num_different)


def continued(original: Any, prompts: Sequence[Sequence[int]], *, num_tokens: int) -> list[list[int]]:
    """Return every prompt with so many tokens behind it that the original thinks likeliest."""
    return [[*prompt, *_continuation(original, prompt, num_tokens)] for prompt in prompts]


def _continuation(original: Any, prompt: Sequence[int], num_tokens: int) -> list[int]:
    found = original.generate(
        torch.tensor([prompt], device=original.device),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64, device=original.device),
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        pad_token_id=0,
    )
    tokens: list[int] = found[0, len(prompt) :].tolist()
    return tokens


def _logits(model: Any, ids: Sequence[int]) -> torch.Tensor:
    found: torch.Tensor = model(torch.tensor([list(ids)], device=model.device), use_cache=False).logits[0]
    return found.cpu()  # [S, V]


def _rows(ours: torch.Tensor, theirs: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    if ours.shape != theirs.shape:
        raise InputError(
            f"has {ours.shape[-1]} tokens in its vocabulary, the original {theirs.shape[-1]}",
            hint="compare with the model it was made from",
            code="E-MODEL",
        )
    return zip(torch.split(ours, ROWS), torch.split(theirs, ROWS), strict=True)
