"""Training module, the base of `Distiller`: steps, eager or recorded, optimiser, log, validation and test."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import SingleDeviceStrategy
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from ekd_lightning.data.batches import as_batch, as_images
from ekd_lightning.data.datamodule import ImageDataModule
from ekd_lightning.data.loader import Batch, IndexBatch, TrainLoader
from ekd_lightning.errors import UserError
from ekd_lightning.evaluation.scores import ClassificationScores
from ekd_lightning.methods import Method
from ekd_lightning.networks import BranchedStudent
from ekd_lightning.networks.staged import in_memory_format
from ekd_lightning.settings import RecipeSettings
from ekd_lightning.training.recorded_step import EpochRows, RecordedStep, StepValues, why_not_recorded
from ekd_lightning.training.steps import StepLog, WeightAverage, make_optimizer, memory_format

log = logging.getLogger(__name__)


class NonFiniteLossError(UserError):
    """A loss became infinite or NaN; the message names epoch, step and term."""


class TrainingModule(pl.LightningModule):
    """The part of `Distiller` without teachers: steps, eager or recorded, the log, validation and test.

    Every term is logged once per epoch as `train/<term>`, scores as `val/<score>` and `test/<score>`.

    Args:
        student: The branched student.
        method: Weighted loss terms; its adapters are trained with the student.
        recipe: Optimiser and schedule.
        channels_last: Memory format of images and student.
        capture: Whether steps are recorded as CUDA graphs, see `Settings.capture`.
        recipe_key: Dotted key of the recipe in the configuration, for messages.

    Attributes:
        test_section: Section of the logged test scores, the part of their names before the slash.
        ema: The moving average of the student's weights; None if `recipe.ema` is 0.
    """

    def __init__(
        self,
        student: BranchedStudent,
        method: Method,
        recipe: RecipeSettings,
        *,
        channels_last: bool,
        capture: str,
        recipe_key: str,
    ) -> None:
        super().__init__()
        self._memory_format = memory_format(student, channels_last)
        if channels_last and self._memory_format is not torch.channels_last:
            log.debug("channels_last=true has no effect: torch's CPU kernels fail on narrow strided 1×1 convolutions")
        self.student = in_memory_format(student, self._memory_format)
        self.method = method
        self.ema = WeightAverage(self.student, recipe.ema) if recipe.ema else None
        self._averaged_steps = 0
        self.recipe, self.recipe_key = recipe, recipe_key
        self._capture, self._may_record = capture, False
        self._recorded: RecordedStep | None = None
        self._kinds: list[tuple[str, ...]] = []
        self.val_scores = ClassificationScores(student.num_classes, student.num_branches)
        self.test_scores = ClassificationScores(student.num_classes, student.num_branches)
        self.test_section = "test"
        self._log_names = ("loss", *method.terms, "accuracy")
        self._step_log = StepLog(self._log_names)
        self._epoch_means: dict[str, Tensor] = {}
        self._epoch_lr = recipe.lr
        self._validated: tuple[int, int] | None = None

    def losses(self, batch: Batch, values: StepValues | None = None) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Returns the total loss, the detached terms by name, and the logits [B, C] of a training batch.

        Args:
            batch: The batch.
            values: For a recorded step, the values that change from step to step, as tensors; None to take them from
                the trainer's counters.
        """
        raise NotImplementedError

    def prepare_epoch(self, loader: TrainLoader, data: ImageDataModule) -> None:
        """Called before an epoch's first step, if the data come from this package's data module."""
        raise NotImplementedError

    def bytes_on_device(self) -> dict[str, int]:
        """Returns the bytes of other training data in the device's memory, by name."""
        raise NotImplementedError

    def why_not_recorded(self) -> str | None:
        """Returns why the losses cannot be part of a CUDA graph; None if they can."""
        raise NotImplementedError

    def teacher_to_blame(self, step: int, term: str) -> str | None:
        """Returns which teacher's outputs make a term non-finite in a step of the epoch, from 0; None if none do."""
        raise NotImplementedError

    def trained_parameters(self) -> list[nn.Parameter]:
        """Returns the parameters for the optimiser: the student's and those of the method's adapters."""
        return [*self.student.parameters(), *self.method.parameters()]

    def progress(self, ahead: int = 0) -> float:
        """Returns the share of the training's steps, in [0, 1], that will be done `ahead` batches from now.

        With `ahead`, now is the start of an epoch.
        """
        steps = self._steps_per_epoch()
        epochs, batches = divmod(ahead, max(1, int(self.trainer.num_training_batches)))
        done = self.global_step + epochs * steps + batches // self.trainer.accumulate_grad_batches
        return min(1.0, done / (self.recipe.epochs * steps))

    def _steps_per_epoch(self) -> int:
        """Returns the optimiser's steps in an epoch, whose last one may accumulate fewer batches."""
        if self.trainer.num_training_batches == math.inf:
            raise UserError("a training loader of unknown length needs pl.Trainer(limit_train_batches=N)")
        return max(1, math.ceil(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches))

    # -- optimisation -----------------------------------------------------------------------------------

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Builds the recipe's optimiser, with a schedule that advances every optimiser step."""
        parameters = [parameter for parameter in self.trained_parameters() if parameter.requires_grad]
        self.trainer.fit_loop.setup_data()
        # Lightning refuses to clip the gradients of a fused optimiser under automatic mixed precision.
        fused = self.device.type in ("cpu", "cuda") and not self.trainer.gradient_clip_val
        steps = self._steps_per_epoch()
        optimizer, schedule = make_optimizer(parameters, self.recipe, steps, fused=fused, key=self.recipe_key)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        """Drops the recorded step of an earlier fit."""
        self._recorded, self._averaged_steps = None, self.global_step
        self._may_record = self._capture == "always" or (self._capture == "auto" and self.device.type == "cuda")

    @property
    def gathers_images(self) -> bool:
        """Whether training steps gather their images themselves, so that they need only the rows of a batch."""
        return self._recorded is not None

    def _decide_recording(self, data: ImageDataModule) -> None:
        """Decides whether steps are recorded: on one CUDA device, unless something prevents it.

        Decides in every epoch, as callbacks may, for example, begin to accumulate gradients.
        """
        if not self._may_record:
            return
        if reason := why_not_recorded(self.trainer) or self.why_not_recorded() or data.why_not_recorded(self.device):
            log.info("the training step is not recorded as one CUDA graph: %s", reason)
            self._may_record, self._recorded = False, None
        elif self._recorded is None:
            self._recorded = RecordedStep(
                device=self.device,
                optimizer=self.trainer.optimizers[0],
                gather=partial(data.gather_training, device=self.device),
                loss=self._loss_and_values,
                weight_names=tuple(self.method.terms),
            )

    def on_fit_end(self) -> None:
        """Frees the graphs' memory."""
        self._recorded = None

    def _loss_and_values(self, batch: Batch, values: StepValues | None = None) -> tuple[Tensor, list[Tensor]]:
        """Returns the total loss of a step, and its logged values: total, terms, accuracy."""
        total, terms, logits = self.losses(self._in_format(batch), values)
        with torch.no_grad():
            known = batch.labelled.labels
            accuracy = (logits[: len(known)].argmax(dim=-1) == known).float().mean()
        return total, [total, *(terms[name] for name in self._log_names[1:-1]), accuracy]

    def training_step(self, batch: Batch | IndexBatch, batch_idx: int) -> Tensor:
        """Runs one step: returns the total loss and keeps every term for the epoch's log.

        A recorded step contains backward pass and optimiser, so that Lightning's are skipped. Too little memory on the
        device is a `UserError`.
        """
        try:
            if self._recorded is not None:
                total = self._recorded.run(batch_idx, self.global_step, self._kinds[batch_idx])
                self._step_log.advance(batch_idx)
                return total
            return self._eager_step(batch)
        except torch.OutOfMemoryError as error:
            raise UserError(self._out_of_memory(error)) from error

    def _eager_step(self, batch: Any) -> Tensor:
        if not isinstance(batch, Batch):
            batch = as_batch(batch, self.student.num_classes)
        total, logged = self._loss_and_values(batch)
        self._step_log.append(logged)
        if total.device.type == "cpu" and self.trainer.world_size == 1 and not self._step_log.last_is_finite():
            self._refuse_non_finite()  # before the optimiser changes the weights
        return total

    def _out_of_memory(self, error: torch.OutOfMemoryError) -> str:
        """Returns the message for a full device, with what takes its memory, the largest first."""
        trained = sum(parameter.nbytes for parameter in self.trained_parameters())
        used = {
            "images": getattr(getattr(self.trainer, "datamodule", None), "bytes_on_device", 0),
            "weights, gradients and momentum": 3 * trained,
            **self.bytes_on_device(),
        }
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
            used["activations of a step"] = max(0, peak - sum(used.values()))
        largest = sorted(used.items(), key=lambda item: -item[1])
        listed = ", ".join(f"{name} {size / 2**30:.2f} GiB" for name, size in largest if size)
        return (
            f"the memory of {self.device} is full: lower recipe.batch_size={self.recipe.batch_size} (in use: {listed}; "
            f"{' '.join(str(error).split())[:120]})"
        )

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Runs the backward pass, unless the step is recorded."""
        if self._recorded is None:
            super().backward(loss, *args, **kwargs)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        """Clears gradients, unless the step is recorded."""
        if self._recorded is None:
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Runs the optimiser's step; a recorded step contains it."""
        if self._recorded is None:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        elif optimizer_closure is not None:
            optimizer_closure()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Averages the weights after each batch that ended with an optimiser step."""
        if self.ema is not None and self.global_step != self._averaged_steps:
            self._averaged_steps = self.global_step
            self.ema.update(self.student, self.global_step)

    def on_train_epoch_start(self) -> None:
        """Resets the epoch's log and prepares its steps; the recipe's last epoch always ends with a validation."""
        if self.trainer.check_val_every_n_epoch and self.current_epoch + 1 == self.recipe.epochs:
            self.trainer.check_val_every_n_epoch = 1  # or the last weights could not be the best
        self._epoch_lr = float(self.optimizers().param_groups[0]["lr"])  # type: ignore[union-attr]
        loader, data = self.trainer.train_dataloader, getattr(self.trainer, "datamodule", None)
        self._step_log.clear()
        self._epoch_means.clear()
        if not isinstance(loader, TrainLoader) or not isinstance(data, ImageDataModule):
            return
        self.prepare_epoch(loader, data)
        self._decide_recording(data)
        if self._recorded is not None:
            self._start_recorded_epoch(self._recorded, loader)

    def _start_recorded_epoch(self, recorded: RecordedStep, loader: TrainLoader) -> None:
        steps = int(self.trainer.num_training_batches)
        labels, index, view = loader.epoch(steps)
        if self.method.changes:
            now = [self.method.weights_at(self.progress(step)) for step in range(steps)]
        else:
            now = [self.method.weights_at(self.progress())] * steps
        self._kinds = [tuple(weights) for weights in now]
        table = torch.tensor([[weights.get(name, 0.0) for name in self.method.terms] for weights in now])
        matrices = [self.method.assignment_at(self.global_step + step, self.progress(step)) for step in range(steps)]
        used = [matrix for matrix in matrices if matrix is not None]
        assignment = torch.stack(used) if used else None
        rows = EpochRows(labels, index, view, table, assignment, loader.num_labelled)
        recorded.start_epoch(rows, len(self._log_names))
        self._step_log.watch(recorded.log_table)

    def epoch_means(self) -> dict[str, Tensor]:
        """Returns means of loss, terms and accuracy over all processes' steps of a finished epoch, scalars.

        They are on the host if this process trains alone, else on the device. All processes must make the first call of
        an epoch.
        """
        if not self._epoch_means and (means := self._step_log.means()):
            reduced = self.trainer.strategy.reduce(torch.stack([*means.values()]), reduce_op="mean")
            values = reduced.cpu() if self._is_alone else reduced  # one wait for all of them
            self._epoch_means = dict(zip(means, values.unbind(), strict=True))
        return self._epoch_means

    @property
    def _is_alone(self) -> bool:
        """Whether there is no process group, not even one of a single process, which reduces tensors of its device."""
        return isinstance(self.trainer.strategy, SingleDeviceStrategy)

    def on_train_epoch_end(self) -> None:
        """Logs the epoch's means; accelerators and distributed runs check only here that the losses are finite."""
        self._refuse_non_finite()
        for name, value in self.epoch_means().items():
            self._log(f"train/{name}", value)
        self._log("lr", self._epoch_lr)

    def _log(self, name: str, value: Tensor | float) -> None:
        """Logs a value of an epoch."""
        if self._is_alone:  # on the host, Lightning's bookkeeping launches no kernels and waits for none
            value = torch.as_tensor(value, dtype=torch.float32, device="cpu")
        self.log(name, value, sync_dist=True)

    def _refuse_non_finite(self) -> None:
        found = self._step_log.first_non_finite()
        # All processes must agree, or the others would wait for this one for ever.
        if not self.trainer.strategy.reduce_boolean_decision(found is not None, all=False):
            return
        epoch = f"epoch {self.current_epoch + 1}"
        if found is None:
            raise NonFiniteLossError(f"a loss of another process is infinite or NaN in {epoch}; its message says which")
        step, name, value = found
        advice = f"lower {self.recipe_key}.lr or the weight of the term, or clip gradients (trainer.gradient_clip_val)"
        raise NonFiniteLossError(
            f"{name} is {value} in {epoch}, step {step + 1} of the epoch; {self.teacher_to_blame(step, name) or advice}"
        )

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns the logits [B, C] of a batch, or of images [B, 3, H, W] alone."""
        if isinstance(batch, Batch):
            return self.student(batch.images)
        return self.student(as_images(batch if isinstance(batch, Tensor) else batch[0]))

    def _in_format(self, batch: Batch) -> Batch:
        return batch._replace(images=batch.images.contiguous(memory_format=self._memory_format))

    # -- evaluation -------------------------------------------------------------------------------------

    def on_validation_start(self) -> None:
        """Refuses a non-finite loss before a validation inside the epoch can save a checkpoint."""
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            self._refuse_non_finite()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds a batch to the validation scores."""
        self._score(self.val_scores, batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds a batch to the test scores."""
        self._score(self.test_scores, batch)

    def on_validation_epoch_end(self) -> None:
        """Logs the validation scores."""
        self._log_scores("val", self.val_scores)
        self._validated = None if self.trainer.sanity_checking else self._versions()

    @property
    def is_validated(self) -> bool:
        """Whether the last validation, but for a sanity check, was of the present weights."""
        return self._validated == self._versions()

    def _versions(self) -> tuple[int, int]:
        """Returns numbers of which one changes with every batch and whatever else changes the student's weights."""
        return self.trainer.fit_loop.total_batch_idx, sum(p._version for p in self.student.parameters())

    def on_test_epoch_end(self) -> None:
        """Logs the test scores."""
        self._log_scores(self.test_section, self.test_scores)

    def _score(self, scores: ClassificationScores, batch: Any) -> None:
        if not isinstance(batch, Batch):
            batch = as_batch(batch, self.student.num_classes)
        output = self.student.outputs(self._in_format(batch).images)
        scores.update(output.logits.float(), batch.labels, batch.valid, output.branch_logits)

    def _log_scores(self, prefix: str, scores: ClassificationScores) -> None:
        for name, value in scores.compute().items():
            values = {f"{name}_{k}": one for k, one in enumerate(value)} if isinstance(value, list) else {name: value}
            for key, one in values.items():
                self._log(f"{prefix}/{key}", one)
        scores.reset()
