"""The settings of sampling, checked. Nothing large is imported here: a command refuses what is wrong at once."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from plans.errors import UsageError

if TYPE_CHECKING:
    from transformers import GenerationConfig

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
        frequency_penalty: taken from a token's score as often as it occurred in the answer.
        presence_penalty: taken once from the score of every token that occurred in it.
        logit_bias: token id -> what is added to its score.
        seed: seed of all draws.
        rules: what the checkpoint asks of scores beside these settings, by the names of generation_config.json; see
            `runtime.reading.generation_config.score_rules`.

    Raises:
        UsageError: a value is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0
    rules: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, 0 <= self.temperature < math.inf, "0 (greedy) or a number above 0")
        _check("top-k", self.top_k, self.top_k >= 0, "0 (all tokens) or a count above 0")
        _check("top-p", self.top_p, 0 < self.top_p <= 1, "a number above 0 and up to 1")
        _check("min-p", self.min_p, self.min_p is None or 0 <= self.min_p <= 1, "a number from 0 to 1")
        _check("repetition-penalty", self.repetition_penalty, 0 < self.repetition_penalty < math.inf, "above 0")
        _check("seed", self.seed, 0 <= self.seed <= MAX_SEED, f"an integer from 0 to {MAX_SEED}")

    @property
    def has_adjustments(self) -> bool:
        """Whether scores are changed beyond what transformers does."""
        return bool(self.frequency_penalty or self.presence_penalty or self.logit_bias)

    @property
    def depends_on_tokens(self) -> bool:
        """Whether the scores of a token depend on what the sequence consists of so far, or on where it is."""
        return self.repetition_penalty != 1 or bool(self.rules) or self.has_adjustments

    @property
    def is_greedy(self) -> bool:
        """Whether no random draw is made."""
        return self.temperature == 0

    @classmethod
    def from_generation_config(cls, config: "GenerationConfig", *, seed: int = 0) -> Self:
        """Return what `generate()` would do with the checkpoint's defaults.

        What is stated about drawing is kept where nothing is drawn: it counts once a temperature is given.

        Raises:
            UsageError: a value is out of range.
        """
        from runtime.reading.generation_config import score_rules

        draws = bool(config.do_sample)
        # transformers fills what a checkpoint leaves open with values of its own, top_k=50 among them.
        top_k = (50 if draws else 0) if config.top_k is None else config.top_k
        return cls(
            temperature=(1.0 if config.temperature is None else config.temperature) if draws else 0.0,
            top_k=top_k,
            top_p=config.top_p if config.top_p or (draws and config.top_p is not None) else 1.0,
            min_p=config.min_p,
            repetition_penalty=config.repetition_penalty or 1.0,
            seed=seed,
            rules=score_rules(config),
        )


def _check(name: str, value: object, is_valid: bool, expected: str) -> None:  # noqa: FBT001
    if isinstance(value, bool) or not is_valid:
        raise UsageError(f"--{name} is {value}", expected=expected, code="E-RANGE")
