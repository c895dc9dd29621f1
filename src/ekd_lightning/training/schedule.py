"""Learning rate as a function of the step: linear warm-up, then cosine, step or constant."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.optim.lr_scheduler import LambdaLR

from ekd_lightning.settings import RecipeSettings


def lr_factor(recipe: RecipeSettings, steps_per_epoch: int) -> Callable[[int], float]:
    """Builds the multiplier of `recipe.lr` for each optimiser step.

    A function of the recipe and the step alone, so a resumed run continues the same curve.

    Args:
        recipe: Checked recipe.
        steps_per_epoch: Optimiser steps of one epoch.

    Returns:
        step (0-based) -> factor; in [0, 1] for `gamma` <= 1.
    """
    total = recipe.epochs * steps_per_epoch
    warmup = round(recipe.warmup_epochs * steps_per_epoch)
    milestones = [round(share * total) for share in recipe.milestones]

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if recipe.schedule == "cosine":
            done = min(1.0, (step - warmup) / max(1, total - warmup))
            return 0.5 * (1.0 + math.cos(math.pi * done))
        if recipe.schedule == "step":
            return float(recipe.gamma ** sum(step >= milestone for milestone in milestones))
        return 1.0

    return factor


def make_optimizer(
    parameters: list[torch.nn.Parameter], recipe: RecipeSettings, steps_per_epoch: int, *, fused: bool = False
) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """SGD as the recipe says, with its schedule (to be stepped once per optimiser step).

    Args:
        parameters: What is trained.
        recipe: Checked recipe.
        steps_per_epoch: Optimiser steps of one epoch.
        fused: One kernel for all parameters instead of several for each; CPU and CUDA have it.
    """
    optimizer = torch.optim.SGD(
        parameters,
        lr=recipe.lr,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        weight_decay=recipe.weight_decay,
        fused=fused,
    )
    return optimizer, LambdaLR(optimizer, lr_factor(recipe, steps_per_epoch))
