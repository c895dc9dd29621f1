"""The batch that every part of a training step sees."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """B images with all that identifies them.

    Attributes:
        images: float32 [B, 3, H, W] in [0, 1]; normalisation belongs to the networks.
        labels: int64 [B].
        index: int64 [B], position of each image in the whole training (or test) set, not in the subset.
        view: int64 [B], which augmentation of the image this is, 0 .. V-1; -1 for images as they are (evaluation)
            where no view of the family is sure to be that.
        valid: bool [B]; False marks the padding rows that keep evaluation batches equally long on all
            devices. They must not be counted. Always True in training.
        soft_labels: float32 [B, C], rows summing to 1, where every image was mixed with another one (mixup, CutMix);
            labels, index and view are then those of the first of the two. None where nothing was mixed.
    """

    images: Tensor
    labels: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index
    view: Tensor
    valid: Tensor
    soft_labels: Tensor | None = None

    @property
    def targets(self) -> Tensor:
        """What cross-entropy compares with: the soft labels [B, C] if there are any, else the labels [B]."""
        return self.labels if self.soft_labels is None else self.soft_labels

    @property
    def hard_labels(self) -> Tensor:
        """int64 [B], one class for each image: of a mixed one the class with the larger share."""
        return self.labels if self.soft_labels is None else self.soft_labels.argmax(-1)
