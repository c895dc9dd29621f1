"""The proof that networks, normalisation and conversion are right: published weights reach their accuracy.

EKD_WEIGHTS_DIR names a folder with the weight files of the zoo, EKD_DATA_ROOT one with the official
binary versions of CIFAR (`cifar-10-batches-bin`, `cifar-100-binary`). The images are read here with
NumPy alone, independently of `ekd_lightning.data`.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from ekd_lightning.networks.convert import load_foreign
from ekd_lightning.networks.zoo import find_zoo_file, zoo

TEST_FILES = {"cifar10": ("cifar-10-batches-bin/test_batch.bin", 1), "cifar100": ("cifar-100-binary/test.bin", 2)}
"""File and number of label bytes in a row; the last of them is the class."""

pytestmark = pytest.mark.assets


def _folder(variable: str) -> Path:
    folder = os.environ.get(variable)
    if not folder or not Path(folder).is_dir():
        pytest.skip(f"{variable} names no folder")
    return Path(folder)


@cache
def _test_set(path: Path, label_bytes: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows = np.fromfile(path, dtype=np.uint8).reshape(10_000, label_bytes + 3072)
    images = torch.from_numpy(rows[:, label_bytes:].reshape(-1, 3, 32, 32).copy())
    return images, torch.from_numpy(rows[:, label_bytes - 1].astype(np.int64))


def _params() -> list[object]:
    """All; but for one network of each kind of file and data set they are slow."""
    fast = {"cifar10_resnet20_akamaster", "cifar100_resnet20_chenyaofo"}
    return [pytest.param(id, marks=[] if id in fast else [pytest.mark.slow]) for id in zoo()]


@pytest.mark.parametrize("id", _params())
def test_published_weights_reach_their_accuracy(id: str) -> None:
    entry = zoo()[id]
    network = load_foreign(find_zoo_file(entry, _folder("EKD_WEIGHTS_DIR")), entry.spec, entry.key_map)
    file, label_bytes = TEST_FILES[entry.data]
    path = _folder("EKD_DATA_ROOT") / file
    if not path.is_file():
        pytest.skip(f"EKD_DATA_ROOT has no {file}")
    images, labels = _test_set(path, label_bytes)
    network.to(memory_format=torch.channels_last)
    right = 0
    with torch.inference_mode():
        for some, answers in zip(images.split(250), labels.split(250), strict=True):
            batch = (some.float() / 255).contiguous(memory_format=torch.channels_last)
            right += int((network(batch).argmax(1) == answers).sum())
    accuracy = 100 * right / len(labels)
    print(f"{id}: {accuracy:.2f} (published {entry.accuracy:.2f})")
    assert abs(accuracy - entry.accuracy) <= 0.02
