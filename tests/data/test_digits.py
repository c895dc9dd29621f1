"""The bundled digits never change."""

import numpy as np
import torch
from sklearn.datasets import load_digits

from ekd_lightning.data.catalog import read_digits


def test_sizes_and_split():
    digits = read_digits()
    assert (len(digits.train), len(digits.test)) == (1437, 360)
    assert digits.image_size == 32
    assert digits.class_names == tuple("0123456789")
    whole = np.bincount(load_digits().target)
    assert np.abs(torch.bincount(digits.test.labels).numpy() - whole * 360 / 1797).max() < 1


def test_content_is_fixed():
    digits = read_digits()
    assert digits.train.sha256 == "f4e7e508bb053b1d25446c47833f206481a20edd1cd94d07004746498f5711d8"
    assert digits.test.sha256 == "74b4e1eab7a21074d8187fa3a0674bda6de9a25b1a2b4d603782fde4c1ea1d82"


def test_images_are_the_enlarged_scans():
    digits = read_digits()
    small = torch.cat([digits.train.images, digits.test.images]).float()
    assert torch.equal(small[:, 0], small[:, 2])
    # The centre of each 4×4 block is mostly its scan's pixel: the block means give the scans back, blurred.
    means = torch.nn.functional.avg_pool2d(small[:, :1], 4).flatten(1)
    scans = torch.from_numpy(load_digits().images).float().flatten(1)
    nearest = torch.cdist(means / 255 * 16, scans).argmin(1)
    assert len(nearest.unique()) > 1790
