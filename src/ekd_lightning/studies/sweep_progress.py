"""One line for every job of a sweep that ends: what it found, what is left, and how long that may take."""

from __future__ import annotations

import contextlib
import statistics
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone

from rich.console import Console
from rich.text import Text

from ekd_lightning.runs.record import now
from ekd_lightning.studies.sweep_jobs import JobState, Sweep, look, varied_keys, varied_values

_SECONDS = 1.0  # between two looks at the jobs' files
_BAR = 12
_STYLES = {"done": "green", "partial": "green", "failed": "red", "stopped": "yellow"}


def seconds_left(
    durations: Sequence[float], ages: Sequence[float], waiting: int, workers: int
) -> float | None:
    """Time until the last job ends, if those to come take as long as the mean of those that ended.

    Args:
        durations: Seconds that ended jobs took.
        ages: Seconds since each running job was started.
        waiting: Jobs that were not started yet.
        workers: Jobs that run at a time, at least 1.

    Returns:
        Seconds; None while nothing has ended.
    """
    if not durations:
        return None
    mean = statistics.fmean(durations)
    to_do = waiting * mean + sum(max(mean - age, 0.0) for age in ages)
    return to_do / max(workers, 1)


def readable(seconds: float) -> str:
    """A duration in words: `40 s`, `12 min`, `3 h 20 min`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


class Progress:
    """Looks at the files of a sweep's jobs and tells of each that ended since the last look.

    Works whatever process runs the jobs, on this machine or another, as all they share is the folder.

    Args:
        sweep: The sweep, all jobs known.
        say: Prints a line.
        since: Start of this part of the sweep, ISO 8601; jobs that ended before without success are still to come.
    """

    def __init__(self, sweep: Sweep, say: Callable[[Text], None], since: str = "") -> None:
        self._sweep = sweep
        self._say = say
        self._since = since or sweep.started
        self._keys = varied_keys(sweep.jobs)
        self._ended: dict[int, JobState] = {}
        self._durations: list[float] = []
        self._workers = 1
        self._lock = threading.Lock()
        for number, job in enumerate(sweep.jobs):
            before = look(job, sweep.started)
            if before.state in ("done", "partial"):
                self._ended[number] = before

    def _look(self) -> list[JobState]:
        known = self._ended
        jobs = enumerate(self._sweep.jobs)
        return [known.get(number) or look(job, self._since) for number, job in jobs]

    def look(self) -> None:
        """Looks once, and says a line for every job that ended since."""
        with self._lock:
            states = self._look()
            running = [state for state in states if state.state == "running"]
            self._workers = max(self._workers, len(running))
            for number, state in enumerate(states):
                if number not in self._ended and state.state in ("done", "partial", "failed"):
                    self._ended[number] = state
                    if state.seconds is not None and state.state != "failed":
                        self._durations.append(state.seconds)
                    self._say(self._line(state, states))

    def _line(self, state: JobState, states: Sequence[JobState]) -> Text:
        total, ended = len(states), len(self._ended)
        text = Text.assemble((f"sweep {ended}/{total}", "bold"), " ")
        done = round(_BAR * ended / max(total, 1))
        text.append("━" * done, "cyan").append("─" * (_BAR - done) + " ", "dim")
        text.append(self._name(state)).append(": ")
        text.append(_outcome(state), _STYLES.get(state.state, ""))
        return text.append(f"  ({self._rest(states)})", "dim")

    def _name(self, state: JobState) -> str:
        values = varied_values(state.job, self._keys)
        name = " ".join(f"{key}={value}" for key, value in values.items())
        return name or state.job.directory.name

    def _rest(self, states: Sequence[JobState]) -> str:
        time = datetime.now(timezone.utc)
        left = [state for number, state in enumerate(states) if number not in self._ended]
        ages = [(time - s.since).total_seconds() for s in left if s.state == "running" and s.since]
        counts = Counter(state.state for state in left)
        failed = sum(state.state == "failed" for state in self._ended.values())
        parts = [f"{failed} failed"] if failed else []
        parts += [f"{counts[name]} {name}" for name in ("running", "waiting") if counts[name]]
        seconds = seconds_left(self._durations, ages, len(left) - len(ages), self._workers) if left else None
        parts += [f"about {readable(seconds)} left"] if seconds is not None else []
        return ", ".join(parts) or "nothing left"


def _outcome(state: JobState) -> str:
    if state.state == "failed":
        return f"failed: {state.error}"
    accuracy = state.result.get("test_accuracy")
    parts = [] if accuracy is None else [f"test accuracy {100 * accuracy:.2f} %"]
    parts += [] if state.seconds is None else [readable(state.seconds)]
    return ", ".join(parts) or state.state


def say(text: Text) -> None:
    """Prints a line on standard output; plain where that is no terminal."""
    Console(file=sys.stdout, soft_wrap=True, highlight=False).print(text, soft_wrap=True)


_watches: list[Progress] = []


@contextlib.contextmanager
def watched(sweep: Sweep) -> Iterator[None]:
    """Tells of the jobs of a sweep while the block runs, and once more at its end.

    Args:
        sweep: Jobs of it that are done by now are not told of.
    """
    progress, stop = Progress(sweep, say, since=now()), threading.Event()

    def watch() -> None:
        while not stop.wait(_SECONDS):
            progress.look()

    thread = threading.Thread(target=watch, name="sweep-progress", daemon=True)
    thread.start()
    _watches.append(progress)
    try:
        yield
    finally:
        _watches.remove(progress)
        stop.set()
        thread.join()
        progress.look()


def look_now() -> None:
    """Looks at once, for when a job ended in this very process."""
    for progress in _watches:
        progress.look()
