"""Networks made of named stages: the one shape every teacher and student here has.

Shape letters: B batch, C classes, D features.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ekd_lightning.networks.outputs import NetworkOutput
from ekd_lightning.networks.spec import NetworkSpec, Normalization


class Normalize(nn.Module):
    """Brings images [B, 3, H, W] in [0, 1] to the statistics a network was trained with."""

    mean: Tensor
    std: Tensor

    def __init__(self, statistics: Normalization) -> None:
        super().__init__()
        # Not persistent: the statistics belong to the spec, so they cannot contradict it.
        self.register_buffer("mean", torch.tensor(statistics.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(statistics.std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Returns (images - mean) / std in the network's own floating-point type.

        Raises:
            TypeError: when the images are integers; they are expected in [0, 1].
        """
        if not images.is_floating_point():
            raise TypeError(f"images must be floating point in [0, 1], got {images.dtype}; divide by 255")
        return ((images - self.mean) / self.std).to(self.mean.dtype)


def pool(maps: Tensor) -> Tensor:
    """Global average: [B, D, height, width] to [B, D]."""
    return maps.mean((-2, -1))


class StagedNetwork(nn.Module):
    """A classifier made of an own normalisation, named stages and one linear head.

    Attributes:
        spec: what the network was built from; enough to build it again.
        normalize: applies the spec's normalisation.
        stages: the stages by name, in the order of execution (`stem`, `stage1`, ...).
        head: the linear classifier on the pooled output of the last stage.
        num_features: D, the width of the head's input.
    """

    stages: nn.ModuleDict
    head: nn.Linear

    def __init__(self, spec: NetworkSpec, stages: Mapping[str, nn.Module], num_features: int) -> None:
        """Assembles and initialises the network.

        Args:
            spec: what the network is built from.
            stages: name to module, in the order of execution.
            num_features: number of channels of the last stage's output.
        """
        super().__init__()
        self.spec = spec
        self.num_features = num_features
        self.normalize = Normalize(spec.normalization)
        self.stages = nn.ModuleDict(stages)
        self.head = nn.Linear(num_features, spec.num_classes)
        for module in self.stages.modules():
            # He et al. 2015, as in the residual networks' papers; linear layers keep PyTorch's default.
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @property
    def stage_names(self) -> tuple[str, ...]:
        """Names of the stages, in the order of execution."""
        return tuple(self.stages)

    def forward(self, images: Tensor) -> Tensor:
        """Classifies images.

        Args:
            images: [B, 3, H, W] in [0, 1], not normalised.

        Returns:
            Logits [B, C].
        """
        maps = self.normalize(images)
        for stage in self.stages.values():
            maps = stage(maps)
        return self.head(pool(maps))

    def outputs(self, images: Tensor) -> NetworkOutput:
        """Like `forward`, with the pooled features [B, D] and every stage's output.

        Args:
            images: [B, 3, H, W] in [0, 1], not normalised.
        """
        maps = self.normalize(images)
        stages: dict[str, Tensor] = {}
        for name, stage in self.stages.items():
            maps = stages[name] = stage(maps)
        pooled = pool(maps)
        return NetworkOutput(self.head(pooled), pooled, stages)

    def stage_shapes(self, image_size: int = 32) -> dict[str, tuple[int, int, int]]:
        """Tells the shape (channels, height, width) of each stage's output for square images.

        Nothing is computed (meta device) and this network is not touched.
        """
        return shapes_of(imagined(self, image_size).stages)


def imagined(network: Any, image_size: int) -> Any:
    """The outputs of a network for one image, without values: nothing is computed, and it is not touched."""
    # A copy in eval mode: a forward in train mode would move the batch norm statistics.
    probe = copy.deepcopy(network).to("meta").eval()
    with torch.no_grad():
        return probe.outputs(torch.empty(1, 3, image_size, image_size, device="meta"))


def shapes_of(stages: Mapping[str, Tensor]) -> dict[str, tuple[int, int, int]]:
    """Channels, height and width of each stage's output."""
    return {name: (maps.shape[1], maps.shape[2], maps.shape[3]) for name, maps in stages.items()}
