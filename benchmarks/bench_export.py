"""`llamaplan export` against copying the files, and against loading and saving the model with transformers.

Weights go out as they are, and rounded to int8 and int4; the int4 export is also verified against its model.

Run: python -m benchmarks export          needs 12 GB of free disk; 36 GB with the 7B shape
     python -m benchmarks.bench_export --quick          without transformers, and 5 GB of memory less

Every variant ends with the bytes on disk (fsync or sync) and runs as a process of its own, in turn with the others.
The 7B checkpoint is made of holes: it measures memory, not time.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.measure import SHAPES, Shape, make_checkpoint

ROUNDS = 5
WIDTHS = ("int8", "int4")
SHAPE_7B = Shape("7B", 32, 4096, 32, 32, 11008, 32000)

_MEASURE = """
import resource, subprocess, sys, time
began = time.perf_counter()
subprocess.run(sys.argv[1:], check=True, stdout=sys.stderr)
elapsed, used = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
print(elapsed, used.ru_utime + used.ru_stime, used.ru_maxrss << 10)
"""
_LLAMAPLAN = "from planner.cli import main; main()"
_SAVE = """
import os, sys, torch
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16).save_pretrained(sys.argv[2])
os.sync()
"""


@dataclass(frozen=True, slots=True)
class Used:
    """What one command needed."""

    seconds: float
    cpu_seconds: float
    """Of all its threads; unlike the seconds, hardly changed by what else runs on the machine."""
    peak_bytes: int


def main() -> None:
    """Print seconds, ratios and peak memory."""
    with tempfile.TemporaryDirectory(prefix="bench-export-") as temp:
        folder = Path(temp)
        model = make_checkpoint(SHAPES["1.1B"], folder, dtype="bfloat16")
        plan = _plan(model, folder, layers=[8, 7, 7])
        plans = {width: _plan(model, folder, layers=[8, 7, 7], weights=width) for width in WIDTHS}
        size = sum(path.stat().st_size for path in model.iterdir())
        print(f"{size / 1e9:.2f} GB bf16 in 3 stages; median of {ROUNDS} interleaved runs, ended by fsync or sync")
        target, packed = folder / "target", folder / "packed"
        _run(_export(plans["int4"], model, packed))
        variants = {
            "cp + sync": lambda: _run(["sh", "-c", f"cp -r '{model}' '{target}' && sync"]),
            "export": lambda: _run(_export(plan, model, target)),
            **{f"export {width}": partial(_exported, plans[width], model, target) for width in WIDTHS},
            "verify int4": lambda: _run(_llamaplan("verify", packed, "--model", model)),
            "save_pretrained": lambda: _run([sys.executable, "-c", _SAVE, str(model), str(target)]),
        }
        if "--quick" in sys.argv[1:]:
            del variants["save_pretrained"]
        _report(variants, target)
        if "--7b" in sys.argv[1:] or shutil.disk_usage(folder).free > 60 << 30:
            _seven_billion(folder)


def _report(variants: dict[str, Callable[[], Used]], target: Path) -> None:
    runs: dict[str, list[Used]] = {name: [] for name in variants}
    for _ in range(ROUNDS):
        for name, run in variants.items():
            shutil.rmtree(target, ignore_errors=True)
            os.sync()
            runs[name].append(run())
    base = statistics.median(used.seconds for used in runs["cp + sync"])
    for name, values in runs.items():
        seconds = sorted(used.seconds for used in values)
        middle, cpu = statistics.median(seconds), statistics.median(used.cpu_seconds for used in values)
        peak = max(used.peak_bytes for used in values) >> 20
        print(
            f"  {name:16} {middle:6.2f} s ({seconds[0]:.2f}-{seconds[-1]:.2f})  x{middle / base:.2f} of cp  "
            f"{cpu:.2f} s of CPU  peak {peak} MiB"
        )


def _export(plan: Path, model: Path, target: Path) -> list[str]:
    return _llamaplan("export", plan, "--model", model, "-o", target, "-q", "--force")


def _llamaplan(*arguments: object) -> list[str]:
    return [sys.executable, "-c", _LLAMAPLAN, *map(str, arguments)]


def _exported(plan: Path, model: Path, target: Path) -> Used:
    return _run(_export(plan, model, target))


def _run(command: list[str]) -> Used:
    """Run a command and return what it used.

    A small process in between asks for the peak, since RUSAGE_CHILDREN covers all children and never falls.
    """
    done = subprocess.run([sys.executable, "-c", _MEASURE, *command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    elapsed, cpu, peak = done.stdout.split()[-3:]
    return Used(float(elapsed), float(cpu), int(peak))


def _plan(model: Path, folder: Path, *, layers: list[int], weights: Any = None) -> Path:
    from planner.api import solve_model

    path = folder / f"plan-{model.name}-{weights}.json"
    plan = solve_model(
        model, devices=["cuda:0=20GiB", "cuda:1=20GiB", "cuda:2=20GiB"], layers=layers, ctx_size=512, weights=weights
    )
    path.write_text(plan.to_json())
    return path


def _seven_billion(folder: Path) -> None:
    """Export a checkpoint of the 7B shape in three shards full of holes and print the peak memory."""
    model = folder / "7B"
    size = _write_holes(SHAPE_7B, model)
    plan = _plan(model, folder, layers=[11, 11, 10])
    used = _run(_export(plan, model, folder / "out"))
    print(f"{size / 1e9:.2f} GB (holes) in 3 stages: {used.seconds:.1f} s, peak {used.peak_bytes >> 20} MiB")


def _write_holes(shape: Shape, folder: Path) -> int:
    """Write a checkpoint whose weights are holes in sparse files; return its size."""
    folder.mkdir()
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "dtype": "bfloat16",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    rows = list(_shapes(shape).items())
    weight_map: dict[str, str] = {}
    third = -(-len(rows) // 3)
    for number in range(3):
        part = dict(rows[number * third : (number + 1) * third])
        name = f"model-{number + 1:05d}-of-00003.safetensors"
        _write_sparse(folder / name, part)
        weight_map |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sum(path.stat().st_size for path in folder.iterdir())


def _shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    width, kv = shape.hidden_size, shape.hidden_size * shape.num_key_value_heads // shape.num_attention_heads
    layer = {
        "input_layernorm.weight": (width,),
        "mlp.down_proj.weight": (width, shape.intermediate_size),
        "mlp.gate_proj.weight": (shape.intermediate_size, width),
        "mlp.up_proj.weight": (shape.intermediate_size, width),
        "post_attention_layernorm.weight": (width,),
        "self_attn.k_proj.weight": (kv, width),
        "self_attn.o_proj.weight": (width, width),
        "self_attn.q_proj.weight": (width, width),
        "self_attn.v_proj.weight": (kv, width),
    }
    layers = {f"model.layers.{i}.{name}": s for i in range(shape.num_hidden_layers) for name, s in layer.items()}
    table = (shape.vocab_size, width)
    return {"model.embed_tokens.weight": table, **layers, "model.norm.weight": (width,), "lm_head.weight": table}


def _write_sparse(path: Path, tensors: dict[str, tuple[int, ...]]) -> None:
    table, position = {}, 0
    for name, shape in tensors.items():
        size = 2
        for length in shape:
            size *= length
        table[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(table).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + position)


if __name__ == "__main__":
    main()
