"""Loggers of a run's curves: always metrics.csv; Weights & Biases and TensorBoard if selected."""

from __future__ import annotations

import csv
import io
import logging
import os
import re
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger
from pytorch_lightning.utilities import rank_zero_only

from ekd_lightning.errors import UserError, one_line, require
from ekd_lightning.files import BackgroundWriter, DamagedFileError, read_bytes, write_text
from ekd_lightning.runs.writer import RunWriter
from ekd_lightning.settings import LoggerSettings, WandbSettings

log = logging.getLogger(__name__)

_WANDB_ID = "wandb_run_id.txt"
_SWEEP_ID = "WANDB_SWEEP_ID"  # set by the agent of a W&B sweep
STUDENT, PROJECT = "student", "ekd-lightning"

_SUMMARIES = {
    "min": ("train/*", "val/nll", "val/ece", "val/brier"),
    "max": ("train/accuracy", "val/accuracy", "val/top5", "val/branch_accuracy_*"),
}
"""Value that W&B's tables show -> curves of which it is not the last one."""


class MetricsCsv(Logger):
    """metrics.csv: one row per logged step, columns in order of first appearance.

    When a run is resumed, Lightning's CSVLogger deletes the old rows; this one keeps them up to the checkpoint's step.
    A background thread writes the file; `finalize` waits for it.

    Raises:
        DamagedFileError: If an existing file is damaged or was changed.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self._writer = BackgroundWriter()
        self._run = RunWriter(path.parent)
        self._written = self._run.curves()
        try:
            stream = io.StringIO((self._written or b"").decode(), newline="")
            rows = [{name: text for name, text in row.items() if text} for row in csv.DictReader(stream)]
            self._rows: dict[int, dict[str, str]] = {int(row["step"]): row for row in rows}
        except (ValueError, KeyError, AttributeError, csv.Error) as error:
            raise DamagedFileError(f"{path}: damaged ({one_line(error)})") from None

    @property
    def name(self) -> str:
        """Empty, as the file lies in the run's directory itself."""
        return ""

    @property
    def version(self) -> str:
        """Empty, as `name`."""
        return ""

    def forget_from(self, step: int) -> None:
        """Drops the rows that training will log again when it continues after `step` optimiser steps.

        The row of an epoch has the number of its last step, counted from 0, and the row of the final test the number of
        steps; so rows from `step` on are dropped.
        """
        self._rows = {number: row for number, row in self._rows.items() if number < step}

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Does nothing: the resolved configuration has its own file."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Adds values to the row of a step."""
        row = self._rows.setdefault(int(step or 0), {"step": str(int(step or 0))})
        row.update({name: repr(float(value)) for name, value in metrics.items()})

    @rank_zero_only
    def save(self) -> None:
        """Queues the whole file to be written; it has one row per epoch."""
        columns = list(dict.fromkeys(name for row in self._rows.values() for name in row))
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, fieldnames=columns, restval="")
        writer.writeheader()
        writer.writerows(self._rows[step] for step in sorted(self._rows))
        content = text.getvalue().encode()
        self._writer.submit(self.path, lambda: self._write(content))

    def _write(self, content: bytes) -> None:
        self._run.write_curves(content, self._written)
        self._written = content

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Writes the file, and waits for the disk."""
        if self._rows:
            self.save()
            self.save()  # once more, so that the checksum of the old content is dropped
        self._writer.close()


def make_loggers(
    settings: LoggerSettings,
    directory: Path,
    *,
    name: str,
    sweep: str | None,
    config: dict[str, Any],
    job_type: str = STUDENT,
) -> list[Logger]:
    """Builds the loggers of a run; the first is metrics.csv, which only the student has.

    Args:
        settings: The selected loggers.
        directory: The run's directory; every logger writes below it.
        name: Readable name of the run.
        sweep: Name of the sweep, for grouping; None for a single run.
        config: Resolved, nested configuration as plain containers.
        job_type: Kind of run, as a job type of W&B: `student`, `teacher`, `assistant` or `evaluation`.

    Raises:
        UserError: If a package is not installed.
    """
    loggers: list[Logger] = [MetricsCsv(directory / "metrics.csv")] if job_type == STUDENT else []
    if settings.tensorboard:
        require("tensorboard", "tensorboard", or_else="set logger.tensorboard=false")
        loggers.append(TensorBoardLogger(directory, name="tensorboard", version="", default_hp_metric=False))
    # The agent of a W&B sweep gives this process one run, which is the student's.
    if settings.wandb.enabled and (job_type == STUDENT or not in_wandb_sweep()):
        loggers.append(_wandb(settings.wandb, directory, sweep, name=name, config=config, job_type=job_type))
    return loggers


@dataclass(frozen=True)
class TeacherCurves:
    """Loggers for the teachers and assistants that a run trains; each network has its own curves.

    Files of a teacher go to `teachers/<name>/` below the run's directory.
    """

    settings: LoggerSettings
    directory: Path
    sweep: str | None = None


@contextmanager
def open_curves(
    curves: TeacherCurves | None, job_type: str, name: str, config: dict[str, Any]
) -> Iterator[list[Logger]]:
    """Opens the loggers of one training and ends them with the block, as failed if it raises."""
    if curves is None:
        yield []
        return
    directory = curves.directory / "teachers" / name
    loggers = make_loggers(curves.settings, directory, name=name, sweep=curves.sweep, config=config, job_type=job_type)
    ended: dict[str, Any] | None = None
    try:
        describe_metrics(loggers)
        yield loggers
        ended = {}
    finally:
        finish_loggers(loggers, result=ended)


def _wandb(settings: WandbSettings, directory: Path, sweep: str | None, **about: Any) -> Logger:
    directory.mkdir(parents=True, exist_ok=True)
    import wandb  # noqa: PLC0415 (slow to import, and only where it is selected)

    logger = WandbLogger(
        settings=wandb.Settings(silent=True),  # warnings and errors are still shown
        mode=settings.mode,  # rather than `offline=`, which would change WANDB_MODE for all later runs of the process
        id=wandb_run_id(directory),
        resume="allow",
        save_dir=str(directory),
        project=settings.project or os.environ.get("WANDB_PROJECT") or PROJECT,
        entity=settings.entity,  # for None, W&B reads its environment variables
        group=settings.group or os.environ.get("WANDB_RUN_GROUP") or sweep or os.environ.get(_SWEEP_ID),
        tags=settings.tags or None,
        notes=settings.notes,
        log_model=settings.log_model,
        **about,
    )
    logger._wandb_init.pop("anonymous", None)  # W&B warns of any value
    return logger


def in_wandb_sweep() -> bool:
    """Whether an agent of a W&B sweep started this process."""
    return _SWEEP_ID in os.environ


@rank_zero_only
def wandb_run_id(directory: Path) -> str:
    """Returns the run's W&B id, made at the first start and kept in its directory, so that a resumed run continues it.

    For a run that the agent of a W&B sweep starts, the agent chooses the id.

    Raises:
        DamagedFileError: If the file does not hold an id.
    """
    from wandb.sdk.lib.runid import generate_id  # noqa: PLC0415 (slow to import, and only where it is selected)

    path = directory / _WANDB_ID
    if not path.is_file():
        given = os.environ.get("WANDB_RUN_ID") if in_wandb_sweep() else None
        write_text(path, (given or generate_id()) + "\n")
    kept = read_bytes(path).decode(errors="replace").strip()
    if not re.fullmatch(r"[^\s/\\#?%:\ufffd\0]{1,128}", kept):
        raise DamagedFileError(f"{path}: damaged, holds no id of a W&B run; remove it to start a new W&B run")
    return kept


@rank_zero_only
def describe_metrics(loggers: list[Logger], columns: dict[str, Any] | None = None) -> None:
    """Sets W&B's axis, the value of each curve in its tables, and the columns by which runs can be grouped.

    Logs the address of the run, or how to upload it.

    Raises:
        UserError: If W&B starts no run, for example without a login.
    """
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            import wandb  # noqa: PLC0415 (slow to import, and only where it is selected)

            try:
                run: Any = logger.experiment
            except wandb.errors.UsageError as error:
                advice = "`wandb login` logs in, logger.wandb.mode=offline needs no login"
                raise UserError(f"logger.wandb: {one_line(error)} ({advice})") from None
            if not run.disabled:
                offline = f"kept in {run.settings.sync_dir}; `make wandb-sync` or `wandb sync` uploads it"
                log.info("W&B: run %s, %s", run.name, offline if run.offline else run.url)
            run.define_metric("epoch", hidden=True)
            run.define_metric("trainer/global_step", hidden=True)
            run.define_metric("*", step_metric="epoch")
            for summary, names in _SUMMARIES.items():
                for name in names:
                    run.define_metric(name, step_metric="epoch", summary=summary)
            if columns:
                run.config.update(columns, allow_val_change=True)


_RENAMED = {"method": "method_name", "data": "data_name", "student": "student_network"}


def flat_columns(facts: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns facts of a run as flat columns with the names of result.json, for grouping, filters and sweeps.

    Facts with the name of a configuration group are renamed: `method_name`, `data_name`, `student_network`. Lists and
    mappings become text.
    """
    columns = {_RENAMED.get(name, name): value for name, value in facts.items()}
    return {
        name: value if value is None or isinstance(value, (int, float, str)) else str(value)
        for name, value in columns.items()
        if name not in config
    }


def finish_loggers(loggers: list[Logger], *, result: Mapping[str, Any] | None) -> None:
    """Ends every logger; W&B gets the final numbers, and an exit code that marks failed runs, which have no result.

    An error is logged and not raised, as the run's own record does not depend on loggers.
    """
    for logger in loggers:
        try:
            if isinstance(logger, WandbLogger):
                _finish_wandb(result)
            else:
                logger.finalize("failed" if result is None else "success")
        except Exception:
            log.exception("%s failed at the end of the run, whose record does not depend on it", type(logger).__name__)


def _finish_wandb(result: Mapping[str, Any] | None) -> None:
    import wandb  # noqa: PLC0415

    if wandb.run is None:
        return
    summary: dict[str, Any] = {}
    for name, value in (result or {}).items():
        if isinstance(value, (int, float, str)):
            summary[name] = value
        elif isinstance(value, list) and all(isinstance(item, (int, float)) for item in value):
            summary |= {f"{name}_{k}": item for k, item in enumerate(value)}
    wandb.run.summary.update(summary)
    wandb.finish(exit_code=1 if result is None else 0)
