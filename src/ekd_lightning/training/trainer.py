"""The Lightning Trainer of a run, from `trainer.*` flags."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import BaseFinetuning, Callback, ProgressBar, StochasticWeightAveraging
from pytorch_lightning.loggers import Logger
from pytorch_lightning.plugins.io import CheckpointIO
from pytorch_lightning.strategies import SingleDeviceStrategy
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from ekd_lightning.data.datamodule import ImageDataModule
from ekd_lightning.errors import UserError, unknown_name
from ekd_lightning.teachers.hardware import resolve_precision
from ekd_lightning.training.checkpoints import CheckpointWriter

_OURS = {
    "logger": "use the logger group (logger=wandb, logger.tensorboard=true)",
    "callbacks": "use the callbacks group",
    "default_root_dir": "the run's directory is hydra.run.dir",
}


def trainer_flags() -> dict[str, Any]:
    """Names and defaults of all flags that `trainer.*` may set."""
    parameters = inspect.signature(pl.Trainer).parameters
    lightning = {name: parameter.default for name, parameter in parameters.items() if name not in _OURS}
    return lightning | {"threads": None}  # see `threads.set_threads`


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
    chosen = {name: value for name, value in flags.items() if name != "threads"}
    chosen["precision"] = resolve_precision(flags.get("precision"), str(flags.get("accelerator", "auto")))
    if chosen.get("enable_progress_bar") is None:
        own = any(isinstance(callback, ProgressBar) for callback in callbacks)
        chosen["enable_progress_bar"] = own or (sys.stderr.isatty() and not in_sweep)
    chosen["plugins"] = _plugins(chosen.get("plugins"))
    try:
        return pl.Trainer(**chosen, default_root_dir=directory, logger=loggers, callbacks=callbacks)
    except (MisconfigurationException, ValueError, TypeError) as error:
        raise UserError(f"trainer: {' '.join(str(error).split())}") from None


_GRADIENT_HOOKS = (
    "on_before_backward",
    "on_after_backward",
    "on_before_zero_grad",
    "on_before_optimizer_step",
)


def why_not_recorded(trainer: pl.Trainer) -> str | None:
    """Why the training step of a run cannot be one CUDA graph; None where flags, data and callbacks allow it."""
    data, optimizer = getattr(trainer, "datamodule", None), trainer.optimizers[0]
    watching = [
        type(callback).__name__
        for callback in trainer.callbacks  # type: ignore[attr-defined]
        if isinstance(callback, (StochasticWeightAveraging, BaseFinetuning))
        or any(getattr(type(callback), hook) is not getattr(Callback, hook) for hook in _GRADIENT_HOOKS)
    ]
    reasons = {
        "several processes train together": not isinstance(trainer.strategy, SingleDeviceStrategy),
        "trainer.accumulate_grad_batches": trainer.accumulate_grad_batches != 1,
        "trainer.gradient_clip_val": bool(trainer.gradient_clip_val),
        "trainer.detect_anomaly": trainer._detect_anomaly,
        f"trainer.precision={trainer.precision} scales the loss": str(trainer.precision).startswith("16"),
        f"{type(optimizer).__name__} is not a fused SGD": not (
            isinstance(optimizer, torch.optim.SGD) and optimizer.defaults.get("fused")
        ),
        f"the callback {', '.join(watching)} looks at gradients or changes the optimiser": bool(watching),
        "the data do not come from this package's data module": not isinstance(data, ImageDataModule),
        "images are mixed (recipe.mixup, recipe.cutmix)": bool(getattr(data, "mixing", None)),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _plugins(chosen: Any) -> list[Any]:
    """The user's plugins, and the one that writes checkpoints unless they brought their own."""
    plugins = list(chosen) if isinstance(chosen, (list, tuple)) else [] if chosen is None else [chosen]
    own = any(isinstance(plugin, CheckpointIO) for plugin in plugins)
    return plugins if own else [*plugins, CheckpointWriter()]
