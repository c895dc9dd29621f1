"""What the two LightningModules share: optimiser, loss bookkeeping and evaluation."""

from __future__ import annotations

import math
import warnings

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from ekd_lightning.data.batch import Batch
from ekd_lightning.errors import UserError
from ekd_lightning.evaluation.scores import ClassificationScores
from ekd_lightning.settings import RecipeSettings
from ekd_lightning.training.schedule import make_optimizer
from ekd_lightning.training.step_log import StepLog


class NonFiniteLossError(UserError):
    """A loss became infinite or not a number; the message says at which step and in which term."""


def has_fragile_convolution(module: nn.Module) -> bool:
    """Whether a network has strided 1×1 convolutions from fewer than 8 channels.

    In channels-last format torch 2.14 hangs, or corrupts memory, in their backward pass on a processor.
    """
    return any(
        m.kernel_size == (1, 1) and m.stride != (1, 1) and m.in_channels < 8
        for m in module.modules()
        if isinstance(m, nn.Conv2d)
    )


class ImageClassificationModule(pl.LightningModule):
    """Base of `Classifier` and `Distiller`.

    Subclasses give the loss terms of a step (`losses`), the prediction (`predict`) and the trained parameters.
    Every term is logged once per epoch as `train/<term>`, scores as `val/<score>` and `test/<score>`.

    Attributes:
        test_section: What stands before the slash in the names of test scores.
    """

    recipe_key = "recipe"
    """Where the recipe stands in the configuration, for messages."""

    def __init__(
        self,
        recipe: RecipeSettings,
        *,
        term_names: tuple[str, ...],
        num_classes: int,
        num_branches: int = 0,
        channels_last: bool = True,
    ) -> None:
        super().__init__()
        self.recipe = recipe
        self.val_scores = ClassificationScores(num_classes, num_branches)
        self.test_scores = ClassificationScores(num_classes, num_branches)
        self.test_section = "test"
        self._log_names = ("loss", *term_names, "accuracy")
        self._step_log = StepLog(self._log_names)
        self._epoch_means: dict[str, Tensor] = {}
        self._epoch_lr = recipe.lr
        self._memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def _spare_fragile(self, network: nn.Module) -> None:
        """Gives channels-last up for a network whose backward pass torch cannot compute in it."""
        if self._memory_format is torch.channels_last and has_fragile_convolution(network):
            warnings.warn(
                "channels_last=true has no effect: torch's processor kernels fail on convolutions this narrow",
                stacklevel=3,
            )
            self._memory_format = torch.contiguous_format

    # -- for subclasses ---------------------------------------------------------------------------------

    def losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Returns the total loss, the detached terms by name, and the logits [B, C] of a training batch."""
        raise NotImplementedError

    def predict(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns logits [B, C] and, for a branched student, branch logits [K, B, C]."""
        raise NotImplementedError

    def trained_modules(self) -> list[nn.Module]:
        """The modules whose parameters the optimiser gets, nothing else."""
        raise NotImplementedError

    # -- optimisation -----------------------------------------------------------------------------------

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """SGD with a schedule that advances every optimiser step."""
        parameters = [p for module in self.trained_modules() for p in module.parameters() if p.requires_grad]
        self.trainer.fit_loop.setup_data()
        batches = float(self.trainer.num_training_batches) / self.trainer.accumulate_grad_batches
        # Lightning refuses to clip the gradients of a fused optimiser under automatic mixed precision.
        fused = self.device.type in ("cpu", "cuda") and not self.trainer.gradient_clip_val
        steps = max(1, math.ceil(batches))
        optimizer, schedule = make_optimizer(parameters, self.recipe, steps, fused=fused)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One step: the total loss, with every term remembered for the epoch's log."""
        total, terms, logits = self.losses(self._in_format(batch))
        with torch.no_grad():
            accuracy = (logits.argmax(dim=-1) == batch.labels).float().mean()
        self._step_log.append([total, *(terms[name] for name in self._log_names[1:-1]), accuracy])
        if (
            total.device.type == "cpu"
            and self.trainer.world_size == 1
            and not self._step_log.last_is_finite()
        ):
            self._refuse_non_finite()  # before the optimiser spoils the weights
        return total

    def on_train_epoch_start(self) -> None:
        """Starts the epoch's bookkeeping."""
        self._step_log.clear()
        self._epoch_means.clear()
        self._epoch_lr = float(self.optimizers().param_groups[0]["lr"])  # type: ignore[union-attr]

    def epoch_means(self) -> dict[str, Tensor]:
        """Means of loss, terms and accuracy over all processes' steps of an epoch that has ended, scalars.

        The first call of an epoch has to come from every process.
        """
        if not self._epoch_means and (means := self._step_log.means()):
            summed = self.trainer.strategy.reduce(torch.stack([*means.values()]), reduce_op="mean")
            self._epoch_means = dict(zip(means, summed.unbind(), strict=True))
        return self._epoch_means

    def on_train_epoch_end(self) -> None:
        """Logs the epoch's means; on accelerators and in several processes a non-finite loss is found here."""
        self._refuse_non_finite()
        for name, value in self.epoch_means().items():
            self.log(f"train/{name}", value, sync_dist=True)
        self.log("lr", self._epoch_lr, sync_dist=True)

    def _refuse_non_finite(self) -> None:
        found = self._step_log.first_non_finite()
        # All processes must agree, or those that go on would wait for the others for ever.
        if not self.trainer.strategy.reduce_boolean_decision(found is not None, all=False):
            return
        step, name, value = found or (-1, "the loss of another process", float("nan"))
        raise NonFiniteLossError(
            f"{name} is {value} in epoch {self.current_epoch}, step {step} of the epoch; "
            f"lower {self.recipe_key}.lr or the weight of the term, or clip gradients (trainer.gradient_clip_val)"
        )

    def _in_format(self, batch: Batch) -> Batch:
        return batch._replace(images=batch.images.contiguous(memory_format=self._memory_format))

    # -- evaluation -------------------------------------------------------------------------------------

    def on_validation_start(self) -> None:
        """Looks for a non-finite loss before anything is saved that a validation inside the epoch may save."""
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

    def on_test_epoch_end(self) -> None:
        """Logs the test scores."""
        self._log_scores(self.test_section, self.test_scores)

    def _score(self, scores: ClassificationScores, batch: Batch) -> None:
        logits, branch_logits = self.predict(self._in_format(batch).images)
        scores.update(logits.float(), batch.labels, batch.valid, branch_logits)

    def _log_scores(self, prefix: str, scores: ClassificationScores) -> None:
        for name, value in scores.compute().items():
            if isinstance(value, list):
                for branch, item in enumerate(value):
                    self.log(f"{prefix}/{name}_{branch}", item, sync_dist=True)
            else:
                self.log(f"{prefix}/{name}", value, sync_dist=True)
        scores.reset()
