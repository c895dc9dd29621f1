"""This package's side of the comparison: through Lightning as `ekd-train` does it, and as a bare loop."""

from __future__ import annotations

import contextlib
import logging
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytorch_lightning as pl
import torch

from ekd_lightning.bench.timing import seconds_of
from ekd_lightning.data.loader import TrainLoader, gather_batch
from ekd_lightning.networks import TeacherEnsemble
from ekd_lightning.pipeline.prepare import Prepared, prepare
from ekd_lightning.pipeline.run import make_distiller
from ekd_lightning.pipeline.sources import source_factory
from ekd_lightning.settings import Settings
from ekd_lightning.teachers.compiling import compiled_or_not
from ekd_lightning.tracking.loggers import MetricsCsv
from ekd_lightning.training.callbacks import EpochReport, EpochSeed
from ekd_lightning.training.checkpoints import checkpoint_callbacks
from ekd_lightning.training.distiller import Distiller
from ekd_lightning.training.steps import make_optimizer
from ekd_lightning.training.trainer import build_trainer


class Fitted(NamedTuple):
    """A finished training.

    Attributes:
        images_per_second: Over all epochs.
        module: The trained module.
        seconds: What the rate is over.
    """

    images_per_second: float
    module: Distiller
    seconds: float


@dataclass(frozen=True)
class Job:
    """One training, to be timed.

    Attributes:
        settings: What to train.
        teachers: Loaded once for all jobs.
        device: Where.
    """

    settings: Settings
    teachers: TeacherEnsemble | None
    device: torch.device

    def prepared(self) -> Prepared:
        """Fresh parts: student, method, data module."""
        return prepare(self.settings, "cpu" if self.device.type == "cpu" else "auto")

    def with_store(self, store: Path) -> Job:
        """The same with another store, e.g. an empty one."""
        teachers = replace(self.settings.teachers, store=str(store))
        return replace(self, settings=replace(self.settings, teachers=teachers))

    def fit(self, *, whole: bool = False) -> Fitted:
        """Trains through Lightning with the callbacks and loggers of `ekd-train`, without testing.

        Args:
            whole: Whether the ends of epochs count, where curves and checkpoints are written.

        Returns:
            What it took, teachers included.
        """
        prepared = self.prepared()
        module = make_distiller(self.settings, prepared, self.teachers)
        report, clock = EpochReport(self.settings.recipe.batch_size), WholeTraining()
        with tempfile.TemporaryDirectory() as folder, quiet():
            checkpoints = checkpoint_callbacks(Path(folder), with_best=False)
            callbacks: list[pl.Callback] = [EpochSeed(self.settings.seed), report, *checkpoints, clock]
            trainer = build_trainer(
                self.settings.trainer,
                Path(folder),
                [MetricsCsv(Path(folder) / "metrics.csv")],
                callbacks,
                in_sweep=True,
            )
            trainer.fit(module, datamodule=prepared.datamodule)
        torch.compiler.reset()  # as at the end of a run; the next one finds its kernels in the cache on disk
        assert trainer.current_epoch == self.settings.recipe.epochs
        seconds = clock.seconds if whole else report.train_seconds
        return Fitted(report.images_seen / seconds, module, seconds)


class WholeTraining(pl.Callback):
    """The seconds from the beginning of the first epoch to the end of the training."""

    seconds = 0.0
    _since = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock."""
        self._since = time.perf_counter()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stops it."""
        self.seconds = time.perf_counter() - self._since


class BareLoop:
    """The same kernels, images, teacher tables and optimiser in a `for` loop, without Lightning."""

    def __init__(self, job: Job) -> None:
        self.job, settings = job, job.settings
        prepared = self.prepared = job.prepared()
        memory_format = torch.channels_last if settings.channels_last else torch.contiguous_format
        self.student = prepared.student.to(job.device).to(memory_format=memory_format)
        self.method = prepared.method.to(job.device)
        assert job.teachers is not None
        self.source = source_factory(settings, prepared)(job.teachers.to(job.device))
        self.images = prepared.dataset.train.images.to(job.device)
        self.loader = TrainLoader(
            prepared.dataset.train,
            prepared.subset.train_index,
            prepared.views,
            settings.recipe.batch_size,
            settings.seed,
        )
        parameters = [*self.student.parameters(), *self.method.parameters()]
        self.optimizer, self.schedule = make_optimizer(
            parameters, settings.recipe, len(self.loader), fused=True
        )
        self._memory_format = memory_format
        self.forward = self.student.outputs
        if settings.student.compile == "always":
            stages = tuple(self.method.student_stages)
            self.forward = compiled_or_not(lambda images: self.student.outputs(images, stages))

    def images_per_second(self, epochs: int) -> float:
        """The rate over some epochs, the first of the seed."""
        seconds = seconds_of(lambda: self._epochs(epochs), self.job.device)
        return epochs * len(self.loader) * self.job.settings.recipe.batch_size / seconds

    def _epochs(self, count: int) -> None:
        for epoch in range(count):
            self._epoch(epoch)

    def _epoch(self, epoch: int) -> None:
        self.loader.sampler.set_epoch(epoch)
        index, view = self.loader.rows()
        gather = partial(self.prepared.datamodule.training_images, device=self.job.device)
        self.source.prepare_epoch(index, view, gather, {(): len(index)})
        half = self.job.settings.trainer.get("precision") == "bf16-mixed"
        self.student.train()
        for rows in self.loader:
            batch = gather_batch(self.images, rows, self.prepared.views)
            batch = batch._replace(images=batch.images.contiguous(memory_format=self._memory_format))
            with torch.autocast(self.job.device.type, torch.bfloat16, enabled=half):
                output = self.forward(batch.images)
                result = self.method(output, self.source.ask(batch), batch, epoch=epoch)
            self.optimizer.zero_grad()
            result.total.backward()
            self.optimizer.step()
            self.schedule.step()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what Lightning says about itself."""
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric", "ekd_lightning")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
