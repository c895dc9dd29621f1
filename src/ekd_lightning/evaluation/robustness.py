"""Robustness: how a classifier fares on corrupted test sets.

The sets are the official files where they are present, else made from the test images under a seed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ekd_lightning.data import ImageSet
from ekd_lightning.errors import UserError
from ekd_lightning.evaluation.corruptions import EXTRA, MAIN, SEVERITIES, corrupt, read_frost
from ekd_lightning.evaluation.scores import score_batches

OFFICIAL_FOLDERS = {"cifar10": "CIFAR-10-C", "cifar100": "CIFAR-100-C"}
FROST_FOLDER = "frost"


class CorruptedSets(Protocol):
    """The test images of one data set under several corruptions.

    Attributes:
        source: `official` or `regenerated`.
        names: Corruptions that there are, the 15 main ones first.
    """

    source: str
    names: tuple[str, ...]

    def images(self, name: str, severity: int, index: Tensor) -> Tensor:
        """Gives uint8 [n, 3, H, W] of the test images at positions `index`, int64 [n]."""
        ...


def corrupted_sets(test: ImageSet, root: Path, *, extra: bool = False, seed: int = 0) -> CorruptedSets:
    """Opens the official files of a data set, or sees to it that its test images can be corrupted.

    Args:
        test: The clean test images.
        root: Folder of the data sets; `CIFAR-10-C` or `CIFAR-100-C` in it is the official folder, and `frost`
            holds the photographs without which the regenerated set has no frost.
        extra: Whether the four extra corruptions are wanted, too.
        seed: Of regenerated images.

    Raises:
        UserError: A file is missing, damaged or belongs to other images.
    """
    root = root.expanduser()
    folder = root / OFFICIAL_FOLDERS.get(test.name, "")
    if test.name in OFFICIAL_FOLDERS and folder.is_dir():
        return OfficialSets(folder, test, extra=extra)
    return RegeneratedSets(test, root / FROST_FOLDER, extra=extra, seed=seed)


class RegeneratedSets:
    """Corruptions of test images by `corrupt`; frost only if there are photographs of it."""

    source = "regenerated"

    def __init__(self, test: ImageSet, frost_folder: Path, *, extra: bool = False, seed: int = 0) -> None:
        self._test, self._seed = test, seed
        self._frost = read_frost(frost_folder)
        wanted: tuple[str, ...] = (*MAIN, *EXTRA) if extra else MAIN
        self.names = tuple(name for name in wanted if name != "frost" or self._frost)

    def images(self, name: str, severity: int, index: Tensor) -> Tensor:
        """See `CorruptedSets`."""
        clean = self._test.images[index.to(self._test.images.device)]
        return corrupt(clean, name, severity, index=index, seed=self._seed, frost=self._frost)


class OfficialSets:
    """The files of Hendrycks and Dietterich: one a corruption, five blocks of the N test images, mildest first.

    Raises:
        UserError: A file is missing or damaged, or the labels are not those of the test images.
    """

    source = "official"

    def __init__(self, folder: Path, test: ImageSet, *, extra: bool = False) -> None:
        self._size = len(test)
        shape = (len(SEVERITIES) * len(test), *test.images.shape[2:], 3)
        wanted: tuple[str, ...] = (*MAIN, *EXTRA) if extra else MAIN
        self._files = {name: _open(folder / f"{name}.npy", shape) for name in wanted}
        self.names = wanted
        labels = _open(folder / "labels.npy", shape[:1])
        if not np.array_equal(labels, np.tile(test.labels.cpu().numpy(), len(SEVERITIES))):
            raise UserError(f"{folder / 'labels.npy'}: not the labels of the test images of {test.name}")

    def images(self, name: str, severity: int, index: Tensor) -> Tensor:
        """See `CorruptedSets`."""
        rows = index.cpu().numpy() + (severity - 1) * self._size
        return torch.from_numpy(self._files[name][rows]).permute(0, 3, 1, 2)


def _open(path: Path, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Maps an array of bytes into memory; nothing in the file is unpickled."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; complete the folder, or delete it to have images regenerated")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: not an array of NumPy, or damaged ({type(error).__name__})") from None
    if not isinstance(array, np.ndarray) or array.dtype != np.uint8 or array.shape != shape:
        found = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else "several arrays"
        raise UserError(f"{path}: holds {found} instead of uint8 {list(shape)}")
    return array


def spread_index(count: int, most: int | None) -> Tensor:
    """Positions of at most `most` of `count` images, evenly spread; int64, sorted; None for all."""
    if most is None or most >= count:
        return torch.arange(count)
    return (torch.arange(most) * count).div(most, rounding_mode="floor")


def score_corruptions(
    network: nn.Module,
    sets: CorruptedSets,
    test: ImageSet,
    index: Tensor,
    *,
    batch_size: int = 500,
    device: torch.device | None = None,
) -> dict[str, dict[str, list[float]]]:
    """Scores a network under every corruption at every severity.

    Args:
        network: In eval mode, on `device`; takes images [B, 3, H, W] in [0, 1].
        sets: The corrupted images.
        test: The clean ones, for the labels.
        index: int64 [n], which test images to take.
        batch_size: Images a forward pass.
        device: Where to compute; the CPU if None.

    Returns:
        Corruption -> {`accuracy`, `nll`, `ece`: five numbers, from severity 1 to 5}.
    """
    device = device or torch.device("cpu")
    found: dict[str, dict[str, list[float]]] = {}
    for name in sets.names:
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
    """Means of a score over the main corruptions that there are, for each severity."""
    rows = [scores[score] for name, scores in found.items() if name in MAIN]
    return [sum(values) / len(values) for values in zip(*rows, strict=True)]


def mean_corruption_error(found: dict[str, dict[str, list[float]]]) -> float:
    """Mean error in [0, 1] over the main corruptions and severities.

    Not divided by the errors of another network, as it is usual for CIFAR (and not for ImageNet-C, where AlexNet's
    are taken).
    """
    means = mean_by_severity(found, "accuracy")
    return 1 - sum(means) / len(means)
