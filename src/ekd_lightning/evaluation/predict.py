"""Predictions of a network for a whole image set, and the agreement of two forms of a network.

One pass in float32, without augmentation. Shape letters: N images, C classes, D features, K branches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ekd_lightning.data import ImageSet
from ekd_lightning.data.views import to_unit
from ekd_lightning.networks import BranchedStudent, StagedNetwork
from ekd_lightning.networks.cutting import keeping_modes
from ekd_lightning.progress import part


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
    """Computes a network's outputs for all images, in eval mode.

    Args:
        network: The network, on `device`; its mode is restored afterwards.
        images: N >= 1 images.
        batch_size: Images per forward pass; affects results only by rounding.
        device: The device to compute on.
    """
    with keeping_modes(network), torch.no_grad():
        network.eval()
        found = [network.outputs(batch)[:2] for batch in batches(images, batch_size, device)]
    logits, pooled = zip(*found, strict=True)
    return Predictions(*(torch.cat([part.float().cpu() for part in parts]) for parts in (logits, pooled)))


def predict_student(
    student: BranchedStudent, images: ImageSet, *, batch_size: int, device: torch.device | str = "cpu"
) -> StudentPredictions:
    """Computes the outputs of a student and its branches for all images; see `predict`."""
    # A gate reads the output of the last shared stage.
    stages = () if student.gate is None else (student.split_after,)
    rows: list[list[Tensor]] = []
    with keeping_modes(student), torch.no_grad():
        student.eval()
        for batch in batches(images, batch_size, device):
            output = student.outputs(batch, stages)
            row = [output.logits[None], output.branch_logits, output.pooled]
            if student.gate is not None:
                row.append(student.gate(output.stages[0][student.split_after])[None])
            rows.append([part.float().cpu() for part in row])
    logits, branch_logits, pooled, *gate = (torch.cat(parts, dim=1) for parts in zip(*rows, strict=True))
    return StudentPredictions(logits[0], branch_logits, pooled, gate[0][0] if gate else None)


def batches(images: ImageSet, batch_size: int, device: torch.device | str) -> Iterator[Tensor]:
    """Yields all images in order, as float32 [B, 3, H, W] in [0, 1], channels-last, on `device`."""
    with part(f"{images.split} images", len(images)) as task:
        for pixels in images.images.split(batch_size):
            yield to_unit(pixels.to(device)).contiguous(memory_format=torch.channels_last)
            task.advance(len(pixels))


RELATIVE_TOLERANCE = 1e-4
"""Share of the largest logit by which float32 forms may differ by rounding (order of sums, folded batch norms)."""


class Agreement(NamedTuple):
    """Agreement of two forms of a network over all images.

    Attributes:
        images: N.
        max_difference: Largest |Δlogit|; NaN or infinite if a logit is.
        mean_difference: Mean |Δlogit|.
        accuracy: Accuracy of the checked form, in [0, 1].
        reference_accuracy: Accuracy of the reference, in [0, 1].
        changed: Number of images with different predictions.
        changed_clearly: Number of these whose two largest reference logits differ by more than twice the tolerance, so
            that the cause cannot be rounding.
        tolerance: Largest |Δlogit| that counts as rounding.
    """

    images: int
    max_difference: float
    mean_difference: float
    accuracy: float
    reference_accuracy: float
    changed: int
    changed_clearly: int
    tolerance: float

    @property
    def is_same(self) -> bool:
        """Whether the forms differ only by rounding."""
        return self.max_difference <= self.tolerance and self.changed_clearly == 0  # False for NaN


def default_tolerance(reference: Tensor) -> float:
    """Returns `RELATIVE_TOLERANCE` times the largest |logit| of [N, C], or times 1 if this is larger."""
    return RELATIVE_TOLERANCE * max(1.0, float(reference.abs().max()))


def compare_logits(logits: Tensor, reference: Tensor, labels: Tensor, tolerance: float) -> Agreement:
    """Compares the logits [N, C] of two forms.

    Args:
        logits: Logits of the checked form.
        reference: Logits of the reference.
        labels: int64 [N].
        tolerance: Largest |Δlogit| that counts as rounding.

    Raises:
        ValueError: If the shapes differ, or there are no images.
    """
    if logits.shape != reference.shape or not len(logits):
        raise ValueError(
            f"logits {list(logits.shape)} and {list(reference.shape)} cannot be compared; both must be [N >= 1, C]"
        )
    difference = (logits.double() - reference.double()).abs()
    predictions, expected = logits.argmax(-1), reference.argmax(-1)
    changed = predictions != expected
    first_two = reference.double().topk(min(2, reference.shape[1]), dim=-1).values
    clear = first_two[:, 0] - first_two[:, -1] > 2 * tolerance
    return Agreement(
        images=len(labels),
        max_difference=float(difference.max()),
        mean_difference=float(difference.mean()),
        accuracy=int((predictions == labels).sum()) / len(labels),
        reference_accuracy=int((expected == labels).sum()) / len(labels),
        changed=int(changed.sum()),
        changed_clearly=int((changed & clear).sum()),
        tolerance=tolerance,
    )


@torch.no_grad()
def predict_logits(model: Callable[[Tensor], Tensor], images: ImageSet, batch_size: int) -> Tensor:
    """Computes a model's logits for all images: float32 [N, C] on the CPU.

    Args:
        model: Maps float32 images [B, 3, H, W] in [0, 1] to logits [B, C].
        images: N >= 1 images.
        batch_size: Images per call.
    """
    # Contiguous, like the inputs of most callers of a deployed model.
    contiguous = (batch.contiguous() for batch in batches(images, batch_size, "cpu"))
    return torch.cat([model(batch).float().cpu() for batch in contiguous])
