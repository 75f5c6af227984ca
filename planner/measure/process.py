"""What a process needs before any weights: measured in a fresh one that loads what a run loads and makes a few tokens.

The process takes its request as JSON on stdin and answers with JSON on stdout.
"""

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from plans.commands.children import python_command
from plans.commands.collector import resting_collector
from plans.dtypes import DtypeName
from plans.errors import MachineError, printable
from plans.memory import stage_memory
from plans.profile import ModelProfile
from plans.stages import StageRange
from plans.workload import Workload

PathName = Literal["reference", "fast"]
PROMPT_TOKENS = 64
NEW_TOKENS = 8
TIMEOUT_SECONDS = 600


@dataclass(frozen=True, slots=True)
class Request:
    """What the fresh process does."""

    model: str | None
    """Checkpoint folder or bare configuration; None for the built-in shape."""
    dtype: DtypeName
    device: str
    num_layers: int
    threads: int
    path: PathName = "fast"


@dataclass(frozen=True, slots=True)
class Footprint:
    """Memory that is neither weights nor cache nor activations."""

    process_bytes: int
    """Main memory of the process."""
    device_bytes: int
    """Memory on the accelerator; 0 for a CPU."""


def measure_footprint(profile: ModelProfile, request: Request) -> Footprint:
    """Start a process that runs a short chain, and return what it used beyond the memory model.

    Args:
        profile: of the whole model.
        request: which layers, where.

    Raises:
        MachineError: the process failed.
    """
    done = subprocess.run(
        python_command("planner.measure.process"),
        input=json.dumps(asdict(request)),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise MachineError(f"the process that measures memory failed: {printable(last[0])}", code="E-MEASURE")
    used = json.loads(done.stdout)
    modelled = _modelled_bytes(profile, request, weight_bytes=used["weight_bytes"])
    if request.device.startswith("cpu"):
        return Footprint(max(0, used["peak_bytes"] - modelled), 0)
    return Footprint(used["peak_bytes"], max(0, used["device_bytes"] - modelled))


def _modelled_bytes(profile: ModelProfile, request: Request, *, weight_bytes: int) -> int:
    workload = Workload(
        prompt_tokens=PROMPT_TOKENS,
        new_tokens=NEW_TOKENS,
        context_tokens=PROMPT_TOKENS + NEW_TOKENS,
        prefill_chunk_tokens=PROMPT_TOKENS,
        dtype=profile.dtype,
        kv_cache_dtype=profile.dtype,
    )
    memory = stage_memory(profile, workload=workload, stage=StageRange.whole(request.num_layers))
    return weight_bytes + memory.kv_cache_bytes + memory.activation_bytes


def main() -> None:
    """Answer one request."""
    with resting_collector():  # as where a run imports them: it takes memory
        from planner.measure.chain import use_memory

    request = Request(**json.loads(sys.stdin.read()))
    used = use_memory(
        None if request.model is None else Path(request.model),
        dtype=request.dtype,
        device=request.device,
        num_layers=request.num_layers,
        threads=request.threads,
        path=request.path,
        prompt_tokens=PROMPT_TOKENS,
        new_tokens=NEW_TOKENS,
    )
    print(json.dumps(used))


if __name__ == "__main__":
    main()
