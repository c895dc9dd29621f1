"""Projection of a student's features to a teacher's, so that it can reuse the teacher's classifier: SimKD, CVPR 2022.

Shape letters: B batch, C classes, D features, K branches, M teachers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torchvision.ops.misc import Conv2dNormActivation

from ekd_lightning.errors import UserError
from ekd_lightning.networks.staged import GlobalPool, StagedNetwork, he_initialised, pool

STAGE = "projector"
"""Name of the stage that is added after a network's own."""
_FACTOR = 2  # the teacher's feature width over that of the bottleneck


class Projector(nn.Sequential):
    """1×1, 3×3 and 1×1 convolutions, each with batch norm and ReLU: Chen et al., CVPR 2022, and their code.

    They map the channels of the student's last stage to the width D >= 2 of the teacher's features; the bottleneck has
    D / 2 channels.
    """

    def __init__(self, channels: int, width: int) -> None:
        narrow = width // _FACTOR
        sizes = ((channels, narrow, 1), (narrow, narrow, 3), (narrow, width, 1))
        super().__init__(*(layer for size in sizes for layer in Conv2dNormActivation(*size)))


def project(network: StagedNetwork, width: int) -> StagedNetwork:
    """Adds a projector after a network's last stage, and replaces neck and head to fit a classifier of D features.

    The network's stages are reused with their weights. Then come the stage `projector`, global pooling, and a frozen
    linear classifier [D -> C], which `reuse_classifiers` fills with a teacher's weights.

    Raises:
        UserError: If the network has no stage with maps, or the width is too small.
    """
    if width < _FACTOR:
        raise UserError(f"network {network.spec.name!r}: projection={width} must be at least {_FACTOR}")
    shapes = network.stage_shapes(network.fixed_size or 32)
    if not shapes:
        raise UserError(f"network {network.spec.name!r} has no stages, so it has no maps to project")
    channels = next(reversed(shapes.values()))[0]
    own = StagedNetwork(network.spec, {STAGE: Projector(channels, width)}, width)
    stages = {**network.stages, STAGE: he_initialised(own).stages[STAGE]}
    projected = StagedNetwork(network.spec, stages, width, head=own.head, fixed_size=network.fixed_size)
    projected.head.requires_grad_(False)
    return projected


def classifier_width(teachers: Sequence[StagedNetwork], names: Sequence[str], num_classes: int) -> int:
    """Checks that one student can reuse the classifiers of all teachers; returns D, the width of their features.

    The teachers may have any weights and are set to eval mode; there is at least one.

    Raises:
        UserError: If the widths differ, or a teacher's logits are not a linear function, with a bias, of its last
            stage's maps averaged over space.
    """
    widths = {}
    for name, teacher in zip(names, teachers, strict=True):
        _check_classifier(teacher.eval(), name, num_classes)
        widths[name] = teacher.num_features
    if len(set(widths.values())) > 1:
        raise UserError(
            "student.reuse_classifier=true: all teachers need features of one width, but they have "
            + ", ".join(f"{width} ({name})" for name, width in widths.items())
            + "; choose teachers of equal width, or method.teacher=first"
        )
    return next(iter(widths.values()))


def _check_classifier(teacher: StagedNetwork, name: str, num_classes: int) -> None:
    head = teacher.head
    fits = isinstance(head, nn.Linear) and head.bias is not None and head.out_features == num_classes
    fits = fits and bool(teacher.stages)
    if fits and not isinstance(teacher.neck, GlobalPool):
        shape = next(reversed(teacher.stage_shapes(teacher.fixed_size or 32).values()))
        maps = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            pooled = teacher.neck(maps)
        fits = pooled.shape == maps.shape[:2] and torch.allclose(pooled, pool(maps), atol=1e-5)
    if not fits:
        raise UserError(
            f"student.reuse_classifier=true: teacher {name!r} has no linear classifier of {num_classes} classes, "
            "with a bias, on the spatial mean of its last stage; choose another teacher"
        )


def own_teachers(assignment_KM: Tensor) -> list[int]:
    """Returns the teacher of each branch, for an assignment [K, M] that gives each branch one teacher.

    If the assignment changes, it is the mean over the steps. A branch with several teachers is a `UserError`.
    """
    rows = assignment_KM.tolist()
    if min(max(row) for row in rows) < 1:
        raise UserError(
            "student.reuse_classifier=true: every branch needs one teacher; set method.assignment=one_to_one or "
            "method.teacher=best"
        )
    return [row.index(max(row)) for row in rows]


def reuse_classifiers(branches: Iterable[nn.Module], teachers: Sequence[StagedNetwork], assignment_KM: Tensor) -> None:
    """Gives every branch of a projected student the classifier of its own teacher; see `own_teachers`.

    Raises:
        UserError: If a branch has several teachers.
    """
    for branch, m in zip(branches, own_teachers(assignment_KM), strict=True):
        head = branch.get_submodule("head")
        head.load_state_dict(teachers[m].head.state_dict())
        head.requires_grad_(False)
