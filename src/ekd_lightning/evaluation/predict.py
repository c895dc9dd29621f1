"""What a network says of a whole image set: one pass in float32, without augmentation.

Shape letters: N images, C classes, D features, K branches.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ekd_lightning.data import ImageSet
from ekd_lightning.data.images import to_unit
from ekd_lightning.networks import BranchedStudent, StagedNetwork


class Predictions(NamedTuple):
    """Outputs of a plain network, float32 on the CPU.

    Attributes:
        logits: [N, C].
        pooled: [N, D], the head's input.
    """

    logits: Tensor
    pooled: Tensor


class StudentPredictions(NamedTuple):
    """Outputs of a branched student, float32 on the CPU.

    Attributes:
        logits: [N, C], the ensemble output.
        branch_logits: [K, N, C].
        pooled: [K, N, D].
        gate_weights: [N, K], rows summing to 1; None without a gate.
    """

    logits: Tensor
    branch_logits: Tensor
    pooled: Tensor
    gate_weights: Tensor | None


def predict(
    network: StagedNetwork, images: ImageSet, *, batch_size: int, device: torch.device | str = "cpu"
) -> Predictions:
    """Asks a network about every image once.

    Args:
        network: On `device`; its mode is restored afterwards.
        images: N >= 1 images.
        batch_size: Images per forward pass; changes the cost, and nothing else but rounding.
        device: Where to compute.
    """
    with _asked(network):
        found = [network.outputs(batch)[:2] for batch in batches(images, batch_size, device)]
    logits, pooled = zip(*found, strict=True)
    return Predictions(*(torch.cat([part.float().cpu() for part in parts]) for parts in (logits, pooled)))


def predict_student(
    student: BranchedStudent, images: ImageSet, *, batch_size: int, device: torch.device | str = "cpu"
) -> StudentPredictions:
    """Asks a student, and each of its branches, about every image once; see `predict`."""
    # A gate reads the trunk's output, which is that of the last shared stage.
    stages = () if student.gate is None else (student.split_after,)
    rows: list[list[Tensor]] = []
    with _asked(student):
        for batch in batches(images, batch_size, device):
            output = student.outputs(batch, stages)
            row = [output.logits[None], output.branch_logits, output.pooled]
            if student.gate is not None:
                row.append(student.gate(output.stages[0][student.split_after])[None])
            rows.append([part.float().cpu() for part in row])
    logits, branch_logits, pooled, *gate = (torch.cat(parts, dim=1) for parts in zip(*rows, strict=True))
    return StudentPredictions(logits[0], branch_logits, pooled, gate[0][0] if gate else None)


def batches(images: ImageSet, batch_size: int, device: torch.device | str) -> Iterator[Tensor]:
    """All images in order as float32 [B, 3, H, W] in [0, 1], channels-last, on `device`."""
    for pixels in images.images.split(batch_size):
        yield to_unit(pixels.to(device)).contiguous(memory_format=torch.channels_last)


@contextmanager
def _asked(network: nn.Module) -> Iterator[None]:
    """Eval mode and no gradient; the mode comes back afterwards."""
    training = network.training
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        network.train(training)
