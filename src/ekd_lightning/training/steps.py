"""Parts of training steps: optimiser, learning rate, memory format, weight average, and a log of each step's values.

The learning rate warms up linearly and then follows a cosine, falls in steps, or stays constant.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ekd_lightning.errors import UserError, one_line, unknown_name
from ekd_lightning.settings import RecipeSettings

FUSED = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
"""Optimisers with one kernel for all parameters; these can be part of a recorded step."""
_UNFIT = {
    "optimizer": "is the base class of optimisers; name one of them",
    "lbfgs": "not supported, it computes the loss several times per step",
    "sparseadam": "not supported, it needs sparse gradients, and these are dense",
}
_NO_OPTIONS = ("params", "fused", "foreach", "capturable", "differentiable")


def lr_factor(recipe: RecipeSettings, steps_per_epoch: int) -> Callable[[int], float]:
    """Builds the factor of `recipe.lr` for each optimiser step, counted from 0; it is in [0, 1] for `gamma` <= 1.

    It depends on the recipe and the step alone, so that a resumed run continues the same curve.
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


def optimizer_class(name: str, key: str) -> type[Optimizer]:
    """Returns a class of torch.optim by its name, in upper or lower case; other optimisers are not available.

    Raises:
        UserError: If torch.optim has no such class, or training steps cannot use it; the message begins with `key`.
    """
    if reason := _UNFIT.get(name.lower()):
        raise UserError(f"{key}={name}: {reason}")
    usable = {
        found.__name__.lower(): found
        for found in vars(torch.optim).values()
        if isinstance(found, type)
        and issubclass(found, Optimizer)
        and f"{found.__module__}.".startswith("torch.optim.")
    }
    if name.lower() not in usable:
        raise unknown_name(key, name, (other for other in usable if other not in _UNFIT))
    return usable[name.lower()]


def check_optimizer(recipe: RecipeSettings, key: str) -> None:
    """Checks the recipe's optimiser by building it for a convolution; raises as `make_optimizer`."""
    make_optimizer([nn.Parameter(torch.zeros(1, 1, 1, 1))], recipe, 1, key=key)


def make_optimizer(
    parameters: list[torch.nn.Parameter],
    recipe: RecipeSettings,
    steps_per_epoch: int,
    *,
    fused: bool = False,
    key: str = "recipe",
) -> tuple[Optimizer, LambdaLR]:
    """Builds the recipe's optimiser with its schedule, to be stepped once per optimiser step.

    If `fused`, on CPU and CUDA only, one kernel updates all parameters, for classes of `FUSED`. `key` is the dotted key
    of the recipe, for messages.

    Raises:
        UserError: If torch.optim has no such class, or the class refuses the options or the parameters.
    """
    cls = optimizer_class(recipe.optimizer, f"{key}.optimizer")
    accepted = set(inspect.signature(cls).parameters)
    own: dict[str, Any] = {"lr": recipe.lr}
    own |= {"momentum": recipe.momentum, "nesterov": recipe.nesterov} if cls is torch.optim.SGD else {}
    own |= {"weight_decay": recipe.weight_decay} if "weight_decay" in accepted else {}
    own |= {"fused": fused} if cls in FUSED else {}
    for name in recipe.optimizer_options:
        if name not in (allowed := accepted - {*own, *_NO_OPTIONS}):
            raise unknown_name(f"option of {key}.optimizer={recipe.optimizer}:", name, allowed)
    options: dict[str, Any] = {
        name: tuple(v) if isinstance(v, list) else v for name, v in recipe.optimizer_options.items()
    }
    try:
        optimizer = cls(parameters, **own, **options)
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"{key}.optimizer={recipe.optimizer}: {one_line(error)}") from None
    return optimizer, LambdaLR(optimizer, lr_factor(recipe, steps_per_epoch))


def has_fragile_convolution(module: nn.Module) -> bool:
    """Whether a network has strided 1×1 convolutions from fewer than 16 channels.

    In channels-last format on a CPU, their backward pass in torch 2.14 hangs, corrupts memory or crashes; with 8 or
    more channels only for some numbers of threads (3, 5, 6 and 7 of those tried).
    """
    return any(
        m.kernel_size == (1, 1) and m.stride != (1, 1) and m.in_channels < 16
        for m in module.modules()
        if isinstance(m, nn.Conv2d)
    )


def memory_format(network: nn.Module, channels_last: bool) -> torch.memory_format:
    """Returns the memory format for training a network: channels-last if requested and supported."""
    able = channels_last and not has_fragile_convolution(network)
    return torch.channels_last if able else torch.contiguous_format


class WeightAverage(nn.Module):
    """Exponential moving average of a network's parameters and buffers, in `module`, a copy of the network.

    It equals `torch.optim.swa_utils.AveragedModel`, which would read a counter from the device in every update. Integer
    buffers are copied, not averaged. `decay` is the share of the old average in the new one, in (0, 1).
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        super().__init__()
        self.module = copy.deepcopy(network).requires_grad_(False)
        self._average = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """Updates the average after optimiser step `step` >= 1; it starts as the weights after the first step."""
        ours, theirs = ([*one.parameters(), *one.buffers()] for one in (self.module, network))
        exact = [step <= 1 or not average.is_floating_point() for average in ours]
        for average, weights in zip(itertools.compress(ours, exact), itertools.compress(theirs, exact), strict=True):
            average.copy_(weights)
        moving = [not copied for copied in exact]
        if any(moving):
            self._average([*itertools.compress(ours, moving)], [*itertools.compress(theirs, moving)], step)


def log_row(values: list[Tensor]) -> Tensor:
    """Stacks scalar tensors, one per name, to float32 [names] without gradient."""
    return torch.stack([value.detach().float() for value in values])


class StepLog:
    """Named scalars of the steps of one epoch.

    To append never waits for an accelerator; to read does, once.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self._rows: list[Tensor] = []
        self._table: Tensor | None = None
        self._steps = 0

    def append(self, values: list[Tensor]) -> None:
        """Adds the scalar tensors of one step, one per name; their gradients are dropped."""
        self._rows.append(log_row(values))

    def watch(self, table: Tensor) -> None:
        """Takes an epoch's steps from a table, float32 [steps, names], to which recorded steps write."""
        self._table = table

    def advance(self, step: int) -> None:
        """Counts a recorded step, numbered from 0, as launched."""
        self._steps = step + 1

    def _values(self) -> Tensor | None:
        """Returns the values so far, float32 [steps, names]; None without steps."""
        if self._table is not None:
            return self._table[: self._steps] if self._steps else None
        return torch.stack(self._rows) if self._rows else None

    def means(self) -> dict[str, Tensor]:
        """Returns the mean of each name over the steps so far, scalar tensors on the device; empty without steps."""
        values = self._values()
        return {} if values is None else dict(zip(self.names, values.mean(dim=0).unbind(), strict=True))

    def first_non_finite(self) -> tuple[int, str, float] | None:
        """Finds the first value that is not finite.

        The first name stands for the total, which is returned only if all other values of its step are finite.

        Returns:
            (step within the epoch, from 0; name; value), or None if all values are finite.
        """
        table = self._values()
        if table is None:
            return None
        bad = (~torch.isfinite(table)).nonzero()
        if len(bad) == 0:
            return None
        row = int(bad[0, 0])
        columns = bad[bad[:, 0] == row, 1].tolist()
        column = columns[1] if columns[0] == 0 and len(columns) > 1 else columns[0]
        return row, self.names[column], float(table[row, column])

    def last_is_finite(self) -> bool:
        """Whether all values of the newest step are finite; cheap on a CPU, a synchronisation elsewhere."""
        return bool(torch.isfinite(self._rows[-1]).all())

    def clear(self) -> None:
        """Forgets all steps."""
        self._rows.clear()
        self._table, self._steps = None, 0
