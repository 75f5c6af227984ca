"""How the next token is chosen: transformers' own processors, and one CPU generator per sequence.

Every sequence draws from a generator of its own, seeded from (seed, sequence index): its tokens depend neither on how
sequences were batched nor on what else is running. Sequence 0 uses the seed itself, so that at batch 1 the tokens are
those of `torch.manual_seed(seed)` followed by `generate()`.
"""

import hashlib
import math
from dataclasses import dataclass
from typing import Self, cast

import torch
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from plans.errors import NumericalError, UsageError

MAX_SEED = 2**64 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to choose tokens. The defaults are greedy decoding.

    Attributes:
        temperature: 0 for greedy; larger is more random.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the likeliest tokens whose probabilities sum to p.
        min_p: drop tokens below this share of the likeliest one's probability; None keeps all.
        repetition_penalty: above 1 makes tokens that already occurred less likely.
        seed: seed of all draws.

    Raises:
        UsageError: a value is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, 0 <= self.temperature < math.inf, "0 (greedy) or a number above 0")
        _check("top-k", self.top_k, self.top_k >= 0, "0 (all tokens) or a count above 0")
        _check("top-p", self.top_p, 0 < self.top_p <= 1, "a number above 0 and up to 1")
        _check("min-p", self.min_p, self.min_p is None or 0 <= self.min_p <= 1, "a number from 0 to 1")
        _check("repetition-penalty", self.repetition_penalty, 0 < self.repetition_penalty < math.inf, "above 0")
        _check("seed", self.seed, 0 <= self.seed <= MAX_SEED, f"an integer from 0 to {MAX_SEED}")

    @property
    def is_greedy(self) -> bool:
        """Whether no random draw is made."""
        return self.temperature == 0

    @classmethod
    def from_generation_config(cls, config: GenerationConfig, *, seed: int = 0) -> Self:
        """Return what `generate()` would do with the checkpoint's defaults."""
        # transformers fills what a checkpoint leaves open with values of its own, top_k=50 among them.
        if not config.do_sample:
            return cls(repetition_penalty=config.repetition_penalty or 1.0, seed=seed)
        return cls(
            temperature=1.0 if config.temperature is None else config.temperature,
            top_k=50 if config.top_k is None else config.top_k,
            top_p=1.0 if config.top_p is None else config.top_p,
            min_p=config.min_p,
            repetition_penalty=config.repetition_penalty or 1.0,
            seed=seed,
        )

    def processors(self) -> LogitsProcessorList:
        """Return the processors in the order `generate()` applies them."""
        chosen = LogitsProcessorList()
        if self.repetition_penalty != 1.0:
            chosen.append(RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if self.is_greedy:
            return chosen
        if self.temperature != 1.0:
            chosen.append(TemperatureLogitsWarper(self.temperature))
        if self.top_k:
            chosen.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1.0:
            chosen.append(TopPLogitsWarper(self.top_p))
        if self.min_p is not None:
            chosen.append(MinPLogitsWarper(self.min_p))
        return chosen


class TokenChooser:
    """Chooses the next token of one sequence.

    Args:
        sampling: how to choose.
        sequence_index: position of the sequence in the request; decides its random draws.
    """

    def __init__(self, sampling: Sampling, *, sequence_index: int) -> None:
        self._processors = sampling.processors()
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


def _check(name: str, value: object, is_valid: bool, expected: str) -> None:  # noqa: FBT001
    if isinstance(value, bool) or not is_valid:
        raise UsageError(f"--{name} is {value}", expected=expected, code="E-RANGE")
