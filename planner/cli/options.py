"""Command-line options that several commands share, so that they are spelled and explained once."""

from pathlib import Path
from typing import Annotated, Literal

import typer

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Checkpoint folder, bare config.json, or org/name in the local Hugging Face cache.",
        show_default=False,
    ),
]
ContextOption = Annotated[
    int | None,
    typer.Option("--ctx-size", "-c", metavar="TOKENS", help="Context the KV cache is sized for.", show_default=False),
]
BatchOption = Annotated[int, typer.Option("--batch-size", min=1, max=65536, help="Sequences per batch.")]
DtypeOption = Annotated[
    str | None,
    typer.Option("--dtype", metavar="DTYPE", help="bf16, fp16 or fp32; unset: as stored.", show_default=False),
]
KvDtypeOption = Annotated[
    str | None,
    typer.Option(
        "--kv-cache-dtype", metavar="DTYPE", help="Dtype of the KV cache; unset: as --dtype.", show_default=False
    ),
]
PromptTokensOption = Annotated[
    int | None, typer.Option("--prompt-tokens", metavar="TOKENS", help="Length of the prompt.", show_default=False)
]
InFlightOption = Annotated[
    int, typer.Option("--requests-in-flight", min=1, max=65536, help="Batches in the pipeline at once.")
]
PrefillChunkOption = Annotated[
    int | None,
    typer.Option(
        "--prefill-chunk",
        metavar="TOKENS",
        min=1,
        help="Prompt tokens per step; unset: all at once.",
        show_default=False,
    ),
]
SpeedOption = Annotated[
    Literal["auto", "reference"],
    typer.Option(
        "--speed",
        help="As for llamarun: which measured curves count, those of the path it takes or of transformers' code.",
    ),
]
ClusterOption = Annotated[
    Path | None, typer.Option("--cluster", metavar="FILE", help="Cluster file.", show_default=False)
]
DeviceOption = Annotated[
    list[str] | None,
    typer.Option(
        "--device",
        metavar="NAME[=SIZE]",
        help="A device and its budget: cpu=16GiB, cuda:0=20GiB, 2xrtx4090; repeatable.",
        show_default=False,
    ),
]
MarginOption = Annotated[
    list[str] | None,
    typer.Option(
        "--margin",
        metavar="[NAME=]AMOUNT",
        help="Memory to leave free: 10%, 2GiB, cuda:0=2GiB, cpu=20%; repeatable.",
        show_default=False,
    ),
]
OutputOption = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the JSON file here.", show_default=False)
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout instead of tables.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Only data, warnings and errors.")]
