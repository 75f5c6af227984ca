"""`llamarun`: run what `llamaplan` planned. Commands parse, call and print; torch is imported when one runs."""

from typing import Annotated, NoReturn

import typer

from plans.commands.console import leave, run_command
from runtime.cli import batch as cli_batch
from runtime.cli import bench as cli_bench
from runtime.cli import chat as cli_chat
from runtime.cli import check as cli_check
from runtime.cli import generate as cli_generate

app = typer.Typer(
    name="llamarun",
    help="Run an exported, partitioned model: cached, chained generation equal to the unsplit model's.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def main() -> NoReturn:
    """Entry point of `llamarun`."""
    leave(run())


def run() -> int:
    """Run the command line in `sys.argv`; returns the exit code."""
    return run_command(app, name="llamarun")


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


app.command()(cli_generate.generate)
app.command()(cli_chat.chat)
app.command()(cli_batch.batch)
app.command()(cli_bench.bench)
app.command()(cli_check.check)
