"""Students with branches: a shared trunk, then K branches, coupled into one prediction.

Shape letters: B batch, C classes, D features, K branches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ekd_lightning.errors import UserError, unknown_name
from ekd_lightning.networks.registry import build_network
from ekd_lightning.networks.spec import NetworkSpec
from ekd_lightning.networks.staged import (
    ImageSize,
    Normalize,
    StagedNetwork,
    StudentOutput,
    check_size,
    pool,
    shapes_of,
    through,
)

ENSEMBLES = ("mean_logits", "mean_probs", "gate")
NO_SPLIT = "none"
BRANCH_GRADIENTS = ("mean", "sum")
MOST_BRANCHES = 1000


def _wide(logits: Tensor) -> Tensor:
    """Converts half-precision logits to float32, in which (or wider) the branches are always combined."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


class _ScaledGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a factor."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return value.clone()  # a view could not be changed in place by the stage that follows

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


def scale_gradient(value: Tensor, factor: float) -> Tensor:
    """Returns a copy of `value`; gradients that flow back through it are multiplied by `factor`."""
    return cast(Tensor, _ScaledGradient.apply(value, factor))


class Trunk(nn.Module):
    """The part that all branches share: the normalisation and the first stages (possibly none)."""

    stages: nn.ModuleDict

    def __init__(self, network: StagedNetwork, names: tuple[str, ...]) -> None:
        super().__init__()
        self.normalize = Normalize(network.spec.normalization, network.spec.image_size)
        self.stages = nn.ModuleDict({name: network.stages[name] for name in names})

    def forward(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the trunk's output [B, channels, height, width] and the outputs of its stages."""
        return through(self.stages, self.normalize(images))


class Branch(nn.Module):
    """The remaining stages of one network (possibly none), its neck and its head."""

    stages: nn.ModuleDict

    def __init__(self, network: StagedNetwork, names: tuple[str, ...]) -> None:
        super().__init__()
        self.stages = nn.ModuleDict({name: network.stages[name] for name in names})
        self.neck = network.neck
        self.head = network.head

    def forward(self, maps: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Returns logits [B, C], pooled features [B, D] and the outputs of the branch's stages."""
        maps, outputs = through(self.stages, maps)
        pooled = self.neck(maps)
        return self.head(pooled), pooled, outputs


class Gate(nn.Module):
    """Weights of the branches for each image, from the trunk's pooled output (Lan et al. 2018, ONE)."""

    def __init__(self, num_features: int, branches: int) -> None:
        super().__init__()
        self.fc = nn.Linear(num_features, branches)
        self.bn: nn.BatchNorm1d | nn.Identity = nn.BatchNorm1d(branches)

    def forward(self, trunk_maps: Tensor) -> Tensor:
        """Maps the trunk's output [B, channels, height, width] to weights [B, K] that sum to 1."""
        scores = torch.relu(self.bn(self.fc(pool(trunk_maps))))
        return _wide(scores).softmax(dim=1)

    @torch.no_grad()
    def keep(self, kept: Sequence[int]) -> None:
        """Drops all branches except `kept`, whose scores do not change.

        Args:
            kept: Positions of the branches to keep, 0 .. K-1, in the new order.
        """
        self.fc.out_features = self.bn.num_features = len(kept)
        for value in (*self.parameters(), *self.buffers()):
            if value.ndim:  # all except num_batches_tracked
                value.data, value.grad = value[list(kept)], None


def couple(branch_logits: Tensor, ensemble: str, weights: Tensor | None = None) -> Tensor:
    """Combines the branches' logits into one prediction.

    Args:
        branch_logits: [K, B, C].
        ensemble: `mean_logits`, `mean_probs` or `gate`.
        weights: The gate's weights [B, K]; None for the other two.

    Returns:
        [B, C], at least in float32: logits, or log-probabilities for `mean_probs`.
    """
    logits = _wide(branch_logits)
    if weights is not None:
        # Not einsum, which autocast would compute in half precision.
        return (weights.to(logits.dtype).T.unsqueeze(-1) * logits).sum(dim=0)
    if ensemble == "mean_probs":
        # log(1/K Σ p_k), computed in the log domain.
        return logits.log_softmax(dim=-1).logsumexp(dim=0) - math.log(len(logits))
    return logits.mean(dim=0)


class BranchedStudent(nn.Module):
    """K branches on a shared trunk, all cut from copies of one network.

    The trunk and branch 0 come from the first network that is built, branch k from the k-th (counted from 0): every
    branch has its own random initialisation, and a student with one branch is the plain network of the same seed.
    Names in the state dict are `trunk.stages.<stage>.*`, `branches.<k>.stages.<stage>.*`, `branches.<k>.head.*` and
    `gate.*`.

    Attributes:
        spec: the network that trunk and branches are cut from.
        ensemble: how the branches' logits are combined: `mean_logits`, `mean_probs` or `gate`.
        split_after: the last shared stage, or `none`.
        branch_gradients: `mean`, or `sum` if the branches' own weights get K times the gradient.
        stage_names: names of the stages from image to head, shared stages included, in order.
        num_features: D, the width of every head's input.
        fixed_size: side in pixels of the only image size that the network accepts; None if it accepts any.
    """

    def __init__(
        self,
        spec: NetworkSpec,
        *,
        branches: int,
        split_after: str,
        ensemble: str = "mean_logits",
        branch_gradients: str = "mean",
    ) -> None:
        """Builds trunk and branches; the same `torch.manual_seed` gives the same student.

        Args:
            spec: the network that trunk and branches are cut from.
            branches: K, from 1 to `MOST_BRANCHES`.
            split_after: the last shared stage, or `none` for K separate networks. If it is the network's last stage,
                the branches are heads only.
            ensemble: `mean_logits`; `mean_probs` (the log of the mean softmax); or `gate` (learned
                weights of the branches' logits, from the trunk's pooled output).
            branch_gradients: `mean`: a loss that is averaged over the branches, or that reads their mean, gives each
                branch's own weights 1/K of the gradient of a plain network; `sum`: the whole of it, so that a branch
                learns as fast as a network of its own. The trunk learns from the mean in both cases.

        Raises:
            UserError: for a number of branches out of range, a stage that the network does not have, an unknown
                ensemble or value of `branch_gradients`, or a gate without a trunk; and as `registry.build_network`.
        """
        super().__init__()
        _check(branches, split_after, ensemble)
        if branch_gradients not in BRANCH_GRADIENTS:
            raise unknown_name("branch_gradients", branch_gradients, BRANCH_GRADIENTS)
        network = build_network(spec)
        names = network.stage_names
        if split_after != NO_SPLIT and split_after not in names:
            raise unknown_name(f"split_after for network {spec.name!r}:", split_after, (*names, NO_SPLIT))
        shared = 0 if split_after == NO_SPLIT else names.index(split_after) + 1
        self.spec = spec
        self.ensemble = ensemble
        self.num_features = network.num_features
        self.fixed_size = network.fixed_size
        self.split_after = split_after
        self.branch_gradients = branch_gradients
        self.stage_names = names
        self.trunk = Trunk(network, names[:shared])
        networks = [network, *(build_network(spec) for _ in range(branches - 1))]
        self.branches = nn.ModuleList(Branch(one, names[shared:]) for one in networks)
        self.gate = None
        if ensemble == "gate":
            self.gate = Gate(network.stage_shapes(network.fixed_size or 32)[split_after][0], branches)

    @property
    def num_branches(self) -> int:
        """K."""
        return len(self.branches)

    @property
    def num_classes(self) -> int:
        """C."""
        return self.spec.num_classes

    def arguments(self) -> dict[str, Any]:
        """Returns the constructor's arguments as JSON-able values."""
        return {
            "spec": self.spec.to_dict(),
            "branches": self.num_branches,
            "split_after": self.split_after,
            "ensemble": self.ensemble,
            "branch_gradients": self.branch_gradients,
        }

    def forward(self, images: Tensor) -> Tensor:
        """Classifies images [B, 3, H, W] in [0, 1].

        Returns:
            The ensemble output [B, C]: logits, or log-probabilities for `mean_probs`.
        """
        return self.outputs(images).logits

    def outputs(self, images: Tensor, stages: Sequence[str] | None = None) -> StudentOutput:
        """Classifies images, and returns the logits, pooled features and stage outputs of each branch as well.

        Args:
            images: [B, 3, H, W] in [0, 1], not normalised.
            stages: The stages whose outputs are returned; None for all. A compiler can drop the others.
        """
        maps, shared = self.trunk(images)
        results = [self._through_branch(branch, maps) for branch in self.branches]
        branch_logits = torch.stack([logits for logits, _, _ in results])
        pooled = torch.stack([features for _, features, _ in results])
        wanted = self.stage_names if stages is None else stages
        found = tuple({name: (own if name in own else shared)[name] for name in wanted} for _, _, own in results)
        logits = couple(branch_logits, self.ensemble, None if self.gate is None else self.gate(maps))
        return StudentOutput(logits, branch_logits, pooled, found)

    def _through_branch(self, branch: nn.Module, maps: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        if not self.training or self.branch_gradients == "mean" or self.num_branches == 1:
            return cast("tuple[Tensor, Tensor, dict[str, Tensor]]", branch(maps))
        K = float(self.num_branches)
        logits, pooled, own = branch(scale_gradient(maps, 1.0 / K))
        return scale_gradient(logits, K), scale_gradient(pooled, K), {n: scale_gradient(m, K) for n, m in own.items()}

    def stage_shapes(self, image_size: ImageSize = 32) -> dict[str, tuple[int, int, int]]:
        """Returns the shape (channels, height, width) of each stage's output in every branch.

        Nothing is computed (meta device), and the student does not change.

        Raises:
            UserError: when its network does not accept images of this size.
        """
        check_size(self.spec, self.fixed_size, image_size)
        stages = {**self.trunk.stages, **cast(Branch, self.branches[0]).stages}
        return shapes_of(self.trunk.normalize, nn.ModuleDict(stages), image_size)


def _check(branches: int, split_after: str, ensemble: str) -> None:
    if not isinstance(branches, int) or isinstance(branches, bool) or not 1 <= branches <= MOST_BRANCHES:
        raise UserError(f"branches={branches!r:.30} is not allowed; give an integer from 1 to {MOST_BRANCHES}")
    if ensemble not in ENSEMBLES:
        raise unknown_name("ensemble", ensemble, ENSEMBLES)
    if ensemble == "gate" and split_after == NO_SPLIT:
        raise UserError(
            "ensemble='gate' needs a shared trunk, but split_after='none' leaves none; set split_after to a stage"
        )
