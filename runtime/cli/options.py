"""Command-line options that several commands share, so that they are spelled and explained once."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from plans.dtypes import DtypeName
from plans.errors import UsageError
from runtime.fast.speed import Speed

MAX_TOKENS_LIMIT = 1_000_000

Target = Annotated[Path, typer.Argument(help="An export, a plan file (with --model), or a checkpoint folder.")]
ModelOption = Annotated[Path | None, typer.Option("--model", help="The checkpoint a plan file is for.")]
DeviceMapOption = Annotated[
    list[str] | None,
    typer.Option("--device-map", help="STAGE=DEVICE (stages count from 0), or one DEVICE for all; repeatable."),
]
DtypeOption = Annotated[
    DtypeName | None, typer.Option("--dtype", help="Compute in this dtype instead of the stored one.")
]
KvDtypeOption = Annotated[
    DtypeName | None,
    typer.Option("--kv-cache-dtype", help="Keep keys and values in this dtype; the plan's, else as --dtype."),
]
ContextOption = Annotated[
    int | None, typer.Option("--ctx-size", "-c", min=1, help="Context in tokens; the plan's, else the model's.")
]
ExpectOption = Annotated[str | None, typer.Option("--expect-id", help="Refuse an export with another export id.")]
VerifyOption = Annotated[bool, typer.Option("--verify/--no-verify", help="Compare the weights with their checksums.")]
ThreadsOption = Annotated[int | None, typer.Option("--threads", min=1, max=1024, help="CPU threads.")]
SpeedOption = Annotated[
    Speed,
    typer.Option("--speed", help="transformers' code, native kernels (CPU) and graphs (CUDA), or the faster."),
]
MaxTokensOption = Annotated[
    int | None,
    typer.Option(
        "--max-tokens",
        "--max-new-tokens",
        "-n",
        min=0,
        max=MAX_TOKENS_LIMIT,
        help="New tokens; unset: until end-of-sequence or the context's end.",
    ),
]
TemperatureOption = Annotated[float | None, typer.Option("--temp", "--temperature", help="0 is greedy.")]
TopKOption = Annotated[int | None, typer.Option("--top-k", help="Keep the K likeliest tokens; 0 keeps all.")]
TopPOption = Annotated[float | None, typer.Option("--top-p", help="Keep the likeliest tokens up to this sum.")]
MinPOption = Annotated[float | None, typer.Option("--min-p", help="Drop tokens below this share of the best.")]
PenaltyOption = Annotated[
    float | None, typer.Option("--repetition-penalty", help="Above 1 makes repeated tokens less likely.")
]
SeedOption = Annotated[int, typer.Option("--seed", help="Seed of all random draws.")]
StopOption = Annotated[list[str] | None, typer.Option("--stop", help="Text that ends the output; repeatable.")]
ChunkOption = Annotated[
    int | None,
    typer.Option("--prefill-chunk", min=1, help="Prompt tokens per step; unset: the plan's, else at most 2048."),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions:
    """How tokens are chosen; what is left out comes from the model's generation_config.json."""

    temperature: TemperatureOption = None
    top_k: TopKOption = None
    top_p: TopPOption = None
    min_p: MinPOption = None
    repetition_penalty: PenaltyOption = None
    seed: SeedOption = 0

    def given(self) -> dict[str, Any]:
        """Return what was given, checked before anything is loaded."""
        from runtime.generate.sampling import Sampling

        choices = {name: value for name, value in asdict(self).items() if value is not None}
        Sampling(**choices)
        return choices


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthOptions:
    """Where a text ends."""

    max_tokens: MaxTokensOption = None
    stop: StopOption = None

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """Texts that end the output.

        Raises:
            UsageError: one is empty.
        """
        if "" in (self.stop or ()):
            raise UsageError("a stop string is empty", where="--stop", expected="at least one character", code="E-STOP")
        return tuple(self.stop or ())


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadingOptions:
    """What is loaded, where, and what it computes with."""

    prefill_chunk: ChunkOption = None
    threads: ThreadsOption = None
    speed: SpeedOption = Speed.AUTO
    model: ModelOption = None
    device_map: DeviceMapOption = None
    dtype: DtypeOption = None
    kv_cache_dtype: KvDtypeOption = None
    ctx_size: ContextOption = None
    expect_id: ExpectOption = None
    verify: VerifyOption = True
