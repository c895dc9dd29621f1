"""How a classifier fares on corrupted images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ekd_lightning.data import ImageSet
from ekd_lightning.data.images import to_unit
from ekd_lightning.evaluation.corruption_sets import CorruptedSets
from ekd_lightning.evaluation.corruptions import MAIN, SEVERITIES
from ekd_lightning.evaluation.scores import ClassificationScores


@torch.no_grad()
def score_batches(
    network: nn.Module, batches: Iterator[tuple[Tensor, Tensor]], num_classes: int, device: torch.device
) -> dict[str, Any]:
    """Scores a network in eval mode on batches of uint8 [B, 3, H, W] and labels int64 [B].

    Returns:
        The scores of `ClassificationScores`.
    """
    scores = ClassificationScores(num_classes, sync_on_compute=False).to(device)
    for pixels, labels in batches:
        images = to_unit(pixels.to(device)).contiguous(memory_format=torch.channels_last)
        scores.update(network(images).float(), labels.to(device))
    return scores.compute()


def spread_index(count: int, most: int | None) -> Tensor:
    """Positions of at most `most` of `count` images, evenly spread; int64, sorted; None for all."""
    if most is None or most >= count:
        return torch.arange(count)
    return (torch.arange(most) * count).div(most, rounding_mode="floor")


def score_corruptions(
    network: nn.Module,
    sets: CorruptedSets,
    test: ImageSet,
    index: Tensor,
    *,
    batch_size: int = 500,
    device: torch.device | None = None,
) -> dict[str, dict[str, list[float]]]:
    """Scores a network under every corruption at every severity.

    Args:
        network: In eval mode, on `device`; takes images [B, 3, H, W] in [0, 1].
        sets: The corrupted images.
        test: The clean ones, for the labels.
        index: int64 [n], which test images to take.
        batch_size: Images a forward pass.
        device: Where to compute; the CPU if None.

    Returns:
        Corruption -> {`accuracy`, `nll`, `ece`: five numbers, from severity 1 to 5}.
    """
    device = device or torch.device("cpu")
    found: dict[str, dict[str, list[float]]] = {}
    for name in sets.names:
        found[name] = {"accuracy": [], "nll": [], "ece": []}
        for severity in SEVERITIES:
            batches = (
                (sets.images(name, severity, part), test.labels[part.to(test.labels.device)])
                for part in index.split(batch_size)
            )
            scores = score_batches(network, batches, test.num_classes, device)
            for key, values in found[name].items():
                values.append(scores[key])
    return found


def mean_by_severity(found: dict[str, dict[str, list[float]]], score: str) -> list[float]:
    """Means of a score over the main corruptions that there are, for each severity."""
    rows = [scores[score] for name, scores in found.items() if name in MAIN]
    return [sum(values) / len(values) for values in zip(*rows, strict=True)]


def mean_corruption_error(found: dict[str, dict[str, list[float]]]) -> float:
    """Mean error in [0, 1] over the main corruptions and severities.

    Not divided by the errors of another network, as it is usual for CIFAR (and not for ImageNet-C, where AlexNet's
    are taken).
    """
    means = mean_by_severity(found, "accuracy")
    return 1 - sum(means) / len(means)
