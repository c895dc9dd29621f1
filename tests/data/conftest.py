import os
from pathlib import Path

import pytest
import torch

from ekd_lightning.data.images import Dataset, ImageSet


def random_set(split: str, size: int, classes: int = 4, side: int = 8) -> ImageSet:
    generator = torch.Generator().manual_seed(size)
    images = torch.randint(0, 256, (size, 3, side, side), dtype=torch.uint8, generator=generator)
    names = tuple(f"class{c}" for c in range(classes))
    return ImageSet("random", split, images, torch.arange(size) % classes, names)


@pytest.fixture
def random_dataset() -> Dataset:
    return Dataset("random", random_set("train", 120), random_set("test", 33))


@pytest.fixture(scope="session")
def real_root() -> Path:
    """The folder with real CIFAR data that EKD_DATA_ROOT names."""
    root = os.environ.get("EKD_DATA_ROOT")
    if not root or not (Path(root) / "cifar-10-batches-bin").is_dir():
        pytest.skip("EKD_DATA_ROOT names no folder with cifar-10-batches-bin")
    return Path(root)
