"""`llamarun chat`: a conversation."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from plans.console import Output
from plans.errors import LlamaplanError, UsageError
from runtime.chat.input import LineReader
from runtime.cli import options
from runtime.cli import processes as several
from runtime.cli.opening import merge_sampling, prepare, refuse_empty_stops, sampling_choices
from runtime.fast.speed import Speed

if TYPE_CHECKING:
    from runtime.chat.chat import ChatNumbers
    from runtime.chat.commands import ChatCommands


def chat(
    context: typer.Context,
    target: options.Target,
    system: Annotated[str, typer.Option("--system", help="System message to start with.")] = "",
    conversation: Annotated[Path | None, typer.Option("--load", help="Go on with a saved conversation.")] = None,
    max_tokens: options.MaxTokensOption = None,
    temperature: options.TemperatureOption = None,
    top_k: options.TopKOption = None,
    top_p: options.TopPOption = None,
    min_p: options.MinPOption = None,
    repetition_penalty: options.PenaltyOption = None,
    seed: options.SeedOption = 0,
    stop: options.StopOption = None,
    prefill_chunk: options.ChunkOption = None,
    threads: options.ThreadsOption = None,
    speed: options.SpeedOption = Speed.AUTO,
    model: options.ModelOption = None,
    device_map: options.DeviceMapOption = None,
    dtype: options.DtypeOption = None,
    kv_cache_dtype: options.KvDtypeOption = None,
    ctx_size: options.ContextOption = None,
    expect_id: options.ExpectOption = None,
    verify: options.VerifyOption = True,
    processes: several.ProcessesOption = False,
    listen: several.ListenOption = None,
    key_file: several.KeyOption = None,
    trusted_network: several.TrustedOption = False,
    heartbeat_timeout: several.HeartbeatOption = 30.0,
    join_timeout: several.JoinOption = 60.0,
    world_size: several.WorldOption = None,
    restart: several.RestartOption = False,
    quiet: options.QuietOption = False,
) -> None:
    """Talk with a model that has a chat template. Type /help for what can be done in a conversation.

    Lines come from the terminal or a pipe; answers go to stdout. From a pipe, the first line that cannot be answered
    ends the program with an error.

    Example: llamarun chat shards/ --system "Answer briefly." --temp 0.7
    """  # fmt: skip
    output = Output(quiet=quiet)
    if max_tokens == 0:
        raise UsageError("an answer of 0 tokens is none", where="--max-tokens", expected="at least 1")
    refuse_empty_stops(stop)
    choices = sampling_choices(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    team = several.ProcessChoices(
        processes=processes,
        listen=listen,
        key_file=key_file,
        trusted_network=trusted_network,
        heartbeat_timeout=heartbeat_timeout,
        join_timeout=join_timeout,
        world_size=world_size,
        restart=restart,
    )
    team.check()
    workers = team.workers(context, target, model=model)
    prepared = prepare(
        output,
        target,
        model=model,
        device_map=device_map,
        dtype=dtype,
        kv_cache_dtype=kv_cache_dtype,
        ctx_size=ctx_size,
        expect_id=expect_id,
        threads=threads,
        only_stage=team.only_stage,
        workers=workers,
    )

    from runtime.chat.chat import Chat
    from runtime.chat.commands import ChatCommands
    from runtime.chat.conversation import Conversation, read_conversation
    from runtime.chat.template import check_template
    from runtime.reading.opening import check_sources_unchanged

    check_template(prepared.tokenizer, folder=prepared.source.folder)
    start = Conversation(system) if conversation is None else read_conversation(conversation)
    begin = several.Start(
        output=output, prepared=prepared, workers=workers, threads=threads, verify=verify, speed=speed
    )
    with several.any_session(team, begin) as session:
        talk = Chat(
            session,
            conversation=start,
            sampling=merge_sampling(prepared, choices),
            max_tokens=max_tokens,
            stop_strings=tuple(stop or ()),
            prefill_chunk_tokens=prefill_chunk,
        )
        reader = LineReader()
        if reader.is_terminal:
            output.note("type a message, /help for commands; Ctrl-C stops an answer, Ctrl-D leaves")
        _converse(output, reader, ChatCommands(talk, session, screen=_Screen(output, reader)))
        check_sources_unchanged(session.source)
        output.note(_summary(talk.numbers))


def _converse(output: Output, reader: LineReader, commands: "ChatCommands") -> None:
    """Run lines until there are no more; a person may try again after an error, a pipe cannot."""
    while True:
        try:
            line = reader.read()
            if line is None or not commands.run(line):
                return
        except LlamaplanError as error:
            if not reader.is_terminal:
                raise
            output.warn(error.line())
        except KeyboardInterrupt:
            if not reader.is_terminal:
                raise
            output.note("\n(Ctrl-D or /exit leaves)")


class _Screen:
    """Answers on stdout, remarks on stderr."""

    def __init__(self, output: Output, reader: LineReader) -> None:
        self._output = output
        self._reader = reader

    def text(self, piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    def note(self, text: str) -> None:
        self._output.note(text)

    def ask_again(self, text: str) -> str | None:
        return self._reader.read(suggestion=text) if self._reader.is_terminal else None


def _summary(numbers: "ChatNumbers") -> str:
    if not numbers.num_answers:
        return "no answers"
    first = 1000 * sum(numbers.first_token_seconds) / numbers.num_answers
    speed = numbers.num_decode_steps / numbers.decode_seconds if numbers.decode_seconds else 0.0
    return (
        f"{numbers.num_answers} answers, {numbers.num_new_tokens} tokens; {numbers.num_read_tokens} of "
        f"{numbers.num_prompt_tokens} prompt tokens read, the others were in the cache; "
        f"time to first token {first:.0f} ms on average, then {speed:.1f} tokens/s"
    )
