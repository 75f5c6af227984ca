"""What changes scores before a token is chosen: transformers' own processors, in the order `generate()` has them."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, PreTrainedConfig

from plans.errors import InputError, printable
from runtime.generate.sampling import Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How a sequence may end, for rules that look at it.

    Attributes:
        max_length: prompt and new tokens at most.
        eos_token_ids: tokens that end it.
    """

    max_length: int | None = None
    eos_token_ids: tuple[int, ...] = ()


ENDLESS = Ending()


def make_processors(
    sampling: Sampling, *, vocab_size: int, prompt_ids: torch.Tensor, ending: Ending = ENDLESS
) -> LogitsProcessorList:
    """Return the processors of one sequence.

    Args:
        sampling: the settings, and what the checkpoint asks beside them.
        vocab_size: scores per step.
        prompt_ids: [T] the prompt without padding.
        ending: how the sequence may end.

    Raises:
        ValueError, TypeError, IndexError: transformers refuses a rule; see `check_rules`.
    """
    prompt = cast("torch.LongTensor", prompt_ids[None])
    config = _generation_config(sampling, prompt_tokens=prompt.shape[1], ending=ending)
    maker: Any = _maker(vocab_size)
    made: LogitsProcessorList = maker._get_logits_processor(
        generation_config=config, input_ids_seq_length=prompt.shape[1], encoder_input_ids=prompt, device="cpu"
    )
    return made


def check_rules(rules: Mapping[str, Any], *, vocab_size: int, eos_token_ids: Collection[int], where: object) -> None:
    """Try every rule of a checkpoint on scores that are all zero, before a model is loaded for it.

    Args:
        rules: as in `Sampling.rules`.
        vocab_size: scores per step.
        eos_token_ids: tokens that end a sequence.
        where: the file they come from.

    Raises:
        InputError: transformers refuses one; names it and its value.
    """
    prompt = torch.zeros(1, dtype=torch.long)
    # At this length every rule acts on the first token: those about the beginning, and those about the last one.
    ending = Ending(max_length=2, eos_token_ids=tuple(sorted(eos_token_ids)))
    for name, value in rules.items():
        sampling = Sampling(temperature=1.0, rules={name: value})
        try:
            processors = make_processors(sampling, vocab_size=vocab_size, prompt_ids=prompt, ending=ending)
            processors(cast("torch.LongTensor", prompt[None]), cast("torch.FloatTensor", torch.zeros(1, vocab_size)))
        except Exception as error:  # each processor has exceptions of its own
            shown, why = printable(value, limit=60), printable(" ".join(f"{error}".split()), limit=200)
            raise InputError(
                f"transformers cannot do {shown}: {why}", where=f"{where}:/{name}", code="E-CONFIG"
            ) from None


class _Maker(GenerationMixin):
    """The part of a model that makes processors: it looks at nothing but the configuration."""

    def __init__(self, vocab_size: int) -> None:
        self.config = PreTrainedConfig()
        self.config.vocab_size = vocab_size


@cache
def _maker(vocab_size: int) -> _Maker:
    return _Maker(vocab_size)


def _generation_config(sampling: Sampling, *, prompt_tokens: int, ending: Ending) -> GenerationConfig:
    rules = dict(sampling.rules)
    if rules.get("min_new_tokens") is not None:
        rules["min_length"] = prompt_tokens + rules["min_new_tokens"]  # it goes before min_length
    if not ending.eos_token_ids:
        rules.pop("exponential_decay_length_penalty", None)  # nothing to make likelier
    drawing: dict[str, Any] = {}
    if not sampling.is_greedy:
        names = ("temperature", "top_k", "top_p", "min_p")
        drawing = {"do_sample": True} | {name: getattr(sampling, name) for name in names}
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        repetition_penalty=sampling.repetition_penalty, max_length=ending.max_length, **drawing, **rules
    )
    config._eos_token_tensor = torch.tensor(ending.eos_token_ids) if ending.eos_token_ids else None
    return config
