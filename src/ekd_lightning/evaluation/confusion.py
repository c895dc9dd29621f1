"""Which classes are taken for which. Shape letters: N images, C classes."""

from __future__ import annotations

import numpy as np
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix


def confusion_matrix(predicted: Tensor, labels: Tensor, num_classes: int) -> np.ndarray:
    """Counts images by label (rows) and predicted class (columns).

    Args:
        predicted: int64 [N].
        labels: int64 [N].
        num_classes: C >= 2.

    Returns:
        int64 [C, C], summing to N.
    """
    return multiclass_confusion_matrix(predicted, labels, num_classes=num_classes).cpu().numpy()


def class_accuracy(confusion: np.ndarray) -> list[float | None]:
    """Share of each class's images that are right, in [0, 1]; None for a class without images."""
    totals = confusion.sum(1)
    return [
        int(right) / int(total) if total else None
        for right, total in zip(confusion.diagonal(), totals, strict=True)
    ]
