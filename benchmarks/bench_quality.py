"""What fewer bits cost: mean KL per token to the model as it was, against GGUF's Q4_0 and Q8_0.

Run: python -m benchmarks quality, or python -m benchmarks.bench_quality MODEL ... for other checkpoints

The shipped model reads Python it was not trained on and is calibrated on some it was; other models read every second of
Python's help topics and are calibrated on the rest. Both sides compute in fp32. Packed are the layers, and in int8 and
int4 a head with a table of its own; Q4_0 and Q8_0 are of the layers alone, by the package `gguf`, which rounds as
llama.cpp's llama-quantize does.
"""

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.measure import SHIPPED

NUM_TOKENS = 8192
WINDOW_TOKENS = 512
GROUP = 32
CALIBRATION_CHARACTERS = 1_000_000


def main() -> None:
    """Print a table per model."""
    models = [Path(text) for text in sys.argv[1:] if Path(text).is_dir()] or [SHIPPED]
    for model in models:
        with tempfile.TemporaryDirectory(prefix="bench-quality-") as temp:
            _one(model, Path(temp))


def _one(model: Path, folder: Path) -> None:
    import torch

    from runtime.stages.parity import load_unsplit

    calibration, reading = _texts(is_shipped=model.resolve() == SHIPPED.resolve())
    text = folder / "calibration.txt"
    text.write_text(calibration, encoding="utf-8")
    original = load_unsplit(model, dtype=torch.float32)
    windows = _windows(model, reading)
    print(f"{model.name}: {sum(map(len, windows))} tokens in windows of {WINDOW_TOKENS}")
    for name, make in _variants(model, folder, text, original).items():
        began = time.perf_counter()
        changed = make()
        seconds = time.perf_counter() - began
        _print_row(name, changed, original, windows, seconds)


def _print_row(name: str, changed: Any, original: Any, windows: list[list[int]], seconds: float) -> None:
    from runtime.stages.distance import measure_distance

    found = measure_distance(changed, original, windows)
    share = found.num_different / found.num_tokens
    print(f"  {name:18} KL {found.mean_kl:.2e}  other tokens {share:6.2%}  made in {seconds:.0f} s", flush=True)


def _variants(model: Path, folder: Path, text: Path, original: Any) -> dict[str, Callable[[], Any]]:
    return {
        "Q8_0": lambda: _as_gguf(original, "Q8_0"),
        "int8": lambda: _exported(model, folder / "int8", "int8", None),
        "int8 calibrated": lambda: _exported(model, folder / "int8c", "int8", text),
        "Q4_0": lambda: _as_gguf(original, "Q4_0"),
        "int4": lambda: _exported(model, folder / "int4", "int4", None),
        "int4 calibrated": lambda: _exported(model, folder / "int4c", "int4", text),
    }


def _exported(model: Path, output: Path, weights: Any, text: Path | None) -> Any:
    from exporter import export
    from planner.api import solve_model
    from runtime.session import load

    plan = solve_model(model, devices=["cpu=64GiB"], weights=weights, ctx_size=WINDOW_TOKENS)
    export(plan, model=model, output=output, calibrate_on=text)
    return load(output, dtype="fp32")


def _as_gguf(original: Any, kind: str) -> Any:
    """Return a copy of a model whose layers were stored in a type of GGUF."""
    import copy

    import torch
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    changed, stored = copy.deepcopy(original), GGMLQuantizationType[kind]
    for name, weight in changed.named_parameters():
        if "_proj" in name and weight.dim() == 2 and weight.shape[1] % GROUP == 0:
            rounded = dequantize(quantize(weight.detach().numpy(), stored), stored)
            weight.data = torch.from_numpy(rounded)
    return changed


def _windows(model: Path, text: str) -> list[list[int]]:
    from runtime.reading.tokenizer import encode_prompt, load_tokenizer

    tokenizer = load_tokenizer(model, vocab_size=1 << 30)
    tokenizer.model_max_length = len(text) + 1
    ids = encode_prompt(tokenizer, text[: NUM_TOKENS * 16], parses_special=False)[:NUM_TOKENS]
    return [ids[start : start + WINDOW_TOKENS] for start in range(0, len(ids), WINDOW_TOKENS)]


def _texts(*, is_shipped: bool) -> tuple[str, str]:
    """Return what is calibrated on, and what is read."""
    first, second = _documents(is_shipped=is_shipped)
    return "\n".join(first)[:CALIBRATION_CHARACTERS], "\n".join(second)


def _documents(*, is_shipped: bool) -> tuple[Iterator[str], Iterator[str]]:
    from tests.checkpoint.corpus import name_number, read_documents

    documents = sorted(read_documents(), key=lambda document: name_number(document.name))
    if is_shipped:
        return (d.text for d in documents if not d.is_held_out), (d.text for d in documents if d.is_held_out)
    topics = [document.text for document in documents if document.name.startswith("topic:")]
    return iter(topics[0::2]), iter(topics[1::2])


if __name__ == "__main__":
    main()
