"""Terms that compare how the images of a batch relate to each other: RKD and similarity preservation.

In several processes each compares the images of its own part of the batch.
Shape letters: B batch, D features, M teachers, K branches.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ekd_lightning.methods.losses import at_least_float32
from ekd_lightning.methods.pair_terms import FeatureSite, PairTerm
from ekd_lightning.methods.terms import StepContext, TermContext, register_term

SHORTEST = 1e-4
"""A vector shorter than this share of the others' root mean square counts as having no direction."""


def directions(vectors: Tensor) -> Tensor:
    """Brings vectors to length 1, and those that are (nearly) 0 to 0, with gradient 0.

    The published codes divide by max(length, 1e-12) instead: at 0, where two images coincide or one has no active
    feature at all, that multiplies a gradient by 1e12.

    Args:
        vectors: [..., D].

    Returns:
        The same shape; scaling all vectors together changes nothing.
    """
    squared = vectors.square().sum(-1, keepdim=True)
    long = squared > SHORTEST**2 * squared.detach().mean()
    return torch.where(long, vectors / torch.where(long, squared, 1.0).sqrt(), 0.0)


def relative_distances(features: Tensor) -> Tensor:
    """Distances between all pairs of images over their mean (Park et al., CVPR 2019, equations 6 and 7).

    Args:
        features: [B, D] with B >= 2.

    Returns:
        [B, B], float32 or wider, 0 on the diagonal; moving, rotating or scaling the features changes nothing. All 0
        if all images are in one place.
    """
    x = at_least_float32(features)
    # From the differences, not from the Gram matrix: exact for close images, and no matter under autocast.
    squared = (x[:, None] - x[None]).square().sum(-1)
    apart = squared > 0
    # The gradient of a square root is infinite at 0.
    distances = torch.where(apart, torch.where(apart, squared, 1.0).sqrt(), 0.0)
    mean = distances.sum() / apart.sum().clamp(min=1)
    return distances / torch.where(mean > 0, mean, 1.0)


def angles(features: Tensor) -> Tensor:
    """Cos of the angle at image j between images i and k, for all triples (Park et al. 2019, equation 9).

    Args:
        features: [B, D].

    Returns:
        [B, B, B], indices j, i, k; float32 or wider; 0 where i or k is j, or in its place.
    """
    x = at_least_float32(features)
    from_j = directions(x[None] - x[:, None])
    return from_j @ from_j.transpose(1, 2)


def similarities(features: Tensor) -> Tensor:
    """Rows of the batch's Gram matrix brought to length 1 (Tung and Mori, ICCV 2019, equation 2).

    Args:
        features: [B, ...], flattened.

    Returns:
        [B, B], float32 or wider; rotating or scaling the features changes nothing. A row of 0 for an image without
        any feature.
    """
    x = at_least_float32(features).flatten(1)
    return directions(x @ x.T)


class _Relation(PairTerm):
    """Compares a matrix of the batch's images at one place of both networks."""

    def __init__(self, weight: float, context: TermContext, feature: str, reduction: str) -> None:
        super().__init__(weight, context, reduction)
        self.site = FeatureSite(feature, context, self.pairs)
        self.needs_pooled = self.site.is_pooled
        self.student_stages, self.teacher_stages = self.site.student_stages, self.site.teacher_stages

    def relation_loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Returns the loss of features [B, ...] of the student against those of a teacher."""
        raise NotImplementedError

    def compare(self, context: StepContext, k: int, m: int) -> Tensor:
        """Returns the loss of branch k against teacher m."""
        student, teacher = self.site.features(context, k, m)
        # Autocast would compute the products of the features in bfloat16.
        with torch.autocast(student.device.type, enabled=False):
            return self.relation_loss(student, teacher.detach())


@register_term("rkd_distance")
class RelationalDistance(_Relation):
    """Huber loss between the relative distances of all pairs: RKD-D of Park et al., CVPR 2019; weight 25 there.

    As published, the mean is over all B² entries, the diagonal included.

    Args:
        weight: Factor in the total, >= 0.
        context: The networks' sizes and the assignment.
        feature: `pooled`, `last` or a stage, which is flattened.
        reduction: `mean` or `sum` over the K branches.
    """

    def __init__(
        self, weight: float, context: TermContext, *, feature: str = "pooled", reduction: str = "mean"
    ) -> None:
        super().__init__(weight, context, feature, reduction)

    def relation_loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Returns the mean Huber loss (threshold 1) over the entries."""
        ours, theirs = (relative_distances(x.flatten(1)) for x in (student, teacher))
        return functional.smooth_l1_loss(ours, theirs)


@register_term("rkd_angle")
class RelationalAngle(_Relation):
    """Huber loss between the angles of all triples: RKD-A of Park et al., CVPR 2019; weight 50 there.

    Args:
        weight: Factor in the total, >= 0.
        context: The networks' sizes and the assignment.
        feature: `pooled`, `last` or a stage, which is flattened.
        reduction: `mean` or `sum` over the K branches.
    """

    def __init__(
        self, weight: float, context: TermContext, *, feature: str = "pooled", reduction: str = "mean"
    ) -> None:
        super().__init__(weight, context, feature, reduction)

    def relation_loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Returns the mean Huber loss (threshold 1) over the entries."""
        return functional.smooth_l1_loss(angles(student.flatten(1)), angles(teacher.flatten(1)))


@register_term("similarity")
class SimilarityPreservation(_Relation):
    """‖S_t - S_s‖²_F / B² with the batch's similarities S: SP of Tung and Mori, ICCV 2019; weight 3000.

    Args:
        weight: Factor in the total, >= 0.
        context: The networks' sizes and the assignment.
        feature: `last`, `pooled` or a stage.
        reduction: `mean` or `sum` over the K branches.
    """

    def __init__(
        self, weight: float, context: TermContext, *, feature: str = "last", reduction: str = "mean"
    ) -> None:
        super().__init__(weight, context, feature, reduction)

    def relation_loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Returns the mean squared difference over all B² entries."""
        return functional.mse_loss(similarities(student), similarities(teacher))
