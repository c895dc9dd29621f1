"""Progress of a sweep in the terminal: a line for every job that ends, and tables at the end of all."""

from __future__ import annotations

import contextlib
import statistics
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ekd_lightning.config.edge import print_wide
from ekd_lightning.config.overrides import typed, typed_override
from ekd_lightning.reporting.estimates import Estimate, estimate, percent
from ekd_lightning.runs.collection import RunEntry
from ekd_lightning.runs.directory import RunState
from ekd_lightning.runs.provenance import now
from ekd_lightning.studies.sweep import Standing, Sweep, look, varied_keys, varied_values

_SECONDS = 1.0  # between two looks at the jobs' files
_BAR = 12
_BEST = "★"
SEED = "seed"
MOST_ROWS = 60
"""Longer tables are of no use in a terminal; runs that are not done are shown all the same."""
_STYLES = {RunState.DONE: "green", RunState.PARTIAL: "green", RunState.FAILED: "red", RunState.STOPPED: "yellow"}


def seconds_left(durations: Sequence[float], ages: Sequence[float], waiting: int, workers: int) -> float | None:
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
        self._ended: dict[int, Standing] = {}
        self._durations: list[float] = []
        self._workers = 1
        self._lock = threading.Lock()
        for number, job in enumerate(sweep.jobs):
            before = look(job, sweep.started)
            if before.run.is_over:
                self._ended[number] = before

    def _look(self) -> list[Standing]:
        known = self._ended
        jobs = enumerate(self._sweep.jobs)
        return [known.get(number) or look(job, self._since) for number, job in jobs]

    def look(self) -> None:
        """Looks once, and says a line for every job that ended since."""
        with self._lock:
            states = self._look()
            running = [state for state in states if state.run.state is RunState.RUNNING]
            self._workers = max(self._workers, len(running))
            for number, state in enumerate(states):
                if number not in self._ended and (state.run.is_over or state.run.state is RunState.FAILED):
                    self._ended[number] = state
                    if state.run.is_over and (seconds := state.run.seconds) is not None:
                        self._durations.append(seconds)
                    self._say(self._line(state, states))

    def _line(self, state: Standing, states: Sequence[Standing]) -> Text:
        total, ended = len(states), len(self._ended)
        text = Text.assemble((f"sweep {ended}/{total}", "bold"), " ")
        done = round(_BAR * ended / max(total, 1))
        text.append("━" * done, "cyan").append("─" * (_BAR - done) + " ", "dim")
        text.append(self._name(state)).append(": ")
        text.append(_outcome(state.run), _STYLES.get(state.run.state, ""))
        return text.append(f"  ({self._rest(states)})", "dim")

    def _name(self, state: Standing) -> str:
        values = varied_values(state.job, self._keys)
        name = " ".join(f"{key}={value}" for key, value in values.items())
        return name or state.job.directory.name

    def _rest(self, states: Sequence[Standing]) -> str:
        time = datetime.now(timezone.utc)
        left = [state for number, state in enumerate(states) if number not in self._ended]
        running = [state.run.since for state in left if state.run.state is RunState.RUNNING]
        ages = [(time - since).total_seconds() for since in running if since]
        counts = Counter(state.run.state for state in left)
        failed = sum(state.run.state is RunState.FAILED for state in self._ended.values())
        parts = [f"{failed} failed"] if failed else []
        told = {"running": counts[RunState.RUNNING], "waiting": counts[RunState.PLANNED]}
        parts += [f"{count} {name}" for name, count in told.items() if count]
        seconds = seconds_left(self._durations, ages, len(left) - len(ages), self._workers) if left else None
        parts += [f"about {readable(seconds)} left"] if seconds is not None else []
        return ", ".join(parts) or "nothing left"


def _outcome(run: RunEntry) -> str:
    if run.state is RunState.FAILED:
        return f"failed: {run.error}"
    parts = [] if run.result is None else [f"test accuracy {100 * run.result.test_accuracy:.2f} %"]
    parts += [] if run.seconds is None else [readable(run.seconds)]
    return ", ".join(parts) or run.state.value


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


def show_summary(sweep: Sweep) -> None:
    """Prints what the runs of a sweep found, which failed and why, and where everything is.

    Nothing, if it was refused before its first job.
    """
    states = [look(job, sweep.started) for job in sweep.jobs]
    if all(state.run.state is RunState.PLANNED for state in states):
        return
    print_wide(*sweep_tables(states, sweep.folder))
    done = sum(state.run.is_over for state in states)
    failed = [state for state in states if state.run.state is RunState.FAILED]
    print(f"{sweep.folder}: {done} of {len(states)} runs done, {len(failed)} failed")
    for state in failed:
        print(f"  failed: {state.job.directory.relative_to(sweep.folder)}  {state.run.error}")
    place = typed(sweep.folder)
    if done < len(states):
        print(f"continue:  ekd-train {typed_override('resume', sweep.folder)}")
    if done:
        print(f"report:    ekd-report {place} -o {typed(sweep.folder / 'report')}")


def sweep_tables(states: Sequence[Standing], folder: Path) -> list[Table]:
    """The tables of a sweep.

    Args:
        states: How all jobs stand, in their order.
        folder: That of the sweep.

    Returns:
        One row per run, the highest accuracy marked; where seeds vary, also the mean over them, and the mark there,
        as single seeds are no settings to choose from. At most `MOST_ROWS` done runs are shown.
    """
    keys = varied_keys([state.job for state in states])
    groups = seed_groups(states) if SEED in keys else {}
    done = [state for state in states if state.run.is_over]
    cut = {id(state) for state in done[MOST_ROWS:]}
    caption = f"{len(cut)} more runs are done; ekd-report shows all" if cut else None
    shown = [state for state in states if id(state) not in cut]
    tables = [_runs(shown, keys, folder, caption, mark=not groups)]
    return [*tables, _means(groups, [key for key in keys if key != SEED])] if groups else tables


def seed_groups(states: Sequence[Standing]) -> dict[tuple[str, ...], list[Standing]]:
    """Runs that differ in nothing but the seed, by the values of the other keys; only runs with an accuracy."""
    others = [key for key in varied_keys([state.job for state in states]) if key != SEED]
    groups: dict[tuple[str, ...], list[Standing]] = {}
    for state in states:
        if _figure(state, "test_accuracy") is not None:
            values = varied_values(state.job, others)
            groups.setdefault(tuple(values.get(key, "–") for key in others), []).append(state)
    return groups


def _figure(state: Standing, key: str) -> float | None:
    value = None if state.run.result is None else state.run.result.get(key)
    return None if value is None else float(value)


def _runs(states: Sequence[Standing], keys: Sequence[str], folder: Path, caption: str | None, *, mark: bool) -> Table:
    found = [value for state in states if (value := _figure(state, "test_accuracy")) is not None]
    best = max(found) if mark and len(found) > 1 else None
    table = _table("runs", ["run", *keys], ["test %", "val %", "train s", "state"], caption)
    for state in states:
        accuracy = _figure(state, "test_accuracy")
        is_best = best is not None and accuracy == best
        values = varied_values(state.job, keys)
        table.add_row(
            state.job.directory.relative_to(folder).as_posix(),
            *(values.get(key, "–") for key in keys),
            _marked(_percent(accuracy), is_best),
            _percent(_figure(state, "val_accuracy")),
            _number(_figure(state, "train_seconds")),
            Text(
                "not started" if state.run.state is RunState.PLANNED else state.run.state.value,
                _STYLES.get(state.run.state, ""),
            ),
            style="bold" if is_best else "",
        )
    return table


def _means(groups: Mapping[tuple[str, ...], Sequence[Standing]], keys: Sequence[str]) -> Table:
    found = {values: _mean(group, "test_accuracy") for values, group in groups.items()}
    best = max(cell.mean for cell in found.values() if cell) if len(found) > 1 else None
    table = _table("means over seeds ± std", keys, ["test %", "n", "train s"], None)
    for values, cell in found.items():
        assert cell is not None  # only runs with an accuracy are in groups
        seconds = _mean(groups[values], "train_seconds")
        cells = (_marked(percent(cell), cell.mean == best), str(cell.n), _number(seconds.mean if seconds else None))
        table.add_row(*values, *cells, style="bold" if cell.mean == best else "")
    return table


def _mean(states: Sequence[Standing], key: str) -> Estimate | None:
    return estimate(value for state in states if (value := _figure(state, key)) is not None)


def _table(title: str, left: Sequence[str], right: Sequence[str], caption: str | None) -> Table:
    table = Table(title=title, title_justify="left", caption=caption, box=box.SIMPLE_HEAD, pad_edge=False)
    for name in left:
        table.add_column(name, overflow="fold")
    for name in right:
        table.add_column(name, justify="left" if name == "state" else "right", no_wrap=True)
    return table


def _marked(text: str, is_best: bool) -> Text:
    return Text.assemble((f"{_BEST} ", "yellow"), text) if is_best else Text(text)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.{0 if value >= 10 else 1}f}"
