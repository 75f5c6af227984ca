"""`llamarun`: run what `llamaplan` planned. Commands parse, call and print; torch is imported when one runs."""

import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from plans.console import Output, run_command
from plans.errors import IntegrityError, UsageError
from plans.files import read_limited

if TYPE_CHECKING:
    from runtime.generate import Generation
    from runtime.sampling import Sampling
    from runtime.session import Session

app = typer.Typer(
    name="llamarun",
    help="Run an exported, partitioned model: cached, chained generation equal to the unsplit model's.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

MAX_TOKENS_LIMIT = 1_000_000
CHECK_PROMPTS = ("def main(argv: list[str]) -> int:\n", "import os\n", "The quick brown fox jumps over the lazy dog.")


class Dtype(StrEnum):
    """Dtypes to compute in."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"


Target = Annotated[Path, typer.Argument(help="An export, a plan file (with --model), or a checkpoint folder.")]
ModelOption = Annotated[Path | None, typer.Option("--model", help="The checkpoint a plan file is for.")]
DeviceMapOption = Annotated[
    list[str] | None,
    typer.Option("--device-map", help="STAGE=DEVICE (stages count from 1), or one DEVICE for all; repeatable."),
]
DtypeOption = Annotated[Dtype | None, typer.Option("--dtype", help="Compute in this dtype instead of the stored one.")]
ContextOption = Annotated[
    int | None, typer.Option("--ctx-size", "-c", min=1, help="Context in tokens; the plan's, else the model's.")
]
ExpectOption = Annotated[str | None, typer.Option("--expect-id", help="Refuse an export with another export id.")]
VerifyOption = Annotated[bool, typer.Option("--verify/--no-verify", help="Compare the weights with their checksums.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout instead of text.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Only data, warnings and errors.")]


def _version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        typer.echo(f"llamarun {version('llamaplan')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Run an exported, partitioned model."""


@app.command()
def generate(
    target: Target,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Text to continue; - reads stdin.")] = None,
    prompt_file: Annotated[Path | None, typer.Option("--file", "-f", help="Read the prompt from a file.")] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens",
            "--max-new-tokens",
            "-n",
            min=0,
            max=MAX_TOKENS_LIMIT,
            help="New tokens; unset: until end-of-sequence or the context's end.",
        ),
    ] = None,
    temperature: Annotated[float | None, typer.Option("--temp", "--temperature", help="0 is greedy.")] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", help="Keep the K likeliest tokens; 0 keeps all.")] = None,
    top_p: Annotated[float | None, typer.Option("--top-p", help="Keep the likeliest tokens up to this sum.")] = None,
    min_p: Annotated[float | None, typer.Option("--min-p", help="Drop tokens below this share of the best.")] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option("--repetition-penalty", help="Above 1 makes repeated tokens less likely.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of all random draws.")] = 0,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="Text that ends the output; repeatable.")] = None,
    special: Annotated[
        bool, typer.Option("--special", help="Special tokens named in the prompt count as such.")
    ] = False,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after end-of-sequence.")] = False,
    prefill_chunk: Annotated[
        int | None, typer.Option("--prefill-chunk", min=1, help="Prompt tokens per step; unset: all at once.")
    ] = None,
    threads: Annotated[int | None, typer.Option("--threads", min=1, max=1024, help="CPU threads.")] = None,
    model: ModelOption = None,
    device_map: DeviceMapOption = None,
    dtype: DtypeOption = None,
    ctx_size: ContextOption = None,
    expect_id: ExpectOption = None,
    verify: VerifyOption = True,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Continue a text.

    Settings that are left out come from the model's generation_config.json.

    Example: llamarun generate shards/ -p "Once upon a time" -n 100 --temp 0.8
    """  # fmt: skip
    output = Output(json=as_json, quiet=quiet)
    text = _read_prompt(prompt, prompt_file)
    stated = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
    }
    choices = {name: value for name, value in stated.items() if value is not None}
    from runtime.sampling import Sampling

    Sampling(**choices, seed=seed)  # type: ignore[arg-type]  # refuses bad values before anything is loaded
    started = time.perf_counter()
    session = _open(
        output,
        target,
        model=model,
        device_map=device_map,
        dtype=dtype,
        ctx_size=ctx_size,
        expect_id=expect_id,
        verify=verify,
        threads=threads,
    )
    load_seconds = time.perf_counter() - started

    from runtime.generate import generate as run
    from runtime.limits import Limits
    from runtime.tokenizer import encode_prompt

    ids = encode_prompt(session.tokenizer, text, parses_special=special)
    sampling = _sampling(session, choices, seed=seed)
    limits = Limits(
        max_tokens=max_tokens,
        context_tokens=session.context_tokens,
        eos_token_ids=frozenset() if ignore_eos else session.eos_token_ids,
        stop_strings=tuple(stop or ()),
        prefill_chunk_tokens=prefill_chunk,
    )
    generation = run(
        session.chain,
        [ids],
        sampling=sampling,
        limits=limits,
        decode=session.decode,
        on_text=None if as_json else _Printer("" if quiet else text),
        measure_stages=True,
    )
    _finish(output, session, generation, load_seconds=load_seconds)


@app.command()
def check(
    target: Target,
    against: Annotated[Path, typer.Option("--against", help="The unsplit checkpoint.")],
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "--max-new-tokens", "-n", min=1, max=10_000, help="Greedy tokens to compare.")
    ] = 32,
    model: ModelOption = None,
    device_map: DeviceMapOption = None,
    dtype: DtypeOption = None,
    threads: Annotated[int | None, typer.Option("--threads", min=1, max=1024, help="CPU threads.")] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Compare a split model with the unsplit one: logits bit for bit, and greedy tokens.

    Ends with exit code 5 if anything differs.

    Example: llamarun check shards/ --against checkpoint/
    """
    output = Output(json=as_json, quiet=quiet)
    session = _open(output, target, model=model, device_map=device_map, dtype=dtype, threads=threads)

    from runtime.parity import compare_models, load_unsplit
    from runtime.tokenizer import encode_prompt

    unsplit = load_unsplit(against, dtype=session.chain.dtype)
    prompts = [encode_prompt(session.tokenizer, text, parses_special=False) for text in CHECK_PROMPTS]
    results = compare_models(session.chain, unsplit, prompts, num_tokens=max_tokens, chunk_tokens=3)
    output.data(
        {
            "is_identical": all(result.is_identical for result in results),
            "cases": [
                {"case": r.case, "values": r.num_values, "different": r.num_different, "max_abs": r.max_abs_difference}
                for r in results
            ],
        }
    )
    for result in results:
        verdict = "identical" if result.is_identical else f"{result.num_different} differ"
        output.show(f"{verdict:>12}  {result.case} ({result.num_values} values)")
    if not all(result.is_identical for result in results):
        worst = max(result.max_abs_difference for result in results)
        raise IntegrityError(f"differs from the unsplit model by up to {worst:.3g}", where=target, code="E-PARITY")
    output.note(f"{len(session.chain.stages)} stages equal the unsplit model of {against}, bit for bit")


def main() -> None:
    """Entry point of `llamarun`."""
    run_command(app, name="llamarun")


def _open(
    output: Output,
    target: Path,
    *,
    model: Path | None,
    device_map: list[str] | None,
    dtype: Dtype | None,
    ctx_size: int | None = None,
    expect_id: str | None = None,
    verify: bool = True,
    threads: int | None = None,
) -> "Session":
    """Open and load what the command was given, with a spinner on a terminal."""
    with output.progress_console.status("opening", spinner="line") as status:
        from runtime.opening import open_source, parse_device_map

        source = open_source(target, model=model, expect_id=expect_id)
        for warning in source.warnings:
            output.warn(warning)
        places = parse_device_map(device_map or [], num_stages=len(source.stages))

        import torch
        import transformers

        from runtime.session import open_session

        # Our own sentences say what a person needs; the library's advice about its internals does not help here.
        transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        if threads is not None:
            torch.set_num_threads(threads)
        return open_session(
            source,
            device_map=places,
            dtype=dtype,
            context_tokens=ctx_size,
            verifies=verify,
            progress=lambda text: status.update(text),
        )


def _sampling(session: "Session", choices: dict[str, Any], *, seed: int) -> "Sampling":
    """Return the model's own defaults with the command's choices on top."""
    from dataclasses import replace

    from runtime.sampling import Sampling

    vocab_size = session.source.checkpoint.config.vocab_size
    if choices.get("top_k", 0) > vocab_size:
        raise UsageError(
            f"{choices['top_k']} is more than the vocabulary has", where="--top-k", expected=f"0 to {vocab_size}"
        )
    return replace(Sampling.from_generation_config(session.chain.generation_config, seed=seed), **choices)


def _read_prompt(prompt: str | None, prompt_file: Path | None) -> str:
    from runtime.tokenizer import MAX_PROMPT_BYTES, read_prompt

    if (prompt is None) == (prompt_file is None):
        raise UsageError("give one prompt", expected="--prompt TEXT, --prompt - (stdin) or --file PATH")
    if prompt_file is not None:
        return read_prompt(read_limited(prompt_file, max_bytes=MAX_PROMPT_BYTES), where=prompt_file)
    if prompt == "-":
        return read_prompt(sys.stdin.buffer.read(MAX_PROMPT_BYTES + 1), where="stdin")
    return prompt or ""


class _Printer:
    """Streams text to stdout; the prompt goes to stderr before the first piece, so that a pipe gets only new text."""

    def __init__(self, prompt: str) -> None:
        self._prompt = prompt

    def __call__(self, _sequence: int, piece: str) -> None:
        if self._prompt:
            sys.stderr.write(self._prompt)
            sys.stderr.flush()
            self._prompt = ""
        sys.stdout.write(piece)
        sys.stdout.flush()


def _finish(output: Output, session: "Session", generation: "Generation", *, load_seconds: float) -> None:
    from runtime.opening import check_sources_unchanged
    from runtime.summary import run_document, summary_lines

    check_sources_unchanged(session.source)
    document = run_document(session, generation, load_seconds=load_seconds)
    output.data(document)
    if not output.json:
        sys.stdout.write("\n")
        sys.stdout.flush()
        for line in summary_lines(document):
            output.note(line)


if __name__ == "__main__":
    main()
