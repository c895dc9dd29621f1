"""Callbacks every run has: randomness by epoch, and a line of text per epoch."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from ekd_lightning.data.order import hash_uniform_u64
from ekd_lightning.training.checkpoints import BEST_METRIC
from ekd_lightning.training.module import ImageClassificationModule

log = logging.getLogger(__name__)

_RANDOMNESS_STREAM = 7  # its own domain, apart from order, views and subsets


class EpochSeed(Callback):
    """Makes the global generators a function of (seed, epoch, rank).

    Checkpoints hold no generator state; with this, a resumed epoch draws what the uninterrupted one drew
    (dropout and the like; order and views do not depend on generators at all).
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Seeds torch on CPU and on the accelerator."""
        place = torch.tensor([trainer.global_rank]).numpy()
        value = int(hash_uniform_u64(_RANDOMNESS_STREAM, self.seed, trainer.current_epoch, place)[0])
        torch.manual_seed(value % 2**63)


class EpochReport(Callback):
    """Measures the time spent in training epochs and says one line per epoch in the log.

    The time is part of the checkpoint, so that a resumed run reports the sum.
    """

    def __init__(self, images_per_step: int) -> None:
        self._images_per_step = images_per_step
        self._epoch_images = 0
        self.train_seconds = 0.0
        self.images_seen = 0
        self._since = 0.0
        self._epoch_seconds = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Time and images so far."""
        return {"train_seconds": self.train_seconds, "images_seen": self.images_seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on counting from a checkpoint."""
        self.train_seconds = state_dict["train_seconds"]
        self.images_seen = state_dict["images_seen"]

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock."""
        self._epoch_seconds = 0.0
        self._epoch_images = self._images_per_step * int(trainer.num_training_batches)
        self._since = time.perf_counter()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stops the clock for a validation, which runs inside the training epoch."""
        self._stop(pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Goes on after a validation."""
        self._since = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Adds the epoch and prints its line."""
        self._stop(pl_module)
        self.train_seconds += self._epoch_seconds
        self.images_seen += self._epoch_images
        means = pl_module.epoch_means() if isinstance(pl_module, ImageClassificationModule) else {}
        if trainer.is_global_zero and not trainer.sanity_checking:
            log.info(self._line(trainer, means))

    def _stop(self, module: pl.LightningModule) -> None:
        if module.device.type == "cuda":
            torch.cuda.synchronize(module.device)
        self._epoch_seconds += time.perf_counter() - self._since

    def _line(self, trainer: pl.Trainer, means: Mapping[str, Tensor]) -> str:
        parts = [f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"]
        parts += [f"{name} {float(means[name]):.4f}" for name in ("loss", "accuracy") if name in means]
        if BEST_METRIC in trainer.callback_metrics:
            parts.append(f"{BEST_METRIC} {float(trainer.callback_metrics[BEST_METRIC]):.4f}")
        parts.append(f"{self._epoch_images / max(self._epoch_seconds, 1e-9):.0f} images/s")
        return "  ".join(parts)
