"""What a run measured: the documents of `llamarun generate|bench|batch --json`; calibration reads the first two."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from plans.cluster import Name, Seconds
from plans.dtypes import DTYPE_NAMES
from plans.errors import InputError
from plans.plan import Share
from plans.profile import Count, ModelProfile, Sha256
from plans.reading.files import read_limited
from plans.reading.strict import MAX_KEYS, SchemaVersion, StrictModel, parse_json, validate_json
from plans.stages import StageRange, chain_fault
from plans.workload import MAX_TOKENS, BatchSize, Workload

DEFAULT_CHUNK_TOKENS = 2048
"""What `llamarun generate` reads at once."""
MAX_RUN_BYTES = 16 << 20
MAX_RUN_VALUES = 2_000_000
FinishReason = Literal["eos", "stop_string", "length", "interrupted"]
Positive = Annotated[int, Field(ge=1, le=2**31)]


class _Document(StrictModel):
    """Keys of other versions are left alone, and a key that was never set is not written."""

    model_config = ConfigDict(extra="ignore")

    def as_json(self) -> dict[str, Any]:
        """Return plain data."""
        return self.model_dump(mode="json", exclude_unset=True)


class RunStage(_Document):
    """One stage: its units, where they ran, and seconds, which are totals; a run without tokens leaves those out."""

    device: str
    """Where it ran."""
    planned_device: Name
    start_layer: Count
    end_layer: Count
    has_embedding: bool
    has_head: bool
    decode_steps: Count
    decode_read_bytes: Count
    """Weight bytes per decode step."""
    path: Literal["fast", "reference"] | None = None
    """What served the decode steps, or the prompt where there were none."""
    prefill_compute_seconds: Seconds = 0.0
    prefill_hop_seconds: Seconds = 0.0
    prefill_cache_seconds: Seconds = 0.0
    decode_compute_seconds: Seconds = 0.0
    decode_hop_seconds: Seconds = 0.0
    decode_cache_seconds: Seconds = 0.0

    @property
    def range(self) -> StageRange:
        """Which units it held, on the device they were planned for."""
        return StageRange(self.planned_device, self.start_layer, self.end_layer, self.has_embedding, self.has_head)


class _Measured(_Document):
    """Which model was measured, and how long it took to load."""

    schema_version: SchemaVersion
    plan_sha256: Sha256 | None
    export_id: Sha256 | None
    config_sha256: Sha256
    dtype: str
    """As torch spells it."""
    load_seconds: Seconds
    tokens_per_second: Share
    peak_memory_bytes: Count


class BatchRun(_Measured):
    """What `llamarun batch` did; lines that were done before are not counted."""

    kind: Literal["batch"]
    lines: Count
    prompt_tokens: Count
    new_tokens: Count
    seconds: Seconds


class _TimedRun(_Measured):
    """A run whose stages were timed."""

    prompt_tokens: Positive
    new_tokens: Count
    batch_size: BatchSize
    time_to_first_token_seconds: Seconds
    median_seconds_per_token: Seconds | None
    """Null where nothing was decoded after the first token."""
    stages: Annotated[tuple[RunStage, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _is_a_chain(self) -> "_TimedRun":
        fault = chain_fault([stage.range for stage in self.stages], num_layers=self.stages[-1].end_layer)
        if fault is not None:
            raise ValueError(str(fault))
        return self

    @model_validator(mode="after")
    def _is_a_workload(self) -> "_TimedRun":
        if self.prompt_tokens + self.new_tokens > MAX_TOKENS:
            raise ValueError(f"{self.prompt_tokens} + {self.new_tokens} tokens are more than {MAX_TOKENS}")
        return self

    @property
    def dtype_name(self) -> str:
        """The dtype in our short spelling."""
        return DTYPE_NAMES.get(self.dtype, self.dtype)

    @property
    def decode_rate(self) -> float:
        """Weight bytes read per second of decoding; 0 when nothing was decoded."""
        read = sum(stage.decode_read_bytes for stage in self.stages)
        return read / self.median_seconds_per_token if self.median_seconds_per_token else 0.0

    @property
    def rest_seconds(self) -> float:
        """What a step took beyond its stages and hops."""
        parts = sum((s.decode_compute_seconds + s.decode_hop_seconds) / s.decode_steps for s in self.stages)
        return max(0.0, (self.median_seconds_per_token or 0.0) - parts)

    def _asked(self, profile: ModelProfile, *, prompt: int, new: int, chunk: int) -> Workload:
        return Workload(
            prompt_tokens=prompt,
            new_tokens=new,
            context_tokens=prompt + new,
            batch_size=self.batch_size,
            prefill_chunk_tokens=min(chunk, prompt),
            dtype=profile.dtype,
            kv_cache_dtype=profile.kv_cache_dtype,
        )


class RunSequence(_Document):
    """One text that came out."""

    text: str
    token_ids: tuple[Count, ...]
    finish_reason: FinishReason


class Run(_TimedRun):
    """What `llamarun generate` did; tokens are those of all sequences together."""

    kind: Literal["run"]
    sequences: tuple[RunSequence, ...]

    def workload(self, profile: ModelProfile) -> Workload:
        """Return what was asked for; token counts are per sequence."""
        prompt, new = self.prompt_tokens // self.batch_size, self.new_tokens // self.batch_size
        return self._asked(profile, prompt=max(1, prompt), new=new, chunk=DEFAULT_CHUNK_TOKENS)


class PredictedStage(_Document):
    """What the plan predicted for one stage."""

    device: Name
    prefill_seconds: Seconds
    decode_seconds: Seconds
    hop_seconds: Seconds


class RunPrediction(_Document):
    """What the plan predicted, and for what."""

    time_to_first_token_seconds: Seconds
    seconds_per_token: Seconds
    pipelined_tokens_per_second: Share
    requests_in_flight: Positive
    prompt_tokens: Positive
    batch_size: Positive
    stages: tuple[PredictedStage, ...]


class Bench(_TimedRun):
    """What `llamarun bench` measured: medians; tokens are those of one sequence."""

    kind: Literal["bench"]
    prefill_chunk_tokens: Positive
    repeats: Positive
    prefill_tokens_per_second: Share
    decode_read_bytes: Count
    decode_read_bytes_per_second: Share
    read_bandwidth_bytes_per_second: dict[str, Share]
    """Per device; empty where stages ran in processes of their own."""
    in_flight: Positive
    pipelined_tokens_per_second: Share | None
    """With that many batches under way at once; null for one."""
    prediction: RunPrediction | None

    def workload(self, profile: ModelProfile) -> Workload:
        """Return what was asked for."""
        return self._asked(profile, prompt=self.prompt_tokens, new=self.new_tokens, chunk=self.prefill_chunk_tokens)


TimedRun = Run | Bench


def read_run(path: Path) -> TimedRun:
    """Read what a run wrote.

    Raises:
        InputError: no such document, or one without times (`generate` needs `--json`, and two new tokens).
    """
    data = read_limited(path, max_bytes=MAX_RUN_BYTES)
    value = parse_json(data, where=path, max_values=MAX_RUN_VALUES, max_keys=MAX_KEYS)
    kind = value.get("kind") if isinstance(value, dict) else None
    if kind not in ("run", "bench"):
        raise InputError(
            "is no run", where=path, expected="what llamarun generate or bench writes with --json", code="E-RUN"
        )
    run = validate_json(Run, data, where=path) if kind == "run" else validate_json(Bench, data, where=path)
    untimed = next((key for key, value in _needed(run) if not value), None)
    if untimed is not None:
        raise InputError(
            "nothing was decoded in that run", where=f"{path}:/{untimed}", expected="two new tokens", code="E-SCHEMA"
        )
    return run


def _needed(run: TimedRun) -> Iterator[tuple[str, float | None]]:
    """Yield the numbers without which nothing can be learnt."""
    yield from (("new_tokens", run.new_tokens), ("median_seconds_per_token", run.median_seconds_per_token))
    for index, stage in enumerate(run.stages):
        for key in ("decode_steps", "decode_compute_seconds"):
            yield f"stages/{index}/{key}", getattr(stage, key)
