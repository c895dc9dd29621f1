"""Feature terms: attention transfer, flow matrices (FSP), Gaussian models (VID), relations between images (RKD, SP).

Under DDP, relations are taken within each process's part of the batch.
Shape letters: B batch, D features, M teachers, K branches; in maps [B, C, H, W] the C is channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from ekd_lightning.errors import UserError
from ekd_lightning.methods import losses
from ekd_lightning.methods.context import StepContext, TermContext
from ekd_lightning.methods.options import choice, number
from ekd_lightning.methods.pair_terms import FeatureTerm, adapted, different_stages, pair_key
from ekd_lightning.methods.terms import register_term

STAGES = ("stage1", "stage2", "stage3")


@register_term("attention")
class Attention(FeatureTerm):
    """Σ_stages mean((Q_s - Q_m)²) with attention maps of length 1: Zagoruyko and Komodakis, ICLR 2017.

    See `losses.attention_loss`; the weight is the paper's β. The sum over the stages is averaged over branches and
    teachers, as in every `PairTerm`.

    Args:
        stages: Stages to compare; channel counts and sizes may differ.
        form: `squared` (published code) or `norm` (the paper's equation).

    Raises:
        UserError: For a stage that a network lacks.
    """

    def __init__(
        self,
        weight: float,
        context: TermContext,
        *,
        stages: Sequence[str] = STAGES,
        form: str = "squared",
        **options: Any,
    ) -> None:
        super().__init__(weight, context, different_stages(stages), **options)
        self.form = choice("form", form, ("squared", "norm"))

    def compare_at(self, place: int, k: int, m: int, student: Tensor, teacher: Tensor) -> Tensor:
        """Returns the distance of the attention maps at one stage."""
        return losses.attention_loss(student, teacher, self.form)


@register_term("fsp")
class FlowOfSolution(FeatureTerm):
    """Σ_i ‖G_i(student) - G_i(teacher)‖² over consecutive stages: Yim et al., CVPR 2017, equation 2.

    See `losses.flow_loss`.

    Args:
        stages: Two or more stages from input to output; each makes a pair with the next.
        pooling: Before the product, `max` (the paper's) or `average` (RepDistiller's); see `losses.flow_matrix`.
        elements: `mean` or `sum` over a matrix's elements.

    Raises:
        UserError: For a stage that a network lacks, or channel counts that differ at a stage.
    """

    def __init__(
        self,
        weight: float,
        context: TermContext,
        *,
        stages: Sequence[str] = ("stem", "stage1", "stage2", "stage3"),
        pooling: str = "max",
        elements: str = "mean",
        **options: Any,
    ) -> None:
        super().__init__(weight, context, different_stages(stages, least=2), **options)
        self.pooling = choice("pooling", pooling, ("max", "average"))
        self.elements = choice("elements", elements, ("mean", "sum"))
        for site in self.sites:
            site.require_equal_channels("fsp needs a student and teachers of equal width at every stage")

    def compare(self, context: StepContext, k: int, m: int) -> Tensor:
        """Returns the sum over the pairs of stages."""
        students, teachers = zip(*(site.features(context, k, m) for site in self.sites), strict=True)
        return losses.flow_loss(students, teachers, self.pooling, self.elements)


class GaussianModel(nn.Module):
    """q(f_m | f_s): μ by three 1×1 convolutions with ReLU between them, and one trained σ² for each channel.

    The width between the convolutions is that of the teacher. The initial σ² exceeds its lower bound `eps` > 0.
    """

    def __init__(self, student_channels: int, teacher_channels: int, initial_variance: float, eps: float) -> None:
        super().__init__()
        C, C_m = student_channels, teacher_channels
        self.mean = nn.Sequential(
            nn.Conv2d(C, C_m, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(C_m, C_m, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(C_m, C_m, 1, bias=False),
        )
        self.eps = eps
        # The inverse of softplus, in the form that does not overflow.
        start = (initial_variance - eps) + math.log(-math.expm1(eps - initial_variance))
        self.raw_variance = nn.Parameter(torch.full((C_m,), start))

    def variance(self) -> Tensor:
        """σ² = softplus(α) + eps, [C_m]."""
        return functional.softplus(losses.at_least_float32(self.raw_variance)) + self.eps

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Returns the loss of features [B, C, H, W] against [B, C_m, H, W], a scalar in nats."""
        return losses.gaussian_loss(adapted(self.mean, student), self.variance(), teacher)


@register_term("vid")
class VariationalInformation(FeatureTerm):
    """Σ_stages mean(½ [(μ(f_s) - f_m)² / σ_c² + log σ_c²]): Ahn et al., CVPR 2019, equation 5.

    See `losses.gaussian_loss`. The paper sums over elements with a factor λ; here it is the mean, for the weight 1.
    Every pair (branch, teacher) has its own μ and σ, which are dropped after training.

    Args:
        stages: Stages to compare; channel counts may differ, sizes are averaged to the smaller one.
        initial_variance: Initial σ², > eps.
        eps: Lower bound of σ², > 0, in squared units of the features.

    Raises:
        UserError: For a stage that a network lacks, or values outside these ranges.
    """

    def __init__(
        self,
        weight: float,
        context: TermContext,
        *,
        stages: Sequence[str] = STAGES,
        initial_variance: float = 5.0,
        eps: float = 1e-5,
        **options: Any,
    ) -> None:
        super().__init__(weight, context, different_stages(stages), **options)
        number("eps", eps, above=0.0)
        if number("initial_variance", initial_variance) <= eps:
            raise UserError(f"initial_variance={initial_variance!r} is not allowed; give a number > eps={eps:g}")
        self.models = nn.ModuleDict(
            {
                pair_key(k, m): nn.ModuleList(
                    GaussianModel(site.student_shape[0], site.teacher_shapes[m][0], initial_variance, eps)
                    for site in self.sites
                )
                for k, m in self.pairs
            }
        )

    def compare_at(self, place: int, k: int, m: int, student: Tensor, teacher: Tensor) -> Tensor:
        """Returns the loss of one stage's model."""
        models = cast(nn.ModuleList, self.models[pair_key(k, m)])
        return models[place](*losses.to_common_size(student, teacher))


class _Relation(FeatureTerm):
    """Base of losses that compare relations between the images of a batch.

    The option `feature` is `pooled`, `last` or a stage, whose maps are flattened.
    """

    loss: Callable[[Tensor, Tensor], Tensor]

    def __init__(self, weight: float, context: TermContext, *, feature: str = "pooled", **options: Any) -> None:
        super().__init__(weight, context, [feature], **options)

    def compare_at(self, place: int, k: int, m: int, student: Tensor, teacher: Tensor) -> Tensor:
        """Returns the loss of branch k against teacher m."""
        # Autocast would compute the products of the features in bfloat16.
        with torch.autocast(student.device.type, enabled=False):
            return self.loss(student.flatten(1), teacher.flatten(1))


@register_term("rkd_distance")
class RelationalDistance(_Relation):
    """Huber loss between the relative distances of all pairs: RKD-D of Park et al., CVPR 2019, with weight 25."""

    loss = staticmethod(losses.distance_loss)


@register_term("rkd_angle")
class RelationalAngle(_Relation):
    """Huber loss between the angles of all triples: RKD-A of Park et al., CVPR 2019, with weight 50."""

    loss = staticmethod(losses.angle_loss)


@register_term("similarity")
class SimilarityPreservation(_Relation):
    """‖S_t - S_s‖²_F / B² with the batch's similarities S: SP of Tung and Mori, ICCV 2019, with weight 3000."""

    loss = staticmethod(losses.similarity_loss)

    def __init__(self, weight: float, context: TermContext, *, feature: str = "last", **options: Any) -> None:
        super().__init__(weight, context, feature=feature, **options)
