"""`llamarun chat`: a conversation."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from plans.commands.console import Output
from plans.commands.option_groups import QuietOption, with_option_groups
from plans.errors import LlamaplanError, UsageError
from runtime.chat.input import LineReader
from runtime.cli import options
from runtime.cli import processes as several
from runtime.cli.opening import merge_sampling

if TYPE_CHECKING:
    from runtime.chat.chat import ChatNumbers
    from runtime.chat.commands import ChatCommands


@with_option_groups
def chat(
    context: typer.Context,
    target: options.Target,
    *,
    system: Annotated[str, typer.Option("--system", help="System message to start with.")] = "",
    conversation: Annotated[Path | None, typer.Option("--load", help="Go on with a saved conversation.")] = None,
    length: options.LengthOptions,
    sampling: options.SamplingOptions,
    loading: options.LoadingOptions,
    team: several.RestartOptions,
    quiet: QuietOption = False,
) -> None:
    """Talk with a model that has a chat template. Type /help for what can be done in a conversation.

    Lines come from the terminal or a pipe; answers go to stdout. From a pipe, the first line that cannot be answered
    ends the program with an error.

    Example: llamarun chat shards/ --system "Answer briefly." --temp 0.7
    """  # fmt: skip
    output = Output(quiet=quiet)
    if length.max_tokens == 0:
        raise UsageError("an answer of 0 tokens is none", where="--max-tokens", expected="at least 1")
    stop_strings = length.stop_strings
    choices = sampling.given()
    run = several.open_run(context, target, output=output, loading=loading, team=team)
    prepared = run.prepared

    from runtime.chat.chat import Chat
    from runtime.chat.commands import ChatCommands
    from runtime.chat.conversation import Conversation, read_conversation
    from runtime.chat.template import ChatTemplate, check_template
    from runtime.reading.opening import check_sources_unchanged

    folder = prepared.source.folder
    template = context.with_resource(ChatTemplate(folder, vocab_size=prepared.vocab_size))
    check_template(template, prepared.tokenizer, folder=folder)
    start = Conversation(system) if conversation is None else read_conversation(conversation)
    with run.session() as session:
        talk = Chat(
            session,
            template=template,
            conversation=start,
            sampling=merge_sampling(prepared, choices),
            max_tokens=length.max_tokens,
            stop_strings=stop_strings,
            prefill_chunk_tokens=loading.prefill_chunk,
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
