"""The document that `llamarun generate|bench --json` writes, as far as calibration reads it."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from planner.timing.costs import StageRange
from plans.checkpoint.config import DTYPE_NAMES
from plans.cluster import Name, Seconds
from plans.errors import InputError
from plans.profile import Count, ModelProfile
from plans.reading.files import read_limited
from plans.reading.strict import SchemaVersion, parse_json, validate_json
from plans.workload import Workload

DEFAULT_CHUNK_TOKENS = 2048
"""What `llamarun generate` reads at once."""
MAX_RUN_BYTES = 16 << 20
Positive = Annotated[int, Field(ge=1, le=2**31)]


class _Read(BaseModel):
    """Strict in what it reads; a run document holds more, which is left alone."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False)


class RunStage(_Read):
    """One stage of the run; seconds are totals."""

    device: str
    """Where it ran."""
    planned_device: Name
    start_layer: Count
    end_layer: Count
    has_embedding: bool
    has_head: bool
    decode_steps: Positive
    prefill_compute_seconds: Seconds
    decode_compute_seconds: Annotated[float, Field(gt=0, le=1e6)]
    decode_hop_seconds: Seconds

    def range(self) -> StageRange:
        """Return its units."""
        return StageRange(self.planned_device, self.start_layer, self.end_layer, self.has_embedding, self.has_head)


class RunFile(_Read):
    """What was run, and how long every stage took."""

    schema_version: SchemaVersion
    kind: Literal["run", "bench"]
    config_sha256: str
    dtype: str
    prompt_tokens: Positive
    new_tokens: Positive
    batch_size: Positive
    prefill_chunk_tokens: Positive = DEFAULT_CHUNK_TOKENS
    median_seconds_per_token: Annotated[float, Field(gt=0, le=1e6)]
    stages: Annotated[tuple[RunStage, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _is_a_chain(self) -> "RunFile":
        position = 0
        for index, stage in enumerate(self.stages):
            is_whole = stage.has_embedding == (index == 0) and stage.has_head == (index == len(self.stages) - 1)
            if stage.start_layer != position or stage.end_layer < position or not is_whole:
                raise ValueError(f"stage {index} does not continue the chain at layer {position}")
            position = stage.end_layer
        return self

    @property
    def dtype_name(self) -> str:
        """The dtype in our short spelling."""
        return DTYPE_NAMES.get(self.dtype, self.dtype)

    @property
    def rest_seconds(self) -> float:
        """What a step took beyond its stages and hops."""
        parts = sum((s.decode_compute_seconds + s.decode_hop_seconds) / s.decode_steps for s in self.stages)
        return max(0.0, self.median_seconds_per_token - parts)

    @property
    def tokens_per_sequence(self) -> tuple[int, int]:
        """Prompt and new tokens of one sequence; a run's document counts those of all together."""
        share = self.batch_size if self.kind == "run" else 1
        return max(1, self.prompt_tokens // share), self.new_tokens // share

    def workload(self, profile: ModelProfile) -> Workload:
        """Return what the run was asked for; token counts are per sequence."""
        prompt, new = self.tokens_per_sequence
        values: dict[str, Any] = {
            "prompt_tokens": prompt,
            "new_tokens": new,
            "context_tokens": prompt + new,
            "batch_size": self.batch_size,
            "prefill_chunk_tokens": min(self.prefill_chunk_tokens, prompt),
            "dtype": profile.dtype,
            "kv_cache_dtype": profile.kv_cache_dtype,
        }
        return Workload(**values)


def read_run(path: Path) -> RunFile:
    """Read what a run wrote.

    Raises:
        InputError: no such document, or one without stage times (`generate` needs `--json`, and two new tokens).
    """
    data = read_limited(path, max_bytes=MAX_RUN_BYTES)
    value = parse_json(data, where=path)
    if not isinstance(value, dict) or value.get("kind") not in ("run", "bench"):
        raise InputError(
            "is no run", where=path, expected="what llamarun generate or bench writes with --json", code="E-RUN"
        )
    return validate_json(RunFile, data, where=path)
