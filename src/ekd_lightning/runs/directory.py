"""Directory of a run: its state and files. All reading of a run's record is in this file."""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
from collections.abc import Sequence
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from ekd_lightning.errors import UserError
from ekd_lightning.files import DamagedFileError, read_bytes, read_json, read_yaml
from ekd_lightning.roles import is_of
from ekd_lightning.runs.lock import is_held
from ekd_lightning.runs.result import NotAResultError, Result
from ekd_lightning.runs.words import check_words

FORMAT = 2
"""Format of status.json, result.json, sweep.json and study.json; records of version 0.1 hold no number, which is 1."""
STATUS, RESULT, CONFIG, PROVENANCE = "status.json", "result.json", "config.yaml", "provenance.json"
CURVES, ARRAYS, STUDENT = "metrics.csv", "arrays.npz", "student.safetensors"
CURVES_SUM = ".metrics.json"
CHECKPOINTS, BEST, LAST = "checkpoints", "best.ckpt", "last.ckpt"
EXPORT = "export/export.json"
HYDRA, OVERRIDES = ".hydra", ".hydra/overrides.yaml"
INTERRUPTED = "interrupted"
"""The error in status.json of a stopped run of version 0.1."""
_Kind = TypeVar("_Kind")


class RunState(str, Enum):
    """State of a run."""

    PLANNED = "planned"
    """Nothing of it exists yet."""
    RUNNING = "running"
    """A process is at work in its directory."""
    STOPPED = "stopped"
    """Interrupted or killed; it can go on."""
    FAILED = "failed"
    DONE = "done"
    PARTIAL = "partial"
    """Done, but on a part of the data only: its numbers are no results."""

    __str__ = str.__str__


class ForeignRecordError(UserError):
    """A file that is no record of this package, or a record of a version that this one does not read."""


def read_record(path: Path) -> dict[str, Any]:
    """Reads a record with a format number; one without is of version 0.1.

    Raises:
        DamagedFileError: If it is damaged or half-written.
        ForeignRecordError: If it is no record of this package, or a record of a newer version.
        FileNotFoundError: If there is no such file.
    """
    content = read_json(path)
    version = content.get("format", 1)
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise ForeignRecordError(f"{path}: not a record of this package (format {version!r})")
    if version > FORMAT:
        raise ForeignRecordError(f"{path}: written by a newer version (format {version}; 1 to {FORMAT} are read)")
    return content


class Record(NamedTuple):
    """A run's state, result, error and time according to its files, as in `RunEntry`."""

    state: RunState
    result: Result | None = None
    error: str | None = None
    time: str | None = None


class RunDirectory:
    """One run on disk, to read; the directory need not exist. `RunWriter` writes.

    To read a damaged or half-written file raises a `DamagedFileError` that names it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def student(self) -> Path:
        """The student with the weights after the last epoch."""
        return self.path / STUDENT

    @property
    def last_checkpoint(self) -> Path:
        """Checkpoint from which a stopped run continues."""
        return self.path / CHECKPOINTS / LAST

    @property
    def best_checkpoint(self) -> Path:
        """Checkpoint of the epoch with the best validation accuracy."""
        return self.path / CHECKPOINTS / BEST

    def can_resume(self) -> bool:
        """Whether there is a checkpoint, and a record of how the run was started."""
        return self.last_checkpoint.is_file() and self.file(OVERRIDES) is not None

    def file(self, name: str) -> Path | None:
        """Returns the path of one of its files; None if it is absent."""
        path = self.path / name
        return path if path.is_file() else None

    @property
    def identity(self) -> str | None:
        """The run's id, which all its files hold; None for version 0.1 or a damaged provenance.json."""
        with contextlib.suppress(DamagedFileError):
            return self.provenance().get("run")
        return None

    def require_own(self, path: Path, run: str | None) -> None:
        """Checks that the id in one of its files, if there is one, is that of this run."""
        try:
            record = self.provenance()
        except DamagedFileError:  # reported where it is needed
            return
        if run and run not in (record.get("run"), record.get("replaced")):
            raise DamagedFileError(f"{path}: damaged, belongs to another run than {PROVENANCE}")

    def is_held(self) -> bool:
        """Whether a process holds the lock of the directory."""
        return is_held(self.path)

    def record(self) -> Record:
        """Returns the state of the run.

        It is running while its lock is held, whatever its files say. A run whose files say running, without the lock,
        was killed; it counts as stopped, like an interrupted one.

        Raises:
            DamagedFileError: If status.json is damaged or half-written.
            ForeignRecordError: If a file is no record of this package, or one of another version.
        """
        if not self.is_held():
            return self.recorded()
        time = None
        with contextlib.suppress(UserError):
            time = (self._read(STATUS) or {}).get("time")
        return Record(RunState.RUNNING, time=time)

    def recorded(self) -> Record:
        """Returns the state according to the files alone, for the holder of the lock; raises like `record`."""
        try:
            status = self._read(STATUS)
        except DamagedFileError as damage:
            raise DamagedFileError(f"{damage}; remove it to use the run's other files") from None
        if status is None and self.file(RESULT) is None:
            if (self.path / HYDRA).is_dir() or self.file(CONFIG):
                return Record(RunState.FAILED, error="ended before it wrote a record")
            return Record(RunState.PLANNED)
        status = {"state": "done"} if status is None else status  # a result.json on its own
        state, time = status.get("state"), str(status["time"]) if status.get("time") else None
        error = (str(status.get("error") or "unknown error").splitlines() or [""])[0]
        if state in ("running", "stopped") or (state == "failed" and error == INTERRUPTED):
            return Record(RunState.STOPPED, time=time)
        if state == "failed":
            return Record(RunState.FAILED, error=error, time=time)
        if state != "done":
            raise ForeignRecordError(f"{self.path / STATUS}: not the status of a run of this package ({state=})")
        try:
            result = self.read_result()
        except (FileNotFoundError, DamagedFileError) as problem:
            missing = isinstance(problem, FileNotFoundError)
            error = f"done, but without a {RESULT}" if missing else str(problem).removeprefix(f"{self.path}/")
            return Record(RunState.FAILED, error=error, time=time)
        return Record(RunState.PARTIAL if result.partial else RunState.DONE, result, time=time)

    def started(self) -> datetime | None:
        """Returns when the run, or its last part, was started; None if unknown."""
        first = self.provenance()
        try:
            return datetime.fromisoformat([first, *(first.get("resumed") or [])][-1]["started"])
        except (TypeError, ValueError, KeyError):
            return None

    def read_result(self) -> Result:
        """Reads result.json, whatever status.json says.

        Raises:
            ForeignRecordError: If it is no result of this package, or one of another version.
            FileNotFoundError: If there is none.
        """
        content = self._read(RESULT)
        if content is None:
            raise FileNotFoundError(self.path / RESULT)
        if content.pop("format", 1) == 1:  # its fraction is rounded to whole images
            with contextlib.suppress(DamagedFileError):
                content["fraction"] = self.section("data").get("fraction") or content.get("fraction")
        try:
            return Result.of(content)
        except NotAResultError as error:
            raise ForeignRecordError(f"{self.path / RESULT}: not a result of this package ({error})") from None

    def finished_result(self) -> Result:
        """Returns the result of a run that is done or partial.

        Raises:
            UserError: If the run is not done, or a file of its record is missing, damaged or foreign.
        """
        found = self.record()
        if found.result is not None:
            return found.result
        if (found.error or "").startswith(f"{RESULT}: "):
            raise DamagedFileError(f"{self.path}/{found.error}")
        why = f" ({found.error})" if found.error else ""
        again = "; ekd-train resume=DIR continues it" if found.state is RunState.STOPPED else ""
        raise UserError(f"{self.path}: the run is not done, its status is {found.state.value!r}{why}{again}")

    def _read(self, name: str) -> dict[str, Any] | None:
        """Reads one of its records; None without the file."""
        path = self.path / name
        try:
            content = read_record(path)
        except FileNotFoundError:
            return None
        self.require_own(path, content.pop("run", None))
        return content

    @property
    def config_path(self) -> Path | None:
        """Path of the resolved configuration, else of Hydra's own (of a run that ended early); None without both."""
        return self.file(CONFIG) or self.file(f"{HYDRA}/{CONFIG}")

    def config(self) -> dict[str, Any]:
        """The configuration at `config_path`; empty without."""
        if (path := self.config_path) is None:
            return {}
        content = _read_yaml(path, dict, "mapping")
        if path.parent == self.path:
            self._require_named(path)
        return {str(key): value for key, value in content.items()}

    def _require_named(self, path: Path) -> None:
        """Checks that a YAML file names this run, as `RunWriter.write_yaml` makes it."""
        if named := re.search(rb"^# run (\w+)$", path.read_bytes(), re.MULTILINE):
            self.require_own(path, named[1].decode())
        elif self.identity and "replaced" not in self.provenance():
            raise DamagedFileError(f"{path}: damaged, does not name its run")

    def section(self, name: str) -> dict[str, Any]:
        """A group of the configuration; empty if missing."""
        content = self.config().get(name) or {}
        if not isinstance(content, dict):
            raise DamagedFileError(f"{self.config_path}: damaged ({name} is not a mapping)")
        return content

    def overrides(self) -> list[str]:
        """The overrides that the run was started with; empty if Hydra recorded none.

        Raises:
            UserError: If the file holds an override that a record may not hold, see `check_words`.
        """
        if (path := self.file(OVERRIDES)) is None:
            return []
        words = check_words(_read_yaml(path, list, "list"), path)
        self._require_named(path)
        return [word for word in words if not word.startswith("resume=")]

    def provenance(self) -> dict[str, Any]:
        """Returns the run's provenance; empty if there is no file."""
        path = self.path / PROVENANCE
        try:
            content = read_json(path)
        except FileNotFoundError:
            return {}
        if not is_of(content.get("resumed") or [], list[dict[str, Any]]):
            raise DamagedFileError(f"{path}: damaged (resumed is not a list of mappings)")
        for start in (content, *(content.get("resumed") or ())):
            if not is_of(start.get("hardware") or {}, dict[str, Any]):
                raise DamagedFileError(f"{path}: damaged (hardware is not a mapping)")
        return content

    def arrays(self, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """Returns the arrays of arrays.npz, all or those named; empty without the file."""
        path = self.path / ARRAYS
        try:
            with np.load(io.BytesIO(read_bytes(path)), allow_pickle=False) as file:
                self.require_own(path, str(file["run"]) if "run" in file.files else None)
                return {n: file[n] for n in file.files if n != "run" and (names is None or n in names)}
        except FileNotFoundError:
            return {}
        except DamagedFileError:
            raise
        except Exception as error:  # NumPy, zipfile and zlib raise many kinds for a damaged file
            raise DamagedFileError(
                f"{path}: damaged ({error}); remove it and evaluate the run again (ekd-evaluate --force)"
            ) from None

    def curves(self) -> bytes | None:
        """Content of metrics.csv, which must fit its checksum; None without the file."""
        path, known = self.path / CURVES, None
        with contextlib.suppress(FileNotFoundError):
            known = read_json(self.path / CURVES_SUM).get("sha256")
        try:
            content = read_bytes(path)
        except FileNotFoundError:
            content = None
        if isinstance(known, list) and sha256_of(content) not in known:
            raise DamagedFileError(
                f"{path}: damaged or changed, its SHA-256 is not the recorded one; "
                f"remove it and {CURVES_SUM} to continue without its curves"
            )
        return content

    def was_started(self) -> bool:
        """Whether a run has started here, so that files with the names of a run's files are its own."""
        return any(self.file(name) for name in (PROVENANCE, RESULT))

    def holds_run(self) -> bool:
        """Whether a run has left its configuration, its state or a checkpoint here."""
        return any((self.path / name).exists() for name in (CONFIG, STATUS, f"{CHECKPOINTS}/{LAST}"))


def sha256_of(content: bytes | None) -> str | None:
    """Returns the SHA-256 of bytes, in hex; None for None."""
    return None if content is None else hashlib.sha256(content).hexdigest()


def _read_yaml(path: Path, kind: type[_Kind], named: str) -> _Kind:
    content = read_yaml(path)
    if not isinstance(content, kind):
        raise DamagedFileError(f"{path}: damaged (not a {named})")
    return content
