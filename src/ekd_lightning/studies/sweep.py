"""Sweeps on disk: their jobs, written down in sweep.json before the first one starts, and how each stands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ekd_lightning.config.overrides import SWEEP_FILE, key_of
from ekd_lightning.errors import UserError
from ekd_lightning.files import DamagedFileError, read_json, write_json
from ekd_lightning.runs.collection import RunEntry
from ekd_lightning.runs.directory import HYDRA, STATUS, ForeignRecordError, RunDirectory, RunState
from ekd_lightning.runs.provenance import now


@dataclass(frozen=True)
class Job:
    """One run of many.

    Attributes:
        directory: Its run directory.
        overrides: As for ekd-train.
        resumed: Whether it goes on from its last checkpoint.
    """

    directory: Path
    overrides: tuple[str, ...]
    resumed: bool = False


@dataclass(frozen=True)
class Sweep:
    """What a sweep is made of.

    Attributes:
        folder: Folder of the sweep.
        jobs: In the order in which they are started.
        hydra: Overrides of Hydra itself, e.g. the launcher.
        common: Overrides of the runs that do not vary.
        config_name: The configuration that is composed.
        config_dir: Folder of the user's own configuration files; None without one.
        working_directory: Where relative places of jobs that have not started begin; empty where it is not known.
        started: Time of the first start, ISO 8601 in UTC; a status that is older belongs to an earlier sweep.
    """

    folder: Path
    jobs: tuple[Job, ...]
    hydra: tuple[str, ...] = ()
    common: tuple[str, ...] = ()
    config_name: str = "train"
    config_dir: str | None = None
    started: str = ""
    working_directory: str = ""


class Standing(NamedTuple):
    """How a job stands: the job, and its run on disk."""

    job: Job
    run: RunEntry


def write_sweep(sweep: Sweep) -> None:
    """Writes sweep.json."""
    jobs = [
        {"directory": job.directory.relative_to(sweep.folder).as_posix(), "overrides": list(job.overrides)}
        for job in sweep.jobs
    ]
    content = {
        "started": sweep.started or now(),
        "working_directory": sweep.working_directory,
        "config_name": sweep.config_name,
        "config_dir": sweep.config_dir,
        "hydra": list(sweep.hydra),
        "common": list(sweep.common),
        "jobs": jobs,
    }
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
        content = read_json(path)
        jobs = tuple(Job(folder / job["directory"], tuple(job["overrides"])) for job in content["jobs"])
        words = tuple(content["hydra"]), tuple(content["common"])
        where = content["config_name"], content["config_dir"], content["started"]
        return Sweep(folder, jobs, *words, *where, str(content.get("working_directory", "")))
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: damaged") from None


def found_sweep(folder: Path) -> Sweep:
    """The planned sweep of a folder, or what can be seen of a sweep that nobody planned (another sweeper's)."""
    planned = read_sweep(folder)
    if planned is not None:
        return planned
    runs = sorted({path.parent for name in (HYDRA, STATUS) for path in folder.rglob(name)})
    return Sweep(folder, tuple(Job(run, tuple(RunDirectory(run).overrides())) for run in runs))


def sweep_of(directory: Path) -> str | None:
    """Name of the sweep that a run belongs to, as its dashboards have it; None for a single run."""
    for folder in directory.absolute().parents:
        if (folder / SWEEP_FILE).is_file() or (folder / "multirun.yaml").is_file():
            return "/".join(folder.parts[-2:])
    return None


def look(job: Job, started: str = "") -> Standing:
    """How a job stands by the files in its directory; one that has no record yet is planned.

    Args:
        job: The job.
        started: Start of the sweep; what is older, or has no time, does not count. Empty for one nobody planned.
    """
    name = job.directory.name
    try:
        run = RunEntry.read(job.directory, name)
    except (DamagedFileError, ForeignRecordError) as error:
        return Standing(job, RunEntry(job.directory, name, RunState.FAILED, error=str(error)))
    if run.state is not RunState.RUNNING and started and (run.time is None or run.time < started):
        run = RunEntry(job.directory, name, RunState.PLANNED)
    return Standing(job, run)


def varied_keys(jobs: Sequence[Job]) -> list[str]:
    """Keys of overrides that differ between jobs, by first appearance."""
    values: dict[str, set[str | None]] = {}
    tables = [_table(job) for job in jobs]
    for key in dict.fromkeys(key for table in tables for key in table):
        values[key] = {table.get(key) for table in tables}
    return [key for key, found in values.items() if len(found) > 1]


def varied_values(job: Job, keys: Sequence[str]) -> dict[str, str]:
    """The values a job has for keys; a key that it does not set is left out."""
    table = _table(job)
    return {key: table[key] for key in keys if key in table}


def _table(job: Job) -> dict[str, str]:
    return {key_of(word): word.partition("=")[2] for word in job.overrides}
