"""Scikit-learn's bundled digits: 1797 real scans, no download."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import torch
from torch.nn import functional

from ekd_lightning.data.images import Dataset, ImageSet
from ekd_lightning.data.order import STREAM_SPLIT, hash_uniform_u64
from ekd_lightning.data.subset import take_evenly

NUM_TEST = 360


def read_digits() -> Dataset:
    """Reads the digits as 3×32×32 images, 1437 for training and 360 for testing.

    The 8×8 scans (0 .. 16) are enlarged four times by bilinear interpolation and repeated on three channels.
    The split is stratified and never changes.

    Returns:
        The data set "digits".
    """
    from sklearn.datasets import load_digits  # noqa: PLC0415  # seconds that CIFAR runs need not pay

    raw = load_digits()
    scans = torch.from_numpy(raw.images).float()[:, None]
    large = functional.interpolate(scans, scale_factor=4, mode="bilinear", align_corners=False)
    images = (large / 16 * 255).round().to(torch.uint8).repeat(1, 3, 1, 1)
    labels = torch.from_numpy(raw.target).long()
    is_test = _test_rows(raw.target)
    names = tuple(str(name) for name in raw.target_names)
    return Dataset(
        name="digits",
        train=ImageSet("digits", "train", images[~is_test], labels[~is_test], names),
        test=ImageSet("digits", "test", images[is_test], labels[is_test], names),
        source="bundled with scikit-learn",
        normalization="centered",
    )


def _test_rows(labels: np.ndarray) -> torch.Tensor:
    """Marks every fifth or so of the N images, sorted by class and then by hash; bool [N]."""
    by_class = np.lexsort((hash_uniform_u64(STREAM_SPLIT, 0, 0, np.arange(len(labels))), labels))
    is_test = np.zeros(len(labels), dtype=bool)
    is_test[by_class] = take_evenly(len(labels), Fraction(NUM_TEST, len(labels)))
    return torch.from_numpy(is_test)
