"""Augmentations by name, for pools of random views; `cutout`, `random_erasing` and `resized_crop`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from ekd_lightning.data.order import Draws
from ekd_lightning.errors import Registry, UserError
from ekd_lightning.roles import Range, check_keywords, parameters_of

OPTIONS_KEY = "data.augmentation_options"


class Augmentation(Protocol):
    """Changes each image of a batch by its own random numbers; options are keyword-only arguments.

    An augmentation that reads values back from the device must have an attribute `captures = False`, since training
    steps with it cannot be recorded as CUDA graphs.
    """

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        """Augments a batch.

        The result for an image may depend only on this image and on `draws`, neither on other images of the batch nor
        on other random numbers.

        Args:
            images: uint8 [B, 3, H, W]; must not be changed in place.
            draws: Random numbers, one for each image.

        Returns:
            uint8 [B, 3, H, W] on the same device.
        """
        ...


AugmentationClass = TypeVar("AugmentationClass", bound=Callable[..., Augmentation])

AUGMENTATIONS: Registry[Callable[..., Augmentation]] = Registry("augmentation")
"""All augmentations by name, without the view families `none` and `crop_flip`."""


def register_augmentation(name: str) -> Callable[[AugmentationClass], AugmentationClass]:
    """Makes an augmentation available as `data.augmentation=name`.

    Stored teachers and tables of teacher outputs are identified by names and options, so give an augmentation a new
    name whenever its results change.

    Args:
        name: The value of `data.augmentation`.

    Returns:
        The decorator for the class. The keyword-only arguments of the class are the options under
        `data.augmentation_options.<name>`; it must raise UserError for values that are not allowed.

    Raises:
        ValueError: If another class already has the name.
    """
    if name in ("none", "crop_flip"):
        raise ValueError(f"augmentation {name!r} is registered twice: this name belongs to a view family")
    return AUGMENTATIONS.register(name)


def build_augmentation(name: str, options: Mapping[str, Any]) -> tuple[Augmentation, str]:
    """Builds an augmentation by name; options that are not given have their defaults.

    Returns:
        The augmentation, and a key of its name and all options.

    Raises:
        UserError: For an unknown name or option, a required option that is missing, or a value that is not allowed.
    """
    make = AUGMENTATIONS[name]
    parameters = parameters_of(make)
    key = f"{OPTIONS_KEY}.{name}"
    check_keywords(key, options, parameters, key=key)
    values = {option: options.get(option, known.default) for option, known in parameters.items()}
    return make(**options), name + json.dumps(values, sort_keys=True, default=str)


def check_number(key: str, value: object, low: float, high: float = math.inf) -> float:
    """Returns an option, a finite number in [low, high], as a float; `key` is `<augmentation>.<option>`.

    Raises:
        UserError: If it is not a finite number in [low, high].
    """
    return Range(low, high).check(f"{OPTIONS_KEY}.{key}", value)


def check_integer(key: str, value: object, low: int, high: float = math.inf) -> int:
    """Checks an option that must be an integer in [low, high]; see `check_number`."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise UserError(f"{OPTIONS_KEY}.{key}={value!r}: must be an integer")
    Range(low, high).check(f"{OPTIONS_KEY}.{key}", value)
    return value


def check_range(key: str, value: object, low: float, high: float = math.inf) -> tuple[float, float]:
    """Checks an option that must be a pair of numbers in [low, high], the first not above the second."""
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        raise UserError(f"{OPTIONS_KEY}.{key}={value!r}: must be a pair [smallest, largest]")
    first, last = (check_number(key, item, low, high) for item in value)
    if first > last:
        raise UserError(f"{OPTIONS_KEY}.{key}={value!r}: the first number must not exceed the second")
    return first, last


def rectangles(top: Tensor, left: Tensor, height: Tensor | int, width: Tensor | int, like: Tensor) -> Tensor:
    """Marks one rectangle in each of the images [B, 3, H, W] of `like`: bool [B, 1, H, W], True inside.

    First row and column, and numbers of rows and columns, are int64 [B], the latter possibly one number for all images;
    all edges may lie outside the image.
    """
    row = torch.arange(like.shape[2], device=like.device)
    column = torch.arange(like.shape[3], device=like.device)
    down, right = row - top[:, None], column - left[:, None]
    bottom = height[:, None] if isinstance(height, Tensor) else height
    end = width[:, None] if isinstance(width, Tensor) else width
    in_rows, in_columns = (down >= 0) & (down < bottom), (right >= 0) & (right < end)
    return (in_rows[:, :, None] & in_columns[:, None, :])[:, None]


ATTEMPTS = 10
"""Maximum number of draws of a rectangle until one fits, as in torchvision."""


def _draw_box(
    draws: Draws, H: int, W: int, scale: tuple[float, float], log_ratio: tuple[float, float], most_H: int, most_W: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Draws a rectangle for each image; returns height and width, int64 [B], and whether it fits, bool [B].

    The share of the area is uniform in `scale`, and the logarithm of height / width is uniform in `log_ratio`.
    """
    area = H * W * draws.uniform(*scale, count=ATTEMPTS)
    ratio = draws.uniform(*log_ratio, count=ATTEMPTS).exp()
    heights, widths = (area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long()
    fits = (heights <= most_H) & (widths <= most_W)
    first = fits.byte().argmax(0, keepdim=True)
    return heights.gather(0, first)[0].clamp(max=H), widths.gather(0, first)[0].clamp(max=W), fits.any(0)


@register_augmentation("cutout")
class Cutout:
    """A black (zero) square centred on a random pixel, so that parts of it may lie outside the image.

    Source: DeVries and Taylor 2017, arXiv 1708.04552; they use 16 pixels on CIFAR-10 and 8 on CIFAR-100.

    Args:
        size: Side in pixels, at least 1.

    Raises:
        UserError: For any other size.
    """

    def __init__(self, *, size: int = 16) -> None:
        self.size = check_integer("cutout.size", size, 1)

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        """Augments a batch; see `Augmentation`."""
        top = draws.integers(images.shape[2]) - self.size // 2
        left = draws.integers(images.shape[3]) - self.size // 2
        return images.masked_fill(rectangles(top, left, self.size, self.size, images), 0)


@register_augmentation("random_erasing")
class RandomErasing:
    """A black (zero) rectangle within the image, with probability `p`.

    Area and aspect ratio (height / width) are drawn up to ten times until the rectangle is smaller than the image; if
    none fits, the image does not change. Source: Zhong et al. 2017, arXiv 1708.04896, in the form of torchvision's
    RandomErasing.

    Args:
        p: Probability of erasing, in [0, 1].
        scale: Range of the erased share of the area, in [0, 1].
        ratio: Range of the aspect ratio, whose logarithm is uniform; positive.

    Raises:
        UserError: For values outside these ranges.
    """

    def __init__(
        self, *, p: float = 0.5, scale: Sequence[float] = (0.02, 0.33), ratio: Sequence[float] = (0.3, 3.3)
    ) -> None:
        self.p = check_number("random_erasing.p", p, 0, 1)
        self.scale = check_range("random_erasing.scale", scale, 0, 1)
        low, high = check_range("random_erasing.ratio", ratio, 1e-6)
        self.log_ratio = math.log(low), math.log(high)

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        """Augments a batch; see `Augmentation`."""
        H, W = images.shape[2:]
        height, width, found = _draw_box(draws, H, W, self.scale, self.log_ratio, H - 1, W - 1)
        top, left = draws.integers(H - height + 1), draws.integers(W - width + 1)
        erased = (draws.uniform() < self.p) & found
        mask = rectangles(top, left, height, width, images) & erased[:, None, None, None]
        return images.masked_fill(mask, 0)


@register_augmentation("resized_crop")
class ResizedCrop:
    """A random rectangle of the image, enlarged to the image's size (bilinear).

    Area and aspect ratio (width / height) are drawn up to ten times until the rectangle fits into the image; if none
    fits, the image does not change. Source: Szegedy et al. 2015, arXiv 1409.4842, in the form of torchvision's
    RandomResizedCrop.

    Args:
        scale: Range of the rectangle's share of the area, in (0, 1].
        ratio: Range of the aspect ratio, whose logarithm is uniform; positive.

    Raises:
        UserError: For values outside these ranges.
    """

    def __init__(self, *, scale: Sequence[float] = (0.35, 1.0), ratio: Sequence[float] = (0.75, 4 / 3)) -> None:
        self.scale = check_range("resized_crop.scale", scale, 1e-6, 1)
        low, high = check_range("resized_crop.ratio", ratio, 1e-6)
        self.log_ratio = -math.log(high), -math.log(low)  # of height / width

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        """Augments a batch; see `Augmentation`."""
        H, W = images.shape[2:]
        height, width, found = _draw_box(draws, H, W, self.scale, self.log_ratio, H, W)
        height, width = (torch.where(found, sides, whole).clamp(min=1) for sides, whole in ((height, H), (width, W)))
        top, left = draws.integers(H - height + 1), draws.integers(W - width + 1)
        rows = _stretched(images.float(), top, height, 2)
        return _stretched(rows, left, width, 3).round().to(torch.uint8)


def _stretched(images: Tensor, first: Tensor, length: Tensor, dim: int) -> Tensor:
    """Enlarges `length` [B] pixels, beginning at `first` [B], to the whole of a dimension by linear interpolation."""
    size = images.shape[dim]
    shape = [len(images), 1, 1, 1]
    shape[dim] = size
    place = (torch.arange(size, device=images.device) + 0.5) * (length[:, None] / size) - 0.5  # [B, size]
    place = torch.minimum(place.clamp(min=0), length[:, None] - 1.0)
    below = place.floor().long()
    above = torch.minimum(below + 1, length[:, None] - 1)
    low, high = (images.gather(dim, (first[:, None] + index).view(shape).expand_as(images)) for index in (below, above))
    return torch.lerp(low, high, (place - below).view(shape))
