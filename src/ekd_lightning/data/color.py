"""Colour augmentations for whole batches: colour jitter and RandAugment.

Colour jitter follows the formulas of `torchvision.transforms.v2.functional.adjust_*` on uint8, but with one factor per
image instead of one for all images. Results agree within one grey level, because torchvision fuses a multiplication and
an addition that are rounded separately here. RandAugment uses the operations of torchvision, each applied at once to
all images for which it was drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ekd_lightning.data.augmentations import check_integer, check_number, register_augmentation
from ekd_lightning.data.order import Draws


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Multiplies each image by its factor: uint8 [B, 3, H, W] and float32 [B], at least 0."""
    return _to_uint8(images * factor[:, None, None, None])


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Blends each image uint8 [B, 3, H, W] with its mean grey; factor float32 [B], at least 0."""
    # Grey values are integers, so that their sum is exact in any order.
    total = _gray(images).long().sum((1, 2, 3), keepdim=True)
    return _blend(images, total.float() / (images.shape[2] * images.shape[3]), factor)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Blends each image uint8 [B, 3, H, W] with its grey version; factor float32 [B], at least 0."""
    return _blend(images, _gray(images), factor)


def adjust_hue(images: Tensor, factor: Tensor) -> Tensor:
    """Rotates the hue of each image uint8 [B, 3, H, W] by factor float32 [B] in [-0.5, 0.5], in turns."""
    rgb = images.float() / 255
    low, value = torch.aminmax(rgb, dim=1, keepdim=True)
    span = value - low
    red, green, blue = rgb.split(1, dim=1)
    # Hue in sixths of a turn, counted from red; for grey the value does not matter.
    safe = torch.where(span == 0, 1.0, span)
    sixth = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    turned = (sixth / 6 + factor[:, None, None, None]).remainder(1) * 6
    # A channel is full within one sixth of a turn from its hue, 0 beyond two sixths, and linear in between.
    offset = 5 - 2 * torch.arange(3, device=images.device)[:, None, None]
    distance = (offset + turned).remainder(6)
    lack = torch.minimum(distance, 4 - distance).clamp(0, 1)
    return ((value - span * lack) * 255.999).to(torch.uint8)  # torchvision's scale for the conversion


def _gray(images: Tensor) -> Tensor:
    """Returns grey values, float32 [B, 1, H, W], integers in 0 .. 255 (ITU-R 601 weights, as torchvision)."""
    red, green, blue = images.float().split(1, dim=1)
    return (red * 0.2989 + green * 0.587 + blue * 0.114).floor()


def _blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    factor = factor[:, None, None, None]
    return _to_uint8(images * factor + other * (1 - factor))


def _to_uint8(values: Tensor) -> Tensor:
    return values.clamp(0, 255).to(torch.uint8)


@register_augmentation("color")
class ColorJitter:
    """Colour jitter: changes brightness, contrast, saturation and hue of each image, in this order.

    Args:
        brightness: b >= 0; the factor is uniform in [max(0, 1 - b), 1 + b]; 0 for no change.
        contrast: The same for the contrast.
        saturation: The same for the saturation.
        hue: h in [0, 0.5]; the hue is rotated by a uniform share in [-h, h] of a full turn.

    Raises:
        UserError: For values outside these ranges.
    """

    def __init__(
        self, *, brightness: float = 0.4, contrast: float = 0.4, saturation: float = 0.4, hue: float = 0.1
    ) -> None:
        self.brightness = check_number("color.brightness", brightness, 0)
        self.contrast = check_number("color.contrast", contrast, 0)
        self.saturation = check_number("color.saturation", saturation, 0)
        self.hue = check_number("color.hue", hue, 0, 0.5)

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        """Augments a batch; see `data.augmentations.Augmentation`."""
        for adjust, strength in (
            (adjust_brightness, self.brightness),
            (adjust_contrast, self.contrast),
            (adjust_saturation, self.saturation),
        ):
            if strength:
                images = adjust(images, draws.uniform(max(0.0, 1 - strength), 1 + strength))
        return adjust_hue(images, draws.uniform(-self.hue, self.hue)) if self.hue else images


BINS = 31
"""Magnitudes are 0 .. 30."""


@cache
def _tv() -> Any:
    from torchvision.transforms.v2 import functional  # noqa: PLC0415  # over a second, and not always needed

    return functional


def _affine(images: Tensor, **changes: Any) -> Tensor:
    still = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0]}
    return _tv().affine(images, **{**still, **changes})


def _shear(value: float) -> float:
    return math.degrees(math.atan(value))


Operation = Callable[[Tensor, float], Tensor]

SIGNED: dict[str, Operation] = {
    "ShearX": lambda x, value: _affine(x, shear=[_shear(value), 0.0], center=[0, 0]),
    "ShearY": lambda x, value: _affine(x, shear=[0.0, _shear(value)], center=[0, 0]),
    "TranslateX": lambda x, value: _affine(x, translate=[int(value), 0]),
    "TranslateY": lambda x, value: _affine(x, translate=[0, int(value)]),
    "Rotate": lambda x, value: _tv().rotate(x, angle=value),
    "Brightness": lambda x, value: _tv().adjust_brightness(x, 1.0 + value),
    "Color": lambda x, value: _tv().adjust_saturation(x, 1.0 + value),
    "Contrast": lambda x, value: _tv().adjust_contrast(x, 1.0 + value),
    "Sharpness": lambda x, value: _tv().adjust_sharpness(x, 1.0 + value),
}
"""Operations whose strength is negated for half of the images."""

UNSIGNED: dict[str, Operation] = {
    "Identity": lambda x, value: x,
    "Posterize": lambda x, value: _tv().posterize(x, int(value)),
    "Solarize": lambda x, value: _tv().solarize(x, 255.0 * value),
    "AutoContrast": lambda x, value: _tv().autocontrast(x),
    "Equalize": lambda x, value: _tv().equalize(x),
}

NAMES = (*SIGNED, *UNSIGNED)


def strength(name: str, magnitude: int, height: int, width: int) -> float:
    """Returns the strength of an operation of `NAMES` at a magnitude, 0 .. 30, as in torchvision's RandAugment.

    It is for shears a tangent, for translations pixels, for rotations degrees, for factors their difference from 1 in 0
    .. 0.9, for Posterize the number of kept bits, for Solarize the threshold as a share of white; 0 for operations
    without a strength.
    """
    if name == "Posterize":
        return float((8 - torch.arange(BINS) / ((BINS - 1) / 4)).round()[magnitude])
    if name == "Solarize":
        return float(torch.linspace(1.0, 0.0, BINS)[magnitude])
    largest = {"ShearX": 0.3, "ShearY": 0.3, "Rotate": 30.0}
    largest |= {"TranslateX": 150.0 / 331.0 * width, "TranslateY": 150.0 / 331.0 * height}
    largest |= dict.fromkeys(("Brightness", "Color", "Contrast", "Sharpness"), 0.9)
    return float(torch.linspace(0.0, largest.get(name, 0.0), BINS)[magnitude])


@register_augmentation("randaugment")
class RandAugment:
    """RandAugment: N operations in sequence, each drawn uniformly from 14, all of magnitude M.

    Images with the same operation and sign are processed together, in at most 23 calls of torchvision for each of the
    N operations, whatever the batch size. The host needs the sizes of these groups, so on an accelerator each batch
    synchronises once with the device, besides the synchronisations within torchvision. Pixels from outside the image
    are black.

    Source: Cubuk et al. 2020, arXiv 1909.13719, in the form of torchvision's RandAugment.

    Args:
        num_ops: N, at least 1.
        magnitude: M, 0 .. 30.

    Raises:
        UserError: For values outside these ranges.
    """

    captures = False  # see `Augmentation`

    def __init__(self, *, num_ops: int = 2, magnitude: int = 9) -> None:
        self.num_ops = check_integer("randaugment.num_ops", num_ops, 1)
        self.magnitude = check_integer("randaugment.magnitude", magnitude, 0, BINS - 1)

    def draw(self, draws: Draws) -> Tensor:
        """Draws the operations, int64 [N, B]: twice the position in `NAMES`, plus 1 if the strength is negated."""
        name = draws.integers(len(NAMES), count=self.num_ops)
        negated = draws.integers(2, count=self.num_ops)
        return 2 * name + negated * (name < len(SIGNED))

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        """Augments a batch; see `data.augmentations.Augmentation`."""
        H, W = images.shape[2:]
        drawn = self.draw(draws)
        codes = torch.arange(2 * len(NAMES), device=images.device)
        counts = (drawn[:, :, None] == codes).sum(1).tolist()  # synchronises with the device
        for row, sizes in zip(drawn, counts, strict=True):
            changed = images.clone()
            groups = row.argsort(stable=True).split(sizes)
            for code, rows in enumerate(groups):
                name = NAMES[code // 2]
                if len(rows) and name != "Identity":
                    value = strength(name, self.magnitude, H, W) * (-1 if code % 2 else 1)
                    operation = SIGNED.get(name) or UNSIGNED[name]
                    changed[rows] = operation(images[rows], value)
            images = changed
        return images
