"""Plans for given boundaries, tiny random checkpoints, and how tests look at the files."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from planner.model.profile import build_profile
from plans.checkpoint.folder import open_checkpoint
from plans.checkpoint.header import read_header
from plans.cluster import Cluster, Device
from plans.memory import device_overhead_bytes, stage_memory
from plans.plan import Plan, Prediction, Proof, Stage
from plans.stages import StageRange
from plans.workload import Workload

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "tests" / "checkpoint" / "python-llama"


def make_plan(
    model: Path, boundaries: Sequence[int], *, dtype: Any = None, devices: Sequence[str] = (), hosts: Sequence[str] = ()
) -> Plan:
    """A plan with the given number of layers per stage, each on a device with plenty of memory.

    Devices are GPUs on a host each, unless they or their hosts are named; a name with "cpu" in it makes a CPU.
    """
    profile = build_profile(open_checkpoint(model), dtype=dtype)
    assert sum(boundaries) == profile.model.num_hidden_layers
    cluster = Cluster(
        devices=tuple(
            Device(
                name=devices[index] if devices else f"cuda:{index}",
                host=hosts[index] if hosts else f"host{index}",
                kind="cpu" if devices and "cpu" in devices[index] else "cuda",
                memory_bytes=1 << 34,
                budget_bytes=1 << 34,
                memory_bandwidth_bytes_per_second=1e11,
                flops_per_second={"bf16": 1e13, "fp32": 1e12},
            )
            for index in range(len(boundaries))
        )
    )
    workload = Workload(
        prompt_tokens=16,
        new_tokens=16,
        context_tokens=64,
        prefill_chunk_tokens=16,
        dtype=profile.dtype,
        kv_cache_dtype=profile.dtype,
    )
    stages = []
    start, last = 0, len(boundaries) - 1
    for index, layers in enumerate(boundaries):
        device = cluster.devices[index]
        units = StageRange(device.name, start, start + layers, has_embedding=index == 0, has_head=index == last)
        memory = stage_memory(
            profile,
            workload=workload,
            stage=units,
            overhead_bytes=device_overhead_bytes(device, cluster, is_process_per_stage=False),
        )
        stages.append(
            Stage(
                **asdict(units),
                **asdict(memory),
                budget_bytes=device.budget_bytes or 0,
                decode_seconds=0.001,
                prefill_seconds=0.01,
                hop_seconds=0.0,
            )
        )
        start += layers
    return Plan(
        strategy="custom",
        objective="latency",
        workload=workload,
        cluster=cluster,
        profile=profile,
        stages=tuple(stages),
        prediction=Prediction(
            time_to_first_token_seconds=0.01,
            seconds_per_token=0.001 * len(stages),
            return_hop_seconds=0.0,
            tokens_per_second=1.0,
            pipelined_tokens_per_second=1.0,
            max_memory_share=max(stage.total_bytes / stage.budget_bytes for stage in stages),
        ),
        proof=Proof(
            status="given",
            objective=0.0,
            bound=0.0,
            gap=0.0,
            solver="none",
            solver_version="0",
            certified_by=None,
        ),
    )


def make_llama(folder: Path, *, dtype: str = "bfloat16", shard: str = "5GB", seed: int = 0, **config: Any) -> Path:
    """Write a tiny random Llama with transformers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    settings = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    }
    model = LlamaForCausalLM(LlamaConfig(**(settings | config))).to(getattr(torch, dtype))
    model.config.dtype = dtype
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def tensor_bytes(folder: Path) -> dict[str, bytes]:
    """Every tensor of a checkpoint folder, by name, read without the safetensors library."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        for name, entry in read_header(path).tensors.items():
            assert name not in found
            found[name] = data[entry.begin : entry.end]
    return found


def tree(folder: Path) -> dict[str, str]:
    """Relative path -> sha256 of every file, hidden ones included; folders end with a slash."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        found[name if path.is_file() else name + "/"] = (
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        )
    return found


def names(folder: Path) -> list[str]:
    """The sorted names in a folder, hidden ones included."""
    return sorted(path.name for path in folder.iterdir())


class as_ordinary_user:  # noqa: N801 - reads as a phrase
    """Give up root's rights for a while; nothing to do for others."""

    def __enter__(self) -> None:
        if os.geteuid() == 0:
            os.seteuid(65534)

    def __exit__(self, *_: object) -> None:
        if os.getuid() == 0:
            os.seteuid(0)


def run_python(code: str, *, environment: Mapping[str, str] | None = None, **options: Any) -> subprocess.Popen[str]:
    """Start Python code in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def edit_json(path: Path, **changes: Any) -> None:
    """Change top-level keys of a JSON file in place."""
    document = json.loads(path.read_text(encoding="utf-8"))
    document.update(changes)
    path.write_text(json.dumps(document), encoding="utf-8")
