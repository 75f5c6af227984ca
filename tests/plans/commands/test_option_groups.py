"""Every command line can call every command: groups of options are unfolded into options."""

import inspect
from dataclasses import is_dataclass

import pytest
import typer

from planner.cli.main import app as llamaplan
from runtime.cli.main import app as llamarun

COMMANDS = [
    pytest.param(command.callback, id=f"{name} {command.name or command.callback.__name__}")
    for name, app in (("llamaplan", llamaplan), ("llamarun", llamarun))
    for command in app.registered_commands
    if command.callback is not None
]


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_takes_a_group_as_it_is(command: object) -> None:
    assert callable(command)
    parameters = inspect.signature(command).parameters.values()
    assert not [parameter.name for parameter in parameters if is_dataclass(parameter.annotation)]
    assert not [parameter.name for parameter in parameters if isinstance(parameter.annotation, str)]


@pytest.mark.parametrize("app", [llamaplan, llamarun])
def test_both_command_lines_are_whole(app: typer.Typer) -> None:
    assert typer.main.get_command(app) is not None
