"""Options that several commands share, as one parameter: a frozen dataclass whose fields typer sees as options."""

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from inspect import Parameter
from typing import Annotated, Any

import typer

from plans.commands.console import Output

QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Only data, warnings and errors.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScreenOptions:
    """What is printed."""

    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout instead of text.")] = False
    quiet: QuietOption = False

    def output(self) -> Output:
        """Return where the command writes."""
        return Output(json=self.as_json, quiet=self.quiet)


def with_option_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command whose dataclass parameters are given to it field by field, for typer.

    Args:
        command: each of its parameters that is annotated with a dataclass stands for that class's fields, in its place;
            a field's annotation and default are those of an option.

    Example:
        >>> @dataclass(frozen=True)
        ... class Size:
        ...     width: int = 1
        >>> @with_option_groups
        ... def draw(*, size: Size, name: str = "") -> None: ...
        >>> str(inspect.signature(draw))
        "(*, width: int = 1, name: str = '') -> None"
    """
    signature = inspect.signature(command)
    groups: dict[str, Any] = {
        name: parameter.annotation
        for name, parameter in signature.parameters.items()
        if is_dataclass(parameter.annotation)
    }

    def flattened() -> Iterator[Parameter]:
        for name, parameter in signature.parameters.items():
            if name not in groups:
                yield parameter
                continue
            for field in fields(groups[name]):
                yield Parameter(field.name, Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)

    @functools.wraps(command)
    def run(*arguments: Any, **values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        command(*arguments, **values)

    parameters = list(flattened())
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters} | {"return": None}
    return run
