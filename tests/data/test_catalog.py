"""Data sets by name; the bundled digits."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from cifar_files import make_tiny
from sklearn.datasets import load_digits

from ekd_lightning.data import catalog
from ekd_lightning.data.catalog import load_dataset, read_digits, register_dataset
from ekd_lightning.data.images import Dataset, ImageSet
from ekd_lightning.errors import UserError


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    monkeypatch.setattr(catalog, "DATASETS", copy.copy(catalog.DATASETS))
    monkeypatch.setattr(catalog, "_LOADED", {})


def test_names():
    assert catalog.DATASETS.names() == ["cifar10", "cifar100", "digits"]


def test_unknown_name_offers_the_nearest(tmp_path):
    with pytest.raises(UserError, match="unknown data set 'digit'; did you mean 'digits'"):
        load_dataset("digit", tmp_path)


def test_own_data_set_is_loaded_once_a_root(tmp_path, random_dataset):
    calls = []

    @register_dataset("mine")
    def load_mine(root, download):
        calls.append((root, download))
        return random_dataset

    assert "mine" in catalog.DATASETS.names()
    first = load_dataset("mine", tmp_path / "a")
    assert load_dataset("mine", str(tmp_path / "b" / ".." / "a"), download=True) is first
    load_dataset("mine", tmp_path / "b", download=True)
    assert calls == [(tmp_path / "a", False), (tmp_path / "b", True)]


def test_a_name_taken_twice_names_both(random_dataset):
    def other_digits(root, download):
        return random_dataset

    with pytest.raises(ValueError, match=r"'digits' is registered twice: by .*_load_digits and by .*other_digits"):
        register_dataset("digits")(other_digits)


def test_missing_cifar_is_fetched_only_when_allowed(tmp_path, monkeypatch):
    tiny = make_tiny("cifar10")
    monkeypatch.setattr(catalog, "cifar_spec", lambda name: tiny.spec)
    fetched = []
    monkeypatch.setattr(catalog, "obtain", lambda spec, root: fetched.append(spec.name) or tiny.write(root))
    with pytest.raises(UserError, match="cifar10 not found: looked for"):
        load_dataset("cifar10", tmp_path)
    assert not fetched
    assert len(load_dataset("cifar10", tmp_path, download=True).train) == 20
    catalog._LOADED.clear()
    load_dataset("cifar10", tmp_path, download=True)
    assert fetched == ["cifar10"]


def test_hash_covers_everything(random_dataset):
    train = random_dataset.train
    variants = [train]
    for change in ("name", "split", "images", "labels"):
        fields = {key: getattr(train, key) for key in ("name", "split", "images", "labels", "class_names")}
        value = fields[change]
        fields[change] = value + "x" if isinstance(value, str) else value.flip(0)
        variants.append(ImageSet(**fields))
    assert len({variant.sha256 for variant in variants}) == len(variants)
    assert train.sha256 == ImageSet(train.name, "train", train.images, train.labels, train.class_names).sha256


def test_inconsistent_sets_are_bugs(random_dataset):
    train, test = random_dataset.train, random_dataset.test
    with pytest.raises(ValueError, match="uint8"):
        ImageSet("x", "train", train.images.float(), train.labels, train.class_names)
    with pytest.raises(ValueError, match="int64"):
        ImageSet("x", "train", train.images, train.labels[:-1], train.class_names)
    with pytest.raises(ValueError, match=r"0\.\.1"):
        ImageSet("x", "train", train.images, train.labels, ("a", "b"))
    with pytest.raises(ValueError, match="sizes"):
        Dataset("x", train, ImageSet("x", "test", test.images[..., :4], test.labels, test.class_names))
    oblong = [ImageSet("x", s.split, s.images[:, :, :4], s.labels, s.class_names) for s in (train, test)]
    assert Dataset("x", *oblong).image_size == (4, 8)
    with pytest.raises(ValueError, match="classes"):
        Dataset("x", train, ImageSet("x", "test", test.images, test.labels, tuple("abcd")))
    assert (random_dataset.num_classes, random_dataset.image_size, len(train)) == (4, 8, 120)


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
