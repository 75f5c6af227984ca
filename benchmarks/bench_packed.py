"""Packed weights on a CPU: steps and prompts of int4, int8 and bf16, beside llama.cpp's Q4_0, Q8_0 and BF16.

A random 1.1B shape is exported in each way, and converted by llama.cpp's own tool. In every round each variant reads
the weights of a step once with all threads (the machine's limit), makes tokens after a prompt of 128, runs a step of
eight sequences and, in the first rounds, reads prompts; llama.cpp does the same by `llama-bench` (its batch of eight is
eight tokens of one sequence). Figures are medians over the rounds; ratios are medians of the rounds' ratios.

Run: python -m benchmarks.bench_packed --llama-bench PATH/llama-bench --models FOLDER
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import SHAPES, make_checkpoint, timed
from benchmarks.peer import convert

WEIGHTS = {"bf16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}
"""What the layers are packed to, and what llama.cpp calls that."""
PROMPT_TOKENS = (128, 512)
NEW_TOKENS = 16
BATCH = 8
READS = 3
_COMMAND = "import sys; from {0}.cli import main; main()"


def main(arguments: Sequence[str] = ()) -> None:
    """Print a line per measured thing and per ratio that counts."""
    options = _options(arguments)
    with tempfile.TemporaryDirectory(prefix="bench-packed-") as temp:
        folder = options.models or Path(temp)
        folder.mkdir(parents=True, exist_ok=True)
        variants = {weights: Ours(_exported(folder, options.shape, weights)) for weights in options.weights}
        peers = dict(_peers(folder, options)) if options.llama_bench else {}
        rounds = [_round(variants, peers, number, options.prompt_rounds) for number in range(options.rounds)]
        _print_medians(rounds)
        _print_ratios(rounds, variants)


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=SHAPES, default="1.1B")
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=list(WEIGHTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt-rounds", type=int, default=2)
    parser.add_argument("--models", type=Path, help="keep checkpoints and exports here")
    parser.add_argument("--llama-bench", type=Path, help="llama.cpp's program; llama-quantize lies beside it")
    return parser.parse_args(arguments)


Round = dict[str, float]
"""Name of what was measured, such as `int4 step` -> seconds."""


def _round(variants: Mapping[str, "Ours"], peers: Mapping[str, "Peer"], number: int, prompt_rounds: int) -> Round:
    found: Round = {}
    prompts = PROMPT_TOKENS if number < prompt_rounds else ()
    for weights, ours in variants.items():
        found[f"{weights} read"] = statistics.median(ours.read() for _ in range(READS))
        found[f"{weights} step"] = ours.step(1)
        found[f"{weights} step of {BATCH}"] = ours.step(BATCH)
        found |= {f"{weights} prompt {count}": ours.prompt(count) for count in prompts}
        if weights in peers:
            theirs = peers[weights].measure(prompts)
            found |= {f"{WEIGHTS[weights]} {name}": seconds for name, seconds in theirs.items()}
    return found


def _print_medians(rounds: Sequence[Round]) -> None:
    for name in rounds[0]:
        print(f"{name:18} {1000 * _median(rounds, lambda found, name=name: found.get(name)):9.2f} ms", flush=True)


def _print_ratios(rounds: Sequence[Round], variants: Mapping[str, "Ours"]) -> None:
    for weights in variants:
        peer = WEIGHTS[weights]
        pairs = {"of the read limit": (f"{weights} read", f"{weights} step")}
        for what in ("step", f"step of {BATCH}", *(f"prompt {count}" for count in PROMPT_TOKENS)):
            pairs[f"speed of {peer}, {what}"] = (f"{peer} {what}", f"{weights} {what}")
            pairs[f"speed of bf16, {what}"] = (f"bf16 {what}", f"{weights} {what}")
        for words, (above, below) in pairs.items():
            both = [found for found in rounds if above in found and below in found and above != below]
            if both:
                print(f"{weights}: {_median(both, lambda f, a=above, b=below: f[a] / f[b]):5.2f} {words}", flush=True)


def _median(rounds: Sequence[Round], value: Callable[[Round], float | None]) -> float:
    return statistics.median(found for found in map(value, rounds) if found is not None)


class Ours:
    """An export on the fast path, whichever of its two ways is faster here."""

    def __init__(self, export: Path) -> None:
        import torch

        from plans.native.building import Unavailable
        from runtime import load
        from runtime.fast import native

        kernels = native.load(on_build=print)
        if isinstance(kernels, Unavailable):
            raise SystemExit(kernels.reason)
        self._chain: Any = load(export, speed="auto")
        table = {"model.embed_tokens.weight"} - ({"lm_head.weight"} if self._is_tied else set())
        weights = [weight.detach() for name, weight in self._chain.named_parameters() if name not in table]
        threads = torch.get_num_threads()
        self.read = timed(lambda: kernels.read_memory(weights, threads=threads))

    @property
    def _is_tied(self) -> bool:
        return bool(self._chain.config.tie_word_embeddings)

    def step(self, batch: int) -> float:
        """Return the median seconds of a step of `batch` sequences after a prompt."""
        forward = self._forward(batch)
        forward(PROMPT_TOKENS[0])
        return statistics.median(timed(lambda: forward(1))() for _ in range(NEW_TOKENS))

    def prompt(self, count: int) -> float:
        """Return the seconds that a prompt of so many tokens takes."""
        return timed(lambda: self._forward(1)(count))()

    def _forward(self, batch: int) -> Callable[[int], None]:
        import torch
        from transformers import DynamicCache

        cache = DynamicCache(config=self._chain.config)

        @torch.inference_mode()
        def run(num_tokens: int) -> None:
            ids = torch.randint(3, self._chain.config.vocab_size, (batch, num_tokens))
            self._chain(ids, past_key_values=cache, logits_to_keep=1)

        return run


class Peer:
    """llama.cpp on a GGUF file."""

    def __init__(self, model: Path, *, program: Path) -> None:
        self._model, self._program = model, program

    def measure(self, prompts: Sequence[int]) -> dict[str, float]:
        """Return seconds per step, per step of a batch, and per prompt."""
        after = ["-d", str(PROMPT_TOKENS[0])]
        found = {
            "step": self._run("-p", "0", "-n", str(NEW_TOKENS), *after) / NEW_TOKENS,
            f"step of {BATCH}": self._run("-p", str(BATCH), "-n", "0", *after),
        }
        return found | {f"prompt {count}": self._run("-p", str(count), "-n", "0") for count in prompts}

    def _run(self, *arguments: str) -> float:
        import torch

        threads = str(torch.get_num_threads())
        command = [self._program, "-m", self._model, "-t", threads, "-r", "3", "-o", "json", *arguments]
        (result,) = json.loads(_run_tool(command))
        seconds: float = statistics.median(result["samples_ns"]) / 1e9
        return seconds


def _exported(folder: Path, shape: str, weights: str) -> Path:
    """Return the export of a random checkpoint with its layers (and head) packed, made if it is not there."""
    model, target = folder / f"{shape}-bfloat16", folder / f"{shape}-{weights}"
    if not model.is_dir():
        make_checkpoint(SHAPES[shape], folder, dtype="bfloat16")
    if not target.is_dir():
        plan = folder / f"{shape}-{weights}.json"
        solve = ["solve", model, "--device", "cpu=16GiB", "--weights", weights, "-o", plan, "--ctx-size", "2048"]
        for command in (solve, ["export", plan, "--model", model, "-o", target]):
            subprocess.run([sys.executable, "-c", _COMMAND.format("planner"), *command], check=True, stdout=sys.stderr)
    return target


def _peers(folder: Path, options: argparse.Namespace) -> Iterator[tuple[str, Peer]]:
    whole = convert(folder / f"{options.shape}-bfloat16", python=Path(sys.executable))
    for weights in options.weights:
        kind = WEIGHTS[weights]
        model = whole if weights == "bf16" else whole.with_suffix(f".{kind}.gguf")
        if not model.is_file():
            _run_tool([options.llama_bench.with_name("llama-quantize"), whole, model, kind])
        yield weights, Peer(model, program=options.llama_bench)


def _run_tool(command: Sequence[str | Path]) -> str:
    libraries = {"LD_LIBRARY_PATH": str(Path(command[0]).parent)}
    done = subprocess.run(command, check=True, env=os.environ | libraries, stdout=subprocess.PIPE, text=True)
    return done.stdout


if __name__ == "__main__":
    main(sys.argv[1:])
