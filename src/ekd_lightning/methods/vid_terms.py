"""Variational information distillation: a Gaussian model of the teacher's features given the student's.

Shape letters: B batch, M teachers, K branches; in maps [B, C, H, W] the C is channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from ekd_lightning.errors import UserError
from ekd_lightning.methods.losses import at_least_float32
from ekd_lightning.methods.options import number
from ekd_lightning.methods.pair_terms import PairTerm, map_sites, pair_key, to_common_size
from ekd_lightning.methods.terms import StepContext, TermContext, register_term


def gaussian_loss(mean: Tensor, variance: Tensor, target: Tensor) -> Tensor:
    """mean(½ [(μ - f)² / σ_c² + log σ_c²]): -log N(f; μ, σ²) less its constant ½ log 2π.

    Args:
        mean: μ, [B, C, H, W].
        variance: σ², [C], > 0.
        target: f, [B, C, H, W], detached here.

    Returns:
        Scalar in nats, float32 or wider, averaged over all elements; it may be negative.
    """
    mean, target = at_least_float32(mean), at_least_float32(target).detach()
    variance = at_least_float32(variance)[:, None, None]
    return 0.5 * ((mean - target).square() / variance + variance.log()).mean()


class GaussianModel(nn.Module):
    """q(f_m | f_s): three 1×1 convolutions with ReLU between them for μ, one free σ² for each channel.

    Args:
        student_channels: C.
        teacher_channels: C_m, also the width between the convolutions.
        initial_variance: σ² at the start, > eps.
        eps: Least σ², > 0.
    """

    def __init__(
        self, student_channels: int, teacher_channels: int, initial_variance: float, eps: float
    ) -> None:
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
        return functional.softplus(at_least_float32(self.raw_variance)) + self.eps

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of features [B, C, H, W] against [B, C_m, H, W]."""
        return gaussian_loss(self.mean(student), self.variance(), teacher)


@register_term("vid")
class VariationalInformation(PairTerm):
    """Σ_stages mean(½ [(μ(f_s) - f_m)² / σ_c² + log σ_c²]): Ahn et al., CVPR 2019, equations 5 and 6.

    The loss is the negative of the variational bound on the mutual information, up to constants. The paper sums
    over elements with a factor λ; here, as in RepDistiller (after the authors' code), it is the mean, for the
    weight 1. μ and σ are dropped after training.

    Args:
        weight: Factor in the total, >= 0.
        context: The networks' sizes and the assignment. Every pair (branch, teacher) has its own μ and σ.
        stages: Stages to compare; channel counts may differ, sizes are averaged to the smaller one.
        initial_variance: σ² at the start, > eps.
        eps: Least σ², > 0; the stages' squared units.
        reduction: `mean` or `sum` over the K branches.

    Raises:
        UserError: For a stage that a network lacks.
    """

    def __init__(
        self,
        weight: float,
        context: TermContext,
        *,
        stages: Sequence[str] = ("stage1", "stage2", "stage3"),
        initial_variance: float = 5.0,
        eps: float = 1e-5,
        reduction: str = "mean",
    ) -> None:
        super().__init__(weight, context, reduction)
        number("eps", eps, above=0.0)
        if number("initial_variance", initial_variance) <= eps:
            raise UserError(
                f"initial_variance={initial_variance!r} is not allowed; give a number > eps={eps:g}"
            )
        self.sites = map_sites(stages, context, self.pairs)
        self.student_stages = tuple(name for site in self.sites for name in site.student_stages)
        self.teacher_stages = tuple(name for site in self.sites for name in site.teacher_stages)
        self.models = nn.ModuleDict(
            {
                pair_key(k, m): nn.ModuleList(
                    GaussianModel(site.student_shape()[0], site.teacher_shape(m)[0], initial_variance, eps)
                    for site in self.sites
                )
                for k, m in self.pairs
            }
        )

    def compare(self, context: StepContext, k: int, m: int) -> Tensor:
        """Returns the sum over the stages."""
        models = cast(nn.ModuleList, self.models[pair_key(k, m)])
        features = (to_common_size(*site.features(context, k, m)) for site in self.sites)
        return torch.stack([model(*f) for model, f in zip(models, features, strict=True)]).sum()
