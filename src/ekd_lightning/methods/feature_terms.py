"""The term on features, and the adapters that make a branch's features comparable with a teacher's.

Shape letters: B batch, M teachers, K branches, D features; in maps [B, C, H, W] the C is channels.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from ekd_lightning.errors import UserError
from ekd_lightning.methods import losses
from ekd_lightning.methods.logit_terms import branch_factor
from ekd_lightning.methods.options import choice
from ekd_lightning.methods.terms import StepContext, Term, TermContext, register_term


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
class FeatureBranch(Term):
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

    needs_teachers = True
    uses_assignment = True

    def __init__(
        self,
        weight: float,
        context: TermContext,
        *,
        feature: str = "pooled",
        adapter: str = "auto",
        reduction: str = "mean",
    ) -> None:
        super().__init__(weight)
        assert context.assignment is not None
        self.num_branches = context.num_branches
        self.factor = branch_factor(reduction, context.num_branches)
        self.pairs = tuple(context.assignment.pairs())
        self._student_stage: str | None = None
        self._teacher_stage: dict[int, str] = {}
        self.needs_pooled = feature == "pooled"
        if feature != "pooled":
            self._student_stage = context.student_stage(feature)
            teachers = sorted({m for _, m in self.pairs})
            self._teacher_stage = {m: context.teacher_stage(m, feature) for m in teachers}
            self.student_stages = (self._student_stage,)
            self.teacher_stages = tuple(dict.fromkeys(self._teacher_stage.values()))
        choice("adapter", adapter, ("auto", "identity", "project"))
        self.adapters = nn.ModuleDict({_key(k, m): self._adapter(context, m, adapter) for k, m in self.pairs})

    def _adapter(self, context: TermContext, m: int, kind: str) -> nn.Module:
        if self._student_stage is None:
            student, teacher = (context.student_features,), (context.teacher_features[m],)
        else:
            student = context.student_stage_shapes[self._student_stage]  # type: ignore[assignment]
            teacher = context.teacher_stage_shapes[m][self._teacher_stage[m]]  # type: ignore[assignment]
        agree = student[0] == teacher[0]
        if kind == "identity" and not agree:
            label = context.teacher_names[m] if context.teacher_names else f"number {m}"
            raise UserError(
                f"adapter=identity does not fit: the student {context.student_name!r} has shape"
                f" {list(student)}, the teacher {label!r} {list(teacher)}; use auto or project"
            )
        if kind == "identity" or (kind == "auto" and agree):
            return nn.Identity()
        make = PooledAdapter if self._student_stage is None else MapAdapter
        return make(student[0], teacher[0])

    def forward(self, context: StepContext) -> Tensor:
        """Returns the mean over all elements of the features and the mean or sum over the branches."""
        assert context.assignment_KM is not None
        # All pairs, even those that a random assignment gives no weight in this step: DDP wants a gradient
        # for every parameter, and choosing pairs by value would have to wait for the device.
        values = torch.stack([self._compare(context, k, m) for k, m in self.pairs])
        weights = torch.stack([context.assignment_KM[k, m] for k, m in self.pairs]).to(values)
        return self.factor * (weights * values).sum() / self.num_branches

    def _compare(self, context: StepContext, k: int, m: int) -> Tensor:
        student, teacher = self._features(context, k, m)
        if student.shape[2:] != teacher.shape[2:]:
            size = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))
            student, teacher = (functional.adaptive_avg_pool2d(x, size) for x in (student, teacher))
        return losses.mse(self.adapters[_key(k, m)](student), teacher)

    def _features(self, context: StepContext, k: int, m: int) -> tuple[Tensor, Tensor]:
        assert context.teachers is not None
        if self._student_stage is None:
            return context.student.pooled[k], context.teachers.pooled[m]
        return (
            context.student.stages[k][self._student_stage],
            context.teachers.stages[m][self._teacher_stage[m]],
        )


def _key(k: int, m: int) -> str:
    return f"branch{k}_teacher{m}"
