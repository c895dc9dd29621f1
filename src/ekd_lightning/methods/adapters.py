"""Adapters: trained maps from a student's features to those of a teacher, dropped after training.

Shape letters: B batch, D features; in maps [B, C, H, W] the C is channels.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from ekd_lightning.errors import UserError

ADAPTERS = ("auto", "identity", "project", "conv_reg", "regressor")
REGRESSORS = ("conv_reg", "regressor")


def make_adapter(kind: str, student: tuple[int, ...], teacher: tuple[int, ...]) -> nn.Module:
    """Builds an adapter of one of the kinds `ADAPTERS` from the student's shape to the teacher's.

    Shapes are (D,) or (C, H, W). `project` is a `Projection`; `auto` is the identity if D or C agree, else `project`.

    Raises:
        UserError: As `ConvRegressor`.
    """
    if kind in REGRESSORS:
        return ConvRegressor(student, teacher, norm=kind == "conv_reg")
    if kind == "identity" or (kind == "auto" and student[0] == teacher[0]):
        return nn.Identity()
    return Projection(student, teacher)


def adapted(adapter: nn.Module, features: Tensor) -> Tensor:
    """Applies an adapter; outside autocast, features are first converted to the dtype of its weights."""
    weight = next(adapter.parameters(), None)
    if weight is not None and not torch.is_autocast_enabled(features.device.type):
        features = features.to(weight.dtype)
    return cast(Tensor, adapter(features))


class Projection(nn.Sequential):
    """A linear map, for maps a 1×1 convolution, without bias, then batch norm: [B, D, ...] -> [B, D_m, ...].

    Shapes are (D,) or (D, H, W).
    """

    def __init__(self, student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
        D, D_m = student[0], teacher[0]
        if len(student) == 1:
            super().__init__(nn.Linear(D, D_m, bias=False), nn.BatchNorm1d(D_m))
        else:
            super().__init__(nn.Conv2d(D, D_m, kernel_size=1, bias=False), nn.BatchNorm2d(D_m))

    def forward(self, input: Tensor) -> Tensor:  # the name is nn.Sequential's
        """Maps [B, D, ...] to [B, D_m, ...]."""
        projected, norm = self[0](input), cast("nn.BatchNorm1d | nn.BatchNorm2d", self[1])
        if self.training and projected.numel() == projected.shape[1]:
            # A single vector has no batch statistics, but must not stop the training as its last batch.
            return functional.batch_norm(projected, norm.running_mean, norm.running_var, norm.weight, norm.bias)
        return norm(projected)


class ConvRegressor(nn.Sequential):
    """The regressor of FitNets: one convolution from the student's shape to the teacher's, then ReLU.

    It has two published forms. Romero et al. (2015, section 2.2) use no padding, a kernel of 1 + H - H_m, so that the
    sizes match, and the teacher's non-linearity. RepDistiller's ConvReg adds batch norm; if one size is twice the
    other, it uses 3×3 with stride 2, or a transposed 4×4. At equal sizes both forms are 1×1.

    Args:
        student: (C, H, W).
        teacher: (C_m, H_m, W_m).
        norm: False for Romero's form, True for RepDistiller's.

    Raises:
        UserError: If the student's maps are smaller than the teacher's (in RepDistiller's form, unless half as large).
    """

    def __init__(self, student: tuple[int, ...], teacher: tuple[int, ...], norm: bool) -> None:
        (C, *size), (C_m, *size_m) = student, teacher
        bias = not norm  # batch norm would cancel it
        conv: nn.Module
        if norm and size == [2 * length for length in size_m]:
            conv = nn.Conv2d(C, C_m, kernel_size=3, stride=2, padding=1, bias=bias)
        elif norm and size_m == [2 * length for length in size]:
            conv = nn.ConvTranspose2d(C, C_m, kernel_size=4, stride=2, padding=1, bias=bias)
        elif size[0] >= size_m[0] and size[1] >= size_m[1]:
            kernel = (1 + size[0] - size_m[0], 1 + size[1] - size_m[1])
            conv = nn.Conv2d(C, C_m, kernel, bias=bias)
        else:
            raise UserError(
                f"no regressor from the student's shape {list(student)} to the teacher's {list(teacher)}: use another "
                "feature, or adapter=project, which averages the larger maps"
            )
        super().__init__(conv, *([nn.BatchNorm2d(C_m)] if norm else []), nn.ReLU())
