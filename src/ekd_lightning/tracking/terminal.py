"""Terminal: one live display of all phases of a command, above which everything else that is said stays whole."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ekd_lightning.progress import Reporter, Session, Task, readable

_BAR, _PER_SECOND = 20, 2  # a redraw takes milliseconds from a training that Python bounds
_TOTAL, _GAP, _TIME = "total", 2, 7
_LEAST_WIDTH = 60  # columns below which bars are left out


class LiveDisplay(Reporter):
    """One row per phase with its bar, and the time that is left in total; redrawn in place, on a terminal.

    While it is shown, what is printed, logged or warned of appears above it, each line whole.

    Args:
        stream: The terminal.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._stack = contextlib.ExitStack()
        self._live: Live | None = None
        self._session: Session | None = None

    def start(self, session: Session) -> None:
        """Begins to draw."""
        console = Console(file=self._stream, highlight=False)
        self._session = session
        self._live = Live(
            Rows(session), console=console, refresh_per_second=_PER_SECOND, redirect_stdout=False, redirect_stderr=False
        )
        self._stack.enter_context(self._live)
        self._stack.enter_context(_redirected(console))

    def stop(self) -> None:
        """Draws once more, or clears the rows that are not to be kept, and lets others write as before."""
        if self._live is not None and self._session is not None:
            self._live.transient = not self._session.keep
        self._stack.close()
        self._live = self._session = None


class Rows:
    """What is drawn of a session; made anew each time.

    Args:
        session: The session.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._rows = Group()

    def __rich_console__(self, console: Console, options: Any) -> Iterator[Group]:
        with contextlib.suppress(Exception):  # the session changes meanwhile: the previous rows will do
            self._rows = self._drawn(options.max_width)
        yield self._rows

    def _drawn(self, columns: int) -> Group:
        phases = dict(self._session.phases)
        over = not any(task.active for task in phases.values())
        left = None if over else self._session.seconds_left
        wide = columns >= _LEAST_WIDTH
        names = max(map(len, [*phases, _TOTAL]))
        widths = [names, *([_BAR] if wide else []), _TIME]
        rest = columns - sum(widths) - _GAP * len(widths) - 1
        table = Table.grid(padding=(0, _GAP, 0, 0))
        for width in (*widths, rest):
            table.add_column(no_wrap=True, overflow="ellipsis", width=width)
        for task in phases.values():
            style = "bold" if task.active else "" if task.elapsed else "dim"
            words = task.words() if task.active else task.note
            if task.active and left is None and (own := task.seconds_left) is not None:
                words += f"  about {readable(own)} left"
            table.add_row(Text(task.name, style), *([_bar(task)] if wide else []), Text(_time(task)), Text(words))
        seconds = readable(self._session.elapsed)
        later = "" if left is None else f"about {readable(left)} left in all"
        cells = zip((_TOTAL, *([""] if wide else []), seconds), widths, strict=True)
        total = "".join(f"{text:{width + _GAP}}" for text, width in cells) + later
        # Not filled up to the edge: the ^C that a terminal adds to it would begin a line of its own.
        return Group(table, Text(total.rstrip(), "dim", no_wrap=True, overflow="ellipsis"))


def _bar(task: Task) -> ProgressBar:
    share = task.share
    if not task.active:
        return ProgressBar(total=1, completed=1 if task.elapsed else 0, width=_BAR)
    return ProgressBar(total=1, completed=share or 0, pulse=share is None, width=_BAR)


def _time(task: Task) -> str:
    return readable(task.elapsed) if task.elapsed else ""


class Above(io.TextIOBase):
    """A stream whose whole lines appear above a live display; of lines that redraw themselves, the last state.

    One for each stream of the process, whatever display it has: libraries patch what they find at their import.
    """

    def __init__(self) -> None:
        self._console: Console | None = None
        self._stream: TextIO = sys.stdout
        self._rest = ""
        self._lock = threading.Lock()

    def begin(self, console: Console, stream: TextIO) -> None:
        """Prints from now on above a display, in place of a stream."""
        self._console, self._stream = console, stream

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The terminal's."""
        return self._stream.encoding

    def isatty(self) -> bool:
        """As the terminal says."""
        return self._stream.isatty()

    def fileno(self) -> int:
        """The terminal's."""
        return self._stream.fileno()

    def writable(self) -> bool:
        """Always."""
        return True

    def write(self, text: str) -> int:
        """Prints the lines that are complete; without a display, all at once."""
        if self._console is None:
            return self._stream.write(text)
        with self._lock:
            *lines, self._rest = (self._rest + text).split("\n")
        self._print(lines)
        return len(text)

    def finish(self) -> None:
        """Prints what has no end of line yet, and leaves the display."""
        rest, self._rest = self._rest, ""
        self._print([rest] if rest.strip() else [])
        self._console = None

    def _print(self, lines: Iterable[str]) -> None:
        console = self._console
        if console is None:
            return
        for line in lines:
            shown = line.rstrip("\r").rpartition("\r")[2]
            # Never wrapped: a command that is longer than the screen can be copied.
            console.print(Text.from_ansi(shown), soft_wrap=True)


_ABOVE = {"stdout": Above(), "stderr": Above()}


@contextlib.contextmanager
def _redirected(console: Console) -> Iterator[None]:
    """Leads standard output, standard error and what loggers have of them above a display, where they are terminals."""
    streams = {name: getattr(sys, name) for name in _ABOVE if getattr(sys, name).isatty()}
    terminals = {
        stream: _ABOVE[name]
        for name in _ABOVE
        for stream in (getattr(sys, f"__{name}__"), getattr(sys, name))
        if stream is not None and stream.isatty()
    }
    for name, above in _ABOVE.items():
        above.begin(console, getattr(sys, name))
    found = [handler for handler in _handlers() if handler.stream in terminals]
    before = [handler.setStream(terminals[handler.stream]) for handler in found]
    try:
        for handler in found:
            handler.addFilter(_is_seen)
        for name in streams:
            setattr(sys, name, _ABOVE[name])
        yield
    finally:
        for above in _ABOVE.values():
            above.finish()
        for name, stream in streams.items():
            setattr(sys, name, stream)
        for handler, stream in zip(found, before, strict=True):
            handler.setStream(stream)
            handler.removeFilter(_is_seen)


def _is_seen(record: logging.LogRecord) -> bool:
    """Whether a line says something that the display does not show."""
    return not getattr(record, "progress", False)


def _handlers() -> Iterator[logging.StreamHandler[Any]]:
    """All handlers of all loggers that write to a stream and not to a file."""
    loggers = [logging.getLogger(), *logging.root.manager.loggerDict.values()]
    for logger in loggers:
        for handler in getattr(logger, "handlers", ()):
            if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
                yield handler
