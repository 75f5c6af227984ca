"""How one sequence's next token is chosen: transformers' own processors, and one CPU generator per sequence.

Every sequence draws from a generator of its own, seeded from (seed, sequence index): its tokens depend neither on how
sequences were batched nor on what else is running. Sequence 0 uses the seed itself, so that at batch 1 the tokens are
those of `torch.manual_seed(seed)` followed by `generate()`.
"""

import hashlib
from typing import NoReturn, cast

import torch
from transformers import LogitsProcessorList

from plans.errors import NumericalError
from runtime.generate.rules import ENDLESS, Ending, make_processors
from runtime.generate.sampling import Sampling


class TokenChooser:
    """Chooses the next token of one sequence.

    Args:
        sampling: how to choose.
        sequence_index: position of the sequence in the request; decides its random draws.
        ending: how the sequence may end.
    """

    def __init__(self, sampling: Sampling, *, sequence_index: int, ending: Ending = ENDLESS) -> None:
        self._sampling, self._ending = sampling, ending
        self._processors: LogitsProcessorList | None = None
        self._num_prompt_tokens = 0
        self._generator: torch.Generator | None = None
        if not sampling.is_greedy:
            self._generator = torch.Generator().manual_seed(sequence_seed(sampling.seed, sequence_index))

    @property
    def is_plain_argmax(self) -> bool:
        """Whether the choice is the largest logit and nothing else."""
        return not self._sampling.depends_on_tokens and self._sampling.is_greedy

    def choose(self, logits: torch.Tensor, *, token_ids: torch.Tensor) -> int:
        """Return the next token; the first time, `token_ids` is the prompt.

        Args:
            logits: fp32 [V] of the last position, on the CPU.
            token_ids: [T] everything the sequence consists of so far, without padding.

        Raises:
            NumericalError: no token is left to choose from.
        """
        if self._processors is None:
            self._num_prompt_tokens = len(token_ids)
            self._processors = make_processors(
                self._sampling, vocab_size=logits.shape[-1], prompt_ids=token_ids, ending=self._ending
            )
        logits = adjusted(logits, self._sampling, new_ids=token_ids[self._num_prompt_tokens :])
        ids, scores = cast("torch.LongTensor", token_ids[None]), cast("torch.FloatTensor", logits[None])
        processed: torch.Tensor = self._processors(ids, scores)
        if self._generator is None:
            best = int(torch.argmax(processed, dim=-1))
            return best if processed[0, best] > -torch.inf else self._refuse()
        probabilities = torch.softmax(processed, dim=-1)
        if not torch.isfinite(probabilities).all():
            self._refuse()
        return int(torch.multinomial(probabilities, num_samples=1, generator=self._generator))

    def _refuse(self) -> NoReturn:
        raise nothing_left(self._sampling)


def nothing_left(sampling: Sampling) -> NumericalError:
    """Return what is wrong when the settings leave no token to choose from."""
    rules = "".join(f", {name}" for name in sampling.rules)
    return NumericalError(
        "the sampling settings leave no token to choose from",
        hint=f"raise --temp, --top-p or --top-k{' or change generation_config.json: ' * bool(rules)}{rules[2:]}",
        code="E-MASKED",
    )


def adjusted(logits: torch.Tensor, sampling: Sampling, *, new_ids: torch.Tensor) -> torch.Tensor:
    """Return logits [V] with the biases added and what the answer has said already made less likely.

    A token that occurred n times in the answer loses n times the frequency penalty and once the presence penalty, as
    the OpenAI API has it; the prompt does not count.
    """
    if not sampling.has_adjustments:
        return logits
    logits = logits.clone()
    counts = torch.bincount(new_ids, minlength=len(logits)).to(logits.dtype)
    logits -= sampling.frequency_penalty * counts + sampling.presence_penalty * (counts > 0)
    for token_id, bias in sampling.logit_bias.items():
        logits[token_id] += bias
    return logits


def sequence_seed(seed: int, sequence_index: int) -> int:
    """Return the seed of one sequence's generator: the seed itself for the first, a hash for the others."""
    if sequence_index == 0:
        return seed
    digest = hashlib.sha256(f"{seed}/{sequence_index}".encode()).digest()
    return int.from_bytes(digest[:8], "big")
