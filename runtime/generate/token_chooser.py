"""How one sequence's next token is chosen: transformers' own processors, and one CPU generator per sequence.

Every sequence draws from a generator of its own, seeded from (seed, sequence index): its tokens depend neither on how
sequences were batched nor on what else is running. Sequence 0 uses the seed itself, so that at batch 1 the tokens are
those of `torch.manual_seed(seed)` followed by `generate()`.
"""

import hashlib
from typing import cast

import torch
from transformers import LogitsProcessorList
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from plans.errors import NumericalError
from runtime.generate.sampling import Sampling


class TokenChooser:
    """Chooses the next token of one sequence.

    Args:
        sampling: how to choose.
        sequence_index: position of the sequence in the request; decides its random draws.
    """

    def __init__(self, sampling: Sampling, *, sequence_index: int) -> None:
        self._processors = make_processors(sampling)
        self._generator: torch.Generator | None = None
        if not sampling.is_greedy:
            self._generator = torch.Generator().manual_seed(sequence_seed(sampling.seed, sequence_index))

    @property
    def is_plain_argmax(self) -> bool:
        """Whether the choice is the largest logit and nothing else."""
        return self._generator is None and not self._processors

    def choose(self, logits: torch.Tensor, *, token_ids: torch.Tensor) -> int:
        """Return the next token.

        Args:
            logits: fp32 [V] of the last position, on the CPU.
            token_ids: [T] everything the sequence consists of so far, without padding.

        Raises:
            NumericalError: no token is left to choose from.
        """
        scores = (
            self._processors(cast("torch.LongTensor", token_ids[None]), logits[None])
            if self._processors
            else logits[None]
        )
        if self._generator is None:
            return int(torch.argmax(scores, dim=-1))
        probabilities = torch.softmax(scores, dim=-1)
        if not torch.isfinite(probabilities).all():
            raise NumericalError(
                "the sampling settings leave no token to choose from",
                hint="raise --temp, --top-p or --top-k",
                code="E-MASKED",
            )
        return int(torch.multinomial(probabilities, num_samples=1, generator=self._generator))


def sequence_seed(seed: int, sequence_index: int) -> int:
    """Return the seed of one sequence's generator: the seed itself for the first, a hash for the others."""
    if sequence_index == 0:
        return seed
    digest = hashlib.sha256(f"{seed}/{sequence_index}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


def make_processors(sampling: Sampling) -> LogitsProcessorList:
    """Return the processors in the order `generate()` applies them."""
    chosen = LogitsProcessorList()
    if sampling.repetition_penalty != 1.0:
        chosen.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.is_greedy:
        return chosen
    if sampling.temperature != 1.0:
        chosen.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        chosen.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1.0:
        chosen.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p is not None:
        chosen.append(MinPLogitsWarper(sampling.min_p))
    return chosen
