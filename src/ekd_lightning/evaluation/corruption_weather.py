"""Corruptions of weather and light: snow, frost, fog, brightness, and (extra) saturate.

Constants are those of `make_cifar_c.py` in https://github.com/hendrycks/robustness (Hendrycks and Dietterich 2019);
functions are as in `corruption_noise`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ekd_lightning.data.images import to_unit
from ekd_lightning.evaluation import corruption_tools as tools
from ekd_lightning.evaluation.corruption_tools import ImageDraws

_GREY = (0.299, 0.587, 0.114)


def snow(images: Tensor, severity: int, draws: ImageDraws) -> Tensor:
    """Flakes drawn by the wind, on an image that is whitened."""
    mean, std, zoom, threshold, radius, sigma, keep = (
        (0.1, 0.2, 1.0, 0.6, 8, 3.0, 0.95),
        (0.1, 0.2, 1.0, 0.5, 10, 4.0, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4.0, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6.0, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12.0, 0.8),
    )[severity - 1]
    layer = tools.zoomed(mean + std * draws.normal(*images.shape[-2:]), zoom)[:, None]
    layer = to_unit(tools.to_levels(layer.masked_fill(layer < threshold, 0.0)))
    angle = draws.uniform(1)[:, 0].double() * 90 - 135
    layer = tools.motion_blur(layer, radius, sigma, angle)
    grey = sum(weight * channel for weight, channel in zip(_GREY, images.unbind(1), strict=True))
    assert isinstance(grey, Tensor)
    white = torch.maximum(images, grey[:, None] * 1.5 + 0.5)
    return keep * images + (1 - keep) * white + layer + layer.flip(-2, -1)


def frost(images: Tensor, severity: int, draws: ImageDraws, textures: Sequence[Tensor]) -> Tensor:
    """Mixed with a piece of a photograph of frost.

    Args:
        images: float32 [N, 3, H, W] in [0, 1].
        severity: 1 .. 5.
        draws: Of the images.
        textures: Photographs, float32 [3, height, width] in [0, 1], larger than the images.
    """
    keep, share = ((1.0, 0.2), (1.0, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))[severity - 1]
    H, W = images.shape[-2:]
    which, down, right = draws.uniform(3).double().unbind(1)
    chosen = (which * len(textures)).long().tolist()
    pieces = []
    for number, top, left in zip(chosen, down.tolist(), right.tolist(), strict=True):
        texture = textures[number]
        row, column = int(top * (texture.shape[1] - H)), int(left * (texture.shape[2] - W))
        pieces.append(texture[:, row : row + H, column : column + W])
    return keep * images + share * torch.stack(pieces).to(images)


def fog(images: Tensor, severity: int, draws: ImageDraws) -> Tensor:
    """A fractal cloud in front of the image, darkened so that the brightest value stays."""
    amount, decay = ((0.2, 3.0), (0.5, 3.0), (0.75, 2.5), (1.0, 2.0), (1.5, 1.75))[severity - 1]
    H, W = images.shape[-2:]
    brightest = images.amax((1, 2, 3), keepdim=True)
    cloud = plasma(draws, 1 << (max(H, W) - 1).bit_length(), decay)[:, None, :H, :W]
    return (images + amount * cloud) * brightest / (brightest + amount)


def plasma(draws: ImageDraws, size: int, decay: float) -> Tensor:
    """Height maps by the diamond-square algorithm, on a torus.

    Args:
        draws: Of the images.
        size: Height and width, a power of two.
        decay: By how much the random part shrinks when the grid is halved.

    Returns:
        float32 [N, size, size] from 0 to 1.
    """
    first = draws.uniform(1)[:, :, None] * 0.0  # the corner starts at 0
    maps = first.repeat(1, size, size)
    step, wibble = size, 100.0

    def moved(total: Tensor) -> Tensor:
        noise = 2 * draws.uniform(*total.shape[1:]) - 1
        return total / 4 + wibble * wibble * noise

    while step >= 2:
        half = step // 2
        corners = maps[:, ::step, ::step]
        pairs = corners + corners.roll(-1, 1)
        maps[:, half::step, half::step] = moved(pairs + pairs.roll(-1, 2))
        middles = maps[:, half::step, half::step]
        beside = middles + middles.roll(1, 1) + corners + corners.roll(-1, 2)
        maps[:, ::step, half::step] = moved(beside)
        below = middles + middles.roll(1, 2) + corners + corners.roll(-1, 1)
        maps[:, half::step, ::step] = moved(below)
        step, wibble = half, wibble / decay
    maps -= maps.amin((1, 2), keepdim=True)
    return maps / maps.amax((1, 2), keepdim=True)


def brightness(images: Tensor, severity: int, draws: ImageDraws) -> Tensor:
    """Adds to the value of HSV; hue and saturation stay."""
    value, weakness = _value_and_weakness(images)
    saturation = _saturation(images, value)
    brighter = (value + (0.05, 0.1, 0.15, 0.2, 0.3)[severity - 1]).clamp(0, 1)
    return brighter * (1 - saturation * weakness)


def saturate(images: Tensor, severity: int, draws: ImageDraws) -> Tensor:
    """Scales and shifts the saturation of HSV; hue and value stay."""
    scale, shift = ((0.3, 0.0), (0.1, 0.0), (1.5, 0.0), (2.0, 0.1), (2.5, 0.2))[severity - 1]
    value, weakness = _value_and_weakness(images)
    saturation = (_saturation(images, value) * scale + shift).clamp(0, 1)
    return value * (1 - saturation * weakness)


def _value_and_weakness(images: Tensor) -> tuple[Tensor, Tensor]:
    """What HSV leaves when the saturation is taken out: colour = value (1 - saturation · weakness).

    The weakness of a channel is (max - it) / (max - min); a grey pixel has the hue of red there.

    Returns:
        [N, 1, H, W] and [N, 3, H, W].
    """
    value = images.amax(1, keepdim=True)
    spread = value - images.amin(1, keepdim=True)
    red = torch.tensor([0.0, 1.0, 1.0]).to(images)[:, None, None]
    weakness = torch.where(spread > 0, (value - images) / spread, red)
    return value, weakness


def _saturation(images: Tensor, value: Tensor) -> Tensor:
    spread = value - images.amin(1, keepdim=True)
    return torch.where(value > 0, spread / value, 0.0)
