"""Recorded step: the training step on static buffers, from images to log, replayed as a CUDA graph.

A step of a small student is bound by kernel launches, not by arithmetic; recorded once, it needs a single launch. A
graph repeats the same operations, so everything that changes from step to step lies in buffers that it reads (rows of
the epoch, weights of the terms, assignment, learning rate). On a CPU the same function runs unrecorded.

Shape letters: B batch, K branches, M teachers, N steps of an epoch.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import BaseFinetuning, Callback, StochasticWeightAveraging
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch import Tensor

from ekd_lightning.data.datamodule import ImageDataModule
from ekd_lightning.data.loader import Batch, IndexBatch
from ekd_lightning.training.steps import FUSED, log_row

log = logging.getLogger(__name__)

_GRADIENT_HOOKS = ("on_before_backward", "on_after_backward", "on_before_zero_grad", "on_before_optimizer_step")

WARM_UP = 3
"""Unrecorded steps of each kind before it is recorded, for allocations, autotuning and compiling, which a graph cannot
hold. They are training steps like all others."""


@dataclass(frozen=True)
class StepValues:
    """Values, besides the images, that change from step to step, as tensors on the device.

    Attributes:
        step: int64 scalar, optimiser steps of the whole training so far.
        weights: Term name -> float32 scalar, its weight times its schedule's factor; empty if nothing is weighted.
        assignment_KM: float32 [K, M], the assignment of the step; None if no term uses it.
    """

    step: Tensor
    weights: Mapping[str, Tensor]
    assignment_KM: Tensor | None = None  # noqa: N815  # shape letters


@dataclass(frozen=True)
class EpochRows:
    """Rows and values of all steps of an epoch.

    Attributes:
        labels: int64 [N, B].
        index: int64 [N, B], positions in the whole training set.
        view: int64 [N, B].
        weights: float32 [N, terms], in the order of `weight_names` of the `RecordedStep`.
        assignment: float32 [N, K, M]; None if no term uses it.
        num_labelled: See `Batch`.
    """

    labels: Tensor
    index: Tensor
    view: Tensor
    weights: Tensor
    assignment: Tensor | None = None
    num_labelled: int | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Returns the tensors that are set, by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}


class RecordedStep:
    """Runs training steps from static buffers; on CUDA each kind of step is recorded and replayed.

    Steps that compute the same terms are of one kind, which is recorded after `WARM_UP` steps. Steps that cannot be
    recorded run unrecorded, with one warning and the same results.

    Args:
        device: Device of all tensors.
        optimizer: The optimiser; `lr` of its groups is read before every step, so that schedules may change it.
        gather: Makes the batch of B rows, on the device.
        loss: Returns the total loss, with gradient, and the scalars that the step logs.
        weight_names: Names of the columns of `EpochRows.weights`.
    """

    def __init__(
        self,
        *,
        device: torch.device,
        optimizer: torch.optim.Optimizer,
        gather: Callable[[IndexBatch], Batch],
        loss: Callable[[Batch, StepValues], tuple[Tensor, list[Tensor]]],
        weight_names: Sequence[str],
    ) -> None:
        self.device = device
        self.log_table = torch.empty(0, device=device)
        self._optimizer, self._gather, self._compute = optimizer, gather, loss
        self._names = tuple(weight_names)
        self._position = torch.zeros(1, dtype=torch.int64, device=device)
        self._step_number = torch.zeros((), dtype=torch.int64, device=device)
        # CUDA kernels read rates in float32; on a CPU, float64 equals a Python number.
        rate = torch.float64 if device.type == "cpu" else torch.float32
        self._rates = [torch.zeros((), dtype=rate, device=device) for _ in optimizer.param_groups]
        self._loss = torch.zeros((), device=device)
        self._rows: EpochRows | None = None
        self._seen: Counter[Hashable] = Counter()
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._records = device.type == "cuda"
        self._side = torch.cuda.Stream(device) if self._records else None
        for group in optimizer.param_groups if self._records else ():
            if "capturable" in group:
                group["capturable"] = True
        # No warning of the unrecorded steps before a kind is recorded.
        optimizer._warned_capturable_if_run_uncaptured = True

    @property
    def num_graphs(self) -> int:
        """Number of recorded kinds of steps."""
        return len(self._graphs)

    def start_epoch(self, rows: EpochRows, log_columns: int) -> None:
        """Copies an epoch's rows to the device, into the buffers that graphs read; a step logs `log_columns` values."""
        given = rows.tensors()
        held = {} if self._rows is None else self._rows.tensors()
        if {name: values.shape for name, values in given.items()} != {n: values.shape for n, values in held.items()}:
            self._graphs.clear()  # they read the old buffers
            self._seen.clear()
            moved = {name: values.to(self.device, copy=True) for name, values in given.items()}
            self._rows = EpochRows(**{**vars(rows), **moved})
            self.log_table = torch.zeros(len(rows.index), log_columns, device=self.device)
            return
        for name, values in given.items():
            held[name].copy_(values, non_blocking=True)

    def run(self, position: int, step: int, kind: Hashable) -> Tensor:
        """Runs one training step, the optimiser's included, at a position in the epoch, 0 .. N-1.

        `step` is its number in the whole training, from 0. The kind is equal for steps that compute the same terms;
        other settings of the optimiser than `lr`, or other parameters with gradients, also make another kind. Returns
        the total loss, float32 without gradient; the next step overwrites it.
        """
        self._position.fill_(position)
        self._step_number.fill_(step)
        for rate, group in zip(self._rates, self._optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])
        kind = (kind, *self._fixed())
        warm = self._records and self._seen[kind] >= WARM_UP
        if kind in self._graphs or (warm and self._record(kind)):
            self._graphs[kind].replay()
        else:
            self._seen[kind] += 1
            with self._aside():
                self._step()
        return self._loss

    def _fixed(self) -> Iterator[Hashable]:
        """Yields the settings of the optimiser that become constants of a graph."""
        for group in self._optimizer.param_groups:
            yield tuple((name, value) for name, value in group.items() if name not in ("params", "lr"))
            yield tuple(parameter.requires_grad for parameter in group["params"])

    def _record(self, kind: Hashable) -> bool:
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        self._optimizer.zero_grad(set_to_none=True)  # gradients must come from the graph's own memory
        try:
            # Other threads, which write checkpoints or tables, may use the device meanwhile.
            with torch.cuda.graph(graph, stream=self._side, capture_error_mode="thread_local"):
                self._step()
        except Exception as error:  # a wait for the host, no memory for a second set of activations, ...: many kinds
            self._records = False
            torch.cuda.set_stream(current)  # a recording that cannot be ended does not return to it
            reason = " ".join(str(_first_of(error)).split())[:200]
            del graph
            torch.clear_autocast_cache()  # casts of the weights that were recorded, but never computed
            torch.cuda.empty_cache()
            warnings.warn(
                f"the training step cannot be recorded as a CUDA graph, so it runs slower ({reason})",
                RuntimeWarning,
                stacklevel=2,
            )
            return False
        self._graphs[kind] = graph
        return True

    def _step(self) -> None:
        rows, values = self._now()
        total, logged = self._compute(self._gather(rows), values)
        self._optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, enabled=False):
            total.backward()
            with self._rates_as_data():
                self._optimizer.step()
        self._loss.copy_(total.detach())
        self.log_table.index_copy_(0, self._position, log_row(logged)[None])

    def _now(self) -> tuple[IndexBatch, StepValues]:
        """Returns the rows and values of the step at `_position`."""
        assert self._rows is not None  # an epoch was started
        now = {name: values.index_select(0, self._position)[0] for name, values in self._rows.tensors().items()}
        index = now["index"]
        valid = torch.ones_like(index, dtype=torch.bool)
        rows = IndexBatch(now["labels"], index, now["view"], valid, num_labelled=self._rows.num_labelled)
        weights = dict(zip(self._names, now["weights"].unbind(), strict=True))
        return rows, StepValues(self._step_number, weights, now.get("assignment"))

    @contextlib.contextmanager
    def _rates_as_data(self) -> Iterator[None]:
        """Lets the optimiser read learning rates from buffers within the block; outside they are numbers."""
        groups = self._optimizer.param_groups
        numbers = [group["lr"] for group in groups]
        try:
            for group, rate in zip(groups, self._rates, strict=True):
                group["lr"] = rate
            yield
        finally:
            for group, number in zip(groups, numbers, strict=True):
                group["lr"] = number

    @contextlib.contextmanager
    def _aside(self) -> Iterator[None]:
        """Switches to the stream on which steps are recorded, so that they reuse its allocations and tuning."""
        if self._side is None:
            yield
            return
        current = torch.cuda.current_stream(self.device)
        self._side.wait_stream(current)
        with torch.cuda.stream(self._side):
            yield
        current.wait_stream(self._side)


def _first_of(error: BaseException) -> BaseException:
    """Returns the error that led to this one, or this one; clears their tracebacks, which hold tensors of the step."""
    error.__traceback__ = None
    before = error.__cause__ or error.__context__
    return error if before is None else _first_of(before)


def why_not_recorded(trainer: pl.Trainer) -> str | None:
    """Returns why a run's training step cannot be one CUDA graph; None if it can."""
    data, optimizer = getattr(trainer, "datamodule", None), trainer.optimizers[0]
    callbacks = [
        type(callback).__name__
        for callback in trainer.callbacks  # type: ignore[attr-defined]
        if isinstance(callback, (StochasticWeightAveraging, BaseFinetuning))
        or any(_overrides(callback, hook, Callback) for hook in _GRADIENT_HOOKS)
    ]
    module = trainer.lightning_module
    overridden = [
        hook
        for hook in (*_GRADIENT_HOOKS, "configure_gradient_clipping")
        if _overrides(module, hook, pl.LightningModule)
    ]
    reasons = {
        "several processes train together": not isinstance(trainer.strategy, SingleDeviceStrategy),
        "trainer.accumulate_grad_batches is not 1": trainer.accumulate_grad_batches != 1,
        "trainer.gradient_clip_val clips gradients": bool(trainer.gradient_clip_val),
        "trainer.detect_anomaly is on": trainer._detect_anomaly,
        f"trainer.precision={trainer.precision} scales the loss": str(trainer.precision).startswith("16"),
        f"{type(optimizer).__name__} is not a fused {', '.join(cls.__name__ for cls in FUSED)}": not (
            type(optimizer) in FUSED and optimizer.defaults.get("fused")
        ),
        f"the callback {', '.join(callbacks)} reads gradients or changes the optimiser": bool(callbacks),
        f"{type(module).__name__}.{', '.join(overridden)} reads gradients": bool(overridden),
        "the data do not come from this package's data module": not isinstance(data, ImageDataModule),
        "images are mixed (recipe.mixup, recipe.cutmix)": bool(getattr(data, "mixing", None)),
        "an augmentation needs the host in every step": not getattr(getattr(data, "views", None), "captures", True),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _overrides(thing: object, hook: str, base: type) -> bool:
    """Whether a callback or module overrides a method of the base class."""
    return getattr(getattr(thing, hook), "__func__", None) is not getattr(base, hook)
