"""What the chain costs: 1, 2 and 4 stages in one process against the unsplit model's `generate()`.

Run: python -m benchmarks chain
"""

import itertools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.measure import SHAPES, interleave, make_checkpoint

PROMPT_TOKENS = 64
NEW_TOKENS = 48
ROUNDS = 7


def main() -> None:
    """Print milliseconds per token and the ratio to the unsplit model."""
    import torch

    print(
        f"chain against unsplit generate(): prompt {PROMPT_TOKENS}, {NEW_TOKENS} new tokens, greedy, median of {ROUNDS}"
    )
    with tempfile.TemporaryDirectory() as temp:
        for name, dtype in (("100M", "float32"), ("100M", "bfloat16")):
            folder = make_checkpoint(SHAPES[name], Path(temp), dtype=dtype)
            results = interleave(_variants(folder, SHAPES[name].num_hidden_layers), rounds=ROUNDS)
            base = results["unsplit"]
            for variant, seconds in results.items():
                per_token = 1000 * seconds / NEW_TOKENS
                threads = torch.get_num_threads()
                print(
                    f"  {name} {dtype:8} {threads} threads  {variant:9} {per_token:7.2f} ms/token  x{seconds / base:.3f}"
                )


def _variants(folder: Path, num_layers: int) -> dict[str, Callable[[], float]]:
    from runtime.loading import load
    from runtime.parity import load_unsplit
    from runtime.ranges import StageRange

    unsplit = load_unsplit(folder, dtype=load(folder).dtype)
    variants = {"unsplit": _generation(unsplit)}
    for num_stages in (1, 2, 4):
        edges = [num_layers * k // num_stages for k in range(num_stages + 1)]
        stages = [
            StageRange("cpu", start, end, has_embedding=start == 0, has_head=end == num_layers)
            for start, end in itertools.pairwise(edges)
        ]
        variants[f"{num_stages} stages"] = _generation(load(folder, stages=stages))
    return variants


def _generation(model: object) -> Callable[[], float]:
    import torch

    ids = torch.arange(PROMPT_TOKENS)[None] % 1000

    def run() -> float:
        started = time.perf_counter()
        model.generate(ids, do_sample=False, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, pad_token_id=0)
        return time.perf_counter() - started

    return run
