"""Colour jitter with one factor per image, in a few tensor operations for the whole batch.

The formulas are those of `torchvision.transforms.v2.functional.adjust_*` on uint8, whose functions take one
factor for all images. Results agree within one grey level: torchvision fuses a multiplication and an addition
that are rounded separately here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ekd_lightning.data.augmentations import check_number, register_augmentation
from ekd_lightning.data.order import Draws


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Multiplies each image uint8 [B, 3, H, W] with its factor float32 [B], at least 0."""
    return _to_uint8(images * factor[:, None, None, None])


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Blends each image uint8 [B, 3, H, W] with its mean grey; factor float32 [B], at least 0."""
    # Grey values are integers, so that their sum is exact in whatever order it is taken.
    total = _gray(images).long().sum((1, 2, 3), keepdim=True)
    return _blend(images, total.float() / (images.shape[2] * images.shape[3]), factor)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Blends each image uint8 [B, 3, H, W] with its grey version; factor float32 [B], at least 0."""
    return _blend(images, _gray(images), factor)


def adjust_hue(images: Tensor, factor: Tensor) -> Tensor:
    """Turns the hue of each image uint8 [B, 3, H, W] by factor float32 [B] in [-0.5, 0.5], in turns."""
    rgb = images.float() / 255
    low, value = torch.aminmax(rgb, dim=1, keepdim=True)
    span = value - low
    red, green, blue = rgb.split(1, dim=1)
    # Hue in sixths of a turn, counted from red; any number does where the colour is grey.
    safe = torch.where(span == 0, 1.0, span)
    sixth = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    turned = (sixth / 6 + factor[:, None, None, None]).remainder(1) * 6
    # A channel is full within a sixth of its hue, empty from two sixths on, and falls linearly in between.
    offset = 5 - 2 * torch.arange(3, device=images.device)[:, None, None]
    distance = (offset + turned).remainder(6)
    lack = torch.minimum(distance, 4 - distance).clamp(0, 1)
    return ((value - span * lack) * 255.999).to(torch.uint8)  # the scale that torchvision converts back with


def _gray(images: Tensor) -> Tensor:
    """float32 [B, 1, H, W] with integer values 0 .. 255 (ITU-R 601 weights, as torchvision)."""
    red, green, blue = images.float().split(1, dim=1)
    return (red * 0.2989 + green * 0.587 + blue * 0.114).floor()


def _blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    factor = factor[:, None, None, None]
    return _to_uint8(images * factor + other * (1 - factor))


def _to_uint8(values: Tensor) -> Tensor:
    return values.clamp(0, 255).to(torch.uint8)


@register_augmentation("color")
class ColorJitter:
    """Brightness, contrast, saturation and hue of each image, changed in this order.

    Args:
        brightness: b >= 0; the factor is uniform in [max(0, 1 - b), 1 + b]. 0 leaves it alone.
        contrast: The same for the contrast.
        saturation: The same for the saturation.
        hue: h in [0, 0.5]; the hue is turned by -h .. h of a full turn.

    Raises:
        UserError: Other values.
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
