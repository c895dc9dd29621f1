"""Relation terms, which compare how the images of a batch relate to each other: RKD and similarity preservation.

In several processes each compares the images of its own part of the batch.
Shape letters: B batch, D features, M teachers, K branches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ekd_lightning.methods import losses
from ekd_lightning.methods.context import StepContext, TermContext
from ekd_lightning.methods.pair_terms import FeatureSite, PairTerm, read_sites
from ekd_lightning.methods.terms import register_term


class _Relation(PairTerm):
    """Compares the batch's images at one place of both networks; subclasses say how, with flattened features."""

    loss: Callable[[Tensor, Tensor], Tensor]

    def __init__(
        self, weight: float, context: TermContext, *, feature: str = "pooled", reduction: str = "mean"
    ) -> None:
        super().__init__(weight, context, reduction=reduction)
        self.site = FeatureSite(feature, context, self.pairs)
        read_sites(self, self.site)

    def compare(self, context: StepContext, k: int, m: int) -> Tensor:
        """Returns the loss of branch k against teacher m."""
        student, teacher = self.site.features(context, k, m)
        # Autocast would compute the products of the features in bfloat16.
        with torch.autocast(student.device.type, enabled=False):
            return self.loss(student.flatten(1), teacher.flatten(1))


@register_term("rkd_distance")
class RelationalDistance(_Relation):
    """Huber loss between the relative distances of all pairs: RKD-D of Park et al., CVPR 2019; weight 25 there.

    Args:
        weight: Factor in the total, >= 0.
        context: The networks' sizes and the assignment.
        feature: `pooled`, `last` or a stage, which is flattened.
        reduction: `mean` or `sum` over the K branches.
    """

    loss = staticmethod(losses.distance_loss)


@register_term("rkd_angle")
class RelationalAngle(_Relation):
    """Huber loss between the angles of all triples: RKD-A of Park et al., CVPR 2019; weight 50 there.

    Args:
        weight: Factor in the total, >= 0.
        context: The networks' sizes and the assignment.
        feature: `pooled`, `last` or a stage, which is flattened.
        reduction: `mean` or `sum` over the K branches.
    """

    loss = staticmethod(losses.angle_loss)


@register_term("similarity")
class SimilarityPreservation(_Relation):
    """‖S_t - S_s‖²_F / B² with the batch's similarities S: SP of Tung and Mori, ICCV 2019; weight 3000.

    Args:
        weight: Factor in the total, >= 0.
        context: The networks' sizes and the assignment.
        feature: `last`, `pooled` or a stage.
        reduction: `mean` or `sum` over the K branches.
    """

    loss = staticmethod(losses.similarity_loss)

    def __init__(self, weight: float, context: TermContext, *, feature: str = "last", **options: Any) -> None:
        super().__init__(weight, context, feature=feature, **options)
