"""Trainings of this package that the benchmark times: with Lightning as in `ekd-train`, and as a bare loop."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from torch import Tensor

from ekd_lightning.bench import seconds_of, wait_for
from ekd_lightning.data.loader import Batch, TrainLoader, gather_batch
from ekd_lightning.errors import quiet
from ekd_lightning.networks import TeacherEnsemble
from ekd_lightning.pipeline.prepare import Prepared, prepare
from ekd_lightning.pipeline.run import make_distiller
from ekd_lightning.progress import part
from ekd_lightning.settings import Settings
from ekd_lightning.teachers.hardware import compiled_or_not
from ekd_lightning.tracking.loggers import MetricsCsv
from ekd_lightning.training.checkpoints import checkpoint_callbacks
from ekd_lightning.training.distiller import Distiller
from ekd_lightning.training.recorded_step import EpochRows, RecordedStep, StepValues
from ekd_lightning.training.steps import make_optimizer, memory_format
from ekd_lightning.training.trainer import EpochReport, EpochSeed, build_trainer


class Fitted(NamedTuple):
    """A finished training: images per second over all epochs, the seconds of this rate, and times of phases."""

    images_per_second: float
    module: Distiller
    seconds: float
    clock: Clock


@dataclass(frozen=True)
class Job:
    """A training to be timed; its teachers are loaded once for all jobs."""

    settings: Settings
    teachers: TeacherEnsemble
    device: torch.device

    def prepared(self) -> Prepared:
        """Prepares fresh parts: student, method, data module."""
        return prepare(self.settings, "cpu" if self.device.type == "cpu" else "auto")

    def with_store(self, store: Path) -> Job:
        """Returns the job with another store, e.g. an empty one."""
        teachers = replace(self.settings.teachers, store=str(store))
        return replace(self, settings=replace(self.settings, teachers=teachers))

    def fit(self, *, whole: bool = False, validate: bool = True, also: Sequence[pl.Callback] = ()) -> Fitted:
        """Trains through Lightning with the callbacks and loggers of `ekd-train`, without testing.

        The rate is that of the steps, or of the `whole` training with the ends of epochs, where curves and checkpoints
        are written.
        """
        prepared = self.prepared()
        module = make_distiller(self.settings, prepared, self.teachers)
        report = EpochReport(self.settings.recipe.batch_size)
        clock = Clock()
        validates = validate and prepared.datamodule.num_val_images > 0
        flags = self.settings.trainer if validate else {**self.settings.trainer, "limit_val_batches": 0}
        loud = ("pytorch_lightning", "lightning_fabric", "ekd_lightning")
        with tempfile.TemporaryDirectory() as name, quiet(*loud), part("training") as report.task:
            folder = Path(name)
            checkpoints = checkpoint_callbacks(folder, with_best=validates)
            callbacks: list[pl.Callback] = [clock, EpochSeed(self.settings.seed), report, *checkpoints, *also]
            curves = MetricsCsv(folder / "metrics.csv")
            trainer = build_trainer(flags, folder, [curves], callbacks)
            trainer.fit(module, datamodule=prepared.datamodule)
        torch.compiler.reset()  # as at the end of a run; the next one finds its kernels in the cache on disk
        assert trainer.should_stop or trainer.current_epoch == trainer.max_epochs
        seconds = clock.seconds if whole else report.train_seconds
        return Fitted(report.images_seen / seconds, module, seconds, clock)


class Clock(pl.Callback):
    """Times of a training's phases; as the first callback it includes the time of all others.

    Args:
        file: File for the times of the first and the last step's end, for the process that started this one: JSON with
            `first_step` and `last_step`, in seconds since 1970; None writes no file.

    Attributes:
        seconds: From the beginning of the first epoch to the end of the training.
        first_step: Seconds from the creation of the callback to the end of the first step.
        between: Seconds between the last step of an epoch and the next epoch, without validation.
        epoch_rates: Images per second of each epoch; the first includes compiling and capturing.
    """

    def __init__(self, file: str | None = None) -> None:
        self._file = None if file is None else Path(file)
        self.seconds = self.first_step = 0.0
        self.between: list[float] = []
        self.epoch_rates: list[float] = []
        self._made = time.perf_counter()
        self._since = self._epoch = self._last_step = self._validation = self._validating = 0.0
        self._times: dict[str, float] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock of the training."""
        self._since = time.perf_counter()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ends the time between two epochs."""
        self._epoch = time.perf_counter()
        if trainer.current_epoch and self._last_step:
            self.between.append(self._epoch - self._last_step - self._validation)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Notes the end of the first step, and of an epoch's last one."""
        if self.first_step and not trainer.is_last_batch:
            return
        wait_for(pl_module.device)
        self._last_step, self._validation = time.perf_counter(), 0.0
        if not self.first_step:
            self.first_step, self._times["first_step"] = self._last_step - self._made, time.time()
        if trainer.is_last_batch:
            images = (batch_idx + 1) * trainer.datamodule.batch_size  # type: ignore[attr-defined]
            self.epoch_rates.append(images / (self._last_step - self._epoch))

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Notes when a validation begins."""
        self._validating = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Adds the validation's time."""
        self._validation += time.perf_counter() - self._validating

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stops the clock and writes the times."""
        self.seconds = time.perf_counter() - self._since
        wait_for(pl_module.device)
        if self._file:
            self._file.write_text(json.dumps({**self._times, "last_step": time.time()}))


class BareLoop:
    """The step of a run, with its images, teacher tables and optimiser, in a `for` loop without Lightning.

    On CUDA the step is recorded as one graph, elsewhere it runs unrecorded. Weights of terms and the assignment must be
    the same in all steps.
    """

    def __init__(self, job: Job) -> None:
        settings, prepared = job.settings, job.prepared()
        self._device, self._batch_size = job.device, settings.recipe.batch_size
        self._half = settings.trainer.get("precision") == "bf16-mixed"
        self._format = memory_format(prepared.student, settings.channels_last)
        self.student = prepared.student.to(job.device).to(memory_format=self._format)
        self.method = prepared.method.to(job.device)
        self.source = prepared.source.open(job.teachers.to(job.device))
        train, views = prepared.dataset.train, prepared.views
        self._gather_all = partial(prepared.datamodule.training_images, device=job.device)
        self.loader = TrainLoader(train, prepared.subset.train_index, views, self._batch_size, settings.seed)
        parameters = [*self.student.parameters(), *self.method.parameters()]
        optimizer, self._schedule = make_optimizer(parameters, settings.recipe, len(self.loader), fused=True)
        self._forward = self.student.outputs
        if settings.student.compile == "always":
            stages = tuple(self.method.student_stages)
            self._forward = compiled_or_not(lambda images: self.student.outputs(images, stages))
        self._step = RecordedStep(
            device=job.device,
            optimizer=optimizer,
            gather=partial(gather_batch, train.images.to(job.device), views=views),
            loss=self._loss,
            weight_names=tuple(self.method.terms),
        )
        self._done = 0

    @property
    def num_graphs(self) -> int:
        """Number of recorded graphs; 0 without CUDA, or before the warm-up is over."""
        return self._step.num_graphs

    def images_per_second(self, epochs: int) -> float:
        """The rate over the first `epochs` epochs."""
        return epochs * len(self.loader) * self._batch_size / seconds_of(partial(self._epochs, epochs), self._device)

    def _epochs(self, count: int) -> None:
        for epoch in range(count):
            self.start_epoch(epoch)
            self.run(len(self.loader))

    def start_epoch(self, epoch: int) -> None:
        """Prepares the rows of an epoch and their teacher outputs."""
        self.student.train()
        self.loader.set_epoch(epoch)
        labels, index, view = self.loader.epoch()
        self.source.prepare_epoch(index.flatten(), view.flatten(), self._gather_all, {(): index.numel()})
        weights = self.method.weights_at(0.0)
        row = torch.tensor([weights[name] for name in self.method.terms])
        self._step.start_epoch(EpochRows(labels, index, view, row.expand(len(index), -1).contiguous()), 1)

    def run(self, steps: int) -> None:
        """Runs the next `steps` steps of the epoch that was started last."""
        for _ in range(steps):
            self._step.run(self._done % len(self.loader), self._done, "all terms")
            self._schedule.step()
            self._done += 1

    def _loss(self, batch: Batch, values: StepValues) -> tuple[Tensor, list[Tensor]]:
        batch = batch._replace(images=batch.images.contiguous(memory_format=self._format))
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._half, cache_enabled=False):
            teachers = self.source.outputs(batch)
            result = self.method(
                self._forward(batch.images), teachers, batch, weights=values.weights, step_t=values.step
            )
        return result.total, [result.total]
