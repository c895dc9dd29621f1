"""Images in memory: one split, and the pair of splits that makes a data set."""

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
        images: uint8 [N, 3, H, W]; may be mapped from a file, hence not to be written to.
        labels: int64 [N], 0 .. num_classes-1.
        class_names: One name a class.

    Raises:
        ValueError: Shapes, types or labels do not fit each other (a bug in a loader, not a user's mistake).
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
        """How many classes there are, present in this split or not."""
        return len(self.class_names)

    @cached_property
    def sha256(self) -> str:
        """Hex SHA-256 over name, split, shape, images and labels; computed once."""
        digest = hashlib.sha256(f"{self.name}|{self.split}|{tuple(self.images.shape)}|".encode())
        digest.update(self.images.cpu().contiguous().numpy().data)
        digest.update(self.labels.cpu().contiguous().numpy().astype("<i8").data)
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Dataset:
    """A training and a test split with the same classes and image size.

    Attributes:
        name: Registered name.
        train: Training images; validation images are taken from these.
        test: Test images, not looked at before the end of a run.
        source: Where it was read from, for people to read.
        normalization: Name of the statistics that networks usually take for these images.
        val_index: int64, positions in `train` that are there for validation only; None where validation images are
            taken from those for training.

    Raises:
        ValueError: The splits do not fit each other.
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
        """How many classes there are."""
        return self.train.num_classes

    @property
    def class_names(self) -> tuple[str, ...]:
        """One name a class."""
        return self.train.class_names

    @property
    def image_size(self) -> int | tuple[int, int]:
        """Height, and width, in pixels; (height, width) where images are not square."""
        height, width = self.train.images.shape[2:]
        return height if height == width else (height, width)
