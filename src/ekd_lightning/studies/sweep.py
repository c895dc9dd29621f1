"""Sweep on disk: its jobs in sweep.json, their states, and the summary."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from rich import box
from rich.table import Table
from rich.text import Text

from ekd_lightning.config.commands import print_next, report_command, typed, typed_resume
from ekd_lightning.config.output import print_wide
from ekd_lightning.config.overrides import SWEEP_FILE, key_of
from ekd_lightning.errors import UserError
from ekd_lightning.files import DamagedFileError, write_json
from ekd_lightning.reporting.estimates import Estimate, estimate, percent
from ekd_lightning.runs.collection import RunEntry
from ekd_lightning.runs.directory import FORMAT, HYDRA, STATUS, ForeignRecordError, RunDirectory, RunState, read_record
from ekd_lightning.runs.words import check_words
from ekd_lightning.runs.writer import now

SEED = "seed"
MOST_ROWS = 60
"""Finished runs that a summary shows at most; the others are shown all."""
STYLES = {RunState.DONE: "green", RunState.PARTIAL: "green", RunState.FAILED: "red", RunState.STOPPED: "yellow"}
STATE_NAMES = {state: "not started" if state is RunState.PLANNED else state.value for state in RunState}
_BEST = "★"


@dataclass(frozen=True)
class Job:
    """One run of a sweep or a study.

    Attributes:
        directory: The run's directory.
        overrides: Overrides, as for ekd-train.
        resumed: Whether the run continues from its last checkpoint.
        row: Name of the study's row; empty in a sweep.
        images: Training images, each counted as often as it is seen; 0 if unknown.
        macs: Multiply-accumulates of the training; 0 if unknown.
    """

    directory: Path
    overrides: tuple[str, ...]
    resumed: bool = False
    row: str = ""
    images: int = 0
    macs: int = 0


@dataclass(frozen=True)
class Sweep:
    """Jobs of a sweep, and how to launch them again.

    Attributes:
        folder: Folder of the sweep.
        jobs: In the order in which they are started.
        hydra: Overrides of Hydra itself, e.g. the launcher.
        common: Overrides of the runs that do not vary.
        config_name: The configuration that is composed.
        config_dir: Folder of the user's own configuration files; None without one.
        working_directory: Where relative paths of jobs that have not started begin; empty if unknown.
        started: Time of the first start, ISO 8601 in UTC; an older status belongs to an earlier sweep.
    """

    folder: Path
    jobs: tuple[Job, ...]
    hydra: tuple[str, ...] = ()
    common: tuple[str, ...] = ()
    config_name: str = "train"
    config_dir: str | None = None
    started: str = ""
    working_directory: str = ""

    @property
    def again(self) -> str:
        """The command that continues it."""
        flags = [] if self.config_dir is None else ["--config-dir", self.config_dir]
        words = {word: None for job in self.jobs for word in job.overrides}
        return typed_resume(self.folder, words, flags)


class JobState(NamedTuple):
    """A job and its run on disk."""

    job: Job
    run: RunEntry


def write_sweep(sweep: Sweep) -> None:
    """Writes sweep.json."""
    jobs = [
        {"directory": job.directory.relative_to(sweep.folder).as_posix(), "overrides": list(job.overrides)}
        for job in sweep.jobs
    ]
    content = {name: value for name, value in vars(sweep).items() if name != "folder"}
    content |= {"format": FORMAT, "started": sweep.started or now(), "jobs": jobs}
    write_json(sweep.folder / SWEEP_FILE, content)


def read_sweep(folder: Path) -> Sweep | None:
    """Reads sweep.json; None if the folder has none.

    Raises:
        UserError: If it is damaged.
    """
    path = folder / SWEEP_FILE
    if not path.is_file():
        return None
    try:
        content = read_record(path)
        jobs = tuple(Job(folder / job["directory"], tuple(job["overrides"])) for job in content["jobs"])
        hydra, common = tuple(content["hydra"]), tuple(content["common"])
        where = str(content["config_name"]), content["config_dir"], content["started"]
        sweep = Sweep(folder, jobs, hydra, common, *where, str(content.get("working_directory", "")))
    except UserError:
        raise
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: damaged") from None
    check_words([*common, *(word for job in jobs for word in job.overrides)], path)
    for job in jobs:
        if not job.directory.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{path}: the directory {job.directory} of a job is outside the sweep's folder")
    if not re.fullmatch(r"\w[\w-]*", sweep.config_name):
        raise UserError(f"{path}: config_name {sweep.config_name!r} is not the name of a configuration")
    return sweep


def found_sweep(folder: Path) -> Sweep:
    """The planned sweep of a folder; for another sweeper than Hydra's, a sweep of the runs that the folder holds."""
    planned = read_sweep(folder)
    if planned is not None:
        return planned
    runs = sorted({path.parent for name in (HYDRA, STATUS) for path in folder.rglob(name)})
    return Sweep(folder, tuple(Job(run, tuple(RunDirectory(run).overrides())) for run in runs))


def sweep_of(directory: Path) -> str | None:
    """Name of the sweep that a run belongs to, as in its dashboards; None for a single run."""
    for folder in directory.absolute().parents:
        if (folder / SWEEP_FILE).is_file() or (folder / "multirun.yaml").is_file():
            return "/".join(folder.parts[-2:])
    return None


def job_state(job: Job, started: str = "") -> JobState:
    """State of a job by the files in its directory; a job without a record is planned.

    A run that is older than `started`, or has no time, does not count; with an empty one every run counts.
    """
    name = job.directory.name
    try:
        run = RunEntry.read(job.directory, name)
    except (DamagedFileError, ForeignRecordError) as error:
        return JobState(job, RunEntry(job.directory, name, RunState.FAILED, error=str(error)))
    if run.state is not RunState.RUNNING and started and (run.time is None or run.time < started):
        run = RunEntry(job.directory, name, RunState.PLANNED)
    return JobState(job, run)


def job_states(sweep: Sweep) -> list[JobState]:
    """States of all jobs of a sweep, in their order."""
    return [job_state(job, sweep.started) for job in sweep.jobs]


def varied_keys(jobs: Sequence[Job]) -> list[str]:
    """Keys of overrides that differ between jobs, in order of their first appearance."""
    tables = [_table(job) for job in jobs]
    keys = dict.fromkeys(key for table in tables for key in table)
    return [key for key in keys if len({table.get(key) for table in tables}) > 1]


def varied_values(job: Job, keys: Sequence[str]) -> dict[str, str]:
    """A job's values of the given keys; a key that it does not set is left out."""
    table = _table(job)
    return {key: table[key] for key in keys if key in table}


def _table(job: Job) -> dict[str, str]:
    return {key_of(word): word.partition("=")[2] for word in job.overrides}


def show_summary(sweep: Sweep) -> None:
    """Prints the results of a sweep, its failed runs with their errors, and the next commands.

    Prints nothing if no job of the sweep has started.
    """
    states = job_states(sweep)
    if all(state.run.state is RunState.PLANNED for state in states):
        return
    print_wide(*sweep_tables(states, sweep.folder))
    done = sum(state.run.is_over for state in states)
    failed = [state for state in states if state.run.state is RunState.FAILED]
    print(f"{typed(sweep.folder)}: {done} of {len(states)} runs done, {len(failed)} failed")
    for state in failed:
        print(f"  failed: {state.job.directory.relative_to(sweep.folder)}  {state.run.error}")
    again = [sweep.again] if done < len(states) else []
    print_next(*again, *([report_command([sweep.folder], sweep.folder / "report")] if done else []))


def sweep_tables(states: Sequence[JobState], folder: Path) -> list[Table]:
    """The tables of a sweep.

    Returns:
        A table of all runs with the highest accuracy marked. If seeds vary, also a table of means over seeds, and the
        mark is there, because settings are chosen and not seeds. At most `MOST_ROWS` finished runs are shown.
    """
    keys = varied_keys([state.job for state in states])
    groups = seed_groups(states) if SEED in keys else {}
    cut = {id(state) for state in [state for state in states if state.run.is_over][MOST_ROWS:]}
    runs = _table_of("runs", ["run", *keys], ["test %", "val %", "train s"], ["state"])
    runs.caption = f"{len(cut)} more runs are done; ekd-report shows all" if cut else None
    best = _highest(() if groups else (_mean([state], "test_accuracy") for state in states))
    for state in (state for state in states if id(state) not in cut):
        values = varied_values(state.job, keys)
        found = [_mean([state], key) for key in ("test_accuracy", "val_accuracy", "train_seconds")]
        runs.add_row(
            state.job.directory.relative_to(folder).as_posix(),
            *(values.get(key, "–") for key in keys),
            *_figures(found, best),
            Text(STATE_NAMES[state.run.state], STYLES.get(state.run.state, "")),
            style=_style(found[0], best),
        )
    return [runs, _means(groups, [key for key in keys if key != SEED])] if groups else [runs]


def seed_groups(states: Sequence[JobState]) -> dict[tuple[str, ...], list[JobState]]:
    """Runs that differ in their seed alone, by the values of the other keys; only runs with an accuracy."""
    others = [key for key in varied_keys([state.job for state in states]) if key != SEED]
    groups: dict[tuple[str, ...], list[JobState]] = {}
    for state in states:
        if _mean([state], "test_accuracy") is not None:
            values = varied_values(state.job, others)
            groups.setdefault(tuple(values.get(key, "–") for key in others), []).append(state)
    return groups


def _means(groups: Mapping[tuple[str, ...], Sequence[JobState]], keys: Sequence[str]) -> Table:
    table = _table_of("means over seeds ± std", keys, ["test %", "n", "train s"])
    found = {values: _mean(group, "test_accuracy") for values, group in groups.items()}
    best = _highest(found.values())
    for values, accuracy in found.items():
        assert accuracy is not None  # only runs with an accuracy are in groups
        test, seconds = _figures([accuracy, _mean(groups[values], "train_seconds")], best)
        table.add_row(*values, test, str(accuracy.n), seconds, style=_style(accuracy, best))
    return table


def _mean(states: Sequence[JobState], key: str) -> Estimate | None:
    found = [None if state.run.result is None else state.run.result.get(key) for state in states]
    return estimate(float(value) for value in found if value is not None)


def _highest(found: Iterable[Estimate | None]) -> float | None:
    """The highest of several means; None if there is only one, which has nothing to be compared with."""
    means = [one.mean for one in found if one]
    return max(means) if len(means) > 1 else None


def _style(found: Estimate | None, best: float | None) -> str:
    return "bold" if found and found.mean == best else ""


def _figures(found: Sequence[Estimate | None], best: float | None) -> list[Text]:
    """Accuracies in percent, the first of them marked if it is the best, and seconds last."""
    *accuracies, seconds = found
    first, *others = (Text(percent(one)) for one in accuracies)
    if _style(accuracies[0], best):
        first = Text.assemble((f"{_BEST} ", "yellow"), first)
    return [first, *others, Text(f"{seconds.mean:.{0 if seconds.mean >= 10 else 1}f}" if seconds else "–")]


def _table_of(title: str, left: Sequence[str], right: Sequence[str], last: Sequence[str] = ()) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in left:
        table.add_column(name, overflow="fold")
    for name in (*right, *last):
        table.add_column(name, justify="left" if name in last else "right", no_wrap=True)
    return table
