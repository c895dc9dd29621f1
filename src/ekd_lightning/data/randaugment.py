"""RandAugment: the operations of torchvision, applied to all images at once that drew the same one."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ekd_lightning.data.augmentations import check_integer, register_augmentation
from ekd_lightning.data.order import Draws

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
    """What a magnitude means for an operation, as in torchvision's RandAugment.

    Args:
        name: One of `NAMES`.
        magnitude: 0 .. 30.
        height: Of the image, in pixels.
        width: Of the image, in pixels.

    Returns:
        Shear as a tangent, translation in pixels, rotation in degrees, 0 .. 0.9 for what is added to a factor
        of 1, bits that are kept, or the threshold as a share of white; 0 for operations without a strength.
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
    """N operations one after the other, each drawn from 14 with equal chance, all of magnitude M.

    Images that drew the same operation and sign are taken together, so that there are at most 23 calls of
    torchvision for each of the N, whatever the batch size. The sizes of these groups must be known to the host:
    on an accelerator each batch waits once for the device, beside what torchvision's own functions wait for
    when they send a small matrix there. Pixels from outside the image are black.

    Source: Cubuk et al. 2020, arXiv 1909.13719, in the form of torchvision's RandAugment.

    Args:
        num_ops: N, at least 1.
        magnitude: M, 0 .. 30.

    Raises:
        UserError: Other values.
    """

    def __init__(self, *, num_ops: int = 2, magnitude: int = 9) -> None:
        self.num_ops = check_integer("randaugment.num_ops", num_ops, 1)
        self.magnitude = check_integer("randaugment.magnitude", magnitude, 0, BINS - 1)

    def draw(self, draws: Draws) -> Tensor:
        """Draws int64 [N, B]: 2 (position in `NAMES`) + 1 if the strength is negated."""
        name = draws.integers(len(NAMES), count=self.num_ops)
        negated = draws.integers(2, count=self.num_ops)
        return 2 * name + negated * (name < len(SIGNED))

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        """Augments a batch; see `data.augmentations.Augmentation`."""
        H, W = images.shape[2:]
        drawn = self.draw(draws)
        codes = torch.arange(2 * len(NAMES), device=images.device)
        counts = (drawn[:, :, None] == codes).sum(1).tolist()  # the one wait for the device
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
