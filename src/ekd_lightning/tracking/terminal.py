"""Terminal: one live display of all phases of a command; all other output appears above it in whole lines."""

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

_BAR, _PER_SECOND = 10, 2  # a redraw takes milliseconds of Python's time, which bounds the training
_TOTAL, _GAP, _TIME = "total", 2, 7
_LEAST_WIDTH, _SHORT_BAR = 100, 5  # columns; a narrower display has short bars and no times, to show all scores


class LiveDisplay(Reporter):
    """One row per phase with its bar, and the total time left; redrawn in place, on a terminal.

    While it is shown, printed and logged lines and warnings appear above it, each line whole.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._stack = contextlib.ExitStack()
        self._live: Live | None = None
        self._session: Session | None = None

    def start(self, session: Session) -> None:
        """Starts to draw."""
        console = Console(file=self._stream, highlight=False)
        self._session = session
        self._live = Live(
            SessionRows(session),
            console=console,
            refresh_per_second=_PER_SECOND,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._stack.enter_context(self._live)
        self._stack.enter_context(_redirected(console))

    def stop(self) -> None:
        """Draws a last time, or clears the rows if the session does not keep them, and gives the streams back."""
        if self._live is not None and self._session is not None:
            self._live.transient = not self._session.keep
        self._stack.close()
        self._live = self._session = None


class SessionRows:
    """Rendering of a session, recomputed at each redraw."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._rows = Group()

    def __rich_console__(self, console: Console, options: Any) -> Iterator[Group]:
        with contextlib.suppress(Exception):  # the session may change meanwhile; then the previous rows are drawn
            self._rows = self._render(options.max_width)
        yield self._rows

    def _render(self, columns: int) -> Group:
        phases = dict(self._session.phases)
        over = not any(task.active for task in phases.values())
        left = None if over else self._session.seconds_left
        wide = columns >= _LEAST_WIDTH
        names, bar = max(map(len, [*phases, _TOTAL])), _BAR if wide else _SHORT_BAR
        widths = [names, bar, *([_TIME] if wide else [])]
        gap = _GAP if wide else 1
        rest = columns - sum(widths) - gap * len(widths) - 1
        table = Table.grid(padding=(0, gap, 0, 0))
        for width in (*widths, rest):
            table.add_column(no_wrap=True, overflow="ellipsis", width=width)
        for task in phases.values():
            style = "bold" if task.active else "" if task.elapsed else "dim"
            words = task.words(scores=True) if task.active else f"{task.note}  {task.scores}".strip()
            if task.active and left is None and (own := task.seconds_left) is not None:
                words += f"  about {readable(own)} left"
            words = words if wide else " ".join(words.split())
            table.add_row(Text(task.name, style), _bar(task, bar), *([Text(_time(task))] if wide else []), Text(words))
        seconds = readable(self._session.elapsed)
        later = "" if left is None else f"about {readable(left)} left in all"
        cells = zip((_TOTAL, "", seconds), (*widths, _TIME), strict=False)
        total = "".join(f"{text:{width + gap}}" for text, width in cells) + later
        # Not padded to the edge: the ^C that a terminal appends would start a new line.
        return Group(table, Text(total.rstrip(), "dim", no_wrap=True, overflow="ellipsis"))


def _bar(task: Task, width: int) -> ProgressBar:
    share = task.share
    if not task.active:
        return ProgressBar(total=1, completed=1 if task.elapsed else 0, width=width)
    return ProgressBar(total=1, completed=share or 0, pulse=share is None, width=width)


def _time(task: Task) -> str:
    return readable(task.elapsed) if task.elapsed else ""


class StreamAbove(io.TextIOBase):
    """A stream whose whole lines appear above a live display; of a line that is redrawn, only the last state does.

    There is one per stream of the process, for all displays: libraries patch the stream that they find at their import.
    """

    def __init__(self) -> None:
        self._console: Console | None = None
        self._stream: TextIO = sys.stdout
        self._rest = ""
        self._lock = threading.Lock()

    def begin(self, console: Console, stream: TextIO) -> None:
        """Starts to print above a display, in place of a stream."""
        self._console, self._stream = console, stream

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Encoding of the terminal."""
        return self._stream.encoding

    def isatty(self) -> bool:
        """Whether the stream is a terminal."""
        return self._stream.isatty()

    def fileno(self) -> int:
        """File descriptor of the terminal."""
        return self._stream.fileno()

    def writable(self) -> bool:
        """Always true."""
        return True

    def write(self, text: str) -> int:
        """Prints complete lines above the display; without a display, passes the text on."""
        if self._console is None:
            return self._stream.write(text)
        with self._lock:
            *lines, self._rest = (self._rest + text).split("\n")
        self._print(lines)
        return len(text)

    def finish(self) -> None:
        """Prints the last, incomplete line, and leaves the display."""
        rest, self._rest = self._rest, ""
        self._print([rest] if rest.strip() else [])
        self._console = None

    def _print(self, lines: Iterable[str]) -> None:
        console = self._console
        if console is None:
            return
        for line in lines:
            shown = line.rstrip("\r").rpartition("\r")[2]
            # Never wrapped, so that a command longer than the screen can be copied.
            console.print(Text.from_ansi(shown), soft_wrap=True)


_ABOVE = {"stdout": StreamAbove(), "stderr": StreamAbove()}


@contextlib.contextmanager
def _redirected(console: Console) -> Iterator[None]:
    """Redirects standard output and error, and loggers that write to them, above a display, if they are terminals."""
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
    """Whether a log line is not redundant beside the display; see `progress.UNSEEN`."""
    return not getattr(record, "progress", False)


def _handlers() -> Iterator[logging.StreamHandler[Any]]:
    """Yields the handlers of all loggers that write to a stream rather than a file."""
    loggers = [logging.getLogger(), *logging.root.manager.loggerDict.values()]
    for logger in loggers:
        for handler in getattr(logger, "handlers", ()):
            if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
                yield handler
