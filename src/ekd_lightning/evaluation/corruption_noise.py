"""Corruptions that add noise: Gaussian, shot, impulse, and (extra) speckle.

Constants are those of `make_cifar_c.py` in https://github.com/hendrycks/robustness (Hendrycks and Dietterich 2019).
Every function takes float32 [N, 3, H, W] in [0, 1], a severity 1 .. 5 and the images' draws, and gives images of
the same shape; values may leave [0, 1].
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from scipy import stats
from torch import Tensor

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
