"""Corruptions by processing: contrast, elastic transform, pixelate, JPEG.

Constants are those of `make_cifar_c.py` in https://github.com/hendrycks/robustness (Hendrycks and Dietterich 2019);
functions are as in `corruption_noise`.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ekd_lightning.data.images import to_unit
from ekd_lightning.evaluation import corruption_tools as tools
from ekd_lightning.evaluation.corruption_tools import ImageDraws


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
