"""Decode on a CPU: the native kernels against transformers' `generate()` and against reading the weights once.

Shapes x dtypes x batch sizes, prompt 128. In every round the machine first reads all weights of a step once with all
threads (its limit), then each variant makes a few greedy tokens; a cell is the median over all tokens of all rounds.

Run: python -m benchmarks decode
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.measure import SHAPES, interleave, make_checkpoint

PROMPT_TOKENS = 128
TOKENS_PER_ROUND = 6
ROUNDS = 5
BATCHES = (1, 8)
DTYPES = ("bfloat16", "float32")


@dataclass(frozen=True, slots=True)
class Cell:
    """Median seconds of one shape, dtype and batch size; bytes are the weights that a step reads."""

    weight_bytes: int
    read: float
    transformers: float
    native: float

    def line(self) -> str:
        """Return the columns after shape, dtype and batch."""
        return (
            f"{1000 * self.transformers:12.1f} {1000 * self.native:9.1f} {self.transformers / self.native:7.2f}"
            f" {self.weight_bytes / self.native / 1e9:7.1f} {self.weight_bytes / self.read / 1e9:7.1f}"
            f" {self.read / self.native:7.0%}"
        )


def main() -> None:
    """Print the table."""
    import torch

    print(f"decode, {torch.get_num_threads()} threads, prompt {PROMPT_TOKENS}; milliseconds per step, GB/s of weights")
    print("shape  dtype     batch transformers   native   ratio    GB/s machine   share")
    with tempfile.TemporaryDirectory() as temp:
        for shape in ("1.1B", "135M"):
            for dtype in DTYPES:
                folder = make_checkpoint(SHAPES[shape], Path(temp), dtype=dtype)
                for batch, cell in _cells(folder):
                    print(f"{shape:6} {dtype:9} {batch:5} {cell.line()}", flush=True)


def _cells(folder: Path) -> Iterator[tuple[int, Cell]]:
    import torch
    from transformers import AutoModelForCausalLM

    from runtime import native
    from runtime.fast_setup import whole
    from runtime.loading import load
    from runtime.speed import Choice

    kernels = native.load(on_build=print)
    if isinstance(kernels, native.Unavailable):
        raise SystemExit(kernels.reason)
    chain = load(folder)
    fast = whole(chain, kernels, Choice(((max(BATCHES), torch.get_num_threads()),)))
    unsplit = AutoModelForCausalLM.from_pretrained(folder, dtype=chain.dtype).eval()
    table = set() if chain.config.tie_word_embeddings else {"model.embed_tokens.weight"}
    weights = [weight.detach() for name, weight in chain.named_parameters() if name not in table]
    for batch in BATCHES:
        cache, ids = _prompt(fast, chain, batch=batch)
        variants: dict[str, Callable[[], float]] = {
            "read": lambda: _seconds(lambda: kernels.read_memory(weights, threads=torch.get_num_threads())),
            "transformers": lambda ids=ids, cache=cache: _generate(unsplit, ids, cache),
            "native": lambda ids=ids, cache=cache: _steps(fast, ids, cache),
        }
        medians = interleave(variants, rounds=ROUNDS)
        yield batch, Cell(weight_bytes=sum(w.nbytes for w in weights), **medians)


def _prompt(fast: Any, chain: Any, *, batch: int) -> tuple[Any, Any]:
    """Read all but the last token of random prompts; returns the cache, to be copied before use, and the tokens."""
    import torch
    from transformers import DynamicCache

    ids = torch.randint(3, chain.config.vocab_size, (batch, PROMPT_TOKENS))
    cache = DynamicCache(config=chain.config)
    fast.step(ids[:, :-1], attention_mask=None, position_ids=None, cache=cache)
    return cache, ids


def _copy(cache: Any) -> Any:
    from transformers import DynamicCache

    copy = DynamicCache()
    for index, layer in enumerate(cache.layers):
        copy.update(layer.keys, layer.values, index)
    return copy


def _generate(model: Any, ids: Any, cache: Any) -> float:
    """Return the median seconds per token of `generate()`, its first token left out."""
    import torch

    times: list[float] = []

    def note(input_ids: torch.Tensor, _scores: object, **_: object) -> torch.Tensor:
        times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)

    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=_copy(cache),
        max_new_tokens=TOKENS_PER_ROUND + 1,
        min_new_tokens=TOKENS_PER_ROUND + 1,
        do_sample=False,
        pad_token_id=0,
        stopping_criteria=[note],
    )
    return statistics.median(b - a for a, b in pairwise(times))


def _steps(fast: Any, ids: Any, cache: Any) -> float:
    """Return the median seconds per greedy token of the native kernels, the first one left out."""
    import torch

    cache, mask, times = _copy(cache), torch.ones_like(ids), []
    newest = ids[:, -1:]
    for _ in range(TOKENS_PER_ROUND + 1):
        logits = fast.step(newest, attention_mask=mask, position_ids=None, cache=cache)
        newest = logits.float().argmax(-1)
        mask = torch.cat([mask, torch.ones_like(newest)], dim=1)
        times.append(time.perf_counter())
    return statistics.median(b - a for a, b in pairwise(times))


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
