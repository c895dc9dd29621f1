"""The Lightning Trainer of a run, from `trainer.*` flags."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback, ProgressBar
from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from ekd_lightning.errors import UserError, unknown_name
from ekd_lightning.teachers.precision import resolve_precision

_OURS = {
    "logger": "use the logger group (logger=wandb, logger.tensorboard=true)",
    "callbacks": "use the callbacks group",
    "default_root_dir": "the run's directory is hydra.run.dir",
}


def trainer_flags() -> dict[str, Any]:
    """Names and defaults of all flags that `trainer.*` may set."""
    parameters = inspect.signature(pl.Trainer).parameters
    return {name: parameter.default for name, parameter in parameters.items() if name not in _OURS}


def check_trainer(flags: dict[str, Any]) -> None:
    """Refuses unknown flags, with the nearest match, and those that other groups decide.

    Raises:
        UserError: At the first such flag.
    """
    if str(flags.get("precision")) in (
        "16-true",
        "bf16-true",
        "transformer-engine",
        "transformer-engine-float16",
    ):
        raise UserError(
            f"trainer.precision={flags['precision']}: would cast the teachers too, which stay float32; use bf16-mixed"
        )
    for name in flags:
        if name in _OURS:
            raise UserError(f"trainer.{name}: {_OURS[name]}")
        if name not in trainer_flags():
            raise unknown_name(
                "Lightning trainer flag", f"trainer.{name}", (f"trainer.{n}" for n in trainer_flags())
            )
    if flags.get("limit_train_batches") == 0:
        raise UserError("trainer.limit_train_batches=0: leaves nothing to train on")


def build_trainer(
    flags: dict[str, Any],
    directory: Path,
    loggers: list[Logger],
    callbacks: list[Callback],
    *,
    in_sweep: bool,
) -> pl.Trainer:
    """Builds the Trainer.

    Args:
        flags: Checked `trainer.*` flags; `precision: auto` is resolved here, and a progress bar that is left
            open (null) is shown on a terminal unless the run is part of a sweep.
        directory: The run's directory.
        loggers: Loggers.
        callbacks: Callbacks.
        in_sweep: Whether the run is a job of a multirun.

    Raises:
        UserError: If Lightning refuses a flag's value.
    """
    chosen = dict(flags)
    chosen["precision"] = resolve_precision(flags.get("precision"), str(flags.get("accelerator", "auto")))
    if chosen.get("enable_progress_bar") is None:
        own = any(isinstance(callback, ProgressBar) for callback in callbacks)
        chosen["enable_progress_bar"] = own or (sys.stderr.isatty() and not in_sweep)
    try:
        return pl.Trainer(**chosen, default_root_dir=directory, logger=loggers, callbacks=callbacks)
    except (MisconfigurationException, ValueError, TypeError) as error:
        raise UserError(f"trainer: {' '.join(str(error).split())}") from None
