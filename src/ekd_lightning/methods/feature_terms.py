"""The term on features, and the adapters that make a branch's features comparable with a teacher's.

Shape letters: B batch, M teachers, K branches, D features; in maps [B, C, H, W] the C is channels.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torch.nn import functional

from ekd_lightning.methods import losses
from ekd_lightning.methods.options import choice
from ekd_lightning.methods.pair_terms import FeatureSite, PairTerm, to_common_size
from ekd_lightning.methods.terms import StepContext, TermContext, register_term


class PooledAdapter(nn.Sequential):
    """Linear map without bias, then batch norm: pooled features [B, D] -> [B, D_m].

    Args:
        student_features: D.
        teacher_features: D_m.
    """

    def __init__(self, student_features: int, teacher_features: int) -> None:
        super().__init__(
            nn.Linear(student_features, teacher_features, bias=False), nn.BatchNorm1d(teacher_features)
        )

    def forward(self, input: Tensor) -> Tensor:  # the name is nn.Sequential's
        """Maps [B, D] to [B, D_m]."""
        projected, norm = self[0](input), cast(nn.BatchNorm1d, self[1])
        if self.training and len(projected) == 1:
            # One image has no batch statistics, and a last batch of one must not end a training run.
            return functional.batch_norm(
                projected, norm.running_mean, norm.running_var, norm.weight, norm.bias
            )
        return norm(projected)


class MapAdapter(nn.Sequential):
    """1×1 convolution without bias, then batch norm: [B, C, H, W] -> [B, C_m, H, W].

    Args:
        student_channels: C.
        teacher_channels: C_m.
    """

    def __init__(self, student_channels: int, teacher_channels: int) -> None:
        super().__init__(
            nn.Conv2d(student_channels, teacher_channels, kernel_size=1, bias=False),
            nn.BatchNorm2d(teacher_channels),
        )


@register_term("feature_branch")
class FeatureBranch(PairTerm):
    """mean_k Σ_m A[k, m] · MSE(r_km(h_k), h_m): features of every branch approach those of its teachers.

    r_km is the identity or a trained projection that is not part of the student and is dropped after
    training. MSE is the mean over all elements, so its size hardly depends on the resolution; features
    pooled over space vary less than maps and need a larger weight. The last term of the project's
    reconstruction of EKD (see `losses`); which features the paper compares could not be verified.

    Maps of unequal height or width are first averaged (adaptive_avg_pool2d) to the smaller of the two, so
    shapes "agree" when the channel counts do.

    Args:
        weight: Factor in the total, >= 0.
        context: The networks' sizes and the assignment. Pairs (branch, teacher) without weight get no
            adapter.
        feature: `pooled` (the head's input), `last` (each network's own last stage) or a stage name.
        adapter: `identity`, `project` (1×1 convolution or linear map, no bias, then batch norm), or `auto`:
            identity where the channel counts agree, else project.
        reduction: `mean` or `sum` over the K branches.

    Raises:
        UserError: For a stage that a network lacks, or `identity` between unequal channel counts.
    """

    def __init__(
        self,
        weight: float,
        context: TermContext,
        *,
        feature: str = "pooled",
        adapter: str = "auto",
        reduction: str = "mean",
    ) -> None:
        super().__init__(weight, context, reduction)
        self.site = FeatureSite(feature, context, self.pairs)
        self.needs_pooled = self.site.is_pooled
        self.student_stages, self.teacher_stages = self.site.student_stages, self.site.teacher_stages
        choice("adapter", adapter, ("auto", "identity", "project"))
        self.adapters = nn.ModuleDict({_key(k, m): self._adapter(m, adapter) for k, m in self.pairs})

    def _adapter(self, m: int, kind: str) -> nn.Module:
        if kind == "identity":
            self.site.require_equal_channels(m, "adapter=identity does not fit (use auto or project)")
        student, teacher = self.site.student_shape(), self.site.teacher_shape(m)
        if kind == "identity" or (kind == "auto" and student[0] == teacher[0]):
            return nn.Identity()
        return (PooledAdapter if self.site.is_pooled else MapAdapter)(student[0], teacher[0])

    def compare(self, context: StepContext, k: int, m: int) -> Tensor:
        """Returns the mean squared error over all elements, adapted and at the smaller of the two sizes."""
        student, teacher = to_common_size(*self.site.features(context, k, m))
        return losses.mse(self.adapters[_key(k, m)](student), teacher)


def _key(k: int, m: int) -> str:
    return f"branch{k}_teacher{m}"
