"""The numbers at the end of a run: what a person reads, and what `--json` writes for the planner to read back."""

import resource
import sys
from collections.abc import Sequence
from typing import Any

from plans.sizes import format_bytes
from runtime.clock import StageTime
from runtime.generate import Generation
from runtime.ranges import StageRange, describe_stage
from runtime.session import Session


def peak_memory_bytes() -> int:
    """Return the largest resident memory this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def run_document(session: Session, generation: Generation, *, load_seconds: float) -> dict[str, Any]:
    """Return everything a run measured as plain data."""
    source = session.source
    steps = sorted(generation.step_seconds)
    return {
        "schema_version": 1,
        "kind": "run",
        "plan_sha256": source.plan.sha256 if source.plan else None,
        "export_id": source.export.export_id if source.export else None,
        "dtype": str(session.chain.dtype).removeprefix("torch."),
        "prompt_tokens": generation.num_prompt_tokens,
        "new_tokens": generation.num_new_tokens,
        "load_seconds": load_seconds,
        "time_to_first_token_seconds": generation.time_to_first_token_seconds,
        "tokens_per_second": generation.decode_tokens_per_second,
        "median_seconds_per_token": steps[len(steps) // 2] if steps else None,
        "peak_memory_bytes": peak_memory_bytes(),
        "stages": [
            {
                "device": str(device),
                "start_layer": stage.start_layer,
                "end_layer": stage.end_layer,
                "has_embedding": stage.has_embedding,
                "has_head": stage.has_head,
                **_seconds("prefill", generation.prefill_stages, index),
                **_seconds("decode", generation.decode_stages, index),
            }
            for index, (stage, device) in enumerate(zip(session.chain.stages, session.chain.stage_devices, strict=True))
        ],
        "sequences": [
            {"text": s.text, "token_ids": list(s.token_ids), "finish_reason": s.finish_reason}
            for s in generation.sequences
        ],
    }


def _seconds(phase: str, times: Sequence[StageTime], index: int) -> dict[str, float]:
    if not times:
        return {}
    return {
        f"{phase}_compute_seconds": times[index].compute_seconds,
        f"{phase}_hop_seconds": times[index].hop_seconds,
    }


def summary_lines(document: dict[str, Any]) -> list[str]:
    """Return the lines a person sees after the text."""
    first = document["time_to_first_token_seconds"]
    tokens = f"{document['prompt_tokens']} prompt tokens, {document['new_tokens']} new tokens"
    speed = f"time to first token {1000 * first:.0f} ms, then {document['tokens_per_second']:.1f} tokens/s"
    rest = f"loaded in {document['load_seconds']:.1f} s; peak memory {format_bytes(document['peak_memory_bytes'])}"
    lines = [f"{tokens} ({document['sequences'][0]['finish_reason']})", f"{speed}; {rest}"]
    steps = max(1, document["new_tokens"] - len(document["sequences"]))
    for number, stage in enumerate(document["stages"], start=1):
        lines.append(_stage_line(number, stage, steps))
    return lines


def _stage_line(number: int, stage: dict[str, Any], steps: int) -> str:
    name = describe_stage(
        StageRange(
            stage["device"],
            stage["start_layer"],
            stage["end_layer"],
            has_embedding=stage["has_embedding"],
            has_head=stage["has_head"],
        )
    )
    if "decode_compute_seconds" not in stage:
        return f"  stage {number} on {stage['device']}: {name}"
    compute, hop = stage["decode_compute_seconds"], stage["decode_hop_seconds"]
    return (
        f"  stage {number} on {stage['device']}: {name}: prefill {1000 * stage['prefill_compute_seconds']:.1f} ms, "
        f"decode {1000 * compute / steps:.2f} ms/token, hop {1000 * hop / steps:.3f} ms/token"
    )
