"""Progress of long work, as a tree of tasks. Each command chooses the reporter that shows it.

Work is counted on the host and read by a thread, so that no training step waits for its display.
"""

from __future__ import annotations

import contextlib
import gc
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import TypeVar

_T = TypeVar("_T")

RUN_PHASES = ("data", "teachers", "training", "test", "evaluation")
UNSEEN = {"progress": True}
"""`extra` of a log line that is redundant on a screen with a live display; log files keep it."""
_LEAST_STATES, _LEAST_SHARE = 5, 0.05  # different states of the work, or share of it, before an estimate
_GROWTH = 1.001  # of the work between two states that are kept, so that they stay few


class _Pace:
    """Pace of the later half of the finished work: a slow start, e.g. while networks compile, soon stops counting."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, float]] = deque()
        self._states = 0

    def seconds_left(self, worked: float, seconds: float, left: float) -> float | None:
        """Returns the seconds for `left` work, after `worked` in `seconds`; None if it is too early to say."""
        seen = self._seen
        while seen and seen[-1][0] > worked:  # begun again
            seen.pop()
        if not worked or seconds <= 1:
            return None
        if not seen or seen[-1][0] * _GROWTH < worked:
            seen.append((worked, seconds))
            self._states += 1
        if self._states < _LEAST_STATES and worked < _LEAST_SHARE * (worked + left):
            return None
        while len(seen) > 1 and seen[1][0] <= worked / 2:
            seen.popleft()
        then, since = seen[0] if seen[0][0] <= worked / 2 else (0.0, 0.0)
        return (seconds - since) * left / (worked - then)


class Task:
    """A phase of a command, or a part of one.

    Its total is an amount of work, None if unknown, in a unit named in the plural; a unit of None hides the counts.

    Attributes:
        note: Further information, e.g. the epoch.
        scores: Scores of the last epoch, for a display that redraws itself; lines of the log state them once.
        count: Returns the finished amount, for work that does not call `advance`.
        part: The part that is running.
        active: Whether the task is running.
        begun: Share in [0, 1] finished by an earlier process, which does not count for the pace.
        weight: Amount of the outer task's total that the task makes up as a part of it.
    """

    def __init__(self, name: str, total: float | None = None, unit: str | None = "") -> None:
        self.name, self.total, self.unit = name, total, unit
        self.note = self.scores = ""
        self.count: Callable[[], float] | None = None
        self.part: Task | None = None
        self.active, self.seconds, self.begun, self.weight = False, 0.0, 0.0, 1.0
        self._done, self._since = 0.0, 0.0
        self._pace = _Pace()

    def advance(self, amount: float = 1, note: str | None = None) -> None:
        """Adds to the finished amount, and replaces the note if one is given."""
        self._done += amount
        self.note = self.note if note is None else note

    @property
    def done(self) -> float:
        """Finished amount, of `total`."""
        count = self.count
        return self._done if count is None else count()

    @property
    def share(self) -> float | None:
        """Finished share in [0, 1], including that of the running part; None if unknown."""
        part, total = self.part, self.total  # another thread may end the part meanwhile
        inner = part.share if part else None
        weighted = part.weight * (inner or 0.0) if part else 0.0
        return min(1.0, (self.done + weighted) / total) if total else inner

    @property
    def elapsed(self) -> float:
        """Seconds for which the task has been running."""
        return self.seconds + (time.monotonic() - self._since if self.active else 0.0)

    @property
    def seconds_left(self) -> float | None:
        """Estimated seconds until the task ends, see `_Pace`; None if unknown."""
        part, share = self.part, self.share
        if part is not None and part.active and not self.total:
            return part.seconds_left
        return None if share is None else self._pace.seconds_left(max(0.0, share - self.begun), self.elapsed, 1 - share)

    @contextlib.contextmanager
    def running(self) -> Iterator[Task]:
        """Marks the task as running within the block; the times of several blocks add up."""
        self.active, self._since = True, time.monotonic()
        try:
            yield self
        finally:
            self.seconds += time.monotonic() - self._since
            self.active = False
            # `count` refers to a trainer, which it would keep alive with everything on the device.
            self._done, self.count = self.done, None

    def words(self, *, scores: bool = False) -> str:
        """Returns the state in one line: counts, note, scores if wanted, and the running part."""
        counted, part = "", self.part
        if self.total and self.unit is not None:
            counted = f"{self.done:,.0f} of {self.total:,.0f} {self.unit}".rstrip()
        inner = "" if part is None else f"{part.name} {part.words(scores=scores)}".strip()
        return "  ".join(word for word in (counted, self.note, self.scores if scores else "", inner) if word)


class Session:
    """The phases of one command, in order; names of later phases are known from the start.

    Attributes:
        phases: Phases by name.
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
        self._pace = _Pace()
        self._since = time.monotonic()

    def renew(self) -> None:
        """Resets all phases that are not running, for the next of several runs."""
        self.phases = {name: task if task.active else Task(name) for name, task in self.phases.items()}
        self._work, self._pace = {}, _Pace()

    def expect(self, work: Mapping[str, float]) -> None:
        """Sets the amounts of work of phases, in one common unit, from which the time left is estimated."""
        self._work = {**self._work, **work}

    @property
    def elapsed(self) -> float:
        """Seconds since the session began."""
        return time.monotonic() - self._since

    @property
    def at_work(self) -> Task | None:
        """The innermost running phase."""
        stack = list(self.stack)
        return stack[-1] if stack else None

    @property
    def seconds_left(self) -> float | None:
        """Estimated seconds until all expected phases end, see `_Pace`; None without an estimate."""
        if self.whole is not None:
            return self.whole.seconds_left
        work, phases = self._work, dict(self.phases)
        known = {name: phases[name] for name in work if name in phases}
        over = {name for name, task in known.items() if task.elapsed and not task.active}
        share = {name: task.share or float(name in over) for name, task in known.items()}
        left = sum(work[name] * (1 - share.get(name, 0.0)) for name in work.keys() - over)
        worked = sum(work[name] * max(0.0, share[name] - known[name].begun) for name in known)
        seconds = sum(task.elapsed for task in known.values())
        return self._pace.seconds_left(worked, seconds, left)


class Reporter:
    """Shows a session; this one shows nothing."""

    def start(self, session: Session) -> None:
        """Called before the first phase."""

    def stop(self) -> None:
        """Called at the end of the session, also after an error."""


_reporter = Reporter()
_session: Session | None = None


@contextlib.contextmanager
def reported_by(reporter: Reporter) -> Iterator[None]:
    """Shows the sessions of the block by a reporter."""
    global _reporter  # noqa: PLW0603 (one terminal, one reporter)
    before, _reporter = _reporter, reporter
    try:
        yield
    finally:
        _reporter = before


def is_reported() -> bool:
    """Whether a reporter shows sessions of this process."""
    return type(_reporter) is not Reporter


@contextlib.contextmanager
def session(*names: str, live: bool = True, keep: bool = True) -> Iterator[Session]:
    """Opens a session with the phases of a command; within another session they become phases of that one.

    `live` says whether a display that redraws itself may show it, `keep` whether it stays on the screen at the end.
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
        # After an error in the first phase, only its message stays on the screen.
        _session.keep &= sum(task.elapsed > 0 for task in _session.phases.values()) > 1
        raise
    finally:
        _session = None
        reporter.stop()


@contextlib.contextmanager
def phase(name: str, total: float | None = None, unit: str | None = "") -> Iterator[Task]:
    """Runs a phase of the session, or continues it; see `Task`. Without a session nothing is shown."""
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
def part(
    name: str, total: float | None = None, unit: str | None = "", *, weight: float | None = None
) -> Iterator[Task]:
    """Runs a part of the running task; see `Task`. With a weight, its end advances the outer task by it."""
    task = Task(name, total, unit)
    task.weight = 1.0 if weight is None else weight
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
        outer.advance(weight or 0.0)


@contextlib.contextmanager
def importing(packages: str) -> Iterator[None]:
    """Imports packages as a part of the running task, with the garbage collector off.

    While PyTorch and Lightning make a million objects, the collector would search them again and again, which took 19
    to 25 % of the processor's time (four pairs of processes on an AMD EPYC). Later collections leave them out.
    """
    collects, new = gc.isenabled(), "torch" not in sys.modules
    gc.disable()
    try:
        with part(f"importing {packages}"):
            yield
    finally:
        if collects:
            if new:  # or garbage of earlier work would be kept
                gc.freeze()
            gc.enable()


def expect(**work: float) -> None:
    """Sets the amounts of work of the session's phases, see `Session.expect`."""
    if _session is not None:
        _session.expect(work)


def renew() -> None:
    """Resets the session's phases, see `Session.renew`."""
    if _session is not None:
        _session.renew()


def advance(note: str | None = None) -> None:
    """Adds one to the count of the running phase."""
    if _session is not None and _session.stack:
        _session.stack[-1].advance(note=note)


def track(items: Iterable[_T], name: str, unit: str = "", total: float | None = None) -> Iterator[_T]:
    """Yields all items and counts them, named by `unit` in the plural, as a part of the running task.

    `total` is their number, if they have no length.
    """
    with part(name, len(items) if isinstance(items, Sized) else total, unit) as task:
        for item in items:
            yield item
            task.advance()


def readable(seconds: float) -> str:
    """Returns a duration in words: `40 s`, `12 min`, `3 h 20 min`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
