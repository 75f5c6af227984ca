"""What the KV cache saves, and what it costs over many tokens.

With and without a cache for 20 and 50 new tokens: total time, mean step, first token, and how much a step grows from
the first fifth to the last. Then 500 tokens on the cache: how much a step grows beside the bytes that attention adds.

Run: python -m benchmarks.bench_cache --models FOLDER
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import SHAPES, SHIPPED, make_checkpoint, timed

PROMPT_TOKENS = 16
COUNTS = (20, 50)
LONG = 500


def main(arguments: Sequence[str] = ()) -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", type=Path, help="keep the checkpoints here")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temp:
        models = options.models or Path(temp)
        large = models / "135M-bfloat16"
        if not large.is_dir():
            make_checkpoint(SHAPES["135M"], models, dtype="bfloat16")
        for folder in (SHIPPED, large):
            _compare(folder)
            _long(folder)


def _compare(folder: Path) -> None:
    print(f"{folder.name}, bf16, prompt {PROMPT_TOKENS}")
    print("  new tokens  path       cache   total s   mean step ms   first token ms   growth of a step", flush=True)
    for count in COUNTS:
        for path, speed in (("reference", "reference"), ("fast", "max")):
            for has_cache in (True, False):
                if path == "fast" and not has_cache:
                    continue  # without a cache every step is a prompt, which transformers reads
                first, *rest = _run(folder, speed, count, has_cache=has_cache)
                fifth = max(1, len(rest) // 5)
                growth = statistics.median(rest[-fifth:]) / statistics.median(rest[:fifth])
                print(
                    f"  {count:10}  {path:9}  {'yes' if has_cache else 'no':5} {first + sum(rest):9.2f}"
                    f" {1000 * statistics.mean(rest):14.2f} {1000 * first:16.2f} {growth:12.2f} x",
                    flush=True,
                )


def _long(folder: Path) -> None:
    from runtime import load

    chain = load(folder)
    config, weights = chain.config, sum(p.nbytes for p in chain.parameters())
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * chain.dtype.itemsize
    print(f"  {LONG} tokens: attention adds {per_token * LONG / weights:.1%} to the bytes of a step")
    for path, speed in (("reference", "reference"), ("fast", "max")):
        _, *steps = _run(folder, speed, LONG, has_cache=True)
        early, late = statistics.median(steps[:50]), statistics.median(steps[-50:])
        growth = f"{late / early:.2f} x, {1000 * (late - early):+.2f} ms"
        print(f"  {path:9} steps 1-50 {1000 * early:.2f} ms, 450-500 {1000 * late:.2f} ms: {growth}", flush=True)


def _run(folder: Path, speed: str, count: int, *, has_cache: bool) -> list[float]:
    """Return the seconds of each token, the first with the prompt, of the second of two runs."""
    import torch
    from transformers import DynamicCache

    from runtime import load

    chain = load(folder, speed=speed)
    seconds: list[float] = []
    for _ in range(2):
        ids = torch.arange(5, 5 + PROMPT_TOKENS)[None]
        step = _stepper(chain, ids, DynamicCache(config=chain.config) if has_cache else None)
        with torch.inference_mode():
            seconds = [timed(step)() for _ in range(count)]
    return seconds


def _stepper(chain: Any, ids: Any, cache: Any) -> Callable[[], None]:
    """Return what makes one more greedy token."""
    import torch

    tokens, new = ids, ids

    def step() -> None:
        nonlocal tokens, new
        given = tokens if cache is None else new
        logits = chain(given, past_key_values=cache, use_cache=cache is not None, logits_to_keep=1).logits
        new = logits[:, -1:].argmax(-1)
        tokens = torch.cat([tokens, new], dim=1)

    return step


if __name__ == "__main__":
    main(sys.argv[1:])
