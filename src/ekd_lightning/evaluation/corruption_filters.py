"""Filters of the corruptions: seeded random numbers per image, blurs with a border rule, resampling, edges.

All filters take batches [N, C, H, W] or [N, H, W]; the result for an image does not depend on the rest of its batch.
"""

from __future__ import annotations

import math
import zlib

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

from ekd_lightning.data.order import Draws, hash_uniform_u64, splitmix64

STREAM_CORRUPTION = 10
"""Differs from the streams of `data.order`."""

_TRUNCATION = 1e-4


class ImageDraws(Draws):
    """Random numbers for N images, each a pure function of (seed, name, severity, image index, call).

    Name and severity are those of the corruption; `index`, int64 [N], are positions in the whole image set.
    """

    def __init__(self, seed: int, name: str, severity: int, index: Tensor) -> None:
        place = zlib.crc32(name.encode()) * 8 + severity
        key = int(hash_uniform_u64(STREAM_CORRUPTION, seed, place, np.zeros(1, np.int64)).view(np.int64)[0])
        self._base = splitmix64(index ^ key)
        self._calls = 0

    def uniform(self, *shape: int) -> Tensor:  # type: ignore[override]  # takes a shape instead of a range
        """Draws float32 [N, *shape], uniform in [0, 1), in steps of 2^-24."""
        return super().uniform(count=math.prod(shape)).T.reshape(-1, *shape)

    def normal(self, *shape: int) -> Tensor:
        """Draws float32 [N, *shape] from the standard normal distribution (Box and Muller 1958)."""
        count = math.prod(shape)
        half = (count + 1) // 2
        radius = (-2 * (1 - self.uniform(half)).log()).sqrt()  # 1 - u is never 0
        angle = 2 * math.pi * self.uniform(half)
        pairs = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
        return pairs[:, :count].reshape(-1, *shape)


def to_levels(images: Tensor) -> Tensor:
    """Converts images in [0, 1] to uint8 levels by truncation, as in the source of the corruptions.

    Values less than 1e-4 of a level below a level are rounded up to it, as they result from rounding in float32.
    """
    return (images.clamp(0, 1) * 255 + _TRUNCATION).floor().to(torch.uint8)


def inside(place: Tensor, size: int, border: str) -> Tensor:
    """Maps positions along an axis of length `size` >= 2, int64 of any shape, into 0 .. size-1 by a border rule.

    Rules, named as in SciPy: `nearest` (a a | a b c | c c), `reflect` (b a | a b c | c b) and `mirror` (c b | a b c | b
    a), OpenCV's default, BORDER_REFLECT_101.

    Raises:
        ValueError: For an unknown border rule.
    """
    if border == "nearest":
        return place.clamp(0, size - 1)
    if border == "reflect":
        place = place.remainder(2 * size)
        return torch.minimum(place, 2 * size - 1 - place)
    if border == "mirror":
        place = place.remainder(2 * size - 2)
        return torch.minimum(place, 2 * size - 2 - place)
    raise ValueError(f"border={border!r} is not allowed; give nearest, reflect or mirror")


def correlate(images: Tensor, kernel: Tensor, border: str) -> Tensor:
    """Correlates the last two axes with a kernel of odd sizes, skipping zeros of the kernel; see `inside`."""
    H, W = images.shape[-2:]
    up, left = (size // 2 for size in kernel.shape)
    rows = inside(torch.arange(-up, H + up, device=images.device), H, border)
    columns = inside(torch.arange(-left, W + left, device=images.device), W, border)
    padded = images.index_select(-2, rows).index_select(-1, columns)
    result = torch.zeros_like(images)
    for row, column in kernel.nonzero().tolist():
        result += float(kernel[row, column]) * padded[..., row : row + H, column : column + W]
    return result


def gaussian_weights(sigma: float, radius: int) -> Tensor:
    """Returns a Gaussian sampled at -radius .. radius, normalised to sum 1; float64 [2 radius + 1]."""
    values = (-0.5 * (torch.arange(-radius, radius + 1).double() / sigma) ** 2).exp()
    return values / values.sum()


def gaussian_blur(images: Tensor, sigma: float, border: str = "nearest", truncate: float = 4.0) -> Tensor:
    """Blurs the last two axes like `scipy.ndimage.gaussian_filter` and scikit-image's `gaussian`.

    The standard deviation `sigma` >= 0 is in pixels, the kernel's radius `truncate` in standard deviations; for the
    border rule see `inside`.
    """
    radius = int(truncate * sigma + 0.5)
    if radius == 0:
        return images
    weights = gaussian_weights(sigma, radius)
    return correlate(correlate(images, weights[:, None], border), weights[None], border)


def take(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Reads pixels [N, C, h, w] of images [N, C, H, W] at positions int64 [N, h, w] within the images."""
    N, C, _, W = images.shape
    flat = (rows * W + columns).view(N, 1, -1).expand(-1, C, -1)
    return images.flatten(2).gather(2, flat).view(N, C, *rows.shape[1:])


def bilinear(images: Tensor, rows: Tensor, columns: Tensor, border: str) -> Tensor:
    """Reads images [N, C, H, W] between pixels, at any positions, float [N, h, w], by bilinear interpolation.

    Position 0 is the middle of the first row or column; for the border rule see `inside`. Returns [N, C, h, w].
    """
    H, W = images.shape[-2:]
    top, left = rows.floor(), columns.floor()
    down, right = (rows - top)[:, None], (columns - left)[:, None]
    near = [inside(top.long() + step, H, border) for step in (0, 1)]
    side = [inside(left.long() + step, W, border) for step in (0, 1)]
    upper = (1 - right) * take(images, near[0], side[0]) + right * take(images, near[0], side[1])
    lower = (1 - right) * take(images, near[1], side[0]) + right * take(images, near[1], side[1])
    return (1 - down) * upper + down * lower


def zoomed(images: Tensor, factor: float) -> Tensor:
    """Enlarges the middle of square images [N, C, S, S] to their size by linear interpolation.

    The middle p = ceil(S / factor) pixels are resampled to round(p · factor), like `scipy.ndimage.zoom` of order 1, and
    the middle S of these are kept.
    """
    size = images.shape[-1]
    part = math.ceil(size / factor)
    whole = round(part * factor)
    first, trim = (size - part) // 2, (whole - size) // 2
    middle = images[..., first : first + part, first : first + part].double()  # positions need float64 as well
    large = functional.interpolate(middle, (whole, whole), mode="bilinear", align_corners=True)
    return large[..., trim : trim + size, trim : trim + size].to(images)


def motion_blur(images: Tensor, radius: int, sigma: float, angle: Tensor) -> Tensor:
    """Blurs each image [N, C, H, W] in [0, 1] in its own direction, like ImageMagick's `MotionBlurImage`.

    The kernel is one half of a Gaussian with 2 radius + 1 taps, on the pixels nearest to a line that starts at each
    pixel with the given angle, float64 [N] in degrees: 0 points along the rows, 90 down. Border pixels are repeated.
    The result is rounded to multiples of 1/255, because ImageMagick returns integer levels.
    """
    H, W = images.shape[-2:]
    weights = np.exp(-0.5 * (np.arange(2 * radius + 1) / sigma) ** 2)
    weights /= weights.sum()
    direction = angle.deg2rad()[:, None, None]
    down, right = direction.sin(), direction.cos()
    row = torch.arange(H, device=images.device)[:, None]
    column = torch.arange(W, device=images.device)
    result = torch.zeros_like(images)
    for tap, weight in enumerate(weights):
        if weight < 1e-8:  # this and all following taps are far below one level
            break
        rows = inside(row + (tap * down - 0.5).ceil().long(), H, "nearest").expand(-1, H, W)
        columns = inside(column + (tap * right - 0.5).ceil().long(), W, "nearest").expand(-1, H, W)
        result += float(weight) * take(images, rows, columns)
    return (result * 255).round() / 255


def plasma(draws: ImageDraws, size: int, decay: float) -> Tensor:
    """Draws height maps, float32 [N, size, size] scaled to [0, 1], by the diamond-square algorithm on a torus.

    The size is a power of two; each time the grid is halved, the random part is divided by `decay`.
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


_STEPS = [(0, 1, 1.0), (1, 0, 1.0), (1, 1, 1.4), (1, 2, 2.1969), (2, 1, 2.1969)]
_FAR = 20.0


def canny(layer: Tensor, low: float, high: float) -> Tensor:
    """Returns the edges of grey levels [N, H, W] like `cv2.Canny(layer, low, high)`; bool [N, H, W]."""
    smooth, slope = torch.tensor([1.0, 2.0, 1.0]), torch.tensor([-1.0, 0.0, 1.0])
    dx = correlate(layer, torch.outer(smooth, slope), "nearest")
    dy = correlate(layer, torch.outer(slope, smooth), "nearest")
    size = dx.abs() + dy.abs()

    def above(down: int, right: int) -> Tensor:
        return size > _shifted(size, down, right)

    def not_below(down: int, right: int) -> Tensor:
        return size >= _shifted(size, down, right)

    flat = dy.abs() < dx.abs() * 0.41421356  # tan of 22.5 degrees
    steep = dy.abs() > dx.abs() * 2.41421356
    falling = (dx < 0) == (dy < 0)
    slanted = torch.where(falling, above(-1, -1) & above(1, 1), above(-1, 1) & above(1, -1))
    upright = torch.where(steep, above(-1, 0) & not_below(1, 0), slanted)
    weak = torch.where(flat, above(0, -1) & not_below(0, 1), upright) & (size > low)
    strong = weak & (size > high)
    # Strong edges, and weak edges connected to them.
    joined = ndimage.binary_propagation(strong.cpu().numpy(), np.ones((1, 3, 3)), mask=weak.cpu().numpy())
    return torch.from_numpy(joined).to(layer.device)


def _shifted(maps: Tensor, down: int, right: int, outside: float = 0.0) -> Tensor:
    """Shifts maps: each pixel gets the value `down` rows below and `right` columns to its right, both in -2 .. 2."""
    H, W = maps.shape[-2:]
    padded = functional.pad(maps, (2, 2, 2, 2), value=outside)
    return padded[..., 2 + down : 2 + down + H, 2 + right : 2 + right + W]


def edge_distance(edges: Tensor) -> Tensor:
    """Distance of each pixel to the nearest edge, at most 20, along steps of 1, 1.4 and 2.1969.

    These are the steps of `cv2.distanceTransform` with a 5 × 5 mask (Borgefors 1986). Maps edges, bool [N, H, W], to
    float32 of this shape.
    """
    distance = torch.where(edges, 0.0, _FAR)
    while True:
        shorter = distance
        for down, right, cost in _STEPS:
            for sign, other in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
                beside = _shifted(distance, sign * down, other * right, outside=_FAR)
                shorter = torch.minimum(shorter, beside + cost)
        if torch.equal(shorter, distance):
            return distance
        distance = shorter


def equalize(levels: Tensor) -> Tensor:
    """Equalises the histogram of each map of grey levels [N, H, W] like `cv2.equalizeHist`."""
    N = len(levels)
    place = levels.long().flatten(1)
    histogram = torch.zeros(N, 256, device=levels.device).scatter_add_(1, place, torch.ones_like(levels).flatten(1))
    darkest = histogram.gather(1, place.amin(1, keepdim=True))
    others = place.shape[1] - darkest
    table = ((histogram.cumsum(1) - darkest) * (255 / others)).round().clamp(0, 255)
    return torch.where(others[..., None] > 0, table.gather(1, place).view_as(levels), levels)
