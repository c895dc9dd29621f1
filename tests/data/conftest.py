import os
from pathlib import Path

import pytest
from random_images import random_set

from ekd_lightning.data.images import Dataset


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
