"""Images in memory: one split, unlabelled images, and data sets of a training and a test split."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ImageSet:
    """All N images of one split.

    Attributes:
        name: Data set, e.g. "cifar10".
        split: "train" or "test".
        images: uint8 [N, 3, H, W]; may be memory-mapped, so do not write to it.
        labels: int64 [N], 0 .. num_classes-1.
        class_names: One name per class.

    Raises:
        ValueError: If shapes, types or labels do not fit each other (a bug in a loader, not a user's mistake).
    """

    name: str
    split: str
    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images of {self.name} must be uint8 [N, 3, H, W], not {images.dtype} {images.shape}")
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise ValueError(f"labels of {self.name} must be int64 [{len(images)}], not {labels.dtype} {labels.shape}")
        if len(labels) and (labels.min() < 0 or labels.max() >= self.num_classes):
            raise ValueError(f"labels of {self.name} must lie in 0..{self.num_classes - 1}")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """Number of classes, including classes without images in this split."""
        return len(self.class_names)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of name, split, shape, images and labels in hexadecimal; computed once."""
        digest = hashlib.sha256(f"{self.name}|{self.split}|{tuple(self.images.shape)}|".encode())
        digest.update(self.images.cpu().contiguous().numpy().data)
        digest.update(self.labels.cpu().contiguous().numpy().astype("<i8").data)
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Unlabelled:
    """Training images without labels.

    Attributes:
        index: int64 [U], ascending: positions in the training set, or behind its end for separate images.
        source: Description of the images' origin.
        sha256: Hex SHA-256 of the positions, or of the separate images.
        share: Their share of a batch, in (0, 1).
        leads: Whether an epoch is one pass over these images instead of the labelled ones.
        own: The separate images, whose labels have no meaning; None for images of the training set.
    """

    index: Tensor
    source: str
    sha256: str
    share: float = 0.5
    leads: bool = False
    own: ImageSet | None = None

    @property
    def kind(self) -> str:
        """`rest` for images of the training set, `own` for separate images."""
        return "rest" if self.own is None else "own"

    def __len__(self) -> int:
        return len(self.index)


class JoinedImages:
    """Images of two sets, uint8 [N, 3, H, W] and [U, 3, H, W], under one index, the second set after the first.

    Both may be memory-mapped.
    """

    device = torch.device("cpu")

    def __init__(self, first: Tensor, second: Tensor) -> None:
        self._parts = first, second

    @property
    def nbytes(self) -> int:
        """Bytes of all images."""
        return sum(part.nbytes for part in self._parts)

    def to(self, device: torch.device) -> Tensor | JoinedImages:
        """Returns all images on a device: concatenated on an accelerator, this object on a CPU."""
        if device.type == "cpu":
            return self
        count = sum(map(len, self._parts))
        images = torch.empty((count, *self._parts[0].shape[1:]), dtype=torch.uint8, device=device)
        for rows, part in zip(images.split([len(part) for part in self._parts]), self._parts, strict=True):
            rows.copy_(part)
        return images

    def __getitem__(self, index: Tensor) -> Tensor:
        first, second = self._parts
        behind = index >= len(first)
        chosen = torch.empty((len(index), *first.shape[1:]), dtype=torch.uint8)
        chosen[~behind] = first[index[~behind]]
        chosen[behind] = second[index[behind] - len(first)]
        return chosen


@dataclass(frozen=True, eq=False)
class Dataset:
    """A training and a test split with the same classes and image size.

    Attributes:
        name: Registered name.
        train: Training images, including validation images.
        test: Test images, not used before the end of a run.
        source: Description of the data set's origin.
        normalization: Name of the normalisation that networks usually use for these images.
        val_index: int64, positions in `train` of a published validation split; None if validation images are chosen
            from the training images.

    Raises:
        ValueError: If classes or image sizes of the splits differ.
    """

    name: str
    train: ImageSet
    test: ImageSet
    source: str = ""
    normalization: str = "unit"
    val_index: Tensor | None = None

    def __post_init__(self) -> None:
        if self.train.class_names != self.test.class_names:
            raise ValueError(f"training and test set of {self.name} have different classes")
        if self.train.images.shape[1:] != self.test.images.shape[1:]:
            raise ValueError(f"training and test images of {self.name} have different sizes")

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return self.train.num_classes

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self.train.class_names

    @property
    def image_size(self) -> int | tuple[int, int]:
        """Side of square images in pixels, else (height, width)."""
        height, width = self.train.images.shape[2:]
        return height if height == width else (height, width)
