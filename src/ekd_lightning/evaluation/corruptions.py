"""Corruptions of CIFAR-10-C and CIFAR-100-C by name, made from clean images under a seed.

Source: D. Hendrycks and T. Dietterich, Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations, ICLR 2019, arXiv 1903.12261, with the constants of their `make_cifar_c.py`
(https://github.com/hendrycks/robustness). Images made here are "regenerated": other random numbers than those of the
published files, and for frost the authors' photographs are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional

from ekd_lightning.data.views import to_unit
from ekd_lightning.errors import UserError, unknown_name
from ekd_lightning.evaluation import corruption_pixels as pixel
from ekd_lightning.evaluation import corruption_weather as weather
from ekd_lightning.evaluation.corruption_tools import ImageDraws, to_levels

SEVERITIES = (1, 2, 3, 4, 5)

MAIN = (
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
)
"""The 15 that the mean corruption error is taken over."""

EXTRA = ("speckle_noise", "gaussian_blur", "spatter", "saturate")
"""The four that are meant for validation."""

FROST_FILES = ("frost1.png", "frost2.png", "frost3.png", "frost4.jpg", "frost5.jpg")
"""The photographs that the source draws from; it lists a sixth but never takes it."""

Corruption = Callable[[Tensor, int, ImageDraws], Tensor]


def corrupt(
    images: Tensor,
    name: str,
    severity: int,
    *,
    index: Tensor | None = None,
    seed: int = 0,
    frost: Sequence[Tensor] = (),
) -> Tensor:
    """Corrupts images; each comes out as a pure function of itself, its index and the other arguments.

    Args:
        images: uint8 [N, 3, S, S]; the constants are made for S = 32.
        name: One of `MAIN` or `EXTRA`.
        severity: 1 .. 5.
        index: int64 [N], positions in the whole image set; 0 .. N-1 if None.
        seed: Of the corrupted set.
        frost: Photographs of `read_frost`; only frost needs them.

    Returns:
        uint8 [N, 3, S, S] on the images' device.

    Raises:
        UserError: Unknown name or severity, or frost without photographs.
        ValueError: Images of another type or shape.
    """
    if name not in (*MAIN, *EXTRA):
        raise unknown_name("corruption", name, (*MAIN, *EXTRA))
    if severity not in SEVERITIES:
        raise UserError(f"severity={severity} of {name}: must be 1, 2, 3, 4 or 5")
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
        raise ValueError(f"images must be uint8 [N, 3, S, S], not {images.dtype} {list(images.shape)}")
    # Each is the function of its name.
    function: Corruption = getattr(weather if hasattr(weather, name) else pixel, name)
    if name == "frost":
        function = _frost_of(frost, images.shape[-1])
    if len(images) == 0:
        return images.clone()
    place = torch.arange(len(images)) if index is None else index
    draws = ImageDraws(seed, name, severity, place.to(images.device))
    return to_levels(function(to_unit(images), severity, draws))


def _frost_of(textures: Sequence[Tensor], size: int) -> Corruption:
    if not textures:
        raise UserError(f"frost needs the photographs {', '.join(FROST_FILES)}, see read_frost")
    if any(min(texture.shape[1:]) <= size for texture in textures):
        raise UserError(f"a photograph of frost is not larger than the images ({size} pixels)")
    return partial(weather.frost, textures=textures)


def read_frost(folder: Path) -> list[Tensor]:
    """Reads the photographs of frost of hendrycks/robustness, at a fifth of their size as the source takes them.

    Args:
        folder: Where `frost1.png`, `frost2.png`, `frost3.png`, `frost4.jpg` and `frost5.jpg` are.

    Returns:
        Five tensors, float32 [3, height, width] in [0, 1]; none if the folder does not exist.

    Raises:
        UserError: The folder exists, and a file is missing or damaged.
    """
    if not folder.is_dir():
        return []
    return [_read_photograph(folder / name) for name in FROST_FILES]


def _read_photograph(path: Path) -> Tensor:
    if not path.is_file():
        raise UserError(f"{path}: no such file; frost needs {', '.join(FROST_FILES)}, or no folder at all")
    try:
        pixels = np.asarray(Image.open(path).convert("RGB"))
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError) as error:
        raise UserError(f"{path}: not an image, or damaged ({type(error).__name__})") from None
    photograph = to_unit(torch.from_numpy(pixels.copy())).permute(2, 0, 1)
    # Without smoothing, as OpenCV's resize does it.
    return functional.interpolate(photograph[None], scale_factor=0.2, mode="bilinear")[0]
