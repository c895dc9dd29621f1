"""This package's side of the comparison: through Lightning as `ekd-train` does it, and as a bare loop."""

from __future__ import annotations

import contextlib
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch

from ekd_lightning.bench.timing import seconds_of
from ekd_lightning.data.loader import TrainLoader, gather_batch
from ekd_lightning.networks import TeacherEnsemble
from ekd_lightning.pipeline.prepare import Prepared, prepare
from ekd_lightning.pipeline.run import make_distiller
from ekd_lightning.settings import Settings
from ekd_lightning.teachers.hardware import compiled_or_not
from ekd_lightning.tracking.loggers import MetricsCsv
from ekd_lightning.training.checkpoints import checkpoint_callbacks
from ekd_lightning.training.distiller import Distiller
from ekd_lightning.training.module import memory_format
from ekd_lightning.training.steps import make_optimizer
from ekd_lightning.training.trainer import EpochReport, EpochSeed, build_trainer


class Fitted(NamedTuple):
    """A finished training.

    Attributes:
        images_per_second: Over all epochs.
        module: The trained module.
        seconds: What the rate is over.
        clock: When its parts began and ended.
        epoch_rates: Images per second of each epoch; the first pays for compiling and capturing.
    """

    images_per_second: float
    module: Distiller
    seconds: float
    clock: Clock
    epoch_rates: list[float]


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

    def fit(self, *, whole: bool = False, also: Sequence[pl.Callback] = ()) -> Fitted:
        """Trains through Lightning with the callbacks and loggers of `ekd-train`, without testing.

        Args:
            whole: Whether the ends of epochs count, where curves and checkpoints are written.
            also: Further callbacks; they may stop the training.

        Returns:
            What it took, teachers included.
        """
        prepared = self.prepared()
        module = make_distiller(self.settings, prepared, self.teachers)
        report, clock = EpochReport(self.settings.recipe.batch_size), Clock()
        rates = _EpochRates(report)
        validates = prepared.datamodule.num_val_images > 0 and self.settings.trainer.get("limit_val_batches") != 0
        with tempfile.TemporaryDirectory() as folder, quiet():
            checkpoints = checkpoint_callbacks(Path(folder), with_best=validates)
            callbacks: list[pl.Callback] = [clock, EpochSeed(self.settings.seed), report, rates, *checkpoints, *also]
            trainer = build_trainer(
                self.settings.trainer,
                Path(folder),
                [MetricsCsv(Path(folder) / "metrics.csv")],
                callbacks,
                in_sweep=True,
            )
            trainer.fit(module, datamodule=prepared.datamodule)
        torch.compiler.reset()  # as at the end of a run; the next one finds its kernels in the cache on disk
        assert trainer.should_stop or trainer.current_epoch == self.settings.recipe.epochs
        seconds = clock.seconds if whole else report.train_seconds
        return Fitted(report.images_seen / seconds, module, seconds, clock, rates.rates)


class Clock(pl.Callback):
    """When the parts of a training began and ended; must be the first callback.

    Attributes:
        seconds: From the beginning of the first epoch to the end of the training.
        first_step: Seconds from the callback's making to the end of the first step.
        between: Seconds between the last step of an epoch and the next epoch, without the validation's.
    """

    def __init__(self) -> None:
        self.seconds = self.first_step = 0.0
        self.between: list[float] = []
        self._made = time.perf_counter()
        self._since = self._last_step = self._validation = self._validating = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock of the training."""
        self._since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Notes the end of the first step, and of an epoch's last one."""
        if self.first_step and not trainer.is_last_batch:
            return
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        self._last_step, self._validation = time.perf_counter(), 0.0
        self.first_step = self.first_step or self._last_step - self._made

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Notes when a validation begins."""
        self._validating = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Adds the validation's time."""
        self._validation += time.perf_counter() - self._validating

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ends the time between two epochs."""
        if trainer.current_epoch and self._last_step:
            self.between.append(time.perf_counter() - self._last_step - self._validation)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stops the clock."""
        self.seconds = time.perf_counter() - self._since


class Moments(pl.Callback):
    """Writes when the first and the last training step of a run ended, for who started its process.

    Args:
        file: JSON with `first_step` and `last_step`, seconds since 1970.
    """

    def __init__(self, file: str) -> None:
        self._file = Path(file)
        self._found: dict[str, float] = {}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Notes the first step's end."""
        if not self._found:
            self._note("first_step", pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Notes the training's end, and writes."""
        self._note("last_step", pl_module)
        self._file.write_text(json.dumps(self._found))

    def _note(self, name: str, module: pl.LightningModule) -> None:
        if module.device.type == "cuda":
            torch.cuda.synchronize(module.device)
        self._found[name] = time.time()


class _EpochRates(pl.Callback):
    """Images per second of each epoch, as the report's clock has them; follows the report."""

    def __init__(self, report: EpochReport) -> None:
        self._report = report
        self._seconds, self._images = 0.0, 0
        self.rates: list[float] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Adds the epoch that ended."""
        seconds, images = self._report.train_seconds, self._report.images_seen
        self.rates.append((images - self._images) / max(seconds - self._seconds, 1e-9))
        self._seconds, self._images = seconds, images


class BareLoop:
    """The same kernels, images, teacher tables and optimiser in a `for` loop, without Lightning."""

    def __init__(self, job: Job) -> None:
        self.job, settings = job, job.settings
        prepared = self.prepared = job.prepared()
        self.memory_format = memory_format(prepared.student, settings.channels_last)
        self.student = prepared.student.to(job.device).to(memory_format=self.memory_format)
        self.method = prepared.method.to(job.device)
        assert job.teachers is not None
        self.source = prepared.source.open(job.teachers.to(job.device))
        self.images = prepared.dataset.train.images.to(job.device)
        self.loader = TrainLoader(
            prepared.dataset.train,
            prepared.subset.train_index,
            prepared.views,
            settings.recipe.batch_size,
            settings.seed,
        )
        parameters = [*self.student.parameters(), *self.method.parameters()]
        self.optimizer, self.schedule = make_optimizer(parameters, settings.recipe, len(self.loader), fused=True)
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
        self.loader.set_epoch(epoch)
        _, index, view = (values.flatten() for values in self.loader.epoch())
        gather = partial(self.prepared.datamodule.training_images, device=self.job.device)
        self.source.prepare_epoch(index, view, gather, {(): len(index)})
        half = self.job.settings.trainer.get("precision") == "bf16-mixed"
        self.student.train()
        for rows in self.loader:
            batch = gather_batch(self.images, rows, self.prepared.views)
            batch = batch._replace(images=batch.images.contiguous(memory_format=self.memory_format))
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
