"""Frozen copies of networks for inference, with folded batch norms and the fastest format of the hardware.

Shape letters: B batch, C classes, D features.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.optimization import fuse
from torch.nn.utils.fusion import fuse_linear_bn_eval

from ekd_lightning.networks.staged import (
    GlobalPool,
    NetworkOutput,
    Normalize,
    StagedNetwork,
    StudentOutput,
    averaged,
    in_memory_format,
    own_stage,
    stage_and_grid,
)
from ekd_lightning.networks.student import Branch, BranchedStudent, couple
from ekd_lightning.networks.teachers import TeacherEnsemble

log = logging.getLogger(__name__)


class _Frozen(nn.Module):
    """Base of frozen networks and students: normalisation in float32, stages in `dtype` and their memory format."""

    def __init__(self, normalize: Normalize, dtype: torch.dtype, fold: bool, channels_last: bool) -> None:
        super().__init__()
        self.dtype, self._fold, self.normalize = dtype, fold, normalize
        self._memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def _normalized(self, images: Tensor) -> Tensor:
        return self.normalize.unchecked(images).to(dtype=self.dtype, memory_format=self._memory_format)

    def _frozen(self, stages: nn.ModuleDict) -> dict[str, nn.Module]:
        return {name: self._frozen_part(stage, name) for name, stage in stages.items()}

    def _frozen_part(self, part: nn.Module, name: str) -> nn.Module:
        """Folds a part and casts it to `dtype`, except for batch norms that cannot be folded, which need float32."""
        found = _folded(part, name) if self._fold else part
        found.to(self.dtype)
        for inner in found.modules():
            if isinstance(inner, nn.BatchNorm2d):
                inner.float()
        return in_memory_format(found, self._memory_format)

    def _frozen_neck(self, neck: nn.Module) -> nn.Module:
        return neck if isinstance(neck, GlobalPool) else self._frozen_part(neck, "the neck")


class FrozenNetwork(_Frozen):
    """A copy of a staged network for inference, in eval mode and without gradients; the network does not change.

    Normalisation, pooling and the head use float32, whatever the `dtype` of the convolutions: half precision would cost
    accuracy there without saving time. With `fold`, batch norms are folded into the convolutions before them, and
    outputs of stages are equal within rounding.

    Attributes:
        dtype: Floating-point type of the stages: torch.float32 or torch.bfloat16.
        stage_names: Stages whose outputs are returned, in order of execution; `last` is any network's last stage, and
            outputs are averaged if the names have a grid (`staged.on_grid`).
    """

    def __init__(
        self,
        network: StagedNetwork,
        *,
        dtype: torch.dtype = torch.float32,
        fold: bool = True,
        channels_last: bool = True,
        stage_names: Sequence[str] = (),
    ) -> None:
        network = copy.deepcopy(network).eval()
        super().__init__(network.normalize, dtype, fold, channels_last)
        order = network.stage_names
        own = {name: own_stage(stage_and_grid(name)[0], order) for name in stage_names}
        self.stage_names = tuple(sorted(stage_names, key=lambda name: order.index(own[name])))
        self._grids = {
            stage: [stage_and_grid(name)[1] for name in self.stage_names if own[name] == stage] for stage in order
        }
        self.stages = nn.ModuleDict(self._frozen(network.stages))
        self.neck = self._frozen_neck(network.neck)
        self.head = network.head
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Maps images [B, 3, H, W] in [0, 1] to logits [B, C], pooled features [B, D] and `stage_names`, in float32."""
        maps = self._normalized(images)
        wanted = []
        for name, stage in self.stages.items():
            maps = stage(maps)
            wanted += [averaged(maps.float(), grid) for grid in self._grids[name]]
        pooled = _pooled(self.neck, maps)
        return self.head(pooled), pooled, *wanted

    def named(self, results: tuple[Tensor, ...]) -> NetworkOutput:
        """Converts the results of `forward` to a `NetworkOutput`."""
        logits, pooled, *stages = results
        return NetworkOutput(logits, pooled, dict(zip(self.stage_names, stages, strict=True)))

    def traced(self) -> nn.Module:
        """Returns the computation as one graph, or this module if it cannot be traced.

        `torch.compile` limits the number of variants of one piece of code; as each graph is code of its own, any number
        of teachers can be compiled.
        """
        try:
            return fx.symbolic_trace(self)
        except Exception as error:  # data-dependent control flow of users' networks raises many kinds
            log.debug("%s cannot be traced: %s", type(self).__name__, error)
            return self


class FrozenStudent(_Frozen):
    """A copy of a branched student for inference, frozen like a `FrozenNetwork`."""

    def __init__(
        self,
        student: BranchedStudent,
        *,
        dtype: torch.dtype = torch.float32,
        fold: bool = True,
        channels_last: bool = True,
    ) -> None:
        student = copy.deepcopy(student).eval()
        super().__init__(student.trunk.normalize, dtype, fold, channels_last)
        own = [cast(Branch, branch) for branch in student.branches]
        self.trunk = nn.Sequential(*self._frozen(student.trunk.stages).values())
        self.branches = nn.ModuleList(nn.Sequential(*self._frozen(branch.stages).values()) for branch in own)
        self.necks = nn.ModuleList(self._frozen_neck(branch.neck) for branch in own)
        self.heads = nn.ModuleList(branch.head for branch in own)
        self.ensemble = student.ensemble
        self.gate = student.gate
        if fold and self.gate is not None and isinstance(self.gate.bn, nn.BatchNorm1d):
            self.gate.fc, self.gate.bn = fuse_linear_bn_eval(self.gate.fc, self.gate.bn), nn.Identity()
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Returns the ensemble output [B, C] in float32 for images [B, 3, H, W] in [0, 1]."""
        maps = self.trunk(self._normalized(images))
        branches = zip(self.branches, self.necks, self.heads, strict=True)
        logits = torch.stack([head(_pooled(neck, branch(maps))) for branch, neck, head in branches])
        return couple(logits, self.ensemble, None if self.gate is None else self.gate(maps.float()))


def _pooled(neck: nn.Module, maps: Tensor) -> Tensor:
    """Returns the head's input [B, D] in float32; a global pool also computes in float32."""
    return neck(maps.float()) if isinstance(neck, GlobalPool) else neck(maps).float()


def _folded(stage: nn.Module, name: str) -> nn.Module:
    """Folds batch norms into convolutions; returns the stage unchanged if it cannot be traced."""
    try:
        return fuse(stage)
    except Exception as error:
        log.info("batch norms of %s are not folded, because it cannot be traced (%s)", name, error)
        return stage


class NetworkAccess:
    """Student and float32 teachers, copied and folded on first use, for terms that need outputs for other images.

    It is the `LiveNetworks` of `methods.context`, which has the shapes.
    """

    def __init__(
        self,
        student: BranchedStudent,
        teachers: TeacherEnsemble | None,
        *,
        fold: bool = True,
        channels_last: bool = True,
    ) -> None:
        self._student = student
        self._fold, self._channels_last = fold, channels_last
        self._members = [] if teachers is None else list(teachers.members)
        self._frozen: dict[tuple[int, torch.device], FrozenNetwork] = {}

    def student_outputs(self, images: Tensor) -> StudentOutput:
        """Returns the student's outputs."""
        return self._student.outputs(images)

    def teacher_outputs(self, m: int, images: Tensor) -> NetworkOutput:
        """Returns the outputs of teacher m."""
        key, member = (m, images.device), self._members[m]
        if key not in self._frozen:
            self._frozen[key] = FrozenNetwork(
                member, fold=self._fold, channels_last=self._channels_last, stage_names=member.stage_names
            ).to(images.device)
        frozen = self._frozen[key]
        with torch.autocast(images.device.type, enabled=False):
            return frozen.named(frozen(images))

    def classify(self, m: int, features: Tensor) -> Tensor:
        """Returns the logits of teacher m's classifier."""
        return self._members[m].classify(features)

    def teacher_statistics(self, m: int) -> tuple[Tensor, Tensor]:
        """Returns mean and standard deviation of teacher m's normalisation."""
        return self._members[m].normalize.mean, self._members[m].normalize.std
