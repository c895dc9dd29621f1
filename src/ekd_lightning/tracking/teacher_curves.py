"""Curves of the teachers and assistants that a run trains on its way, as runs of their own beside the student's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger

from ekd_lightning.settings import LoggerSettings
from ekd_lightning.tracking.loggers import describe_metrics, finish_loggers, in_wandb_sweep, selected_loggers

FOLDER = "teachers"


@dataclass(frozen=True)
class TeacherCurves:
    """Where curves of teachers go.

    Attributes:
        settings: What is selected; metrics.csv is the student's alone.
        directory: The run's directory; theirs are `teachers/<name>/` below it.
        sweep: Name of the sweep, for grouping; None for a single run.
    """

    settings: LoggerSettings
    directory: Path
    sweep: str | None = None

    @contextmanager
    def open(self, job_type: str, name: str, config: Mapping[str, Any]) -> Iterator[list[Logger]]:
        """Loggers of one training; ended with the block, as failed if it raises.

        Args:
            job_type: `teacher` or `assistant`.
            name: Of the network, e.g. `resnet8-s0`.
            config: What determines it, for columns.
        """
        settings = self.settings
        if in_wandb_sweep():  # its agent gives this process one run, and that is the student's
            settings = replace(settings, wandb=replace(settings.wandb, enabled=False))
        loggers = selected_loggers(
            settings,
            self.directory / FOLDER / name,
            name=name,
            sweep=self.sweep,
            config=dict(config),
            job_type=job_type,
        )
        ended: dict[str, Any] | None = None
        try:
            describe_metrics(loggers)
            yield loggers
            ended = {}
        finally:
            finish_loggers(loggers, result=ended)


@contextmanager
def open_curves(
    curves: TeacherCurves | None, job_type: str, name: str, config: Mapping[str, Any]
) -> Iterator[list[Logger]]:
    """As `TeacherCurves.open`; no loggers where nobody wants curves."""
    if curves is None:
        yield []
        return
    with curves.open(job_type, name, config) as loggers:
        yield loggers
