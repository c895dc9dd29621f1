"""Supervised training of one staged network, e.g. a teacher."""

from __future__ import annotations

import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from ekd_lightning.data.loader import Batch
from ekd_lightning.networks import StagedNetwork
from ekd_lightning.settings import RecipeSettings
from ekd_lightning.training.module import ImageClassificationModule
from ekd_lightning.training.recorded_step import StepValues


class Classifier(ImageClassificationModule):
    """A staged network trained by cross-entropy on the ground truth."""

    recipe_key = "teachers.recipe"

    def __init__(
        self,
        network: StagedNetwork,
        recipe: RecipeSettings,
        *,
        label_smoothing: float = 0.0,
        channels_last: bool = True,
    ) -> None:
        super().__init__(
            recipe, term_names=("ce",), num_classes=network.spec.num_classes, channels_last=channels_last
        )
        self._spare_fragile(network)
        self.network = network
        self.label_smoothing = label_smoothing

    def losses(
        self, batch: Batch, values: StepValues | None = None
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Cross-entropy of a batch; see the base class."""
        logits = self.network(batch.images).float()
        loss = F.cross_entropy(logits, batch.targets, label_smoothing=self.label_smoothing)
        return loss, {"ce": loss.detach()}, logits

    def predict(self, images: Tensor) -> tuple[Tensor, None]:
        """Logits [B, C] of images [B, 3, H, W]."""
        return self.network(images), None

    def trained_modules(self) -> list[nn.Module]:
        """The network."""
        return [self.network]
