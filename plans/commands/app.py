"""What both command lines are: one typer application, which says its version."""

from typing import Annotated

import typer


def new_app(name: str, *, summary: str) -> typer.Typer:
    """Return a command line without commands.

    Args:
        name: what a person types.
        summary: one sentence, the first of `--help`.
    """
    app = typer.Typer(
        name=name,
        help=summary,
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )

    def say_version(value: bool) -> None:  # noqa: FBT001 - typer calls it so
        if value:
            from importlib.metadata import version

            typer.echo(f"{name} {version('llamaplan')}")
            raise typer.Exit

    def root(
        *,
        version: Annotated[
            bool, typer.Option("--version", callback=say_version, is_eager=True, help="Print the version and leave.")
        ] = False,
    ) -> None:
        pass

    app.callback(help=summary)(root)
    return app
