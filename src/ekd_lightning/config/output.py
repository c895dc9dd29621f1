"""Tables on standard output: folded on a terminal, one line a row elsewhere."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Collection, Iterable, Sequence

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table

_ANY_WIDTH = 100_000  # of lines in a pipe or file, where nothing is folded


def print_table(
    title: str, heads: Sequence[str], rows: Iterable[Sequence[RenderableType]], *, left: Collection[str] = ()
) -> None:
    """Prints a table on standard output; the columns in `left` hold texts, the others numbers."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for head in heads:
        table.add_column(head, justify="left" if head in left else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = _console()
    if console.measure(table, options=console.options.update_width(1000)).maximum > console.width:
        for column in table.columns:  # numbers stay whole and their heads break between words
            if column.justify == "right":
                column.max_width = max(map(len, [*str(column.header).split(), *map(str, column.cells)]))
    print_wide(table)


def print_wide(*parts: RenderableType) -> None:
    """Prints tables and texts on standard output; unless it is a terminal, each row is one line of any length."""
    console = _console()
    for part in parts:
        with contextlib.nullcontext() if console.is_terminal else console.capture() as printed:
            console.print(part)
        if printed:
            print(*(line.rstrip() for line in printed.get().splitlines()), sep="\n")


def terminal_width() -> int | None:
    """Characters of a line of standard output; None unless it is a terminal."""
    console = Console(file=sys.stdout)
    return console.width if console.is_terminal else None


def _console() -> Console:
    return Console(file=sys.stdout, highlight=False, markup=False, width=terminal_width() or _ANY_WIDTH)
