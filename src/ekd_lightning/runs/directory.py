"""Directory of a run: its state, its files, and the only code that reads its record."""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from ekd_lightning.errors import UserError
from ekd_lightning.files import DamagedFileError, read_bytes, read_json, read_yaml
from ekd_lightning.runs.lock import is_held
from ekd_lightning.runs.result import NotAResultError, Result
from ekd_lightning.runs.words import check_words

FORMAT = 2
"""Of status.json, result.json, sweep.json and study.json; records of version 0.1 say none, which is 1."""
STATUS, RESULT, CONFIG, PROVENANCE = "status.json", "result.json", "config.yaml", "provenance.json"
CURVES, ARRAYS, STUDENT = "metrics.csv", "arrays.npz", "student.safetensors"
CURVES_SUM = ".metrics.json"
CHECKPOINTS, BEST, LAST = "checkpoints", "best.ckpt", "last.ckpt"
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
    """A file that is no record of this package, or one of a version that is not read here."""


def require_format(path: Path, content: Mapping[str, Any]) -> None:
    """Checks a record's format number; one without a number is of version 0.1.

    Raises:
        ForeignRecordError: If it is no record of this package, or one of a version that is not read here.
    """
    version = content.get("format", 1)
    if isinstance(version, bool) or not isinstance(version, int):
        raise ForeignRecordError(f"{path}: not a record of this package (format {version!r})")
    if not 1 <= version <= FORMAT:
        age = "newer" if version > FORMAT else "older"
        raise ForeignRecordError(
            f"{path}: written by a{'n' * (age == 'older')} {age} version (format {version}; 1 to {FORMAT} are read)"
        )


class Record(NamedTuple):
    """A run's state, result, error and time according to its files.

    Attributes:
        state: What became of it.
        result: What it found; None unless done or partial.
        error: First line of what went wrong; None unless failed.
        time: When the state was written, ISO 8601; None where unknown.
    """

    state: RunState
    result: Result | None = None
    error: str | None = None
    time: str | None = None


class RunDirectory:
    """One run on disk.

    It only reads, which is free to all; `RunWriter` writes.

    Args:
        path: The directory; it need not exist.
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
        """The best epoch by validation accuracy."""
        return self.path / CHECKPOINTS / BEST

    def can_resume(self) -> bool:
        """Whether there is a checkpoint, and a record of how the run was started."""
        return self.last_checkpoint.is_file() and self.file(OVERRIDES) is not None

    def file(self, name: str) -> Path | None:
        """One of its files; None if it is absent."""
        path = self.path / name
        return path if path.is_file() else None

    @property
    def identity(self) -> str | None:
        """The run's id, which all its files name; None for version 0.1 or a damaged provenance.json."""
        with contextlib.suppress(DamagedFileError):
            return self.provenance().get("run")
        return None

    def require_own(self, path: Path, run: str | None) -> None:
        """Checks that a file names this run as its own, or no run.

        Raises:
            DamagedFileError: Naming the file.
        """
        try:
            record = self.provenance()
        except DamagedFileError:  # who needs it tells
            return
        if run and run not in (record.get("run"), record.get("replaced")):
            raise DamagedFileError(f"{path}: damaged, not of the run that {PROVENANCE} tells of")

    def is_held(self) -> bool:
        """Whether a process is at work in the directory, by its lock."""
        return is_held(self.path)

    def record(self) -> Record:
        """Returns the state of the run.

        It runs while its lock is held, whatever its files say. One that says so without a lock was killed, which is
        the same as interrupted: it is stopped.

        Raises:
            DamagedFileError: If status.json is damaged or half-written.
            ForeignRecordError: If a file is no record of this package, or one of another version.
        """
        return Record(RunState.RUNNING, time=self._time()) if self.is_held() else self.recorded()

    def recorded(self) -> Record:
        """Returns the state according to the files, for the holder of the lock; raises like `record`."""
        try:
            status = self._read(STATUS)
        except DamagedFileError as damage:
            raise DamagedFileError(f"{damage}; remove it to use the run's other files") from None
        if status is None and self.file(RESULT) is None:
            if (self.path / HYDRA).is_dir() or self.file(CONFIG):
                return Record(RunState.FAILED, error="ended before it had a record")
            return Record(RunState.PLANNED)
        status = {"state": "done"} if status is None else status  # a result that was put apart
        state, time = status.get("state"), str(status["time"]) if status.get("time") else None
        error = (str(status.get("error") or "unknown error").splitlines() or [""])[0]
        if state in ("running", "stopped") or (state == "failed" and error == INTERRUPTED):
            return Record(RunState.STOPPED, time=time)
        if state == "failed":
            return Record(RunState.FAILED, error=error, time=time)
        if state != "done":
            raise ForeignRecordError(f"{self.path / STATUS}: not the status of a run of this package")
        try:
            result = self.read_result()
        except (FileNotFoundError, DamagedFileError) as problem:
            missing = isinstance(problem, FileNotFoundError)
            error = f"done, but without a {RESULT}" if missing else str(problem).removeprefix(f"{self.path}/")
            return Record(RunState.FAILED, error=error, time=time)
        return Record(RunState.PARTIAL if result.partial else RunState.DONE, result, time=time)

    def _time(self) -> str | None:
        try:
            return (self._read(STATUS) or {}).get("time")
        except UserError:
            return None

    def started(self) -> datetime | None:
        """Returns when the run, or its last part, was started; None if that is unknown."""
        first = self.provenance()
        try:
            return datetime.fromisoformat([first, *(first.get("resumed") or [])][-1]["started"])
        except (TypeError, ValueError, KeyError):
            return None

    def read_result(self) -> Result:
        """Reads result.json, whatever status.json says.

        Raises:
            DamagedFileError: If it is damaged or half-written.
            ForeignRecordError: If it is no result of this package, or one of another version.
            FileNotFoundError: If there is none.
        """
        content = self._read(RESULT)
        if content is None:
            raise FileNotFoundError(self.path / RESULT)
        if content.pop("format", 1) == 1:  # it recorded the share that the rounded number of images came to
            with contextlib.suppress(DamagedFileError):
                asked = self.section("data").get("fraction")
                content["fraction"] = content.get("fraction") if asked is None else asked
        if content.get("num_unlabelled_images") and "unlabelled_from" not in content:  # then config.yaml alone told
            with contextlib.suppress(DamagedFileError):
                if data := self.section("data"):
                    content["unlabelled_from"] = "rest" if data.get("unlabelled") == "rest" else "own"
                    content["epoch_over"] = str(data.get("epoch", "labelled"))
        try:
            return Result.of(content)
        except NotAResultError as error:
            raise ForeignRecordError(f"{self.path / RESULT}: not a result of this package ({error})") from None

    def finished_result(self) -> Result:
        """Returns the result of a run that is done or partial.

        Raises:
            UserError: If the run is not done, or a file is missing, half-written or something else.
        """
        found = self.record()
        if found.result is None and (found.error or "").startswith(f"{RESULT}: "):
            raise DamagedFileError(f"{self.path}/{found.error}")
        if found.result is None:
            why = f" ({found.error})" if found.error else ""
            raise UserError(f"{self.path}: the run is not done, its status is {found.state.value!r}{why}")
        return found.result

    def _read(self, name: str) -> dict[str, Any] | None:
        """Reads a record with a format number; None without the file."""
        path = self.path / name
        try:
            content = read_json(path)
        except FileNotFoundError:
            return None
        self.require_own(path, content.pop("run", None))
        require_format(path, content)
        return content

    @property
    def config_path(self) -> Path | None:
        """The resolved configuration, or what Hydra composed where the run ended before that; None without."""
        return self.file(CONFIG) or self.file(f"{HYDRA}/{CONFIG}")

    def config(self) -> dict[str, Any]:
        """The configuration at `config_path`; empty without.

        Raises:
            DamagedFileError: If it is damaged.
        """
        path = self.config_path
        if path is None:
            return {}
        content = _read_yaml(path, dict, "mapping")
        if path.parent == self.path:
            self._require_named(path)
        return {str(key): value for key, value in content.items()}

    def _require_named(self, path: Path) -> None:
        """Checks that `write_yaml` wrote a YAML file for this run."""
        if named := re.search(rb"^# run (\w+)$", path.read_bytes(), re.MULTILINE):
            self.require_own(path, named[1].decode())
        elif self.identity and "replaced" not in self.provenance():
            raise DamagedFileError(f"{path}: damaged, names no run")

    def section(self, name: str) -> dict[str, Any]:
        """A group of the configuration; empty without.

        Raises:
            DamagedFileError: If the configuration is damaged, or this is no group.
        """
        content = self.config().get(name) or {}
        if not isinstance(content, dict):
            raise DamagedFileError(f"{self.config_path}: damaged ({name} is not a mapping)")
        return content

    def overrides(self) -> list[str]:
        """The overrides that the run was started with; empty where Hydra wrote none down.

        Raises:
            DamagedFileError: If the file is damaged.
            UserError: If it holds what a record may not set, see `check_words`.
        """
        path = self.file(OVERRIDES)
        if path is None:
            return []
        words = check_words(_read_yaml(path, list, "list"), path)
        self._require_named(path)
        return [word for word in words if not word.startswith("resume=")]

    def provenance(self) -> dict[str, Any]:
        """Returns the run's provenance; empty if it is unknown.

        Raises:
            DamagedFileError: If the file is damaged.
        """
        path = self.path / PROVENANCE
        try:
            content = read_json(path)
        except FileNotFoundError:
            return {}
        if not isinstance(content.get("resumed") or [], list):
            raise DamagedFileError(f"{path}: damaged (resumed is not a list)")
        return content

    def arrays(self, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """Returns arrays that figures need, all or some by name; empty without the file.

        Raises:
            DamagedFileError: If it is damaged.
        """
        path = self.path / ARRAYS
        try:
            with np.load(io.BytesIO(read_bytes(path)), allow_pickle=False) as file:
                self.require_own(path, str(file["run"]) if "run" in file.files else None)
                return {n: file[n] for n in file.files if n != "run" and (names is None or n in names)}
        except FileNotFoundError:
            return {}
        except DamagedFileError:
            raise
        except Exception as error:  # of a damaged file NumPy, zipfile and zlib each have several kinds
            raise DamagedFileError(
                f"{path}: damaged ({error}); remove it and evaluate the run again, by force"
            ) from None

    def curves(self) -> bytes | None:
        """Content of metrics.csv; None without the file.

        Raises:
            DamagedFileError: If it cannot be read, or is not what was written.
        """
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

    def refuse_finished(self) -> None:
        """Refuses to start a run in the directory of a finished one, which only the user may replace.

        Raises:
            UserError: If there is a result, of another version as well; a damaged one is none.
        """
        try:
            self.read_result()
        except (FileNotFoundError, DamagedFileError):
            return
        except ForeignRecordError:
            pass
        raise UserError(
            f"{self.path}: holds a finished run; give another hydra.run.dir, or overwrite=true to replace it"
        )

    def refuse_complete(self, epochs: int) -> None:
        """Refuses to continue a run that completed all epochs of its recipe.

        One that trainer.max_epochs, max_time or a callback ended earlier has a result, and can go on.

        Args:
            epochs: How many these are.

        Raises:
            UserError: If it did.
        """
        result = self.recorded().result
        if result is not None and (result.epochs_done or 0) >= epochs:
            raise UserError(f"resume={self.path}: this run is done, there is nothing to continue")

    def holds_run(self) -> bool:
        """Whether a run has left its configuration, its state or a checkpoint here."""
        return any((self.path / name).exists() for name in (CONFIG, STATUS, f"{CHECKPOINTS}/{LAST}"))


def sha256_of(content: bytes | None) -> str | None:
    """The hash of a content; None without one."""
    return None if content is None else hashlib.sha256(content).hexdigest()


def _read_yaml(path: Path, kind: type[_Kind], named: str) -> _Kind:
    content = read_yaml(path)
    if not isinstance(content, kind):
        raise DamagedFileError(f"{path}: damaged (not a {named})")
    return content
