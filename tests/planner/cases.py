"""Small models, clusters and checkpoints for the planner's tests, without transformers."""

import json
import struct
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from planner.answers.solve import solve as solve_question
from planner.model.profile import build_profile
from planner.model.widths import Packed, uniform
from planner.problem.question import Question
from planner.program.effort import Effort
from planner.timing.costs import predict
from plans.checkpoint.units import Checkpoint
from plans.cluster import Cluster, Device, Link
from plans.config.config import parse_config
from plans.dtypes import STORED_DTYPES
from plans.memory import StageMemory, device_overhead_bytes, stage_memory
from plans.plan import Demands, Execution, Plan, Proof, Stage
from plans.profile import ModelProfile
from plans.stages import StageRange
from plans.workload import Workload

TINY: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "dtype": "bfloat16",
}
RATES: dict[str, Any] = {
    "memory_bandwidth_bytes_per_second": 1e10,
    "flops_per_second": {"fp32": 1e11, "bf16": 2e11},
}


def bare(**changes: Any) -> Checkpoint:
    """A bare configuration: TINY with changes."""
    config = parse_config(TINY | changes, where="config.json", sha256="0" * 64)
    return Checkpoint(Path("tiny/config.json"), None, config, (), {}, ())


def tiny_profile(**changes: Any) -> ModelProfile:
    """The profile of TINY with changes."""
    return build_profile(bare(**changes))


def workload(**changes: Any) -> Workload:
    """128 prompt tokens at once, 128 new ones, one sequence."""
    values: dict[str, Any] = {
        "prompt_tokens": 128,
        "new_tokens": 128,
        "context_tokens": 512,
        "prefill_chunk_tokens": 128,
        "dtype": "bf16",
        "kv_cache_dtype": "bf16",
    }
    return Workload(**(values | changes))


def device(name: str, **changes: Any) -> Device:
    """A CPU device of 1 GiB, all of it budget, on the host `local`."""
    values: dict[str, Any] = {"kind": "cpu", "memory_bytes": 1 << 30, "budget_bytes": 1 << 30} | RATES
    return Device(name=name, **(values | changes))


def link(a: str, b: str, *, bandwidth: float, latency: float) -> Link:
    """A link between two named ends."""
    return Link(**{"from": a}, to=b, bandwidth_bytes_per_second=bandwidth, latency_seconds=latency)


def class_link(name: Any, *, bandwidth: float, latency: float) -> Link:
    """A link for a class of pairs."""
    return Link(**{"class": name}, bandwidth_bytes_per_second=bandwidth, latency_seconds=latency)


def cluster(*devices: Device, links: tuple[Link, ...] = (), **changes: Any) -> Cluster:
    """A cluster of devices and links."""
    return Cluster(devices=devices, links=links, **changes)


def asked(profile: ModelProfile, **options: Any) -> tuple[Question, Effort]:
    """A question and an effort, from the fields of both and those of the demands."""
    demands = {key: options.pop(key) for key in Demands.model_fields if key in options}
    demands |= {key: tuple(demands[key]) for key in ("pins", "bans") if key in demands}
    effort = {key: options.pop(key) for key in Effort.__slots__ if key in options}
    return Question(profile, demands=Demands(**demands), **options), Effort(**effort)


def solve(profile: ModelProfile, **options: Any) -> Plan:
    """The best plan, for the options of `asked`."""
    return solve_question(*asked(profile, **options))


def write_safetensors(path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """Write zeros in the safetensors format, from (dtype, shape) by name."""
    header: dict[str, Any] = {}
    position = 0
    for name, (dtype, shape) in tensors.items():
        size = STORED_DTYPES[dtype].size_bytes
        for dimension in shape:
            size *= dimension
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(position))


def write_checkpoint(
    folder: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]], config: Mapping[str, Any] = TINY
) -> Path:
    """Write a folder with `config.json` and one safetensors file of zeros."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config)))
    write_safetensors(folder / "model.safetensors", tensors)
    return folder


EVEN: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
"""Changes that make every side of TINY's matrices a multiple of 32, so that all of them can be packed."""


def in_width(width: Any, checkpoint: Checkpoint | None = None, *, head: Any = None) -> Packed:
    """A checkpoint, TINY with even sides unless another is given, with its weights packed."""
    subject = checkpoint or bare(**EVEN)
    return uniform(subject, build_profile(subject), width, head=head)


def make_plan(**changes: Any) -> Plan:
    """A plan of TINY over two devices, cut after `cut` layers; made without a solver."""
    values: dict[str, Any] = {"cut": 3, "profile": tiny_profile(), "workload": workload(), "execution": "one_process"}
    values |= {"weights": None}
    values |= {"cluster": cluster(device("a"), device("b"))} | changes
    profile, load, parts, execution = (values[key] for key in ("profile", "workload", "cluster", "execution"))
    num_layers, (a, b) = profile.model.num_hidden_layers, [d.name for d in parts.devices]
    ranges = (StageRange(a, 0, values["cut"], True, False), StageRange(b, values["cut"], num_layers, False, True))
    times, prediction = predict(profile, workload=load, cluster=parts, stages=ranges, execution=execution)
    stages = tuple(
        Stage(
            **asdict(part),
            budget_bytes=parts.device(part.device).budget_bytes,
            **asdict(seconds),
            **asdict(stage_bytes(profile, load, parts, part, execution)),
        )
        for part, seconds in zip(ranges, times, strict=True)
    )
    proof = Proof(
        status="given", objective=0.0, bound=0.0, gap=0.0, solver="none", solver_version="0", certified_by=None
    )
    return Plan(
        strategy="custom",
        objective="latency",
        execution=execution,
        weights=values["weights"],
        workload=load,
        cluster=parts,
        profile=profile,
        stages=stages,
        prediction=prediction,
        proof=proof,
    )


def stage_bytes(
    profile: ModelProfile, load: Workload, parts: Cluster, part: StageRange, execution: Execution
) -> StageMemory:
    """The memory model for one range."""
    is_process_per_stage = execution == "process_per_stage"
    return stage_memory(
        profile,
        workload=load,
        stage=part,
        overhead_bytes=device_overhead_bytes(
            parts.device(part.device), parts, is_process_per_stage=is_process_per_stage
        ),
    )
