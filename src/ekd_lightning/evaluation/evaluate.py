"""Scores of one network on one image set, by a plain PyTorch loop; or of logits that are there already."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ekd_lightning.data import ImageSet
from ekd_lightning.evaluation.predict import batches
from ekd_lightning.evaluation.scores import ClassificationScores
from ekd_lightning.networks import StagedNetwork


@torch.no_grad()
def score_network(
    network: StagedNetwork, images: ImageSet, *, batch_size: int = 500, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """Evaluates a network on every image once, without augmentation, in float32.

    Args:
        network: Takes images [B, 3, H, W] in [0, 1]; put into eval mode and channels-last, and left there.
        images: The image set.
        batch_size: Images per forward pass.
        device: Where to compute.

    Returns:
        The scores of `ClassificationScores`: accuracy and ECE in [0, 1], NLL in nats, Brier in [0, 2].
    """
    network = network.eval().to(device).to(memory_format=torch.channels_last)
    scores = ClassificationScores(images.num_classes, sync_on_compute=False).to(device)  # one process alone
    for batch, labels in zip(
        batches(images, batch_size, device), images.labels.split(batch_size), strict=True
    ):
        scores.update(network(batch).float(), labels.to(device))
    return scores.compute()


def score_logits(logits: Tensor, labels: Tensor) -> dict[str, Any]:
    """What `score_network` returns, of logits [N, C] of a whole image set and its labels, int64 [N]."""
    scores = ClassificationScores(logits.shape[-1], sync_on_compute=False).to(logits.device)
    scores.update(logits, labels)
    return scores.compute()
