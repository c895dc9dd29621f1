"""Corruptions that blur: defocus, glass, motion, zoom, and (extra) Gaussian.

Constants are those of `make_cifar_c.py` in https://github.com/hendrycks/robustness (Hendrycks and Dietterich 2019);
functions are as in `corruption_noise`.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ekd_lightning.data.images import to_unit
from ekd_lightning.evaluation import corruption_tools as tools
from ekd_lightning.evaluation.corruption_tools import ImageDraws


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
