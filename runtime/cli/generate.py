"""`llamarun generate`: continue one text."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from plans.commands.console import Output
from plans.commands.option_groups import ScreenOptions, with_option_groups
from plans.errors import UsageError, printable
from plans.reading.files import read_limited
from runtime.cli import options
from runtime.cli import processes as several
from runtime.cli.opening import merge_sampling

if TYPE_CHECKING:
    from runtime.generate.request import Generation
    from runtime.session import AnySession


@with_option_groups
def generate(
    context: typer.Context,
    target: options.Target,
    *,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Text to continue; - reads stdin.")] = None,
    prompt_file: Annotated[Path | None, typer.Option("--file", "-f", help="Read the prompt from a file.")] = None,
    prompt_ids: Annotated[
        str | None, typer.Option("--prompt-ids", help="The prompt as token ids, separated by commas.")
    ] = None,
    length: options.LengthOptions,
    sampling: options.SamplingOptions,
    special: Annotated[
        bool, typer.Option("--special", help="Special tokens named in the prompt count as such.")
    ] = False,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after end-of-sequence.")] = False,
    loading: options.LoadingOptions,
    team: several.RestartOptions,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Walk through the chain step by step.")] = False,
    screen: ScreenOptions,
) -> None:
    """Continue a text.

    Settings that are left out come from the model's generation_config.json.

    Example: llamarun generate shards/ -p "Once upon a time" -n 100 --temp 0.8
    """  # fmt: skip
    output = screen.output()
    if sum(given is not None for given in (prompt, prompt_file, prompt_ids)) != 1:
        raise UsageError(
            "give one prompt", expected="--prompt TEXT, --prompt - (stdin), --file PATH or --prompt-ids IDS"
        )
    stop_strings = length.stop_strings
    given_ids = None if prompt_ids is None else _parse_ids(prompt_ids)
    text = "" if given_ids is not None else _read_prompt(prompt, prompt_file)
    choices = sampling.given()
    run = several.open_run(context, target, output=output, loading=loading, team=team)
    prepared = run.prepared

    from runtime.generate.limits import check_prompt
    from runtime.generate.request import Request
    from runtime.reading.tokenizer import encode_prompt

    ids = given_ids or encode_prompt(prepared.tokenizer, text, parses_special=special)
    limits = prepared.limits(
        max_tokens=length.max_tokens,
        stop_strings=stop_strings,
        prefill_chunk_tokens=loading.prefill_chunk,
        ignores_eos=ignore_eos,
    )
    room = check_prompt(ids, limits, vocab_size=prepared.vocab_size, where="prompt")
    request = Request(prompt_ids=ids, sampling=merge_sampling(prepared, choices), limits=limits)
    shown = text if given_ids is None else prepared.decode(ids)
    with run.session(cache_tokens=len(ids) + room) as session:
        generation = _run(output, session, request, prompt="" if screen.quiet else shown, is_verbose=verbose)
        _finish(output, session, generation, is_text_shown=not verbose)


def _run(output: Output, session: "AnySession", request: object, *, prompt: str, is_verbose: bool) -> "Generation":
    from runtime.engine.run import generate_requests
    from runtime.generate.request import Request
    from runtime.reading.capacity import memory_faults
    from runtime.results.summary import Walk

    assert isinstance(request, Request)
    is_streamed = not output.json and not is_verbose
    with memory_faults("generating"):
        return generate_requests(
            session,
            [request],
            decode=session.prepared.decode,
            on_text=_Printer(prompt) if is_streamed else None,
            on_step=Walk(session, write=output.note) if is_verbose else None,
            measure_stages=True,
        )


def _parse_ids(text: str) -> list[int]:
    from plans.reading.sizes import parse_count

    ids = [parse_count(part.strip()) for part in text.split(",")]
    if None in ids:
        raise UsageError(
            f"'{printable(text, limit=60)}' is no list of token ids",
            where="--prompt-ids",
            expected="whole numbers from 0 up, separated by commas",
            code="E-PROMPT",
        )
    return [token for token in ids if token is not None]


def _read_prompt(prompt: str | None, prompt_file: Path | None) -> str:
    from runtime.reading.tokenizer import MAX_PROMPT_BYTES, read_prompt

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


def _finish(output: Output, session: "AnySession", generation: "Generation", *, is_text_shown: bool) -> None:
    from runtime.reading.opening import check_sources_unchanged
    from runtime.results.summary import run_document, summary_lines

    check_sources_unchanged(session.source)
    document = run_document(session, generation)
    output.data(document.as_json())
    if not output.json:
        sys.stdout.write("\n" if is_text_shown else generation.sequences[0].text + "\n")
        sys.stdout.flush()
        for line in summary_lines(document):
            output.note(line)
