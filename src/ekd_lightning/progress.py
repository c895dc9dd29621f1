"""Progress: what long work says of itself while it lasts. Who shows it, and how, is decided where a command starts.

Work is counted on the host and looked at from a thread, so that no step of a training waits for its display.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import TypeVar

log = logging.getLogger(__name__)

_T = TypeVar("_T")

RUN_PHASES = ("data", "teachers", "training", "test", "evaluation")
UNSEEN = {"progress": True}
"""`extra` of a log line that a live display makes superfluous on the screen; files have it all the same."""
_FIRST_SECONDS, _QUIET_SECONDS, _LOOK_SECONDS = 3.0, 15.0, 0.5


class Task:
    """A phase of a command, or a part of one.

    Args:
        name: What is done.
        total: How much there is to do; None where that is not known.
        unit: Of what, in the plural; None where counts are not to be told.

    Attributes:
        note: What else there is to say, e.g. the loss.
        count: Looks up how much is done, where nobody calls `advance`.
        part: The part that is at work now.
        active: Whether it is at work itself.
    """

    def __init__(self, name: str, total: float | None = None, unit: str | None = "") -> None:
        self.name, self.total, self.unit, self.note = name, total, unit, ""
        self.count: Callable[[], float] | None = None
        self.part: Task | None = None
        self.active, self.seconds = False, 0.0
        self._done, self._since = 0.0, 0.0

    def advance(self, amount: float = 1, note: str | None = None) -> None:
        """Says that more is done, and what is worth a note."""
        self._done += amount
        self.note = self.note if note is None else note

    @property
    def done(self) -> float:
        """How much is done, of `total`."""
        return self._done if self.count is None else self.count()

    @property
    def share(self) -> float | None:
        """Share in [0, 1] that is done, its part's included; None where that is not known."""
        inner = self.part.share if self.part else None
        return min(1.0, (self.done + (inner or 0.0)) / self.total) if self.total else inner

    @property
    def elapsed(self) -> float:
        """Seconds that it has been at work."""
        return self.seconds + (time.monotonic() - self._since if self.active else 0.0)

    @property
    def seconds_left(self) -> float | None:
        """Seconds until it is done at the pace so far; None where that is not known."""
        share = self.share
        return self.elapsed * (1 - share) / share if share and self.elapsed > 1 else None

    @contextlib.contextmanager
    def running(self) -> Iterator[Task]:
        """At work while the block runs; several blocks add up."""
        self.active, self._since = True, time.monotonic()
        try:
            yield self
        finally:
            self.seconds += time.monotonic() - self._since
            self.active = False
            # What is looked up is a trainer's, which would be kept with all that it has on the device.
            self._done, self.count = self.done, None

    def words(self) -> str:
        """Where it stands, in a line: its part at work, counts and notes."""
        counted = ""
        if self.total and self.unit is not None:
            counted = f"{self.done:,.0f} of {self.total:,.0f} {self.unit}".rstrip()
        part = "" if self.part is None else f"{self.part.name} {self.part.words()}".strip()
        return "  ".join(word for word in (counted, self.note, part) if word)


class Session:
    """The phases of one command, in order; those to come are known by name.

    Attributes:
        phases: By name.
        live: Whether a display that redraws itself may show it.
        keep: Whether such a display stays on the screen at the end.
    """

    def __init__(self, names: Sequence[str], *, live: bool, keep: bool) -> None:
        self.phases = {name: Task(name) for name in names}
        self.live, self.keep = live, keep
        self.stack: list[Task] = []
        self._work: dict[str, float] = {}

    def renew(self) -> None:
        """Begins all phases anew that are not at work, for the next run of several."""
        self.phases = {name: task if task.active else Task(name) for name, task in self.phases.items()}
        self._work = {}

    def expect(self, work: Mapping[str, float]) -> None:
        """Says how much work phases are, in any one unit, so that the time of those to come can be told."""
        self._work |= work

    @property
    def seconds_left(self) -> float | None:
        """Seconds until all expected phases are done, at the pace so far; None before that can be told."""
        known = {name: self.phases[name] for name in self._work if name in self.phases}
        done = {name: (task.share or 0.0) if task.active else float(task.elapsed > 0) for name, task in known.items()}
        worked = sum(self._work[name] * share for name, share in done.items())
        seconds = sum(task.elapsed for task in known.values())
        return seconds * (sum(self._work.values()) - worked) / worked if worked and seconds > 1 else None


class Reporter:
    """Shows a session; this one shows nothing."""

    def start(self, session: Session) -> None:
        """Called before the first phase."""

    def stop(self) -> None:
        """Called when all is done, or something went wrong."""


_reporter = Reporter()
_session: Session | None = None


@contextlib.contextmanager
def reported_by(reporter: Reporter) -> Iterator[None]:
    """Lets a reporter show what sessions of the block say."""
    global _reporter  # noqa: PLW0603 (one terminal, one reporter)
    before, _reporter = _reporter, reporter
    try:
        yield
    finally:
        _reporter = before


def is_reported() -> bool:
    """Whether anybody shows sessions of this process."""
    return type(_reporter) is not Reporter


@contextlib.contextmanager
def session(*names: str, live: bool = True, keep: bool = True) -> Iterator[Session]:
    """Phases of a command; within another session they are phases of that one.

    Args:
        *names: Of the phases that there will be.
        live: Whether a display that redraws itself may show it.
        keep: Whether such a display stays on the screen at the end.
    """
    global _session  # noqa: PLW0603
    if _session is not None:
        for name in names:
            _session.phases.setdefault(name, Task(name))
        yield _session
        return
    _session = Session(names, live=live, keep=keep)
    reporter = _reporter
    try:
        reporter.start(_session)
        yield _session
    except BaseException:
        # What is refused at once leaves its message alone on the screen.
        _session.keep &= sum(task.elapsed > 0 for task in _session.phases.values()) > 1
        raise
    finally:
        _session = None
        reporter.stop()


@contextlib.contextmanager
def phase(name: str, total: float | None = None, unit: str | None = "") -> Iterator[Task]:
    """A phase of the session, see `Task`; one that was there goes on. Without a session nobody hears of it."""
    current = _session
    if current is None:
        yield Task(name, total, unit)
        return
    task = current.phases.setdefault(name, Task(name))
    task.total, task.unit = total, unit
    current.stack.append(task)
    try:
        with task.running():
            yield task
    finally:
        current.stack.remove(task)


@contextlib.contextmanager
def part(name: str, total: float | None = None, unit: str | None = "") -> Iterator[Task]:
    """A part of what is at work now, see `Task`."""
    task = Task(name, total, unit)
    if _session is None or not _session.stack:
        yield task
        return
    outer = _session.stack[-1]
    while outer.part is not None:
        outer = outer.part
    outer.part = task
    try:
        with task.running():
            yield task
    finally:
        outer.part = None


def expect(**work: float) -> None:
    """Says how much work phases of the session are, see `Session.expect`."""
    if _session is not None:
        _session.expect(work)


def advance(note: str | None = None) -> None:
    """Says that one more of what the phase at work counts is done."""
    if _session is not None and _session.stack:
        _session.stack[-1].advance(note=note)


def track(items: Iterable[_T], name: str, unit: str = "", total: float | None = None) -> Iterator[_T]:
    """Gives all items, and counts them as a part of what is at work now.

    Args:
        items: Any.
        name: What is done with them.
        unit: What they are, in the plural.
        total: Their number, where it cannot be asked for.
    """
    with part(name, len(items) if isinstance(items, Sized) else total, unit) as task:
        for item in items:
            yield item
            task.advance()


def readable(seconds: float) -> str:
    """A duration in words: `40 s`, `12 min`, `3 h 20 min`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


class Lines(Reporter):
    """Says in plain log lines how it stands, where nothing else was said for a while: for pipes and CI."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._heard = _Heard()

    def start(self, session: Session) -> None:
        """Begins to look."""
        self._stop.clear()
        self._heard.time = time.monotonic()
        logging.getLogger().addHandler(self._heard)
        self._thread = threading.Thread(target=self._watch, args=(session,), name="progress", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Says nothing more."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        logging.getLogger().removeHandler(self._heard)

    def _watch(self, session: Session) -> None:
        told = None
        while not self._stop.wait(_LOOK_SECONDS):
            task = session.stack[-1] if session.stack else None
            if task is None:
                continue
            key = (task.name, task.part.name if task.part else None)
            if time.monotonic() - self._heard.time >= (_QUIET_SECONDS if key == told else _FIRST_SECONDS):
                told = key
                log.info("%s", status_line(task, session))


class _Heard(logging.Handler):
    """Remembers when the last line was said."""

    time = 0.0

    def emit(self, record: logging.LogRecord) -> None:
        self.time = time.monotonic()


def status_line(task: Task, session: Session) -> str:
    """How a phase stands, in a line."""
    said = " ".join(f"{task.name}: {task.words()}".split("\n")).rstrip(": ")
    left = session.seconds_left or task.seconds_left
    more = f"about {readable(left)} left" if left is not None else f"{readable(task.elapsed)} so far"
    return f"{said} ({more})"
