"""Decode and prefill on a CPU: transformers' `generate()`, llamarun's two paths, and llama.cpp if it is there.

Prompt 128, 64 new greedy tokens. Variants take turns of eight tokens, each on its own cache, until all have made 64;
in every turn the machine also reads the weights of a step once with all its threads, which is its limit. Prefill is
measured in turns before that. A figure is the median of its kind.

llama.cpp: `pip install --no-binary llama-cpp-python llama-cpp-python gguf` into an environment of its own, and give its
interpreter with --llama-cpp; the same weights are converted to GGUF in the same dtype.

Run: python -m benchmarks.bench_decode --shape 1.1B --dtype bfloat16 --batch 1 --models FOLDER
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

from benchmarks.measure import SHAPES, interleave, make_checkpoint, timed
from benchmarks.peer import LlamaCpp, convert

PROMPT_TOKENS = 128
NEW_TOKENS = 64
TURN_TOKENS = 8
PREFILL_ROUNDS = {1: 2}
"""By batch size, after one that does not count; larger batches read their prompts once, and that counts."""
SPEEDS = {"reference": "reference", "fast": "max", "fast, 2 stages": "max", "fast, 4 stages": "max"}
NUM_STAGES = {"fast, 2 stages": 2, "fast, 4 stages": 4}


class Variant(Protocol):
    """Something that reads a prompt and then makes tokens."""

    def prefill(self) -> None:
        """Start anew: read the prompt."""

    def decode(self, count: int) -> list[float]:
        """Make tokens; return the seconds of each."""


def main(arguments: Sequence[str] = ()) -> None:
    """Print the table of what was asked for; without arguments, of everything."""
    import torch

    options = _options(arguments)
    print(f"{torch.get_num_threads()} threads, prompt {PROMPT_TOKENS}, {NEW_TOKENS} new tokens; medians")
    print("shape dtype    batch variant             ms/step  ratio     GB/s  limit   prefill ms  ratio", flush=True)
    with tempfile.TemporaryDirectory() as temp:
        models = options.models or Path(temp)
        for shape in options.shape:
            for dtype in options.dtype:
                folder = models / f"{shape}-{dtype}"
                if not folder.is_dir():
                    make_checkpoint(SHAPES[shape], models, dtype=dtype)
                for batch in options.batch:
                    for line in _cell(folder, batch, options.llama_cpp):
                        print(f"{shape:5} {dtype:8} {batch:5} {line}", flush=True)


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["1.1B", "135M"])
    parser.add_argument("--dtype", nargs="+", choices=("bfloat16", "float32"), default=["bfloat16", "float32"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--models", type=Path, help="keep the checkpoints here")
    parser.add_argument("--llama-cpp", type=Path, help="an interpreter with llama_cpp and gguf")
    return parser.parse_args(arguments)


def _cell(folder: Path, batch: int, llama_cpp: Path | None) -> Iterator[str]:
    import torch

    torch.manual_seed(0)
    variants, read, read_bytes = _variants(folder, batch)
    peer = None
    if llama_cpp is not None:
        ids = torch.randint(3, 1000, (batch, PROMPT_TOKENS)).tolist()
        peer = variants["llama.cpp"] = LlamaCpp(convert(folder, python=llama_cpp), ids, python=llama_cpp)
    rounds = PREFILL_ROUNDS.get(batch, 0)
    readings = {name: timed(v.prefill) for name, v in variants.items()}
    prefill = interleave(readings, rounds=max(1, rounds), warmup=1 if rounds else 0)
    steps: dict[str, list[float]] = {name: [] for name in ("read", *variants)}
    for _ in range(NEW_TOKENS // TURN_TOKENS):
        steps["read"] += [read() for _ in range(3)]
        for name, variant in variants.items():
            steps[name] += variant.decode(TURN_TOKENS)
    medians = {name: statistics.median(seconds) for name, seconds in steps.items()}
    if peer is not None:
        peer.close()
    limit, base = medians.pop("read"), medians["transformers"]
    yield f"{'reading the weights':18} {1000 * limit:8.1f} {base / limit:6.2f} {read_bytes / limit / 1e9:8.1f}"
    for name, step in medians.items():
        yield (
            f"{name:18} {1000 * step:8.1f} {base / step:6.2f} {read_bytes / step / 1e9:8.1f} {limit / step:6.0%}"
            f" {1000 * prefill[name]:12.0f} {prefill['transformers'] / prefill[name]:6.2f}"
        )


def _variants(folder: Path, batch: int) -> tuple[dict[str, Variant], Callable[[], float], int]:
    """Return the variants of this process, a timed reading of the weights of a step, and how many bytes those are."""
    import torch
    from transformers import AutoModelForCausalLM

    from plans.native.building import Unavailable
    from runtime import load
    from runtime.fast import native

    kernels = native.load(on_build=print)
    if isinstance(kernels, Unavailable):
        raise SystemExit(kernels.reason)
    chains = {
        name: load(folder, stages=_stages(folder, NUM_STAGES.get(name, 1)), speed=speed)
        for name, speed in SPEEDS.items()
        if batch == 1 or name not in NUM_STAGES  # what a cut costs does not depend on the batch
    }
    chain = chains["fast"]
    ids = torch.randint(3, chain.config.vocab_size, (batch, PROMPT_TOKENS))
    unsplit = AutoModelForCausalLM.from_pretrained(folder, dtype=chain.dtype).eval()
    variants: dict[str, Variant] = {"transformers": Generate(unsplit, ids)}
    variants |= {name: Llamarun(chain, ids) for name, chain in chains.items()}
    table = set() if chain.config.tie_word_embeddings else {"model.embed_tokens.weight"}
    weights = [weight.detach() for name, weight in chain.named_parameters() if name not in table]
    threads = torch.get_num_threads()
    return variants, timed(lambda: kernels.read_memory(weights, threads=threads)), sum(w.nbytes for w in weights)


def _stages(folder: Path, count: int) -> list[Any]:
    from plans.checkpoint.folder import open_checkpoint
    from plans.stages import StageRange

    num_layers = open_checkpoint(folder).config.num_hidden_layers
    edges = [num_layers * k // count for k in range(count + 1)]
    return [StageRange("cpu", a, b, has_embedding=a == 0, has_head=b == num_layers) for a, b in pairwise(edges)]


class Generate:
    """transformers' `generate()`, a few tokens at a time on one cache; its start is not counted."""

    def __init__(self, model: Any, ids: Any) -> None:
        self._model, self._prompt = model, ids

    def prefill(self) -> None:
        """Read the prompt, and choose one token."""
        from transformers import DynamicCache

        self._ids, self._cache = self._prompt, DynamicCache(config=self._model.config)
        self._times: list[float] = []
        self._generate(1)

    def decode(self, count: int) -> list[float]:
        """Make one token more than asked for: the first one holds the start of `generate()`."""
        self._times = []
        self._generate(count + 1)
        return [b - a for a, b in pairwise(self._times)]

    def _generate(self, count: int) -> None:
        import torch

        def note(input_ids: torch.Tensor, _scores: object, **_: object) -> torch.Tensor:
            self._times.append(time.perf_counter())
            return torch.zeros(len(input_ids), dtype=torch.bool)

        self._ids = self._model.generate(
            self._ids,
            attention_mask=torch.ones_like(self._ids),
            past_key_values=self._cache,
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
            stopping_criteria=[note],
        )


class Llamarun:
    """The commands' own loop, without text."""

    def __init__(self, chain: Any, ids: Any) -> None:
        self._chain, self._prompts = chain, ids.tolist()

    def prefill(self) -> None:
        """Read the prompt, and choose one token."""
        from runtime.engine.engine import Engine
        from runtime.engine.run import BareChain
        from runtime.generate.limits import Limits
        from runtime.generate.request import Request
        from runtime.generate.sampling import Sampling

        total = len(self._prompts[0]) + NEW_TOKENS + 1
        limits = Limits(context_tokens=total)
        self._engine = Engine(
            BareChain(self._chain), num_slots=len(self._prompts), cache_tokens=total, reads_first=True
        )
        for prompt in self._prompts:
            request = Request(prompt_ids=prompt, sampling=Sampling(), limits=limits)
            self._engine.submit(request, on_event=lambda _event: None)
        while self._engine.is_reading:
            self._engine.step()

    def decode(self, count: int) -> list[float]:
        """Make tokens."""
        step = timed(self._engine.step)
        return [step() for _ in range(count)]


if __name__ == "__main__":
    main(sys.argv[1:])
