"""Corruptions of pixels: noise, blur and processing, each with one extra.

Constants are those of `make_cifar_c.py` in https://github.com/hendrycks/robustness (Hendrycks and Dietterich 2019).
Every function takes float32 [N, 3, H, W] in [0, 1], a severity 1 .. 5 and the images' draws, and gives images of
the same shape; values may leave [0, 1].
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from scipy import stats
from torch import Tensor

from ekd_lightning.data.views import to_unit
from ekd_lightning.evaluation import corruption_tools as tools
from ekd_lightning.evaluation.corruption_tools import ImageDraws


def gaussian_noise(images: Tensor, severity: int, draws: ImageDraws) -> Tensor:
    """Adds a normal number to every value."""
    scale = (0.04, 0.06, 0.08, 0.09, 0.10)[severity - 1]
    return images + scale * draws.normal(*images.shape[1:])


def shot_noise(images: Tensor, severity: int, draws: ImageDraws) -> Tensor:
    """Counts photons: a Poisson number of mean c x, divided by c."""
    photons = (500, 250, 100, 75, 50)[severity - 1]
    flat = _poisson_table(photons).to(images.device)
    levels = (images * 255).round().long()
    # Row v of the table holds the distribution for level v, plus v: one sorted list for all of them.
    found = torch.searchsorted(flat.view(-1), levels + draws.uniform(*images.shape[1:]).double(), right=True)
    return (found - levels * flat.shape[1]).to(images) / photons


@lru_cache(maxsize=5)
def _poisson_table(photons: int) -> Tensor:
    """Gives v + P(count <= k) for every grey level v of mean photons v/255; float64 [256, most + 1]."""
    most = int(photons + 9 * photons**0.5 + 9)  # beyond that less than 2^-53
    level = np.arange(256)[:, None]
    table = stats.poisson.cdf(np.arange(most + 1), level * photons / 255)
    table[:, -1] = 1.0
    return torch.from_numpy(table + level)


def impulse_noise(images: Tensor, severity: int, draws: ImageDraws) -> Tensor:
    """Sets a share of all values to 0 or 1, with equal chance, each channel on its own."""
    amount = (0.01, 0.02, 0.03, 0.05, 0.07)[severity - 1]
    drawn = draws.uniform(*images.shape[1:])
    return images.masked_fill(drawn < amount, 0.0).masked_fill(drawn < amount / 2, 1.0)


def speckle_noise(images: Tensor, severity: int, draws: ImageDraws) -> Tensor:
    """Adds a normal number in proportion to the value."""
    scale = (0.06, 0.1, 0.12, 0.16, 0.2)[severity - 1]
    return images + images * scale * draws.normal(*images.shape[1:])


def gaussian_blur(images: Tensor, severity: int, draws: ImageDraws) -> Tensor:
    """A Gaussian of 0.4 to 1 pixels."""
    return tools.gaussian_blur(images, (0.4, 0.6, 0.7, 0.8, 1.0)[severity - 1])


def defocus_blur(images: Tensor, severity: int, draws: ImageDraws) -> Tensor:
    """The mean over a disk whose edge is smoothed."""
    radius, alias = ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1.0, 0.2), (1.5, 0.1))[severity - 1]
    return tools.correlate(images, disk(radius, alias), "mirror")


def disk(radius: float, alias: float) -> Tensor:
    """A disk of sum 1 on a grid of pixels, blurred by a 3 × 3 Gaussian.

    Args:
        radius: In pixels, at most 3.
        alias: Standard deviation of the blur, in pixels.

    Returns:
        float32 [9, 9].
    """
    place = torch.arange(-4, 5)
    inner = (place[:, None] ** 2 + place**2 <= radius**2).float()
    weights = tools.gaussian_weights(alias, 1)
    smooth = tools.correlate_axis(inner / inner.sum(), weights, 0, "mirror")
    return tools.correlate_axis(smooth, weights, 1, "mirror")


def glass_blur(images: Tensor, severity: int, draws: ImageDraws) -> Tensor:
    """A Gaussian, pixels moved by one at random, the Gaussian again.

    The source means to swap pixels, but both sides of its swap are views of one array, so that a pixel is
    overwritten by a neighbour above or left of it and that neighbour stays: the published images were made so,
    and so are these. As it goes from the last pixel to the first, every neighbour is read before it changes.
    """
    sigma, passes = ((0.05, 1), (0.25, 1), (0.4, 1), (0.25, 2), (0.4, 2))[severity - 1]
    images = to_unit(tools.to_levels(tools.gaussian_blur(images, sigma)))
    for _ in range(passes):
        images = _moved(images, draws)
    return tools.gaussian_blur(images, sigma)


def _moved(images: Tensor, draws: ImageDraws) -> Tensor:
    H, W = images.shape[-2:]
    row, column = torch.arange(H, device=images.device), torch.arange(W, device=images.device)
    fixed = (row < 2)[:, None] | (column < 2)
    up, left = ((draws.uniform(H, W) < 0.5) & ~fixed for _ in range(2))
    return tools.take(images, row[:, None] - up.long(), column - left.long())


def motion_blur(images: Tensor, severity: int, draws: ImageDraws) -> Tensor:
    """Along a line of -45 to 45 degrees, drawn for each image."""
    radius, sigma = ((6, 1.0), (6, 1.5), (6, 2.0), (8, 2.0), (9, 2.5))[severity - 1]
    angle = draws.uniform(1)[:, 0].double() * 90 - 45
    return tools.motion_blur(images, radius, sigma, angle)


def zoom_blur(images: Tensor, severity: int, draws: ImageDraws) -> Tensor:
    """The mean of the image and of itself enlarged step by step, by up to 6 to 26 %."""
    end = (1.06, 1.11, 1.16, 1.21, 1.26)[severity - 1]
    factors = np.arange(1, end, 0.01)  # rounding adds the end itself here and there, as it does in the source
    total = images.clone()
    for factor in factors:
        total += tools.zoomed(images, float(factor))
    return total / (len(factors) + 1)


def contrast(images: Tensor, severity: int, draws: ImageDraws) -> Tensor:
    """Draws every value towards the mean of its channel."""
    keep = (0.75, 0.5, 0.4, 0.3, 0.15)[severity - 1]
    H, W = images.shape[-2:]
    # A sum of whole numbers has no rounding, and so no order of addition.
    total = (images * 255).round().long().sum((2, 3), keepdim=True)
    mean = (total.double() / (255 * H * W)).to(images)
    return (images - mean) * keep + mean


def elastic_transform(images: Tensor, severity: int, draws: ImageDraws) -> Tensor:
    """A random affine map of three points, then a smooth random displacement of every pixel."""
    strength, smoothness, affine = (
        (0.0, 0.0, 0.08),
        (0.05, 0.2, 0.07),
        (0.08, 0.06, 0.06),
        (0.1, 0.04, 0.05),
        (0.1, 0.03, 0.03),
    )[severity - 1]
    H, W = images.shape[-2:]
    size = min(H, W)
    row = torch.arange(H, device=images.device, dtype=images.dtype)[:, None]
    column = torch.arange(W, device=images.device, dtype=images.dtype)
    x, y = _sources(H, W, (2 * draws.uniform(3, 2) - 1) * (affine * size), row, column)
    images = tools.bilinear(images, y, x, "mirror")
    right, down = (
        strength * size * tools.gaussian_blur(2 * draws.uniform(H, W) - 1, smoothness * size, "reflect", 3.0)
        for _ in range(2)
    )
    return tools.bilinear(images, row + down, column + right, "reflect")


def _sources(H: int, W: int, moves: Tensor, row: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    """Where each pixel of the result of an affine map comes from.

    Args:
        H: Height of the images.
        W: Width of the images.
        moves: [N, 3, 2], by how much the map moves three corners of a square around the middle, x and y.
        row: [H, 1].
        column: [W].

    Returns:
        x and y, [N, H, W].
    """
    # As in the source, the centre is (H // 2, W // 2) also as (x, y): images are square.
    middle, side = torch.tensor([H // 2, W // 2]).to(moves), min(H, W) // 3
    corners = middle + side * torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]]).to(moves)
    moved = corners + moves
    across = (moved[:, 1] - moved[:, 2]) / (2 * side)  # image of the unit vector in x
    along = (moved[:, 0] - moved[:, 1]) / (2 * side)
    a, c = across.unbind(1)
    b, d = along.unbind(1)
    offset = moved[:, 0] - across * corners[0, 0] - along * corners[0, 1]
    dx = column - offset[:, 0, None, None]
    dy = row - offset[:, 1, None, None]
    a, b, c, d = (value[:, None, None] for value in (a, b, c, d))
    determinant = a * d - b * c
    return (d * dx - b * dy) / determinant, (a * dy - c * dx) / determinant


def pixelate(images: Tensor, severity: int, draws: ImageDraws) -> Tensor:
    """Made smaller by means over boxes, and large again."""
    share = (0.95, 0.9, 0.85, 0.75, 0.65)[severity - 1]

    def smaller_and_back(image: Image.Image) -> Image.Image:
        width, height = image.size
        small = image.resize((int(width * share), int(height * share)), Image.Resampling.BOX)
        return small.resize((width, height), Image.Resampling.BOX)

    return _one_by_one(images, smaller_and_back)


def jpeg_compression(images: Tensor, severity: int, draws: ImageDraws) -> Tensor:
    """Written as JPEG of quality 80 to 40, and read."""
    quality = (80, 65, 58, 50, 40)[severity - 1]

    def written_and_read(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        return Image.open(file)

    return _one_by_one(images, written_and_read)


def _one_by_one(images: Tensor, change: Callable[[Image.Image], Image.Image]) -> Tensor:
    """Changes each image on the processor by Pillow."""
    levels = tools.to_levels(images).permute(0, 2, 3, 1).cpu().numpy()
    changed = np.stack([np.asarray(change(Image.fromarray(image))) for image in levels])
    return to_unit(torch.from_numpy(changed).to(images.device)).permute(0, 3, 1, 2)
