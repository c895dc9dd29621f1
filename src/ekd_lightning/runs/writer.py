"""Writer of a run's record, and provenance: code, versions, hardware, command."""

from __future__ import annotations

import contextlib
import io
import os
import platform
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from ekd_lightning import __version__
from ekd_lightning.errors import UserError, loaded_plugins
from ekd_lightning.files import (
    DamagedFileError,
    UnwritableFileError,
    file_sha256,
    read_json,
    remove_parts,
    write_bytes,
    write_json,
    write_yaml,
)
from ekd_lightning.runs.directory import (
    ARRAYS,
    BEST,
    CHECKPOINTS,
    CONFIG,
    CURVES,
    CURVES_SUM,
    EXPORT,
    FORMAT,
    HYDRA,
    INTERRUPTED,
    LAST,
    PROVENANCE,
    RESULT,
    STATUS,
    STUDENT,
    ForeignRecordError,
    RunDirectory,
    sha256_of,
)
from ekd_lightning.runs.lock import DirectoryLock
from ekd_lightning.runs.result import Result

_PACKAGES = ("torch", "torchvision", "pytorch-lightning", "torchmetrics", "hydra-core", "omegaconf", "wandb", "numpy")
_REPLACED = (
    *(STUDENT, CURVES, CURVES_SUM, "train.log", "rank*_train.log", "export/student.*", EXPORT),
    *(f"{place}{name}" for place in ("", "evaluation/", "teachers/*/") for name in ("wandb_run_id.txt", "tensorboard")),
)
"""Files and folders of an earlier run that a new run in its directory removes."""


class RunWriter(RunDirectory):
    """A run's directory for the process that writes it; in a distributed job, only global rank 0."""

    def start(self, *, resumed: bool) -> None:
        """Marks the run as running and removes an earlier result; a new run also removes the files of an earlier run.

        A resumed run keeps its first provenance and appends this start to it. Nothing is removed before the provenance
        is written: a full disk costs no result.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        remove_parts(self.path)
        facts, replaces = provenance(), self.was_started() and not resumed
        first = self.provenance() if resumed else {}
        if first:
            facts = {**first, "resumed": [*(first.get("resumed") or []), facts]}
        # Until the status is written, the files here still belong to the run that is replaced.
        replaced = {"replaced": self.identity} if "run" not in facts and self.holds_run() else {}
        write_json(self.path / PROVENANCE, {"run": uuid.uuid4().hex, **replaced, **facts})
        if replaces:
            for checkpoint in (self.last_checkpoint, self.best_checkpoint):
                checkpoint.unlink(missing_ok=True)
        self._write_status("running")
        for name in (RESULT, ARRAYS):
            (self.path / name).unlink(missing_ok=True)
        if not replaces:
            return
        self._remove_model_card()
        for path in [path for pattern in _REPLACED for path in self.path.glob(pattern)]:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def refuse_used(self, *, overwrite: bool, key: str = "hydra.run.dir") -> None:
        """Refuses to start a new run where it would destroy an earlier one, or files that no run wrote.

        `overwrite` permits to replace a run, but no other files; `key` is the setting by which the user chose the
        directory.

        Raises:
            UserError: If there is a result, also one of another version (a damaged one does not count), a run that can
                be resumed, or a file of no run with the name of one that the new run writes.
        """
        if not self.was_started():
            names = [CURVES, ARRAYS, STUDENT, f"{CHECKPOINTS}/{LAST}", f"{CHECKPOINTS}/{BEST}"]
            if not (self.file(STATUS) or (self.path / HYDRA).is_dir()):  # a refused job and ekd-teach write it, too
                names.append(CONFIG)
            for path in filter(None, map(self.file, names)):
                raise UserError(f"{path}: exists, and no run wrote it; give another {key}, or move the file")
        if overwrite:
            return
        holds = "a finished run"
        try:
            with contextlib.suppress(ForeignRecordError):
                self.read_result()
        except (FileNotFoundError, DamagedFileError):
            if not self.can_resume():
                return
            holds = f"an unfinished run with checkpoints; resume={self.path} continues it"
        raise UserError(f"{self.path}: holds {holds}; give another {key}, or overwrite=true to replace it")

    def refuse_complete(self, epochs: int) -> None:
        """Refuses to continue a run that completed all epochs of its recipe.

        A run that trainer.max_epochs, max_time or a callback ended earlier has a result, too, and can go on.
        """
        result = self.recorded().result
        if result is not None and (result.epochs_done or 0) >= epochs:
            raise UserError(f"resume={self.path}: the run is done, there is nothing to continue")

    def _remove_model_card(self) -> None:
        """Removes the card of the exported student, unless the user has edited it."""
        card = (self.path / EXPORT).with_name("README.md")
        with contextlib.suppress(FileNotFoundError, DamagedFileError):
            if read_json(self.path / EXPORT).get("card_sha256") == file_sha256(card):
                card.unlink()

    def add_provenance(self, **facts: Any) -> None:
        """Adds facts that are known only after the start, e.g. hashes of data and teachers."""
        write_json(self.path / PROVENANCE, {**self.provenance(), **facts})

    def write_yaml(self, name: str, text: str) -> None:
        """Writes a YAML file that names the run."""
        write_yaml(self.path / name, f"# run {self.identity}\n{text}" if self.identity else text)

    def write_curves(self, content: bytes, before: bytes | None) -> None:
        """Writes metrics.csv, and before it the checksums of new and old content, as a kill may leave either."""
        write_json(self.path / CURVES_SUM, {"sha256": list({sha256_of(content), sha256_of(before)})})
        if content != before:
            write_bytes(self.path / CURVES, content)

    def write_result(self, result: Result) -> None:
        """Writes result.json."""
        write_json(self.path / RESULT, {"format": FORMAT, "run": self.identity, **result})

    def write_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Writes arrays.npz, if there are arrays."""
        if arrays:
            stream = io.BytesIO()
            np.savez_compressed(stream, run=self.identity or "", **arrays)  # type: ignore[arg-type] # no options
            write_bytes(self.path / ARRAYS, stream.getvalue())

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Lets the block change the record of a finished run, while other processes wait.

        Raises:
            LockedError: If a run is at work here; its end is not waited for, as it replaces the record.
            UnwritableFileError: If the directory cannot be written.
        """
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(FileLock(self.path / ".evaluation.lock"))
                stack.enter_context(DirectoryLock(self.path))
            except OSError as error:
                raise UnwritableFileError(f"{self.path}: cannot be written ({error.strerror or error})") from None
            yield

    def finish(self, result: Result) -> None:
        """Writes the result, then the state done; in this order, so that done implies a result."""
        self.write_result(result)
        self._write_status("done")

    def fail(self, error: str) -> None:
        """Records that the run failed, and why."""
        self._write_status("failed", error)

    def stop(self) -> None:
        """Records that the run was interrupted."""
        self._write_status("stopped", INTERRUPTED)

    def _write_status(self, state: str, error: str | None = None) -> None:
        write_json(
            self.path / STATUS, {"format": FORMAT, "run": self.identity, "state": state, "error": error, "time": now()}
        )


def provenance() -> dict[str, Any]:
    """Returns the provenance of a result: code, versions, hardware, command."""
    return {
        "version": __version__,
        "git": _git(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "working_directory": os.getcwd(),  # base of relative paths in the configuration
        "python": platform.python_version(),
        "packages": {name: version_of(name) for name in _PACKAGES},
        "plugins": dict(loaded_plugins),
        "platform": platform.platform(),
        "hardware": _hardware(),
        "started": now(),
    }


def given_rank() -> int | None:
    """Returns the global rank that torchrun or SLURM gave this process; None without.

    Batch scripts and interactive shells have SLURM_PROCID, too. Like Lightning (`SLURMEnvironment.detect`), this takes
    a process for a task of SLURM only if there are several and the job is not an interactive one.
    """
    if "RANK" in os.environ:
        return int(os.environ["RANK"])
    alone = int(os.environ.get("SLURM_NTASKS", "1")) == 1 or os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
    return None if alone or "SLURM_PROCID" not in os.environ else int(os.environ["SLURM_PROCID"])


def is_rank_zero() -> bool:
    """Whether this process is global rank 0, by its environment alone; works before a process group exists."""
    if (rank := given_rank()) is not None:
        return rank == 0
    return all(int(os.environ.get(name, "0")) == 0 for name in ("LOCAL_RANK", "NODE_RANK"))


def now() -> str:
    """Returns the time as ISO 8601 in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def version_of(name: str) -> str | None:
    """Returns the version of a package; None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git() -> dict[str, Any] | None:
    """Returns the commit of this source tree; None for an installed wheel."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return None

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    return {"commit": git("rev-parse", "HEAD") or None, "modified": bool(git("status", "--porcelain", "-uno"))}


def _hardware() -> dict[str, Any]:
    import torch  # noqa: PLC0415 (slow; every command imports this file first)

    return {
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def cpu_name() -> str:
    """Returns the processor's model name."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()
