"""Hands what an evaluation found to Weights & Biases and TensorBoard, under the same names."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger
from pytorch_lightning.utilities import rank_zero_only

from ekd_lightning.data import Dataset
from ekd_lightning.pipeline.evaluate_run import read_arrays
from ekd_lightning.settings import LoggerSettings
from ekd_lightning.tracking.loggers import (
    describe_metrics,
    finish_loggers,
    flat_columns,
    in_wandb_sweep,
    selected_loggers,
)
from ekd_lightning.tracking.panels import Example, Lines, Table, curves, misclassified, scalars, tables

log = logging.getLogger(__name__)

EVALUATION = "evaluation"


@dataclass(frozen=True)
class Panels:
    """Everything that is shown of an evaluation.

    Attributes:
        scalars: Numbers by `<section>/<field>`.
        tables: Tables by `<section>/<name>`.
        curves: Lines by `<section>/<name>`.
        confusion: int [C, C], rows are true classes; None if it is not known.
        examples: Images that the student gets wrong.
        class_names: C names.
        columns: What was run, flat.
    """

    scalars: dict[str, float]
    tables: dict[str, Table]
    curves: dict[str, Lines]
    confusion: NDArray[Any] | None
    examples: list[Example]
    class_names: tuple[str, ...]
    columns: dict[str, Any]


def make_panels(
    result: Mapping[str, Any],
    arrays: Mapping[str, NDArray[Any]],
    images: NDArray[np.uint8],
    names: tuple[str, ...],
) -> Panels:
    """Gathers all panels.

    Args:
        result: Content of result.json.
        arrays: Content of arrays.npz; may be empty.
        images: Test images, uint8 [N, 3, H, W].
        names: C names of classes.
    """
    return Panels(
        scalars(result),
        tables(result),
        curves(result, arrays),
        arrays.get("confusion"),
        misclassified(arrays, images, names),
        names,
        flat_columns(result_facts(result), {}),
    )


_RUN_FIELDS = (
    "method",
    "data",
    "student",
    "num_teachers",
    "num_branches",
    "split_after",
    "ensemble",
    "temperature",
    "assignment",
    "fraction",
    "seed",
    "epochs",
    "batch_size",
    "num_parameters",
    "macs",
)


@rank_zero_only
def log_evaluation(
    loggers: list[Logger], result: Mapping[str, Any], directory: Path, dataset: Dataset
) -> None:
    """Logs numbers, tables, plots and wrong examples of an evaluation; its record is complete without.

    Args:
        loggers: Those of the run; metrics.csv is left alone, as result.json has it all.
        result: What is to stand in result.json.
        directory: The run's directory, with arrays.npz if there are any.
        dataset: For its test images and class names.
    """
    shown = [logger for logger in loggers if isinstance(logger, (WandbLogger, TensorBoardLogger))]
    if not shown:
        return
    try:
        images = dataset.test.images.cpu().numpy()
        panels = make_panels(result, read_arrays(directory), images, tuple(dataset.class_names))
        for logger in shown:
            _log(logger, panels, epoch=int(result["epochs_done"]), step=int(result["steps"]))
    except Exception:
        log.exception("the dashboard has no evaluation of this run")


def _log(logger: Logger, panels: Panels, *, epoch: int, step: int) -> None:
    if isinstance(logger, WandbLogger):
        from ekd_lightning.tracking.wandb_panels import log_panels  # noqa: PLC0415 (wandb is slow to import)

        log_panels(logger.experiment, panels, epoch=epoch, step=step)
    elif isinstance(logger, TensorBoardLogger):
        from ekd_lightning.tracking.tensorboard_panels import write_panels  # noqa: PLC0415

        write_panels(logger, panels, step=step)


def log_evaluation_run(
    settings: LoggerSettings,
    result: dict[str, Any],
    directory: Path,
    dataset: Dataset,
    *,
    config: dict[str, Any],
    sweep: str | None,
) -> None:
    """Logs a later evaluation of a finished run, as a run of its own of the kind `evaluation`, in the same group.

    Args:
        settings: Where the run's curves went; nothing is done if that was to metrics.csv alone.
        result: Content of result.json.
        directory: The run's directory; files go to `evaluation/` below it.
        dataset: For its test images and class names.
        config: The run's resolved configuration.
        sweep: Name of the sweep that the run belongs to.
    """
    if in_wandb_sweep():
        return
    name = f"{result['method']}-T{result['num_teachers']}-B{result['num_branches']}-s{result['seed']}"
    loggers = selected_loggers(
        settings, directory / EVALUATION, name=name, sweep=sweep, config=config, job_type=EVALUATION
    )
    try:
        describe_metrics(loggers, flat_columns(result_facts(result), config))
        log_evaluation(loggers, result, directory, dataset)
    except Exception:  # no server, no login
        log.exception("%s: no dashboard has this evaluation; its record does", directory)
    finish_loggers(loggers, result=result)


def result_facts(result: Mapping[str, Any]) -> dict[str, Any]:
    """What was run, of a finished run's record."""
    return {name: result[name] for name in _RUN_FIELDS if name in result}
