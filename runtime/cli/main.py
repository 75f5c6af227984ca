"""`llamarun`: run what `llamaplan` planned. Commands parse, call and print; torch is imported when one runs."""

from typing import NoReturn

from plans.commands.app import new_app
from plans.commands.console import leave, run_command
from runtime.cli import batch as cli_batch
from runtime.cli import bench as cli_bench
from runtime.cli import chat as cli_chat
from runtime.cli import check as cli_check
from runtime.cli import generate as cli_generate
from runtime.cli import serve as cli_serve

app = new_app(
    "llamarun", summary="Run an exported, partitioned model: cached, chained generation equal to the unsplit model's."
)


def main() -> NoReturn:
    """Entry point of `llamarun`."""
    leave(run())


def run() -> int:
    """Run the command line in `sys.argv`; returns the exit code."""
    return run_command(app, name="llamarun")


app.command()(cli_generate.generate)
app.command()(cli_chat.chat)
app.command()(cli_batch.batch)
app.command()(cli_serve.serve)
app.command()(cli_bench.bench)
app.command()(cli_check.check)
