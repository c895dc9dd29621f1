"""Corruptions of weather and light: snow, frost, fog, brightness, and (extra) saturate and spatter.

Constants are those of `make_cifar_c.py` in https://github.com/hendrycks/robustness (Hendrycks and Dietterich 2019).
Functions are as in `corruption_pixels`. Spatter is drops of water or mud, with the steps of OpenCV that it
is made of: its maps are [N, H, W], with grey levels kept in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ekd_lightning.data.views import to_unit
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


_WATER, _MUD = (175, 238, 238), (63, 42, 20)
_STEPS = [(0, 1, 1.0), (1, 0, 1.0), (1, 1, 1.4), (1, 2, 2.1969), (2, 1, 2.1969)]
_FAR = 20.0


def spatter(images: Tensor, severity: int, draws: ImageDraws) -> Tensor:
    """Transparent drops with bright edges at severities 1 .. 3, opaque mud at 4 and 5."""
    mean, std, sigma, threshold, strength, mud = (
        (0.62, 0.1, 0.7, 0.7, 0.5, False),
        (0.65, 0.1, 0.8, 0.7, 0.5, False),
        (0.65, 0.3, 1.0, 0.69, 0.5, False),
        (0.65, 0.1, 0.7, 0.69, 0.6, True),
        (0.65, 0.1, 0.5, 0.68, 0.6, True),
    )[severity - 1]
    layer = tools.gaussian_blur(mean + std * draws.normal(*images.shape[-2:]), sigma)
    if mud:
        cover = tools.gaussian_blur((layer > threshold).to(images), strength)
        cover = cover.masked_fill(cover < 0.8, 0.0)[:, None]
        return images * (1 - cover) + cover * _colour(_MUD, images)
    layer = layer.masked_fill(layer < threshold, 0.0)
    light = _water((layer * 255).floor() % 256)  # a drop brighter than white wraps around, as in the source
    brightest = light.amax((1, 2), keepdim=True)
    light = torch.where(brightest > 0, light / brightest, 0.0) * strength
    return images + light[:, None] * _colour(_WATER, images)


def _colour(levels: tuple[int, int, int], images: Tensor) -> Tensor:
    return to_unit(torch.tensor(levels)).to(images)[:, None, None]


def _water(layer: Tensor) -> Tensor:
    """How bright the drops of a layer of grey levels are: the layer times its embossed distance from the edges."""
    distance = edge_distance(canny(layer, 50, 150))
    box = torch.full((3, 3), 1 / 9)
    distance = equalize(tools.correlate(distance, box, "mirror").add(1e-4).floor())
    emboss = torch.tensor([[-2.0, -1, 0], [-1, 1, 1], [0, 1, 2]])
    distance = tools.correlate(distance, emboss, "mirror").clamp(0, 255)
    return layer * tools.correlate(distance, box, "mirror").round()


def canny(layer: Tensor, low: float, high: float) -> Tensor:
    """Edges of grey levels [N, H, W] as `cv2.Canny(layer, low, high)` finds them; bool [N, H, W]."""
    smooth, slope = [1.0, 2.0, 1.0], [-1.0, 0.0, 1.0]
    dx = tools.correlate_axis(tools.correlate_axis(layer, smooth, 1, "nearest"), slope, 2, "nearest")
    dy = tools.correlate_axis(tools.correlate_axis(layer, slope, 1, "nearest"), smooth, 2, "nearest")
    size = dx.abs() + dy.abs()
    flat = dy.abs() < dx.abs() * 0.41421356  # tan of 22.5 degrees
    steep = dy.abs() > dx.abs() * 2.41421356
    same = (dx < 0) == (dy < 0)
    largest = torch.where(
        flat,
        (size > _seen(size, 0, -1)) & (size >= _seen(size, 0, 1)),
        torch.where(
            steep,
            (size > _seen(size, -1, 0)) & (size >= _seen(size, 1, 0)),
            torch.where(
                same,
                (size > _seen(size, -1, -1)) & (size > _seen(size, 1, 1)),
                (size > _seen(size, -1, 1)) & (size > _seen(size, 1, -1)),
            ),
        ),
    )
    weak = largest & (size > low)
    return _connected(weak & (size > high), weak)


def _connected(strong: Tensor, weak: Tensor) -> Tensor:
    """The weak pixels that a chain of weak neighbours joins to a strong one."""
    while True:
        grown = strong.float()
        grown = torch.nn.functional.max_pool2d(grown[:, None], 3, stride=1, padding=1)[:, 0]
        grown_edges = (grown > 0) & weak
        if torch.equal(grown_edges, strong):
            return strong
        strong = grown_edges


def _seen(maps: Tensor, down: int, right: int, outside: float = 0.0) -> Tensor:
    """What each pixel sees that many rows below and columns to its right (at most two)."""
    H, W = maps.shape[-2:]
    padded = torch.nn.functional.pad(maps, (2, 2, 2, 2), value=outside)
    return padded[..., 2 + down : 2 + down + H, 2 + right : 2 + right + W]


def edge_distance(edges: Tensor) -> Tensor:
    """Distance of each pixel from the nearest edge, at most 20, along steps of 1, 1.4 and 2.1969.

    These are the steps of `cv2.distanceTransform` with a 5 × 5 mask (Borgefors 1986).

    Args:
        edges: bool [N, H, W].

    Returns:
        float32 [N, H, W].
    """
    distance = torch.where(edges, 0.0, _FAR)
    while True:
        shorter = distance
        for down, right, cost in _STEPS:
            for sign, other in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
                beside = _seen(distance, sign * down, other * right, outside=_FAR)
                shorter = torch.minimum(shorter, beside + cost)
        if torch.equal(shorter, distance):
            return distance
        distance = shorter


def equalize(levels: Tensor) -> Tensor:
    """Equalises the histogram of each map of grey levels [N, H, W] as `cv2.equalizeHist` does."""
    N = len(levels)
    place = levels.long().flatten(1)
    histogram = torch.zeros(N, 256, device=levels.device).scatter_add_(1, place, torch.ones_like(levels).flatten(1))
    darkest = histogram.gather(1, place.amin(1, keepdim=True))
    others = place.shape[1] - darkest
    table = ((histogram.cumsum(1) - darkest) * (255 / others)).round().clamp(0, 255)
    return torch.where(others[..., None] > 0, table.gather(1, place).view_as(levels), levels)
