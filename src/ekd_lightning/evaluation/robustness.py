"""Robustness of a classifier: corrupted test sets by name, and scores on them.

The sets are the official files of CIFAR-10-C and CIFAR-100-C if present; otherwise they are regenerated from the test
images under a seed. Regenerated images have other random numbers than the published files, and frost needs the
photographs of https://github.com/hendrycks/robustness.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn
from torch.nn import functional

from ekd_lightning.data import ImageSet
from ekd_lightning.data.views import to_unit
from ekd_lightning.errors import UserError, unknown_name
from ekd_lightning.evaluation import corruptions
from ekd_lightning.evaluation.corruption_filters import ImageDraws, to_levels
from ekd_lightning.evaluation.scores import score_batches
from ekd_lightning.progress import track

OFFICIAL_FOLDERS = {"cifar10": "CIFAR-10-C", "cifar100": "CIFAR-100-C"}
FROST_FOLDER = "frost"
SEVERITIES = (1, 2, 3, 4, 5)

MAIN = (
    *("gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    *("snow", "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression"),
)
"""The 15 corruptions of the mean corruption error."""

EXTRA = ("speckle_noise", "gaussian_blur", "spatter", "saturate")
"""The four corruptions that are meant for validation."""

FROST_FILES = ("frost1.png", "frost2.png", "frost3.png", "frost4.jpg", "frost5.jpg")
"""The photographs that the source uses; it lists a sixth but never draws it."""


def corrupt(
    images: Tensor,
    name: str,
    severity: int,
    *,
    index: Tensor | None = None,
    seed: int = 0,
    frost: Sequence[Tensor] = (),
) -> Tensor:
    """Corrupts images; each result depends only on the image, its index, and the other arguments.

    Args:
        images: uint8 [N, 3, S, S]; the constants are meant for S = 32.
        name: One of `MAIN` or `EXTRA`.
        severity: 1 .. 5.
        index: int64 [N], positions in the whole image set; None for 0 .. N-1.
        seed: Seed of the corrupted set.
        frost: Photographs from `read_frost`, for the corruption frost.

    Raises:
        UserError: For an unknown name or severity, or for frost without photographs larger than the images.
        ValueError: For images of another type or shape.
    """
    if name not in (*MAIN, *EXTRA):
        raise unknown_name("corruption", name, (*MAIN, *EXTRA))
    if severity not in SEVERITIES:
        raise UserError(f"severity={severity} of {name}: must be 1, 2, 3, 4 or 5")
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
        raise ValueError(f"images must be uint8 [N, 3, S, S], not {images.dtype} {list(images.shape)}")
    function = getattr(corruptions, name)
    if name == "frost":
        if not frost:
            raise UserError(f"frost needs the photographs {', '.join(FROST_FILES)}; read them by read_frost(FOLDER)")
        smallest = min(min(photograph.shape[1:]) for photograph in frost)
        if smallest <= images.shape[-1]:
            raise UserError(
                f"a photograph of frost ({smallest} pixels at a fifth of its size) is not larger than the images "
                f"({images.shape[-1]} pixels); use larger photographs"
            )
        function = partial(function, textures=frost)
    if len(images) == 0:
        return images.clone()
    place = torch.arange(len(images)) if index is None else index
    draws = ImageDraws(seed, name, severity, place.to(images.device))
    return to_levels(function(to_unit(images), severity, draws))


def read_frost(folder: Path) -> list[Tensor]:
    """Reads the frost photographs of hendrycks/robustness, reduced to a fifth of their size as in the source.

    Returns:
        Five tensors, float32 [3, height, width] in [0, 1]; an empty list if the folder does not exist.

    Raises:
        UserError: If the folder exists, but one of `FROST_FILES` is missing or damaged.
    """
    if not folder.is_dir():
        return []
    return [_read_photograph(folder / name) for name in FROST_FILES]


def _read_photograph(path: Path) -> Tensor:
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; frost needs {', '.join(FROST_FILES)}; complete the folder, or delete it to leave "
            "out frost"
        )
    try:
        pixels = np.asarray(Image.open(path).convert("RGB"))
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError) as error:
        raise UserError(f"{path}: not an image, or damaged ({type(error).__name__})") from None
    photograph = to_unit(torch.from_numpy(pixels.copy())).permute(2, 0, 1)
    # Without antialiasing, as in OpenCV's resize.
    return functional.interpolate(photograph[None], scale_factor=0.2, mode="bilinear")[0]


class CorruptedSets:
    """The test images of one data set under several corruptions.

    They are the official files in the data set's folder of `OFFICIAL_FOLDERS` below `root`, if that is there; each
    holds one corruption, in five blocks of the N test images from severity 1 to 5. Otherwise `corrupt` makes them,
    frost from the photographs in `FROST_FOLDER` below `root`. With `extra`, they include the four extra corruptions.

    Attributes:
        source: `official`, or `regenerated` by `corrupt`.
        names: The available corruptions, the 15 main ones first; without frost if it is regenerated and its
            photographs are missing.

    Raises:
        UserError: If a file is missing, damaged or belongs to other images.
    """

    def __init__(self, test: ImageSet, root: Path, *, extra: bool = False, seed: int = 0) -> None:
        self._test, self._seed = test, seed
        self.names: tuple[str, ...] = (*MAIN, *EXTRA) if extra else MAIN
        root = root.expanduser()
        folder = root / OFFICIAL_FOLDERS.get(test.name, "")
        if test.name in OFFICIAL_FOLDERS and folder.is_dir():
            self.source = "official"
            shape = (len(SEVERITIES) * len(test), *test.images.shape[2:], 3)
            self._files = {name: _open(folder / f"{name}.npy", shape) for name in self.names}
            labels = _open(folder / "labels.npy", shape[:1])
            if not np.array_equal(labels, np.tile(test.labels.cpu().numpy(), len(SEVERITIES))):
                raise UserError(
                    f"{folder / 'labels.npy'}: not the labels of the test images of {test.name}; replace the folder by "
                    "the official one, or delete it to have images regenerated"
                )
        else:
            self.source = "regenerated"
            self._frost = read_frost(root / FROST_FOLDER)
            self.names = tuple(name for name in self.names if name != "frost" or self._frost)

    def images(self, name: str, severity: int, index: Tensor) -> Tensor:
        """Returns the corrupted test images at the positions `index`, int64 [n], as uint8 [n, 3, H, W]."""
        if self.source == "official":
            rows = index.cpu().numpy() + (severity - 1) * len(self._test)
            return torch.from_numpy(self._files[name][rows]).permute(0, 3, 1, 2)
        clean = self._test.images[index.to(self._test.images.device)]
        return corrupt(clean, name, severity, index=index, seed=self._seed, frost=self._frost)


def _open(path: Path, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Memory-maps a uint8 array of a given shape; nothing in the file is unpickled."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; complete the folder, or delete it to have images regenerated")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: not a NumPy array, or damaged ({type(error).__name__})") from None
    if not isinstance(array, np.ndarray) or array.dtype != np.uint8 or array.shape != shape:
        found = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else "several arrays"
        raise UserError(f"{path}: holds {found} instead of uint8 {list(shape)}")
    return array


def spread_index(count: int, limit: int | None) -> Tensor:
    """Returns at most `limit` of `count` positions, evenly spread; int64, ascending; all positions for None."""
    if limit is None or limit >= count:
        return torch.arange(count)
    return (torch.arange(limit) * count).div(limit, rounding_mode="floor")


def score_corruptions(
    network: nn.Module,
    sets: CorruptedSets,
    test: ImageSet,
    index: Tensor,
    *,
    batch_size: int = 500,
    device: torch.device | str = "cpu",
) -> dict[str, dict[str, list[float]]]:
    """Scores a network, in eval mode on `device`, under every corruption at every severity.

    `index`, int64 [n], are the positions of the test images to use; `test` has their labels.

    Returns:
        Corruption -> {`accuracy`, `nll`, `ece`: five numbers each, for severities 1 to 5}.
    """
    found: dict[str, dict[str, list[float]]] = {}
    for name in track(sets.names, "", "kinds"):
        found[name] = {"accuracy": [], "nll": [], "ece": []}
        for severity in SEVERITIES:
            batches = (
                (sets.images(name, severity, part), test.labels[part.to(test.labels.device)])
                for part in index.split(batch_size)
            )
            scores = score_batches(network, batches, test.num_classes, device)
            for key, values in found[name].items():
                values.append(scores[key])
    return found


def mean_by_severity(found: dict[str, dict[str, list[float]]], score: str) -> list[float]:
    """Returns the mean of a score over the available main corruptions, for each severity."""
    rows = [scores[score] for name, scores in found.items() if name in MAIN]
    return [sum(values) / len(values) for values in zip(*rows, strict=True)]


def mean_corruption_error(found: dict[str, dict[str, list[float]]]) -> float:
    """Returns the mean error in [0, 1] over the available main corruptions and all severities.

    As is usual for CIFAR, it is not divided by the errors of a reference network (AlexNet for ImageNet-C).
    """
    means = mean_by_severity(found, "accuracy")
    return 1 - sum(means) / len(means)
