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
HEARTBEAT = {"heartbeat": True}
"""`extra` of a log line that says only how it stands; log files go without."""
_FIRST_SECONDS, _QUIET_SECONDS, _MOST_SECONDS, _LOOK_SECONDS = 3.0, 15.0, 300.0, 0.5


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
        begun: Share that was done before, by an earlier process; it says nothing about the pace.
    """

    def __init__(self, name: str, total: float | None = None, unit: str | None = "") -> None:
        self.name, self.total, self.unit, self.note = name, total, unit, ""
        self.count: Callable[[], float] | None = None
        self.part: Task | None = None
        self.active, self.seconds, self.begun = False, 0.0, 0.0
        self._done, self._since = 0.0, 0.0

    def advance(self, amount: float = 1, note: str | None = None) -> None:
        """Says that more is done, and what is worth a note."""
        self._done += amount
        self.note = self.note if note is None else note

    @property
    def done(self) -> float:
        """How much is done, of `total`."""
        count = self.count
        return self._done if count is None else count()

    @property
    def share(self) -> float | None:
        """Share in [0, 1] that is done, its part's included; None where that is not known."""
        part, total = self.part, self.total  # another thread may end the part meanwhile
        inner = part.share if part else None
        return min(1.0, (self.done + (inner or 0.0)) / total) if total else inner

    @property
    def elapsed(self) -> float:
        """Seconds that it has been at work."""
        return self.seconds + (time.monotonic() - self._since if self.active else 0.0)

    @property
    def seconds_left(self) -> float | None:
        """Seconds until it is done at the pace so far; None where that is not known."""
        part, share = self.part, self.share
        if part is not None and part.active and not self.total:
            return part.seconds_left
        if share is None or share <= self.begun or self.elapsed <= 1:
            return None
        return self.elapsed * (1 - share) / (share - self.begun)

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
        counted, part = "", self.part
        if self.total and self.unit is not None:
            counted = f"{self.done:,.0f} of {self.total:,.0f} {self.unit}".rstrip()
        inner = "" if part is None else f"{part.name} {part.words()}".strip()
        return "  ".join(word for word in (counted, self.note, inner) if word)


class Session:
    """The phases of one command, in order; those to come are known by name.

    Attributes:
        phases: By name.
        live: Whether a display that redraws itself may show it.
        keep: Whether such a display stays on the screen at the end.
        whole: The counted phase that contains the others, if there is one.
    """

    def __init__(self, names: Sequence[str], *, live: bool, keep: bool) -> None:
        self.phases = {name: Task(name) for name in names}
        self.live, self.keep = live, keep
        self.stack: list[Task] = []
        self.whole: Task | None = None
        self._work: dict[str, float] = {}
        self._since = time.monotonic()

    def renew(self) -> None:
        """Begins all phases anew that are not at work, for the next run of several."""
        self.phases = {name: task if task.active else Task(name) for name, task in self.phases.items()}
        self._work = {}

    def expect(self, work: Mapping[str, float]) -> None:
        """Says how much work phases are, in any one unit, so that the time of those to come can be told."""
        self._work = {**self._work, **work}

    @property
    def elapsed(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self._since

    @property
    def at_work(self) -> Task | None:
        """The innermost phase that is at work."""
        stack = list(self.stack)
        return stack[-1] if stack else None

    @property
    def seconds_left(self) -> float | None:
        """Seconds until all expected phases are done, at the pace so far; None before that can be told."""
        if self.whole is not None:
            return self.whole.seconds_left
        work, phases = self._work, dict(self.phases)
        known = {name: phases[name] for name in work if name in phases}
        done = {name: (task.share or 0.0) if task.active else float(task.elapsed > 0) for name, task in known.items()}
        left = sum(work.values()) - sum(work[name] * share for name, share in done.items())
        worked = sum(work[name] * max(0.0, share - known[name].begun) for name, share in done.items())
        seconds = sum(task.elapsed for task in known.values())
        return seconds * left / worked if worked and seconds > 1 else None


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
    if current.stack and current.stack[0].total:
        current.whole = current.stack[0]
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


def renew() -> None:
    """Begins phases of the session anew, see `Session.renew`."""
    if _session is not None:
        _session.renew()


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
        self._told: tuple[str, str | None] | None = None
        self._words, self._pause = "", _QUIET_SECONDS
        self._thread: threading.Thread | None = None
        self._heard = _Heard()

    def start(self, session: Session) -> None:
        """Begins to look."""
        self._stop.clear()
        self._heard.time = time.monotonic()
        if logging.getLogger().handlers:  # being the only one, it would silence Python's last resort for warnings
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
        while not self._stop.wait(_LOOK_SECONDS):
            with contextlib.suppress(Exception):  # the work goes on meanwhile: the next look may succeed
                self.look(session)

    def look(self, session: Session) -> None:
        """Says how it stands, if it is time to; ever more rarely while nothing changes."""
        task = session.at_work
        if task is None:
            return
        part, words = task.part, task.words()
        told = (task.name, part.name if part else None)
        if changed := told != self._told or words != self._words:
            self._pause = _QUIET_SECONDS
        pause = self._pause if told == self._told else _FIRST_SECONDS
        if time.monotonic() - self._heard.time < pause:
            return
        self._pause = _QUIET_SECONDS if changed else min(2 * self._pause, _MOST_SECONDS)
        self._told, self._words, self._heard.time = told, words, time.monotonic()
        log.info("%s", status_line(task, session), extra=HEARTBEAT)


class _Heard(logging.Handler):
    """Remembers when the last line was said."""

    time = 0.0

    def emit(self, record: logging.LogRecord) -> None:
        self.time = time.monotonic()


def status_line(task: Task, session: Session) -> str:
    """How a phase stands, in a line."""
    said = " ".join(f"{task.name}: {task.words()}".split("\n")).rstrip(": ")
    left = session.seconds_left
    if left is None and session.whole is None:
        left = task.seconds_left
    more = f"about {readable(left)} left" if left is not None else f"{readable(task.elapsed)} so far"
    return f"{said} ({more})"
