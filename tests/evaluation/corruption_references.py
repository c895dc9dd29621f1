"""Images, and pieces of references, for the tests of corruptions."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy import ndimage

from ekd_lightning.evaluation.corruption_filters import ImageDraws
from ekd_lightning.evaluation.robustness import EXTRA, MAIN, corrupt

ALL = (*MAIN, *EXTRA)


def made(count: int = 6, size: int = 32) -> torch.Tensor:
    """Soft and speckled images; the last three are black, white and grey."""
    rng = np.random.default_rng(5)
    soft = ndimage.gaussian_filter(rng.normal(size=(count, 3, size, size)), (0, 0.5, 3, 3))
    images = 128 + 50 * soft / soft.std() + 8 * rng.normal(size=soft.shape)
    levels = torch.from_numpy(images.clip(0, 255).astype(np.uint8))
    levels[-3], levels[-2], levels[-1] = 0, 255, 128
    return levels


IMAGES = made()
FROST = [torch.rand(3, 40, 50 + n, generator=torch.Generator().manual_seed(n)) for n in range(3)]


def run(name: str, severity: int, images: torch.Tensor = IMAGES, **options) -> torch.Tensor:
    return corrupt(images, name, severity, frost=FROST, **options)


def the_draws(name: str, severity: int, images: torch.Tensor = IMAGES) -> ImageDraws:
    return ImageDraws(0, name, severity, torch.arange(len(images)))


def unit(images: torch.Tensor = IMAGES) -> np.ndarray:
    return images.double().numpy() / 255


def assert_levels(found: torch.Tensor, expected: np.ndarray, share: float = 0.01) -> None:
    """Equal but for a level here and there, where cutting off falls on the other side; expected is in [0, 1]."""
    levels = np.floor(np.clip(expected, 0, 1) * 255 + 1e-6).astype(int)
    differ = np.abs(found.numpy().astype(int) - levels)
    assert differ.max() <= 1, differ.max()
    assert (differ > 0).mean() <= share, (differ > 0).mean()


def clipped_zoom(image: np.ndarray, factor: float) -> np.ndarray:
    size = len(image)
    part = math.ceil(size / factor)
    top = (size - part) // 2
    large = ndimage.zoom(image[top : top + part, top : top + part], factor, order=1, mode="nearest")
    trim = (len(large) - size) // 2
    return large[trim : trim + size, trim : trim + size]


def swept(image: np.ndarray, radius: int, sigma: float, angle: float) -> np.ndarray:
    """One half of a Gaussian along a line; image [C, S, S]."""
    taps = np.arange(2 * radius + 1)
    weights = np.exp(-(taps**2) / (2 * sigma**2))
    padded = np.pad(image, ((0, 0), (30, 30), (30, 30)), mode="edge")
    size, total = image.shape[1], np.zeros_like(image)
    for tap, weight in zip(taps, weights / weights.sum(), strict=True):
        right = math.ceil(tap * math.cos(math.radians(angle)) - 0.5)
        down = math.ceil(tap * math.sin(math.radians(angle)) - 0.5)
        total += weight * padded[:, 30 + down : 30 + down + size, 30 + right : 30 + right + size]
    return total
