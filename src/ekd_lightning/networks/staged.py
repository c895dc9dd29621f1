"""Staged networks, the common structure of teachers and students: outputs, normalisation, stages.

Shape letters: B batch, C classes, D features, M teachers, K branches.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, fx, nn

from ekd_lightning.errors import UserError
from ekd_lightning.networks.spec import NetworkSpec, Normalization

_ModuleT = TypeVar("_ModuleT", bound=nn.Module)
ImageSize = int | Sequence[int]
"""Side of square images in pixels, or (height, width)."""


def sides(image_size: ImageSize) -> tuple[int, int]:
    """Returns height and width in pixels."""
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    return int(height), int(width)


class NetworkOutput(NamedTuple):
    """One network's outputs for a batch.

    Attributes:
        logits: [B, C].
        pooled: [B, D], globally average-pooled output of the last stage (the input of the head).
        stages: output of every named stage, [B, channels, height, width].
    """

    logits: Tensor
    pooled: Tensor
    stages: dict[str, Tensor]


class TeacherOutput(NamedTuple):
    """Outputs of M frozen teachers for a batch, without gradients.

    Attributes:
        logits: [M, B, C].
        pooled: M tensors [B, D_m].
        stages: the requested stage outputs of each teacher (M dicts), [B, channels, height, width].
    """

    logits: Tensor
    pooled: tuple[Tensor, ...]
    stages: tuple[dict[str, Tensor], ...]

    @classmethod
    def of(cls, outputs: Sequence[NetworkOutput], stages: Sequence[str]) -> TeacherOutput:
        """Joins the outputs of M networks, restricted to some stages; names with a grid (`on_grid`) are averaged."""

        def output_of(name: str, outputs: Mapping[str, Tensor]) -> Tensor:
            stage, grid = stage_and_grid(name)
            return outputs[name] if name in outputs else averaged(outputs[own_stage(stage, outputs)], grid)

        return cls(
            torch.stack([output.logits for output in outputs]),
            tuple(output.pooled for output in outputs),
            tuple({name: output_of(name, output.stages) for name in stages} for output in outputs),
        )


class StudentOutput(NamedTuple):
    """Outputs of a branched student for a batch.

    Attributes:
        logits: [B, C], the ensemble output; log-probabilities for `mean_probs`.
        branch_logits: [K, B, C].
        pooled: [K, B, D], pooled features of each branch.
        stages: stage outputs of each branch (K dicts), [B, channels, height, width]; every dict has the shared stages.
    """

    logits: Tensor
    branch_logits: Tensor
    pooled: Tensor
    stages: tuple[dict[str, Tensor], ...]


class Normalize(nn.Module):
    """Resizes and normalises images [B, 3, H, W] in [0, 1] as in the network's training.

    Attributes:
        image_size: As in `NetworkSpec`.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, statistics: Normalization, image_size: int | None = None) -> None:
        super().__init__()
        self.image_size = image_size
        # Not persistent: the spec holds the statistics, and weights must not contradict it.
        self.register_buffer("mean", torch.tensor(statistics.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(statistics.std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Returns (images - mean) / std in the network's floating-point type, [B, 3, H, W] (or resized).

        Raises:
            TypeError: when the images are not floating point.
        """
        if not images.is_floating_point():
            raise TypeError(f"images must be floating point in [0, 1], got {images.dtype}; convert uint8 by / 255")
        return self.unchecked(images).to(self.mean.dtype)

    def unchecked(self, images: Tensor) -> Tensor:
        """Resizes, bilinearly with antialiasing, and normalises floating-point images; `torch.fx` can trace it."""
        if self.image_size is not None:
            images = nn.functional.interpolate(images, (self.image_size,) * 2, mode="bilinear", antialias=True)
        return (images - self.mean) / self.std


def through(stages: nn.ModuleDict, maps: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Runs stages in order; returns the last output (the input if there are no stages), and all outputs by name."""
    outputs: dict[str, Tensor] = {}
    for name, stage in stages.items():
        maps = outputs[name] = stage(maps)
    return maps, outputs


LAST = "last"
"""Name by which every network's own last stage can be asked for."""


def own_stage(name: str, stages: Iterable[str]) -> str:
    """Returns a network's own name of a stage: `last` is the last of its stages, in the order of execution."""
    return list(stages)[-1] if name == LAST else name


_GRID = "."  # separates stage and grid; names of modules cannot contain it


def on_grid(stage: str, grid: int | None) -> str:
    """Returns the name of a stage's output averaged to grid × grid, e.g. `stage2.4x4`; without a grid the stage's."""
    return stage if grid is None else f"{stage}{_GRID}{grid}x{grid}"


def stage_and_grid(name: str) -> tuple[str, int | None]:
    """Splits a name of `on_grid` into stage and grid; the grid is None for a stage's own name."""
    stage, _, size = name.partition(_GRID)
    return stage, int(size.partition("x")[0]) if size else None


def averaged(maps: Tensor, grid: int | None) -> Tensor:
    """Averages maps [B, channels, height, width] over space to grid × grid; None keeps them."""
    return maps if grid is None else average_pool(maps, (grid, grid))


@fx.wrap  # its choice of a kernel depends on the sizes
def average_pool(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Averages maps [B, channels, height, width] to a height and width, as adaptive_avg_pool2d does.

    Equal windows go through avg_pool2d, which is equal within rounding and has a deterministic backward pass on CUDA.
    """
    height, width = maps.shape[2:]
    if height % size[0] == 0 and width % size[1] == 0:
        return nn.functional.avg_pool2d(maps, (height // size[0], width // size[1]))
    return nn.functional.adaptive_avg_pool2d(maps, size)


def shape_at(shapes: Mapping[str, tuple[int, int, int]], name: str) -> tuple[int, int, int]:
    """Returns the shape (channels, height, width) of a stage's output, averaged if its name has a grid (`on_grid`).

    The shapes are given by the stages' own names; the name may be `last`.
    """
    stage, grid = stage_and_grid(name)
    shape = shapes[own_stage(stage, shapes)]
    return shape if grid is None else (shape[0], grid, grid)


def pool(maps: Tensor) -> Tensor:
    """Global average: [B, D, height, width] to [B, D]."""
    return maps.mean((-2, -1))


class GlobalPool(nn.Module):
    """The default neck: `pool` as a module."""

    def forward(self, maps: Tensor) -> Tensor:
        """Maps [B, D, height, width] to [B, D]."""
        return pool(maps)


class StagedNetwork(nn.Module):
    """A classifier that consists of its own normalisation, named stages, a neck and a head.

    Attributes:
        spec: the spec that the network was built from; it suffices to build it again.
        normalize: resizes and normalises images as the spec says.
        stages: the stages by name, in the order of execution (`stem`, `stage1`, ...).
        neck: maps the last stage's output to the head's input; `GlobalPool` except in networks of other libraries.
        head: the linear classifier; an identity in a network of another library that does not end with one.
        num_features: D, the width of the head's input; 0 without a linear head.
        fixed_size: side in pixels of the only image size that the stages accept; None if they accept any.
    """

    stages: nn.ModuleDict
    head: nn.Module

    def __init__(
        self,
        spec: NetworkSpec,
        stages: Mapping[str, nn.Module],
        num_features: int,
        *,
        neck: nn.Module | None = None,
        head: nn.Module | None = None,
        fixed_size: int | None = None,
    ) -> None:
        """Assembles the network from modules, which keep their weights; arguments are the attributes of the class.

        The neck is a global pool unless one is given; D is then the number of channels of the last stage's output. The
        head is a newly initialised linear classifier [D -> C] unless one is given.

        Raises:
            UserError: when the spec's image size differs from the fixed one.
        """
        super().__init__()
        self.spec = spec
        self.num_features = num_features
        self.fixed_size = fixed_size
        if spec.image_size is not None:
            check_size(spec, fixed_size, spec.image_size)
        self.normalize = Normalize(spec.normalization, spec.image_size)
        self.stages = nn.ModuleDict(stages)
        self.neck = GlobalPool() if neck is None else neck
        self.head = nn.Linear(num_features, spec.num_classes) if head is None else head

    @property
    def stage_names(self) -> tuple[str, ...]:
        """Names of the stages, in the order of execution."""
        return tuple(self.stages)

    @property
    def pooled_width(self) -> int:
        """Width of `NetworkOutput.pooled`: D; without a linear head C, as it is then the logits."""
        return self.num_features or self.spec.num_classes

    def classify(self, features: Tensor) -> Tensor:
        """Applies the network's classifier with frozen weights; gradients flow to the features only.

        Maps features [B, D], or maps like the last stage's output, [B, channels, height, width], to logits [B, C], in
        the floating-point type of the head.
        """
        assert isinstance(self.head, nn.Linear), "a network without pooled features has no classifier of its own"
        pooled = self.neck(features) if features.dim() == 4 else features
        # Detached, since in a plain loop the classifier may still have requires_grad.
        bias = None if self.head.bias is None else self.head.bias.detach()
        return nn.functional.linear(pooled.to(self.head.weight.dtype), self.head.weight.detach(), bias)

    def forward(self, images: Tensor) -> Tensor:
        """Maps images [B, 3, H, W] in [0, 1], not normalised, to logits [B, C]."""
        maps = self.normalize(images)
        for stage in self.stages.values():
            maps = stage(maps)
        return self.head(self.neck(maps))

    def outputs(self, images: Tensor) -> NetworkOutput:
        """Maps images as `forward` does, and returns pooled features and the outputs of all stages as well."""
        maps, stages = through(self.stages, self.normalize(images))
        pooled = self.neck(maps)
        return NetworkOutput(self.head(pooled), pooled, stages)

    def stage_shapes(self, image_size: ImageSize = 32) -> dict[str, tuple[int, int, int]]:
        """Returns the shape (channels, height, width) of each stage's output.

        Nothing is computed (meta device), and the network does not change.

        Raises:
            UserError: when the network does not accept images of this size.
        """
        check_size(self.spec, self.fixed_size, image_size)
        return shapes_of(self.normalize, self.stages, image_size)


def check_size(spec: NetworkSpec, fixed_size: int | None, image_size: ImageSize) -> None:
    """Refuses images of a size that a network of fixed size does not accept; a spec with an image size accepts any."""
    height, width = sides(image_size if spec.image_size is None else spec.image_size)
    if fixed_size is not None and (height, width) != (fixed_size, fixed_size):
        raise UserError(
            f"network {spec.name!r} accepts only images of {fixed_size}×{fixed_size} pixels, not {height}×{width}: "
            f"set image_size={fixed_size} to resize them, or options={{img_size: {height}}} to build a timm network "
            "for their size"
        )


def in_memory_format(module: _ModuleT, memory_format: torch.memory_format) -> _ModuleT:
    """Converts a module's four-dimensional parameters to a memory format; other parameters cannot have it."""
    for parameter in module.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=memory_format)
    return module


def he_initialised(network: StagedNetwork) -> StagedNetwork:
    """Initialises the convolutions of a network's stages as in He et al. 2015, and returns the network.

    Biases of convolutions become 0; linear layers and batch norms do not change. Builders call it for new modules.
    Weights on the meta device have no values and are skipped.
    """
    for module in network.stages.modules():
        if isinstance(module, nn.Conv2d) and not module.weight.is_meta:
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return network


def meta_probe(module: _ModuleT) -> _ModuleT:
    """Returns a copy in eval mode on the meta device, for a forward pass that computes shapes alone.

    Batch norms of images pass their input on: they keep its shape, and on the meta device they would take most of the
    time.
    """
    probe = copy.deepcopy(module).to("meta").eval()
    for layer in probe.modules():
        if type(layer) is nn.BatchNorm2d:
            layer.forward = nn.Identity().forward  # type: ignore[method-assign]
    return probe


def shapes_of(normalize: Normalize, stages: nn.ModuleDict, image_size: ImageSize) -> dict[str, tuple[int, int, int]]:
    """Returns channels, height and width of each stage's output; see `StagedNetwork.stage_shapes`."""
    probe = meta_probe(nn.ModuleList([normalize, stages]))
    with torch.no_grad():
        maps = probe[0](torch.empty(1, 3, *sides(image_size), device="meta"))
        _, outputs = through(probe[1], maps)  # type: ignore[arg-type]
    return {name: (maps.shape[1], maps.shape[2], maps.shape[3]) for name, maps in outputs.items()}
