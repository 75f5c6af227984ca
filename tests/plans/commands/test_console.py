"""Bars and spinners are for people at a terminal; tables fold only where they are told to."""

import io

import pytest
from rich.console import Console

from plans.commands.console import Output, table


def output(*, is_terminal: bool, quiet: bool = False) -> tuple[Output, io.StringIO]:
    written = io.StringIO()
    console = Console(file=written, force_terminal=is_terminal, width=100, color_system=None)
    return Output(quiet=quiet, _consoles={True: console}), written


@pytest.mark.parametrize(("is_terminal", "quiet"), [(True, False), (True, True), (False, False)])
def test_bars_and_spinners_are_seen_on_a_terminal_and_only_there(is_terminal: bool, quiet: bool) -> None:
    screen, written = output(is_terminal=is_terminal, quiet=quiet)
    with screen.spinner("opening") as say:
        say("loading")
    with screen.progress("export", unit="bytes") as bar:
        bar(1 << 20, 2 << 20)
    with screen.progress("lines", done=3, total=9, unit="items") as bar:
        bar(5, 9)
    with screen.progress() as bar:
        bar(1, 2, what="copies")
    is_seen = is_terminal and not quiet
    for part in ("loading", "export", "1.0/2.0 MiB", "lines", "5/9", "copies"):
        assert (part in written.getvalue()) == is_seen, part


def test_only_folded_columns_run_over_several_lines() -> None:
    rows = table("name", numbers=("size",), folded=("words",))
    rows.add_row("a", "1", "many " * 9)
    written = io.StringIO()
    Console(file=written, width=30, color_system=None).print(rows)
    lines = written.getvalue().splitlines()
    assert [column.header for column in rows.columns] == ["name", "size", "words"]
    assert (lines[1].split()[:3], len(lines)) == (["a", "1", "many"], 4)
