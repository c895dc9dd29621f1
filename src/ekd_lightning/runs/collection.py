"""Collection of runs on disk: finds them below folders, reads their records, and determines their states.

Only the record of a run is read (status.json, result.json, config.yaml), never its logs. Foreign and
half-written files are left out, each with one warning.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from ekd_lightning.errors import UserError
from ekd_lightning.files import DamagedFileError
from ekd_lightning.progress import track
from ekd_lightning.roles import is_of
from ekd_lightning.runs.directory import CONFIG, HYDRA, RESULT, STATUS, ForeignRecordError, RunDirectory, RunState
from ekd_lightning.runs.protocol import Protocol
from ekd_lightning.runs.result import Result

RECORDS = ".jsonl"
"""Suffix of files of records."""
STATES = (RunState.DONE, RunState.FAILED, RunState.PARTIAL, RunState.STOPPED, RunState.RUNNING)
"""States of existing runs."""


@dataclass(frozen=True)
class RunEntry:
    """A run as its files describe it.

    Attributes:
        directory: Absolute.
        name: Its path below the common root of all runs, POSIX, e.g. `runs/ekd-f0.1-s0`; unique.
        state: Its state.
        result: Its result; None unless done or partial.
        error: First line of its error; None unless failed.
        time: When the state was written, ISO 8601; None if unknown.
        row: Name of its row in a study; None unless it was read from a file of records.
        study: Name of that study, likewise.
        decides: Whether the row is among those that answer the study's question.
        about: Description of the study; empty unless a file of records has one.
    """

    directory: Path
    name: str
    state: RunState
    result: Result | None = field(default=None, repr=False)
    error: str | None = None
    time: str | None = None
    row: str | None = None
    study: str | None = None
    decides: bool = True
    about: str = ""

    @classmethod
    def read(cls, directory: Path, name: str) -> RunEntry:
        """Reads the record of a run.

        Raises:
            DamagedFileError: If status.json is damaged or half-written.
            ForeignRecordError: If a file is no record of this package, or one of another version.
        """
        return cls(directory, name, *RunDirectory(directory).record())

    def having(self, **changes: Any) -> RunEntry:
        """Returns the entry with changed attributes, and with the configuration and provenance that it holds."""
        made = replace(self, **changes)
        vars(made).update({name: vars(self)[name] for name in ("config", "provenance") if name in vars(self)})
        return made

    @property
    def is_over(self) -> bool:
        """Whether the run has a result, of all or of part of the data."""
        return self.state in (RunState.DONE, RunState.PARTIAL)

    @property
    def on_disk(self) -> RunDirectory:
        """The run's directory."""
        return RunDirectory(self.directory)

    @property
    def since(self) -> datetime | None:
        """When the run, or its last part, was started; None if unknown."""
        with contextlib.suppress(DamagedFileError):
            return self.on_disk.started()
        return None

    @property
    def seconds(self) -> float | None:
        """Seconds from `since` to `time`; None if one of them is unknown."""
        try:
            end, since = datetime.fromisoformat(self.time or ""), self.since
            return None if since is None else (end - since).total_seconds()
        except (ValueError, TypeError):
            return None

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The configuration, read on first use; empty if missing or damaged."""
        with contextlib.suppress(DamagedFileError):
            return self.on_disk.config()
        return {}

    @cached_property
    def provenance(self) -> Mapping[str, Any]:
        """The provenance, read on first use; empty if missing or damaged."""
        with contextlib.suppress(DamagedFileError):
            return self.on_disk.provenance()
        return {}

    def setting(self, key: str) -> Any:
        """Returns a value of the configuration by its dotted key; None if it is absent."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    def get(self, key: str) -> Any:
        """A field of the result; without one, the setting of method, data, ... in the configuration. Else None."""
        if self.result is not None:
            return self.result.get(key)
        return self.setting(_IN_CONFIG[key]) if key in _IN_CONFIG else None


_IN_CONFIG = {
    "method": "method.name",
    "data": "data.name",
    "fraction": "data.fraction",
    "seed": "seed",
    "student": "student.network",
    "num_branches": "student.branches",
    "epochs": "recipe.epochs",
    "batch_size": "recipe.batch_size",
}


@dataclass(frozen=True)
class Collection:
    """All runs that were found: on disk in the order of their names, then of files of records.

    Names are relative to `root`. `problems` has a line for each foreign, half-written or unreadable file.
    """

    root: Path
    runs: tuple[RunEntry, ...]
    problems: tuple[str, ...] = ()

    def count(self, state: str) -> int:
        """Number of runs in a state."""
        return sum(run.state == state for run in self.runs)


def collect(paths: Sequence[Path]) -> Collection:
    """Finds all runs at or below the given paths, in any state; a run that is reached twice counts once.

    Paths are run directories, folders of runs at any depth (a sweep, a study, several of them), result.json files, or
    .jsonl files of records.

    Raises:
        UserError: If a path does not exist or is none of these, or no run is found.
    """
    recorded: list[RunEntry] = []
    for path in paths:
        recorded += read_records(path, recorded) if path.suffix == RECORDS else []
    tops = list(dict.fromkeys(_folder(path) for path in paths if path.suffix != RECORDS))
    found = sorted({directory for top in tops for directory in _walk(top)})
    if recorded and not found:
        return Collection(Path.cwd(), tuple(recorded))
    if not found:
        raise UserError(f"{' '.join(map(str, paths)) or 'no folder'}: no runs found (no status.json or result.json)")
    parents = {top.parent if top in found else top for top in tops}
    root = Path(os.path.commonpath(parents))
    problems: list[str] = []
    entries = [_read(place, place.relative_to(root).as_posix(), problems) for place in track(found, "reading", "runs")]
    runs = (*(entry for entry in entries if entry is not None), *recorded)
    if not runs:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(f"no run can be read: {problems[0]}{more}")
    return Collection(root, runs, tuple(problems))


def read_records(path: Path, others: Sequence[RunEntry] = ()) -> list[RunEntry]:
    """Reads the runs of a file of records; their names differ from each other and from those of `others`.

    Each line is a mapping in JSON. One with `study` says what the runs of the following lines share: parts of their
    `result`, `config` (by dotted keys) and `provenance`, which rows decide, and what the study is (`about`). The other
    lines are runs: `row`, `time`, and their own parts.

    Raises:
        DamagedFileError: Naming the first line that is neither.
        UserError: If the file cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    shared: dict[str, Any] = {}
    runs: list[RunEntry] = []
    for number, line in enumerate(lines, 1):
        try:
            own = json.loads(line, parse_constant=_no_number)
            if "study" in own:
                shared = own
                continue
            result, config, provenance = (
                {**shared.get(part, {}), **own.get(part, {})} for part in ("result", "config", "provenance")
            )
            row, study, decide = str(own["row"]), str(shared["study"]), shared.get("decide")
            hash(Protocol.of(result))
            kinds: dict[str, Any] = {"time": str | None, "resumed": list[dict[str, dict[str, Any]]]}
            for key, value in {"time": own.get("time"), **provenance}.items():
                if not is_of(value, kinds.get(key, dict[str, Any])):
                    raise ValueError(f"{key} is {value!r:.60}")
            name = record_name(study, row, result)
            names = [run.name for run in (*others, *runs)]
            name += f"-{sum(one.startswith(name) for one in names)}" if name in names else ""
            run = RunEntry(
                path.parent / name,
                name,
                RunState.DONE,
                Result.of(result),
                time=own.get("time"),
                row=row,
                study=study,
                decides=decide is None or row in decide,
                about=str(shared.get("about", "")),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else error
            raise DamagedFileError(f"{path}: damaged (line {number}: {what})") from None
        vars(run).update(config=_nested(config), provenance=provenance)  # in place of what files would hold
        runs.append(run)
    return runs


def _no_number(word: str) -> float:
    raise ValueError(f"{word} is no number")


def record_name(study: str, row: str, result: Mapping[str, Any]) -> str:
    """Name of a run in a file of records, e.g. `full/ekd-f0.1-s0`; others may share it."""
    return f"{study}/{row}-f{result['fraction']:g}-s{result['seed']}"


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Turns a mapping by dotted keys into nested mappings."""
    made: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, last = key.split(".")
        place = made
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return made


def finished_runs(places: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """Finds finished runs: the given run directories, and all runs below the given folders that are done.

    Returns their directories, and a line for each folder with runs that were left out.

    Raises:
        UserError: If a path does not exist, or has no run that is done.
    """
    if not places:
        raise UserError("no RUN given: name the directory of a run, or a folder of runs")
    found: dict[Path, None] = {}
    left_out = []
    for place in places:
        run = RunDirectory(place)
        if not place.is_dir():
            raise UserError(f"{place}: no such directory")
        if run.file(STATUS) or run.file(CONFIG):
            run.finished_result()
            found[place] = None
            continue
        below = sorted(path.parent for path in place.rglob(STATUS))
        done = [directory for directory in below if _is_done(directory)]
        if not done:
            what = f"none of its {len(below)} runs is done" if below else "no run found there"
            raise UserError(f"{place}: {what}")
        if left := len(below) - len(done):
            left_out.append(f"{place}: left out {left} of {len(below)} runs, which are unfinished or partial")
        found.update(dict.fromkeys(done))
    return list(found), left_out


def _is_done(directory: Path) -> bool:
    with contextlib.suppress(UserError):
        return RunDirectory(directory).record().state is RunState.DONE
    return False


def _folder(path: Path) -> Path:
    absolute = Path(os.path.abspath(path))
    if absolute.is_dir():
        return absolute.resolve()
    if not absolute.exists():
        raise UserError(f"{path}: no such folder")
    if absolute.name != RESULT:
        raise UserError(f"{path}: neither a folder of runs nor a {RESULT} nor a {RECORDS} file of records")
    return absolute.parent.resolve()


def _walk(top: Path) -> Iterator[Path]:
    """Yields directories that look like runs; folders below a run (checkpoints, W&B files) are skipped."""
    for folder, below, files in os.walk(top):
        if STATUS in files or RESULT in files or (HYDRA in below and _was_composed(Path(folder))):
            yield Path(folder)
            below.clear()
        else:
            below[:] = sorted(name for name in below if not name.startswith("."))


def _was_composed(folder: Path) -> bool:
    """Whether Hydra composed a run of this package here that ended before it wrote a record; `ekd-teach` makes none."""
    config, hydra = _text(folder / HYDRA / CONFIG), _text(folder / HYDRA / "hydra.yaml")
    sections = ("data", "teachers", "student", "method")
    return all(f"\n{section}:" in config for section in sections) and "\n    app_name: ekd-teach\n" not in hydra


def _text(path: Path) -> str:
    """The lines of a file, each after a line break; empty if it cannot be read."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return f"\n{path.read_text()}"
    return ""


def _read(directory: Path, name: str, problems: list[str]) -> RunEntry | None:
    """Reads one run; returns None, and adds a line to `problems`, if its record is damaged or foreign."""
    try:
        entry = RunEntry.read(directory, name)
    except (DamagedFileError, ForeignRecordError) as error:
        problems.append(f"{name}/{str(error).removeprefix(f'{directory}/')}; left out")
        return None
    if entry.state is RunState.FAILED and RESULT in (entry.error or ""):
        problems.append(f"{name}/{entry.error}; counted as failed")
    return entry
