"""Runs as they lie on disk: found below folders, read, and told apart by their state.

Only the record of a run is read (status.json, result.json, config.yaml), never its logs. What is foreign or
half-written is told in one line and left out; nothing of it counts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from ekd_lightning.errors import UserError

STATES = ("done", "failed", "partial", "running")
STATUS, RESULT, CONFIG = "status.json", "result.json", "config.yaml"
CURVES, ARRAYS, PROVENANCE = "metrics.csv", "arrays.npz", "provenance.json"
_HYDRA = ".hydra"
_STRINGS = ("method", "data")
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times faster where libyaml is there


@dataclass(frozen=True)
class RunEntry:
    """One run directory.

    Attributes:
        directory: Absolute.
        name: Its path below the common root of all runs, POSIX, e.g. `runs/ekd-f0.1-s0`; unique.
        state: `done`; `failed`; `partial` (done, but saw a part of the data only: such results are no results); or
            `running` (or killed: a run cannot say so itself).
        result: Content of result.json; None unless done or partial.
        error: First line of what went wrong; None unless failed.
        time: When the state was written, ISO 8601; None where unknown.
    """

    directory: Path
    name: str
    state: str
    result: Mapping[str, Any] | None = field(default=None, repr=False)
    error: str | None = None
    time: str | None = None

    def file(self, name: str) -> Path | None:
        """A file of the run's directory; None where it is absent."""
        path = self.directory / name
        return path if path.is_file() else None

    @property
    def config_path(self) -> Path | None:
        """The resolved configuration, or what Hydra composed where the run ended before that; None without."""
        return self.file(CONFIG) or self.file(f"{_HYDRA}/{CONFIG}")

    @property
    def curves_path(self) -> Path | None:
        """metrics.csv: one row per epoch, columns `epoch`, `val/accuracy`, `train/loss`, ...; None where absent."""
        return self.file(CURVES)

    @property
    def arrays_path(self) -> Path | None:
        """arrays.npz: what plots need; None where absent."""
        return self.file(ARRAYS)

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The configuration, read when first asked for; empty where there is none or it is damaged."""
        path = self.config_path
        if path is None:
            return {}
        try:
            content = yaml.load(path.read_bytes(), _Loader)
        except (yaml.YAMLError, OSError, UnicodeDecodeError):
            return {}
        return content if isinstance(content, dict) else {}

    @cached_property
    def provenance(self) -> Mapping[str, Any]:
        """Where the run was made, read when first asked for; empty where that is unknown."""
        path = self.file(PROVENANCE)
        try:
            content = {} if path is None else json.loads(path.read_text())
        except (ValueError, OSError):
            return {}
        return content if isinstance(content, dict) else {}

    def setting(self, key: str) -> Any:
        """A value of the configuration by its dotted key; None where it is not there."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    def get(self, key: str) -> Any:
        """A field of the result; of a run without one, what the configuration says of method, data, ...; else None."""
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
    """All runs that were found.

    Attributes:
        root: The folder that names of runs are relative to.
        runs: In the order of their names.
        problems: One line for each foreign, half-written or unreadable file.
    """

    root: Path
    runs: tuple[RunEntry, ...]
    problems: tuple[str, ...] = ()

    def count(self, state: str) -> int:
        """Number of runs in a state."""
        return sum(run.state == state for run in self.runs)


def collect(paths: Sequence[Path]) -> Collection:
    """Finds all runs at or below the given places; one that is reached twice counts once.

    Args:
        paths: Run directories, folders of runs at any depth (a sweep, a study, several of them), or result.json
            files.

    Returns:
        The runs, whatever became of them.

    Raises:
        UserError: If a place does not exist or is something else, or no run is found.
    """
    tops = list(dict.fromkeys(_folder(path) for path in paths))
    found = sorted({directory for top in tops for directory in _walk(top)})
    if not found:
        raise UserError(
            f"{' '.join(map(str, paths)) or 'no folder'}: no runs (no status.json or result.json)"
        )
    parents = {top.parent if top in found else top for top in tops}
    root = Path(os.path.commonpath(parents))
    problems: list[str] = []
    entries = [_read(directory, directory.relative_to(root).as_posix(), problems) for directory in found]
    runs = tuple(entry for entry in entries if entry is not None)
    if not runs:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(f"no runs: {problems[0]}{more}")
    return Collection(root, runs, tuple(problems))


def _folder(path: Path) -> Path:
    absolute = Path(os.path.abspath(path))
    if absolute.is_dir():
        return absolute.resolve()
    if not absolute.exists():
        raise UserError(f"{path}: no such folder")
    if absolute.name != RESULT:
        raise UserError(f"{path}: neither a folder of runs nor a {RESULT}")
    return absolute.parent.resolve()


def _walk(top: Path) -> Iterator[Path]:
    """Directories that look like runs. What lies below a run (checkpoints, W&B's files) is its own affair."""
    for folder, below, files in os.walk(top):
        if STATUS in files or RESULT in files or (_HYDRA in below and _was_composed(Path(folder))):
            yield Path(folder)
            below.clear()
        else:
            below[:] = sorted(name for name in below if not name.startswith("."))


def _was_composed(folder: Path) -> bool:
    """Whether Hydra composed a run of this package here, which then ended before it had a record."""
    try:
        text = (folder / _HYDRA / CONFIG).read_text()
    except (OSError, UnicodeDecodeError):
        return False
    return all(f"\n{section}:" in f"\n{text}" for section in ("data", "teachers", "student", "method"))


def _read(directory: Path, name: str, problems: list[str]) -> RunEntry | None:
    """One run; None, and a line more in `problems`, if its record is none of this package's."""
    try:
        status = _json(directory / STATUS)
        if status is not None and not isinstance(status.get("state"), str):
            raise _NotOursError(f"{STATUS}: not the status of a run of this package")
        return _entry(directory, name, status, problems)
    except _NotOursError as error:
        problems.append(f"{name}/{error}; left out")
        return None


def _entry(
    directory: Path, name: str, status: Mapping[str, Any] | None, problems: list[str]
) -> RunEntry | None:
    time = str(status["time"]) if status and status.get("time") else None
    state = status["state"] if status else "done"
    if state == "failed":
        lines = str((status or {}).get("error") or "unknown error").splitlines()
        return RunEntry(directory, name, "failed", error=lines[0], time=time)
    if state != "done":
        return RunEntry(directory, name, "running", time=time)
    try:
        result = _json(directory / RESULT)
    except _NotOursError as error:
        problems.append(f"{name}/{error}; counted as failed")
        return RunEntry(directory, name, "failed", error=str(error), time=time)
    if result is None:
        missing = f"done, but without a {RESULT}" if status else "ended before it had a record"
        return RunEntry(directory, name, "failed", error=missing, time=time)
    check_result(result)
    entry = RunEntry(directory, name, "partial" if result.get("partial") else "done", result, time=time)
    asked = entry.setting("data.fraction")
    if isinstance(
        asked, (int, float)
    ):  # version 0.1 recorded the share that the rounded number of images came to
        result["fraction"] = asked
    return entry


class _NotOursError(ValueError):
    """A file is no record of this package; the message begins with its name."""


def check_result(result: Mapping[str, Any]) -> None:
    """Refuses a result that lacks what every run of this package records.

    Raises:
        ValueError: Naming the field.
    """
    for key in _STRINGS:
        if not isinstance(result.get(key), str):
            raise _NotOursError(f"{RESULT}: not a result of this package (no {key!r})")
    seed, fraction, accuracy = (result.get(key) for key in ("seed", "fraction", "test_accuracy"))
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise _NotOursError(f"{RESULT}: not a result of this package (no 'seed')")
    for key, value in (("fraction", fraction), ("test_accuracy", accuracy)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise _NotOursError(
                f"{RESULT}: not a result of this package ({key!r} is {value!r}, not in [0, 1])"
            )


def _json(path: Path) -> dict[str, Any] | None:
    """Content of a JSON object; None without the file."""
    try:
        content = json.loads(path.read_bytes(), parse_constant=lambda _: None)  # NaN: as runs write it, null
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _NotOursError(f"{path.name}: {error.strerror}") from None
    except ValueError:  # of JSON and of UTF-8
        raise _NotOursError(f"{path.name}: damaged or half-written") from None
    if not isinstance(content, dict):
        raise _NotOursError(f"{path.name}: not a record of this package (a {type(content).__name__})")
    return content
