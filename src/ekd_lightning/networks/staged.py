"""Staged networks, the common structure of teachers and students: specs, outputs, normalisation.

Shape letters: B batch, C classes, D features, M teachers, K branches.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ekd_lightning.errors import Registry, UserError

Triple = tuple[float, float, float]
_ModuleT = TypeVar("_ModuleT", bound=nn.Module)
ImageSize = int | Sequence[int]
"""Side of square images in pixels, or (height, width)."""


def sides(image_size: ImageSize) -> tuple[int, int]:
    """Returns height and width in pixels."""
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    return int(height), int(width)


@dataclass(frozen=True)
class Normalization:
    """Per-channel statistics that a network applies to images in [0, 1].

    Attributes:
        mean: subtracted from the red, green and blue channel.
        std: what the difference is divided by; every entry above 0.

    Raises:
        UserError: when there are not three finite numbers each, or a std is not above 0.
    """

    mean: Triple
    std: Triple

    def __post_init__(self) -> None:
        try:
            mean, std = (tuple(float(value) for value in values) for values in (self.mean, self.std))
        except (TypeError, ValueError, OverflowError):
            raise UserError(f"normalization: mean {self.mean!r:.60}, std {self.std!r:.60} are not numbers") from None
        if len(mean) != 3 or len(std) != 3 or not all(map(math.isfinite, mean + std)) or min(std) <= 0:
            raise UserError(f"normalization: mean {mean}, std {std} must be three finite numbers each, std above 0")
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "std", std)


NORMALIZATIONS: Registry[Normalization] = Registry(
    "normalization",
    {
        "cifar10": Normalization((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
        "cifar100": Normalization((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
        "imagenet": Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        "unit": Normalization((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
        "centered": Normalization((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    },
)


def normalization(name: str) -> Normalization:
    """Looks up a named normalisation.

    Raises:
        UserError: when there is none of that name; the nearest one is offered.
    """
    return NORMALIZATIONS[name]


_OPTIONAL = ("image_size", "projection")  # of a network's spec


@dataclass(frozen=True)
class NetworkSpec:
    """All that determines a network's structure (not its weights).

    Attributes:
        name: a registered network.
        num_classes: C, at least 1.
        normalization: what the network does to images in [0, 1] first.
        options: keyword arguments of the registered builder, JSON-able.
        image_size: side in pixels to which the network brings images before anything else; None takes them as they
            are.
        projection: width of the teacher's features that a projector after the last stage maps to, for a teacher's
            classifier in place of the network's own, see `projection.project`; None for the network as it is.

    Raises:
        UserError: when the class count, the image size or the projection is not a whole number above 0 or an option is
            not JSON-able.
    """

    name: str
    num_classes: int
    normalization: Normalization
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    image_size: int | None = None
    projection: int | None = None

    def __post_init__(self) -> None:
        for key in _OPTIONAL:
            size = getattr(self, key)
            if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
                raise UserError(f"network {self.name!r}: {key}={size!r} must be at least 1, or null")
        if not isinstance(self.num_classes, int) or isinstance(self.num_classes, bool) or self.num_classes < 1:
            raise UserError(f"network {self.name!r}: num_classes={self.num_classes!r} must be at least 1")
        try:
            # A private copy in its JSON form: equal specs are then equal whatever file they came from.
            options = json.loads(json.dumps(dict(self.options)))
        except (TypeError, ValueError) as error:
            raise UserError(f"network {self.name!r}: options {self.options!r} are not JSON-able ({error})") from None
        object.__setattr__(self, "options", options)

    def to_dict(self) -> dict[str, Any]:
        """Returns the spec as plain JSON-able values; an image size or a projection of None is left out."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return {key: value for key, value in values.items() if key not in _OPTIONAL or value is not None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> NetworkSpec:
        """Rebuilds a spec from `to_dict` (a normalisation may also be given by its name).

        Raises:
            UserError: when a key is missing, unknown or of the wrong kind.
        """
        try:
            statistics = values["normalization"]
            named = isinstance(statistics, str)
            statistics = normalization(statistics) if named else Normalization(**statistics)
            rest = {key: value for key, value in values.items() if key != "normalization"}
            return cls(normalization=statistics, **rest)
        except (TypeError, KeyError) as error:
            raise UserError(f"not a network spec: {values!r:.300} ({error})") from None


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
    """Outputs of M frozen teachers for a batch. No tensor here carries a gradient.

    Attributes:
        logits: [M, B, C].
        pooled: M tensors [B, D_m].
        stages: for each teacher the requested stage outputs (empty without any).
    """

    logits: Tensor
    pooled: tuple[Tensor, ...]
    stages: tuple[dict[str, Tensor], ...]

    @classmethod
    def of(cls, outputs: Sequence[NetworkOutput], stages: Sequence[str]) -> TeacherOutput:
        """Joins the outputs of M networks, with the named stages, averaged here if their names have a grid."""

        def named(found: Mapping[str, Tensor], name: str) -> Tensor:
            stage, grid = stage_and_grid(name)
            return found[name] if name in found else averaged(found[stage], grid)

        return cls(
            torch.stack([output.logits for output in outputs]),
            tuple(output.pooled for output in outputs),
            tuple({name: named(output.stages, name) for name in stages} for output in outputs),
        )


class StudentOutput(NamedTuple):
    """Outputs of a branched student for a batch.

    Attributes:
        logits: [B, C], the ensemble output. For `mean_probs` these are log-probabilities.
        branch_logits: [K, B, C].
        pooled: [K, B, D], pooled features of each branch.
        stages: stage outputs of each branch (K dicts); shared stages appear in every one of them.
    """

    logits: Tensor
    branch_logits: Tensor
    pooled: Tensor
    stages: tuple[dict[str, Tensor], ...]


class Normalize(nn.Module):
    """Resizes and normalises images [B, 3, H, W] in [0, 1] as the network was trained.

    Attributes:
        image_size: As in `NetworkSpec`.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, statistics: Normalization, image_size: int | None = None) -> None:
        super().__init__()
        self.image_size = image_size
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
        if self.image_size is not None:
            images = resized(images, self.image_size)
        return ((images - self.mean) / self.std).to(self.mean.dtype)


def resized(images: Tensor, size: int) -> Tensor:
    """Resizes images [B, 3, H, W] to `size` pixels a side, bilinearly with antialiasing; exact at that size."""
    return nn.functional.interpolate(images, (size, size), mode="bilinear", antialias=True)


def through(stages: nn.ModuleDict, maps: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Runs stages one after the other; returns the last output (of none: what went in), and each by name."""
    outputs: dict[str, Tensor] = {}
    for name, stage in stages.items():
        maps = outputs[name] = stage(maps)
    return maps, outputs


_GRID = "."  # in no stage's own name: modules cannot have it there


def on_grid(stage: str, grid: int | None) -> str:
    """Name of a stage's output averaged to grid × grid, such as `stage2.4x4`; without a grid the stage's own."""
    return stage if grid is None else f"{stage}{_GRID}{grid}x{grid}"


def stage_and_grid(name: str) -> tuple[str, int | None]:
    """Takes a name of `on_grid` apart."""
    stage, _, sides_of_grid = name.partition(_GRID)
    return stage, int(sides_of_grid.partition("x")[0]) if sides_of_grid else None


def averaged(maps: Tensor, grid: int | None) -> Tensor:
    """Averages maps [B, channels, height, width] over space to grid × grid; None keeps them."""
    return maps if grid is None else average_pool(maps, (grid, grid))


def average_pool(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Averages maps [B, channels, height, width] to a height and width, as adaptive_avg_pool2d does.

    Equal windows go through avg_pool2d, which is equal within rounding and has a deterministic backward pass on CUDA.
    """
    height, width = maps.shape[2:]
    if height % size[0] == 0 and width % size[1] == 0:
        return nn.functional.avg_pool2d(maps, (height // size[0], width // size[1]))
    return nn.functional.adaptive_avg_pool2d(maps, size)


def shape_at(shapes: Mapping[str, tuple[int, int, int]], name: str) -> tuple[int, int, int]:
    """Shape (channels, height, width) of a stage's output, or of that on a grid, from the stages' own shapes."""
    stage, grid = stage_and_grid(name)
    return shapes[stage] if grid is None else (shapes[stage][0], grid, grid)


def pool(maps: Tensor) -> Tensor:
    """Global average: [B, D, height, width] to [B, D]."""
    return maps.mean((-2, -1))


class GlobalPool(nn.Module):
    """The usual neck: `pool` as a module."""

    def forward(self, maps: Tensor) -> Tensor:
        """Maps [B, D, height, width] to [B, D]."""
        return pool(maps)


class StagedNetwork(nn.Module):
    """A classifier made of an own normalisation, named stages, a neck and a head.

    Attributes:
        spec: what the network was built from; enough to build it again.
        normalize: brings images to the spec's size and normalisation.
        stages: the stages by name, in the order of execution (`stem`, `stage1`, ...).
        neck: makes the head's input of the last stage's output; `GlobalPool` but for networks of other libraries.
        head: the linear classifier; an identity in a network of another library that does not end with one.
        num_features: D, the width of the head's input; 0 without a linear head.
        fixed_size: side in pixels of the only images that its stages take; None where any size will do.
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
        """Assembles the network; what is handed in keeps its weights.

        Args:
            spec: what the network is built from.
            stages: name to module, in the order of execution.
            num_features: D, for a global pool the number of channels of the last stage's output.
            neck: None makes a global pool.
            head: None makes a fresh linear classifier [D -> C].
            fixed_size: side in pixels of the only images that the stages take; None where any size will do.

        Raises:
            UserError: when the spec's image size is another than the fixed one.
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

    def classify(self, features: Tensor) -> Tensor:
        """Applies the network's own classifier, held fixed; features get a gradient, weights none.

        Args:
            features: [B, D], or maps as the last stage gives them [B, channels, height, width].

        Returns:
            Logits [B, C], in the floating-point type of the head.
        """
        assert isinstance(self.head, nn.Linear), "a network without pooled features has no classifier of its own"
        pooled = self.neck(features) if features.dim() == 4 else features
        # Detached: the classifier is frozen, but a plain loop may have left its requires_grad on.
        bias = None if self.head.bias is None else self.head.bias.detach()
        return nn.functional.linear(pooled.to(self.head.weight.dtype), self.head.weight.detach(), bias)

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
        return self.head(self.neck(maps))

    def outputs(self, images: Tensor) -> NetworkOutput:
        """Like `forward`, with the pooled features [B, D] and every stage's output.

        Args:
            images: [B, 3, H, W] in [0, 1], not normalised.
        """
        maps, stages = through(self.stages, self.normalize(images))
        pooled = self.neck(maps)
        return NetworkOutput(self.head(pooled), pooled, stages)

    def stage_shapes(self, image_size: ImageSize = 32) -> dict[str, tuple[int, int, int]]:
        """Returns the shape (channels, height, width) of each stage's output.

        Nothing is computed (meta device) and this network is not touched.

        Raises:
            UserError: when the network does not take images of this size.
        """
        check_size(self.spec, self.fixed_size, image_size)
        probe = copy.deepcopy(nn.ModuleList([self.normalize, self.stages])).to("meta").eval()
        images = torch.empty(1, 3, *sides(image_size), device="meta")
        with torch.no_grad():
            return shapes_of(through(probe[1], probe[0](images))[1])  # type: ignore[arg-type]


def check_size(spec: NetworkSpec, fixed_size: int | None, image_size: ImageSize) -> None:
    """Checks that a network of fixed size can take images of this size; a spec's own size resizes any.

    Raises:
        UserError: with the size that it takes.
    """
    height, width = sides(image_size if spec.image_size is None else spec.image_size)
    if fixed_size is not None and (height, width) != (fixed_size, fixed_size):
        raise UserError(
            f"network {spec.name!r} takes images of {fixed_size}×{fixed_size} pixels alone, not of {height}×{width}: "
            f"image_size={fixed_size} brings them to that size; options={{img_size: {height}}} builds timm's for these"
        )


def in_memory_format(module: _ModuleT, memory_format: torch.memory_format) -> _ModuleT:
    """Converts a module's four-dimensional parameters to a memory format; attention keeps tables of five."""
    for parameter in module.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=memory_format)
    return module


def he_initialised(network: StagedNetwork) -> StagedNetwork:
    """Draws the convolutions of a network's stages as He et al. 2015 do, as in the residual networks' papers.

    Biases of convolutions become 0; linear layers and batch norms stay as they are. Builders call it for modules that
    they have just made.
    """
    for module in network.stages.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return network


def imagined(network: Any, image_size: ImageSize) -> Any:
    """Returns a network's outputs for one image on the meta device; nothing is computed."""
    # A copy in eval mode: a forward in train mode would move the batch norm statistics.
    probe = copy.deepcopy(network).to("meta").eval()
    with torch.no_grad():
        return probe.outputs(torch.empty(1, 3, *sides(image_size), device="meta"))


def shapes_of(stages: Mapping[str, Tensor]) -> dict[str, tuple[int, int, int]]:
    """Returns channels, height and width of each stage's output."""
    return {name: (maps.shape[1], maps.shape[2], maps.shape[3]) for name, maps in stages.items()}
