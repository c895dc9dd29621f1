"""What several corruptions are made of: seeded draws for each image, filters with a stated border, resampling.

All of it takes batches [N, C, H, W] or [N, H, W] and works value by value, so that an image comes out the same
whatever it was batched with.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ekd_lightning.data.order import hash_uniform_u64, splitmix64

STREAM_CORRUPTION = 10
"""A number of its own among the streams of `data.order`."""

_TRUNCATION = 1e-4


class ImageDraws:
    """Random numbers for N images, each a pure function of (seed, name, severity, image index, call).

    Args:
        seed: Of the corrupted set.
        name: Of the corruption.
        severity: 1 .. 5.
        index: int64 [N], positions in the whole image set, on the device where numbers are wanted.
    """

    def __init__(self, seed: int, name: str, severity: int, index: Tensor) -> None:
        place = zlib.crc32(name.encode()) * 8 + severity
        key = int(hash_uniform_u64(STREAM_CORRUPTION, seed, place, np.zeros(1, np.int64)).view(np.int64)[0])
        self._base = splitmix64(index ^ key)
        self._calls = 0

    def uniform(self, *shape: int) -> Tensor:
        """Draws float32 [N, *shape], uniform in [0, 1), in steps of 2^-24."""
        image = splitmix64(self._base ^ self._calls)
        self._calls += 1
        place = torch.arange(math.prod(shape), device=image.device)
        bits = splitmix64(image[:, None] ^ place)
        # The upper 24 bits; the shift of an int64 copies its sign, hence the mask.
        return (((bits >> 40) & 0xFFFFFF).float() * 2.0**-24).view(-1, *shape)

    def normal(self, *shape: int) -> Tensor:
        """Draws float32 [N, *shape] from the standard normal distribution (Box and Muller 1958)."""
        count = math.prod(shape)
        half = (count + 1) // 2
        radius = (-2 * (1 - self.uniform(half)).log()).sqrt()  # 1 - u is never 0
        angle = 2 * math.pi * self.uniform(half)
        pairs = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
        return pairs[:, :count].reshape(-1, *shape)


def to_levels(images: Tensor) -> Tensor:
    """Images in [0, 1] as grey levels, uint8, cut off and not rounded, as in the source of the corruptions.

    What lies less than 1e-4 of a level below a level counts as that level: it got there by rounding in
    float32.
    """
    return (images.clamp(0, 1) * 255 + _TRUNCATION).floor().to(torch.uint8)


def inside(place: Tensor, size: int, border: str) -> Tensor:
    """Positions along an axis, any integers, as positions 0 .. size-1 of what is seen there.

    Args:
        place: int64, any shape.
        size: Length of the axis, at least 2.
        border: `nearest` (a a | a b c | c c), `reflect` (b a | a b c | c b) or `mirror` (c b | a b c | b a), in
            the words of SciPy; `mirror` is OpenCV's default and called BORDER_REFLECT_101 there.
    """
    if border == "nearest":
        return place.clamp(0, size - 1)
    if border == "reflect":
        place = place.remainder(2 * size)
        return torch.minimum(place, 2 * size - 1 - place)
    if border == "mirror":
        place = place.remainder(2 * size - 2)
        return torch.minimum(place, 2 * size - 2 - place)
    raise ValueError(f"border {border!r}")


def correlate_axis(images: Tensor, weights: Sequence[float], dim: int, border: str) -> Tensor:
    """Correlates along one axis with an odd number of weights."""
    size, radius = images.shape[dim], len(weights) // 2
    place = torch.arange(-radius, size + radius, device=images.device)
    padded = images.index_select(dim, inside(place, size, border))
    result = torch.zeros_like(images)
    for shift, weight in enumerate(weights):
        result += weight * padded.narrow(dim, shift, size)
    return result


def correlate(images: Tensor, kernel: Tensor, border: str) -> Tensor:
    """Correlates the last two axes with a kernel [odd, odd]; taps of weight 0 cost nothing."""
    H, W = images.shape[-2:]
    up, left = (size // 2 for size in kernel.shape)
    rows = inside(torch.arange(-up, H + up, device=images.device), H, border)
    columns = inside(torch.arange(-left, W + left, device=images.device), W, border)
    padded = images.index_select(-2, rows).index_select(-1, columns)
    result = torch.zeros_like(images)
    for row, column in kernel.nonzero().tolist():
        result += float(kernel[row, column]) * padded[..., row : row + H, column : column + W]
    return result


def gaussian_weights(sigma: float, radius: int) -> list[float]:
    """A sampled Gaussian at -radius .. radius, of sum 1."""
    if radius == 0:
        return [1.0]
    values = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    return [float(value) for value in values / values.sum()]


def gaussian_blur(images: Tensor, sigma: float, border: str = "nearest", truncate: float = 4.0) -> Tensor:
    """Blurs the last two axes as `scipy.ndimage.gaussian_filter` and scikit-image's `gaussian` do.

    Args:
        images: [..., H, W].
        sigma: In pixels, at least 0.
        border: See `inside`.
        truncate: Standard deviations after which the kernel ends.
    """
    radius = int(truncate * sigma + 0.5)
    if radius == 0:
        return images
    weights = gaussian_weights(sigma, radius)
    return correlate_axis(correlate_axis(images, weights, -2, border), weights, -1, border)


def take(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Reads pixels [N, C, h, w] of images [N, C, H, W] at places int64 [N, h, w] that lie inside."""
    N, C, _, W = images.shape
    flat = (rows * W + columns).view(N, 1, -1).expand(-1, C, -1)
    return images.flatten(2).gather(2, flat).view(N, C, *rows.shape[1:])


def bilinear(images: Tensor, rows: Tensor, columns: Tensor, border: str) -> Tensor:
    """Reads images [N, C, H, W] between their pixels.

    Args:
        images: [N, C, H, W].
        rows: float [N, h, w]; any place, 0 is the middle of the first row.
        columns: The same for columns.
        border: See `inside`.

    Returns:
        [N, C, h, w].
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
    """Enlarges the middle of square images [..., S, S] to their size, linearly between pixels.

    The middle ceil(S / factor) pixels are resampled to round(... factor) by `scipy.ndimage.zoom` of order 1, of
    which the middle S are kept.
    """
    size = images.shape[-1]
    part = math.ceil(size / factor)
    whole = round(part * factor)
    step = (part - 1) / (whole - 1)
    place = [(row + (whole - size) // 2) * step for row in range(size)]
    low = [min(math.floor(value), part - 2) for value in place]
    first = torch.tensor(low, device=images.device) + (size - part) // 2
    share = torch.tensor([value - floor for value, floor in zip(place, low, strict=True)]).to(images)
    images = images.index_select(-1, first) * (1 - share) + images.index_select(-1, first + 1) * share
    share = share[:, None]
    return images.index_select(-2, first) * (1 - share) + images.index_select(-2, first + 1) * share


def motion_blur(images: Tensor, radius: int, sigma: float, angle: Tensor) -> Tensor:
    """Blurs each image in a direction of its own, as ImageMagick's `MotionBlurImage` does.

    One half of a Gaussian with 2 radius + 1 taps, on the pixels nearest to a line that leaves each pixel at the
    angle, with the border's pixels repeated.

    Args:
        images: [N, C, H, W] in [0, 1].
        radius: In pixels.
        sigma: In pixels.
        angle: float64 [N], degrees; 0 looks along the rows, 90 down.

    Returns:
        [N, C, H, W], rounded to 255ths since ImageMagick gives grey levels back.
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
        if weight < 1e-8:  # far below a grey level, like all that follow
            break
        rows = inside(row + (tap * down - 0.5).ceil().long(), H, "nearest").expand(-1, H, W)
        columns = inside(column + (tap * right - 0.5).ceil().long(), W, "nearest").expand(-1, H, W)
        result += float(weight) * take(images, rows, columns)
    return (result * 255).round() / 255
