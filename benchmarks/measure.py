"""How everything here is measured: two or more variants in turn, A B C A B C ..., medians and ratios of medians.

These figures are for a quiet machine; on a shared one only the ratios of interleaved runs mean anything.
"""

import shutil
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

SHIPPED = Path(__file__).parents[1] / "tests" / "checkpoint" / "python-llama"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
PROMPT_IDS = range(500, 2000)
"""What random prompts are drawn from: every model has these, the shipped one too, and none of them ends a text."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A model shape, in the field names of config.json."""

    name: str
    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    vocab_size: int
    tie_word_embeddings: bool = False


SHAPES: Mapping[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape("55M", 8, 512, 8, 4, 1408, 32000),
        Shape("100M", 12, 768, 12, 4, 2048, 16384),
        Shape("135M", 30, 576, 9, 3, 1536, 49152, tie_word_embeddings=True),
        Shape("360M", 24, 960, 15, 5, 2560, 49152, tie_word_embeddings=True),
        Shape("1.1B", 22, 2048, 32, 4, 5632, 32000),
    )
}


def make_checkpoint(shape: Shape, folder: Path, *, dtype: str, seed: int = 0) -> Path:
    """Write a random Llama of the given shape with transformers, and a tokenizer; return its folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(seed)
    config = LlamaConfig(
        num_hidden_layers=shape.num_hidden_layers,
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        intermediate_size=shape.intermediate_size,
        vocab_size=shape.vocab_size,
        tie_word_embeddings=shape.tie_word_embeddings,
        dtype=dtype,
    )
    target = folder / f"{shape.name}-{dtype}"
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(target)
    for name in TOKENIZER:  # commands want one; any will do, since prompts are token ids
        shutil.copy(SHIPPED / name, target)
    return target


def interleave(variants: Mapping[str, Callable[[], float]], *, rounds: int, warmup: int = 1) -> dict[str, float]:
    """Run every variant in turn `rounds` times and return the median of what each returned (seconds)."""
    found = interleave_rounds(variants, rounds=rounds, warmup=warmup)
    return {name: statistics.median(values) for name, values in found.items()}


def interleave_rounds(
    variants: Mapping[str, Callable[[], float]], *, rounds: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Run every variant in turn `rounds` times and return what each returned, by round."""
    results: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(warmup + rounds):
        for name, run in variants.items():
            value = run()
            if number >= warmup:
                results[name].append(value)
    return results


def timed(call: Callable[[], object]) -> Callable[[], float]:
    """Return a function that runs `call` and returns the wall seconds it took."""

    def run() -> float:
        started = time.perf_counter()
        call()
        return time.perf_counter() - started

    return run
