"""Sweeps on disk: their jobs, written down in sweep.json before the first one starts, and how each stands."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ekd_lightning.config.overrides import key_of
from ekd_lightning.config.resume import SWEEP_FILE
from ekd_lightning.errors import UserError
from ekd_lightning.files import read_json, write_json
from ekd_lightning.runs.record import now

LOCK_FILE = ".lock"
INTERRUPTED = "interrupted"


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
        started: Time of the first start, ISO 8601 in UTC; a status that is older belongs to an earlier sweep.
    """

    folder: Path
    jobs: tuple[Job, ...]
    hydra: tuple[str, ...] = ()
    common: tuple[str, ...] = ()
    config_name: str = "train"
    config_dir: str | None = None
    started: str = ""


@dataclass(frozen=True)
class JobState:
    """How a job stands.

    Attributes:
        job: The job.
        state: `waiting` (not started), `running`, `done`, `partial` (done, on a part of the data), `failed`, or
            `stopped` (interrupted or killed; only where nobody is at work any more, see `settled`).
        error: One line, if it failed.
        result: Content of result.json, if it is done.
        seconds: From its (last) start to its end, to the second; None where one is not known.
        since: Its (last) start.
    """

    job: Job
    state: str
    error: str | None = None
    result: dict[str, Any] = field(default_factory=dict)
    seconds: float | None = None
    since: datetime | None = None

    @property
    def ended(self) -> bool:
        """Whether there is nothing more to wait for."""
        return self.state not in ("waiting", "running")


def write_sweep(sweep: Sweep) -> None:
    """Writes sweep.json."""
    jobs = [
        {"directory": job.directory.relative_to(sweep.folder).as_posix(), "overrides": list(job.overrides)}
        for job in sweep.jobs
    ]
    content = {
        "started": sweep.started or now(),
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
        return Sweep(folder, jobs, *words, content["config_name"], content["config_dir"], content["started"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: damaged") from None


def found_sweep(folder: Path) -> Sweep:
    """The planned sweep of a folder, or what can be seen of a sweep that nobody planned (another sweeper's)."""
    planned = read_sweep(folder)
    if planned is not None:
        return planned
    runs = sorted({path.parent for name in (".hydra", "status.json") for path in folder.rglob(name)})
    return Sweep(folder, tuple(Job(run, tuple(recorded_overrides(run))) for run in runs))


def sweep_of(directory: Path) -> str | None:
    """Name of the sweep that a run belongs to, as its dashboards have it; None for a single run."""
    for folder in directory.absolute().parents:
        if (folder / SWEEP_FILE).is_file() or (folder / "multirun.yaml").is_file():
            return "/".join(folder.parts[-2:])
    return None


def recorded_overrides(directory: Path) -> list[str]:
    """The overrides that a run was started with; empty where Hydra wrote none down."""
    path = directory / ".hydra" / "overrides.yaml"
    words: Any = OmegaConf.to_container(OmegaConf.load(path)) if path.is_file() else []
    return [str(word) for word in words if not str(word).startswith("resume=")]


def look(job: Job, started: str = "") -> JobState:
    """How a job stands by the files in its directory.

    Args:
        job: The job.
        started: Start of the sweep; what is older does not count.
    """
    status, error = _json(job.directory / "status.json")
    if error:
        return JobState(job, "failed", error)
    if status is None or str(status.get("time", "")) < started:
        return JobState(job, "waiting")
    since, end = _start(job.directory), _time(status.get("time"))
    if status.get("state") == "running":
        return JobState(job, "running", since=since)
    seconds = (end - since).total_seconds() if since and end else None
    if status.get("state") == "done":
        result, error = _json(job.directory / "result.json")
        if result is None:
            return JobState(job, "failed", error or "has no result.json")
        return JobState(job, "partial" if result.get("partial") else "done", None, result, seconds, since)
    text = (str(status.get("error") or "").splitlines() or ["unknown error"])[0]
    state = "stopped" if text == INTERRUPTED else "failed"
    return JobState(job, state, None if state == "stopped" else text, {}, seconds, since)


def settled(states: Iterable[JobState]) -> list[JobState]:
    """The same once nobody is at work any more: what still says `running` was killed, or never came that far."""
    return [_settled(state) for state in states]


def _settled(state: JobState) -> JobState:
    if state.state == "running":
        return JobState(state.job, "failed", "killed: it ended without a word")
    if state.state == "waiting" and (state.job.directory / ".hydra").is_dir():
        return JobState(state.job, "failed", "ended before it had a record; see its log")
    return state


def mark_interrupted(jobs: Iterable[Job]) -> None:
    """Says `interrupted` for every job that says it is running; for when all processes have ended."""
    for job in jobs:
        status, _ = _json(job.directory / "status.json")
        if status is not None and status.get("state") == "running":
            content = {"state": "failed", "error": INTERRUPTED, "time": now()}
            write_json(job.directory / "status.json", content)


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


def _json(path: Path) -> tuple[dict[str, Any] | None, str | None]:
    """Content of a file, or why there is none; both None if the file does not exist."""
    try:
        return dict(json.loads(path.read_text())), None
    except FileNotFoundError:
        return None, None
    except (OSError, ValueError, TypeError):
        return None, f"{path.name}: damaged"


def _start(directory: Path) -> datetime | None:
    provenance, _ = _json(directory / "provenance.json")
    if provenance is None:
        return None
    parts = [provenance, *provenance.get("resumed", [])]
    return _time(parts[-1].get("started"))


def _time(text: Any) -> datetime | None:
    try:
        return datetime.fromisoformat(text)
    except (TypeError, ValueError):
        return None


def as_typed(path: Path) -> str:
    """A path as one would type it here, in a shell."""
    here = Path.cwd()
    return shlex.quote(path.relative_to(here).as_posix() if path.is_relative_to(here) else str(path))
