"""Comparing a cut model with transformers itself, bit for bit.

The protocol every comparison runs: a left-padded batch, the prompt read in chunks (logits of all positions compared),
then greedy tokens one by one (logits of every step compared).
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedConfig, PreTrainedModel

from plans.stages import StageRange
from runtime.stages.stage import Stage

CPU = torch.device("cpu")
NUM_PADDING = (0, 4, 7)
PROMPT_TOKENS = 11
CHUNKS = ((0, 4), (4, 8), (8, 11))

Step = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(new token ids [B, S], mask [B, T], positions [B, S]) -> logits [B, S, V]; keeps its own cache."""


def all_cuts(num_layers: int, num_stages: int) -> Iterator[tuple[StageRange, ...]]:
    """Every way to cut embedding, layers and head into contiguous, non-empty stages."""
    num_units = num_layers + 2
    for inner in itertools.combinations(range(1, num_units), num_stages - 1):
        edges = (0, *inner, num_units)
        yield tuple(as_stage(a, b, num_layers=num_layers) for a, b in itertools.pairwise(edges))


def as_stage(start: int, end: int, *, num_layers: int, device: str = "cpu") -> StageRange:
    """The stage that holds units [start, end), unit 0 being the embedding and the last one the head."""
    first, last = max(start - 1, 0), min(end - 1, num_layers)
    return StageRange(device, first, max(first, last), has_embedding=start == 0, has_head=end == num_layers + 2)


def some_cut(num_layers: int, num_stages: int, *, seed: int) -> tuple[StageRange, ...]:
    """One of `all_cuts`, chosen by `seed`."""
    cuts = list(all_cuts(num_layers, num_stages))
    return cuts[seed % len(cuts)]


def save_model(config: PreTrainedConfig, folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """Write a random checkpoint of a family, made by transformers."""
    torch.manual_seed(seed)
    model: Any = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Wider than the usual initialisation: norms and biases that are all ones or zeros would hide mistakes.
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 0.5) + ("norm" in name))
    model.to(dtype).save_pretrained(folder)
    return folder


def reference_model(folder: Path, *, dtype: torch.dtype) -> Any:
    """The unsplit model, as transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def model_step(model: PreTrainedModel) -> Step:
    """Step a whole model (or a chain)."""
    cache = DynamicCache(config=model.config)

    def step(ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        ).logits
        return logits

    return step


def stages_step(stages: Sequence[Stage]) -> Step:
    """Step stages that know nothing of each other, as separate processes would."""
    caches = [stage.new_cache() for stage in stages]

    def step(ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        value = ids
        for stage, cache in zip(stages, caches, strict=True):
            value = stage(value, attention_mask=mask, position_ids=positions, cache=cache)
        return value

    return step


def trace(step: Step, *, vocab_size: int, num_tokens: int, padded: bool = True) -> list[torch.Tensor]:
    """Run the protocol; returns the logits of every chunk and of every greedy step."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(4, vocab_size, (3, PROMPT_TOKENS), generator=generator)
    start = torch.tensor(NUM_PADDING if padded else (0, 0, 0))[:, None]
    logits = []
    with torch.inference_mode():
        for chunk_start, chunk_end in CHUNKS:
            logits.append(_step(step, ids, start, chunk_start, chunk_end))
        for _ in range(num_tokens):
            ids = torch.cat([ids, logits[-1][:, -1:].argmax(-1)], dim=-1)
            logits.append(_step(step, ids, start, ids.shape[1] - 1, ids.shape[1]))
    return logits


def _step(step: Step, ids: torch.Tensor, start: torch.Tensor, begin: int, end: int) -> torch.Tensor:
    columns = torch.arange(end)[None]
    mask = (columns >= start).long()
    return step(ids[:, begin:end], mask, (columns - start).clamp(min=0)[:, begin:end])


def assert_same(expected: Sequence[torch.Tensor], found: Sequence[torch.Tensor]) -> None:
    """Every logit equal, bit for bit (padded rows included), and none of them NaN."""
    assert len(expected) == len(found)
    for index, (a, b) in enumerate(zip(expected, found, strict=True)):
        assert torch.equal(a, b), f"forward {index}: largest difference {(a - b).abs().max()}"
