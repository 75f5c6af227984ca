"""Files of the planner and of exports: checkpoints, profiles, clusters, plans, runs, requests, manifests."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

from exporter import export
from planner.devices.budgets import with_budgets
from planner.model import formula
from planner.model.profile import build_profile
from plans.check import read_plan
from plans.checkpoint.folder import open_checkpoint
from plans.checkpoint.header import read_header
from plans.cluster import Cluster
from plans.config.config import parse_config
from plans.export.manifest import MANIFEST_NAME
from plans.export.opening import open_export
from plans.profile import ModelProfile
from plans.reading.files import sha256_hex
from plans.reading.strict import StrictModel, dump_json
from plans.run import Bench, Run, read_run
from plans.workload import Workload, read_requests
from tests.hostile.fuzz_reader import Reader, reader, reads_back
from tests.hostile.mutations import NUMBERS, mutate_bytes, mutate_document, mutate_lines
from tests.planner.cases import TINY, make_plan, write_checkpoint, write_safetensors
from tests.planner.measure.test_calibrate import document

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "tests" / "checkpoint" / "python-llama"
EXAMPLES = ROOT / "plans" / "examples"

CONFIGS: tuple[dict[str, Any], ...] = (
    TINY,
    TINY | {"model_type": "gemma2", "tie_word_embeddings": True, "sliding_window": 16, "max_position_embeddings": 64},
    TINY | {"model_type": "qwen3", "layer_types": ["full_attention", "sliding_attention"] * 2, "sliding_window": 8},
    TINY | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    TINY | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
    TINY | {"rope_parameters": {"rope_theta": 1e4, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                                "high_freq_factor": 4.0, "original_max_position_embeddings": 64}},
    TINY | {"quantization_config": {"quant_method": "gptq", "bits": 4}},
)  # fmt: skip
KNOWN_KEYS: dict[str, Sequence[Any]] = {
    "sliding_window": NUMBERS,
    "layer_types": (["full_attention"] * 4, ["sliding_attention"] * 4, [[]] * 4, [None] * 4, "full_attention", {}),
    "use_sliding_window": (True, False, 0, "no"),
    "max_window_layers": NUMBERS,
    "rope_scaling": ({"type": "longrope", "short_factor": [], "long_factor": {}}, {"factor": 2}, {"x": {"type": []}}),
    "rope_parameters": ({"a": {"rope_type": "linear", "factor": 1e400}, "b": {}}, {"rope_type": {}}, [1], "x"),
    "quantization_config": ({"quant_method": "x" * 500}, {"quant_method": ["fp8"]}, "int8", 4, [], {}),
    "architectures": ([], [None], "LlamaForCausalLM", [["x"]], [""], {"0": 1}),
    "num_experts": NUMBERS,
    "num_local_experts": NUMBERS,
    "head_dim": NUMBERS,
    "attn_implementation": ("org/kernels", "sdpa", [], {}, {"a": "b"}, 1),
    "auto_map": ({"AutoConfig": "x.Y"}, [], 1, "x"),
    "torch_dtype": ("float32", "torch.bfloat16", "auto", [], 16),
    "dtype": ("float32", {}, None),
    "text_config": (TINY, {}, [], "x"),
    "tie_word_embeddings": (True, False, None, 1, "true"),
}


@reader
def config(folder: Path) -> Reader:
    """`config.json` alone, and beside weights."""
    full, bare = write_checkpoint(folder / "model", _tensors()), folder / "config.json"

    def read(data: bytes) -> None:
        for path in (bare, full / "config.json"):
            path.write_bytes(data)
        _both(lambda: reads_back(build_profile(open_checkpoint(bare))),
              lambda: reads_back(build_profile(open_checkpoint(full))))  # fmt: skip

    seeds = [*(json.dumps(table).encode() for table in CONFIGS), (SHIPPED / "config.json").read_bytes()]
    return Reader(make=lambda rng: mutate_document(rng, rng.choice(seeds), known=KNOWN_KEYS), read=read)


@reader
def index(folder: Path) -> Reader:
    """`model.safetensors.index.json` of two shards."""
    model = write_checkpoint(folder / "model", {})
    (model / "model.safetensors").unlink()
    names = list(tensors := _tensors())
    files = {name: f"model-0000{1 + (place > 9)}-of-00002.safetensors" for place, name in enumerate(names)}
    for file in set(files.values()):
        write_safetensors(model / file, {name: row for name, row in tensors.items() if files[name] == file})
    size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    seed = json.dumps({"metadata": {"total_size": size}, "weight_map": files}).encode()

    def read(data: bytes) -> None:
        (model / "model.safetensors.index.json").write_bytes(data)
        reads_back(build_profile(open_checkpoint(model)))

    return Reader(make=lambda rng: mutate_document(rng, seed), read=read)


@reader
def header(folder: Path) -> Reader:
    """A safetensors file: its table with the length that fits, or its first bytes."""
    model = write_checkpoint(folder / "model", _tensors())
    good = (model / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(good[:8], "little")
    table, rest = good[8:end], good[end:]

    def make(rng: Random) -> bytes:
        if rng.random() < 0.2:
            return mutate_bytes(rng, good[:end]) + rest
        changed = mutate_document(rng, table)
        return len(changed).to_bytes(8, "little") + changed + (rest if rng.random() < 0.9 else mutate_bytes(rng, rest))

    def read(data: bytes) -> None:
        path = model / "model.safetensors"
        path.write_bytes(data)
        _both(lambda: read_header(path), lambda: reads_back(build_profile(open_checkpoint(model))))

    return Reader(make=make, read=read)


@reader
def profile(folder: Path) -> Reader:
    """What `analyze -o` writes."""
    seeds = [build_profile(open_checkpoint(SHIPPED)), make_plan().profile]
    return _documents(folder, [seed.to_json().encode() for seed in seeds], lambda path: _kept(ModelProfile.read(path)))


@reader
def workload(folder: Path) -> Reader:
    """The workload that plans hold."""
    seed = make_plan().workload.to_json().encode()

    def read(path: Path) -> None:
        found = Workload.read(path)
        reads_back(found)
        assert sum(size for size, _past in found.prefill_chunks[:1]) <= found.prompt_tokens

    return _documents(folder, [seed], read)


@reader
def cluster(folder: Path) -> Reader:
    """Cluster files, up to their budgets."""
    seeds = [(EXAMPLES / f"{name}.json").read_bytes() for name in ("workstation", "lab", "rented", "demo")]

    def read(path: Path) -> None:
        found = Cluster.read(path)
        reads_back(found)
        reads_back(with_budgets(found))

    return _documents(folder, seeds, read)


@reader
def plan(folder: Path) -> Reader:
    """Plans, re-checked."""
    seeds = [make_plan().to_json().encode(), (EXAMPLES / "demo.plan.json").read_bytes()]
    return _documents(folder, seeds, lambda path: _kept(read_plan(path)))


@reader
def run(folder: Path) -> Reader:
    """What `llamarun generate` and `bench` wrote, as calibration reads it."""
    known = make_plan().profile
    bench = document(known)
    keys = ("prefill_chunk_tokens", "repeats", "prediction")
    generated = {key: value for key, value in bench.items() if key not in keys} | {
        "kind": "run",
        "sequences": [{"text": "x", "token_ids": [1, 2], "finish_reason": "length"}],
    }

    def read(path: Path) -> None:
        found = read_run(path)
        again = (Run if found.kind == "run" else Bench).from_json(dump_json(found.as_json()).encode(), where="again")
        assert again == found, "reads back as something else"
        found.workload(known)
        assert min(found.decode_rate, found.rest_seconds) >= 0, found.dtype_name

    return _documents(folder, [dump_json(table).encode() for table in (bench, generated)], read)


@reader
def requests(folder: Path) -> Reader:
    """Records of requests, one per line."""
    rows = [{"arrival_seconds": i / 4, "prompt_tokens": 100 + i, "new_tokens": 8} for i in range(6)]
    seed = "\n".join(map(json.dumps, rows)).encode() + b"\n"
    path = folder / "requests.jsonl"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        found = read_requests(path)
        path.write_text("".join(json.dumps(request.model_dump()) + "\n" for request in found))
        assert read_requests(path) == found, "reads back as something else"

    return Reader(make=lambda rng: mutate_lines(rng, seed), read=read)


@reader
def exported(folder: Path) -> Reader:
    """The JSON files of an export; half of the manifests get the id and the form that belong to their content."""
    model, shards = write_checkpoint(folder / "model", _tensors()), folder / "shards"
    export(make_plan(profile=build_profile(open_checkpoint(model))), model=model, output=shards)
    good = {path.name: path.read_bytes() for path in sorted(shards.glob("*.json"))}
    names = [*good, *(MANIFEST_NAME,) * len(good)]

    def make(rng: Random) -> bytes:
        name = rng.choice(names)
        signs = name == MANIFEST_NAME and rng.random() < 0.5
        changed = mutate_document(rng, good[name], repairs=signs)
        return name.encode() + b"\n" + (_signed(changed) if signs else changed)

    def read(data: bytes) -> None:
        name, _, changed = data.partition(b"\n")
        path = shards / os.fsdecode(name)
        try:
            path.write_bytes(changed)
            reads_back(open_export(shards).manifest)
        finally:
            path.write_bytes(good[path.name])

    return Reader(make=make, read=read)


def _signed(data: bytes) -> bytes:
    try:
        table = json.loads(data)
        body = {key: value for key, value in table.items() if key != "export_id"}
        return dump_json(body | {"export_id": sha256_hex(dump_json(body).encode())}).encode()
    except (ValueError, RecursionError, AttributeError):
        return data  # no document any more, or none that can be written


def _tensors() -> dict[str, tuple[str, tuple[int, ...]]]:
    """The tensors of TINY."""
    tiny = parse_config(TINY, where="")
    rows = dict(formula.embedding_shapes(tiny))
    for layer in range(tiny.num_hidden_layers):
        rows |= {f"model.layers.{layer}.{name}": shape for name, shape in formula.layer_shapes(tiny).items()}
    rows |= formula.head_shapes(tiny)
    return {name: ("BF16", shape) for name, shape in rows.items()}


def _documents(folder: Path, seeds: Sequence[bytes], read: Callable[[Path], object]) -> Reader:
    path = folder / "document.json"

    def read_bytes(data: bytes) -> None:
        path.write_bytes(data)
        read(path)

    return Reader(make=lambda rng: mutate_document(rng, rng.choice(seeds)), read=read_bytes)


def _kept(value: StrictModel) -> None:
    reads_back(value)


def _both(first: Callable[[], object], second: Callable[[], object]) -> None:
    """Do both, also where the first is refused."""
    try:
        first()
    finally:
        second()
