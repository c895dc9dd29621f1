"""Arrays: .npz files and torchvision's data sets become the data sets that they are."""

from __future__ import annotations

import gzip
import importlib.util
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from ekd_lightning.data import Dataset, arrays, catalog, open_dataset
from ekd_lightning.errors import UserError
from ekd_lightning.settings import DataSettings

RNG = np.random.default_rng(0)


def opened(source: str, root: Path, **changes) -> Dataset:
    catalog._LOADED.clear()
    given = DataSettings("own", source, str(root), cache=str(root.parent / "cache"), download=False)
    return open_dataset(replace(given, **changes))


def colours(count: int, side: int = 6) -> np.ndarray:
    return RNG.integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def npz(folder: Path, **arrays) -> Path:
    np.savez(folder / "own.npz", **arrays)
    return folder / "own.npz"


def two_classes(names) -> dict[str, np.ndarray]:
    return {"images": colours(20), "labels": np.arange(20) % 2, "class_names": np.array(names)}


@pytest.mark.parametrize("names", [("x_{}", "y_{}"), ("{}_images", "{}_labels")])
@pytest.mark.parametrize("form", ["colour", "channels first", "grey", "grey with a channel"])
def test_arrays_of_either_spelling_and_form(tmp_path, names, form):
    images, labels = {"train": colours(12), "val": colours(2), "test": colours(4)}, {}
    arrays = {}
    for split, pixels in images.items():
        labels[split] = np.arange(len(pixels)) % 2
        given = {
            "colour": pixels,
            "channels first": pixels.transpose(0, 3, 1, 2),
            "grey": pixels[..., 0],
            "grey with a channel": pixels[..., :1],
        }[form]
        arrays |= {names[0].format(split): given, names[1].format(split): labels[split][:, None]}
    found = opened("npz", npz(tmp_path, **arrays))
    grey = form.startswith("grey")
    expected = {split: np.repeat(x[..., :1], 3, 3) if grey else x for split, x in images.items()}
    assert np.array_equal(found.test.images.permute(0, 2, 3, 1), expected["test"])
    assert np.array_equal(found.train.images.permute(0, 2, 3, 1), np.concatenate([expected["train"], expected["val"]]))
    assert found.train.labels.tolist() == [*labels["train"], *labels["val"]]
    assert found.val_index.tolist() == [12, 13]
    assert found.class_names == ("0", "1")


@pytest.mark.parametrize("names", [["cat", "dog"], [b"cat", b"dog"]])
def test_images_and_labels_alone_are_split_and_named(tmp_path, names):
    found = opened("npz", npz(tmp_path, **two_classes(names)), image_size=4)
    assert (len(found.train), len(found.test), found.class_names) == (16, 4, ("cat", "dog"))
    assert found.image_size == 4


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({f"a{i}": np.zeros(1) for i in range(9)}, r"\(only a0, a1, a2 and 6 more\)"),
        ({"images": np.zeros((4, 5, 5, 3))}, r"holds neither x_train and y_train nor images .*\(only images\)"),
        ({"images": np.zeros((4, 5, 5, 3)), "labels": np.arange(4)}, r"images is float64 \[4, 5, 5, 3\], but must be"),
        ({"images": np.zeros((4, 5), np.uint8), "labels": np.arange(4)}, r"images is uint8 \[4, 5\], but"),
        ({"images": colours(0), "labels": np.arange(0)}, r"images is uint8 \[0, 6, 6, 3\], but"),
        ({"images": colours(4), "labels": np.arange(3)}, r"labels must be 4 classes, .*int64 \[3\]"),
        ({"images": colours(4), "labels": np.arange(4) - 1}, r"labels must be 4 classes"),
        ({"images": colours(4), "labels": np.array([0, 1, 0, 1 << 40])}, r"class 1099511627776, but only 4 images"),
        ({"images": colours(4), "labels": np.zeros(4)}, r"labels must be 4 classes.*float64"),
        ({"images": colours(4), "labels": np.array([{}] * 4)}, r"not an \.npz file of plain arrays"),
        (two_classes("cat"), r"class_names is <U3 \[\], but must be \[2\] names"),
        (two_classes(["cat"]), r"class_names is <U3 \[1\], but must be \[2\] names"),
        (two_classes([["cat", "dog"]]), r"class_names is <U3 \[1, 2\], but must be \[2\] names"),
        (two_classes([b"cat", b"\xff"]), r"class_names is not UTF-8"),
    ],
)
def test_other_arrays_are_refused(tmp_path, arrays, message):
    with pytest.raises(UserError, match=message) as caught:
        opened("npz", npz(tmp_path, **arrays))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, b"", b"text"])
def test_what_is_no_npz_is_refused(tmp_path, content):
    path = tmp_path / "own.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"own\.npz: (no such file|not an \.npz file)"):
        opened("npz", path)


def test_other_files_of_numpy_are_refused(tmp_path):
    np.save(tmp_path / "own.npy", colours(4))
    with pytest.raises(UserError, match=r"own\.npy: not an \.npz file of plain arrays, .*a single array"):
        opened("npz", tmp_path / "own.npy")
    np.savez_compressed(tmp_path / "own.npz", images=np.zeros((40, 9, 9), np.uint8), labels=np.arange(40))
    content = bytearray((tmp_path / "own.npz").read_bytes())
    content[60:80] = bytes([255]) * 20
    (tmp_path / "own.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"own\.npz: not an \.npz file of plain arrays, or damaged"):
        opened("npz", tmp_path / "own.npz")


def idx(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    head = bytes([0, 0, 8, array.ndim]) + b"".join(int(n).to_bytes(4, "big") for n in array.shape)
    path.write_bytes(head + array.astype(np.uint8).tobytes())


def test_a_data_set_of_torchvision(tmp_path):
    """FashionMNIST in its own file form, small."""
    raw, expected = tmp_path / "root" / "FashionMNIST" / "raw", {}
    for split, name, count in (("train", "train", 30), ("test", "t10k", 20)):
        expected[split] = RNG.integers(0, 256, (count, 28, 28), dtype=np.uint8), np.arange(count) % 10
        for array, kind in zip(expected[split], ("images-idx3", "labels-idx1"), strict=True):
            idx(raw / f"{name}-{kind}-ubyte", array)
            with gzip.open(raw / f"{name}-{kind}-ubyte.gz", "wb") as file:
                file.write(b"")
    found = opened("torchvision", tmp_path / "root", name="FashionMNIST")
    for image_set in (found.train, found.test):
        images, labels = expected[image_set.split]
        assert torch.equal(image_set.images, torch.from_numpy(images)[:, None].expand(-1, 3, -1, -1))
        assert image_set.labels.tolist() == labels.tolist()
    assert found.class_names == tuple(datasets.FashionMNIST.classes)


class Fake:
    """A data set of torchvision whose splits have names, and whose labels only its items tell."""

    categories = (("husky", "dog"), "cat")
    names = ("train", "val", "test")

    def __init__(self, root, split="train", download=False):
        if split not in self.names:
            raise ValueError(f"Unknown value '{split}' for argument split")
        self.split = split

    def __len__(self):
        return {"train": 8, "trainval": 8, "val": 2, "test": 4}[self.split]

    def __getitem__(self, i):
        return Image.new("RGB", (5 + i, 9), (i, 0, 0)), torch.tensor(i % 2)


@pytest.mark.parametrize(
    ("names", "train", "val", "test"),
    [(Fake.names, 10, 2, 4), (("trainval", "test"), 8, 0, 4), (("train", "val"), 8, 0, 2), (("train",), 6, 0, 2)],
)
def test_splits_by_name(tmp_path, monkeypatch, names, train, val, test):
    monkeypatch.setattr(datasets, "SVHN", type("SVHN", (Fake,), {"names": names}))
    found = opened("torchvision", tmp_path / "root", name="SVHN", image_size=3, test_fraction=0.25)
    held_out = 0 if found.val_index is None else len(found.val_index)
    assert (len(found.train), held_out, len(found.test)) == (train, val, test)
    assert found.class_names == ("husky, dog", "cat")
    with pytest.raises(UserError, match=r"images differ in size \(9×5 and 9×6\): give"):
        opened("torchvision", tmp_path / "root", name="SVHN", test_fraction=0.25)


def test_what_torchvision_cannot_give_is_one_line(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"data set of torchvision 'SVHM'; did you mean 'SVHN'"):
        opened("torchvision", tmp_path, name="SVHM")
    with pytest.raises(UserError, match=r"data\.name=STL10: torchvision cannot read it from .*not found"):
        opened("torchvision", tmp_path, name="STL10")
    for target in ({"boxes": []}, torch.zeros(40, dtype=torch.int64), (1, 2)):
        several = {"__getitem__": lambda self, i, target=target: (Image.new("RGB", (3, 3)), target)}
        monkeypatch.setattr(datasets, "SVHN", type("SVHN", (Fake,), several))
        with pytest.raises(UserError, match=r"data\.name=SVHN: torchvision gives its images no classes"):
            opened("torchvision", tmp_path, name="SVHN")


@pytest.mark.parametrize("source", ["folder", "torchvision"])
@pytest.mark.parametrize("forgotten", [True, False])
def test_replaced_images_are_read_anew(tmp_path, monkeypatch, source, forgotten):
    """In another process and in the same one, from a root that is relative, too."""
    monkeypatch.chdir(tmp_path)
    settings = DataSettings("ImageFolder", source, "root", cache="cache", download=False)
    for level in (1, 200):
        for name in ("a", "b"):
            (tmp_path / "root" / name).mkdir(parents=True, exist_ok=True)
            for i in range(5):
                Image.new("RGB", (4 + level % 2, 4), (level, i, i)).resize((4, 4)).save(f"root/{name}/{i}.png")
        if forgotten:
            catalog._LOADED.clear()
        found = open_dataset(settings)
        assert found.train.images[:, 0].unique().tolist() == [level]
        assert open_dataset(settings) is found


def test_parameters_that_are_handed_on(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"data\.name=EMNIST: torchvision needs an argument `split`"):
        opened("torchvision", tmp_path, name="EMNIST")
    with pytest.raises(UserError, match=r"data\.name=LSUN: refused, because torchvision would unpickle"):
        opened("torchvision", tmp_path, name="LSUN")
    fetched = []
    monkeypatch.setattr(datasets.QMNIST, "download", lambda self: fetched.append(self.what))
    with pytest.raises(UserError, match=r"data\.name=QMNIST: torchvision cannot read it"):
        opened("torchvision", tmp_path, name="QMNIST", download=True)
    assert fetched == ["train"]


class Split:
    """What `datasets.load_dataset` gives of a split."""

    def __init__(self, features, columns):
        self.features, self._columns, self._fingerprint = features, columns, f"{len(columns)}"

    def __getitem__(self, key):
        return self._columns[key] if isinstance(key, str) else {name: own[key] for name, own in self._columns.items()}


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the package `datasets`, and what it was asked."""
    module: Any = ModuleType("datasets")
    module.__version__, module.asked = "4.8.5", []
    module.Image = type("Image", (), {})
    module.ClassLabel = type("ClassLabel", (), {"names": ["ant", "bee"]})
    module.config = SimpleNamespace(HF_HUB_OFFLINE=False)
    module.DownloadConfig = lambda cache_dir, local_files_only: {"cache": cache_dir, "local": local_files_only}
    pixels = {split: colours(count) for split, count in {"train": 20, "validation": 4, "test": 6}.items()}
    module.pixels = pixels

    def load_dataset(name, cache_dir, download_config):
        module.asked.append((name, cache_dir, download_config, module.config.HF_HUB_OFFLINE))
        features = {"id": None, "img": module.Image(), "fine": module.ClassLabel(), "coarse": module.ClassLabel()}
        columns = {
            split: {
                "id": list(range(len(own))),
                "img": [Image.fromarray(one) for one in own],
                "fine": [module.unknown] * len(own) if split in module.secret else [i % 2 for i in range(len(own))],
                "coarse": [0] * len(own),
            }
            for split, own in pixels.items()
        }
        return {split: Split(features, own) for split, own in columns.items()}

    module.load_dataset, module.secret, module.unknown = load_dataset, (), -1
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.setattr(arrays, "require", lambda *_: None)
    return module


def test_a_data_set_of_the_hub(hub, tmp_path, caplog):
    found = opened("huggingface", tmp_path / "root", name="user/set")
    kept = {"cache": str(tmp_path / "root" / "downloads"), "local": True}
    assert hub.asked == [("user/set", str(tmp_path / "root"), kept, True)]
    assert hub.config.HF_HUB_OFFLINE is False
    assert found.class_names == ("ant", "bee")
    assert torch.equal(found.test.images, torch.from_numpy(hub.pixels["test"]).permute(0, 3, 1, 2))
    assert found.train.labels.tolist() == [i % 2 for i in range(20)] + [0, 1, 0, 1]
    assert found.val_index.tolist() == [20, 21, 22, 23]
    assert found.source == "user/set of the Hugging Face hub"
    hub.secret = ("test",)
    for hub.unknown in (-1, None):
        caplog.clear()
        with caplog.at_level("INFO"):
            found = opened("huggingface", tmp_path / "root", name="user/set", download=True)
        assert len(found.test) == 4
        assert found.source == "user/set of the Hugging Face hub, its validation split for testing"
        assert "the validation split is used for testing" in caplog.text
        assert hub.asked[-1][2:] == ({**kept, "local": False}, False)


@pytest.fixture
def bees(tmp_path):
    """Images of two classes by the package itself: as the hub's cache keeps them, and as it saves them."""
    package = pytest.importorskip("datasets")
    pixels = {split: colours(count) for split, count in {"train": 20, "validation": 4, "test": 6}.items()}
    for split, images in pixels.items():
        for number, image in enumerate(images):
            path = tmp_path / "files" / split / ("ant", "bee")[number % 2] / f"{number // 2:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    built = package.load_dataset("imagefolder", data_dir=str(tmp_path / "files"), cache_dir=str(tmp_path / "built"))
    built.save_to_disk(tmp_path / "saved")
    built["train"].save_to_disk(tmp_path / "single")
    (info,) = (tmp_path / "built").rglob("dataset_info.json")
    kept = shutil.copytree(info.parent, tmp_path / "root" / "user___set" / "default" / "0.0.0" / "1")
    for file in kept.glob("imagefolder-*"):
        file.rename(kept / file.name.replace("imagefolder", "set"))
    order = {split: [*range(0, len(images), 2), *range(1, len(images), 2)] for split, images in pixels.items()}
    return {split: torch.from_numpy(images[order[split]]).permute(0, 3, 1, 2) for split, images in pixels.items()}


@pytest.mark.parametrize(("root", "name"), [("root", "user/set"), ("saved", "bees")])
def test_the_package_itself_gives_the_images_that_it_was_given(bees, tmp_path, root, name):
    found = opened("huggingface", tmp_path / root, name=name)
    assert found.class_names == ("ant", "bee")
    assert torch.equal(found.test.images, bees["test"])
    assert torch.equal(found.train.images, torch.cat([bees["train"], bees["validation"]]))
    assert found.train.labels.tolist() == [0] * 10 + [1] * 10 + [0, 0, 1, 1]
    assert found.val_index.tolist() == [20, 21, 22, 23]
    hashes = found.train.sha256, found.test.sha256
    again = opened("huggingface", tmp_path / root, name=name)
    assert (again.train.sha256, again.test.sha256) == hashes


def test_what_the_package_itself_cannot_read_is_one_line(bees, tmp_path):
    single = opened("huggingface", tmp_path / "single", name="bees")
    assert (len(single.train), len(single.test)) == (16, 4)  # a fifth of each class is set aside
    with pytest.raises(UserError, match=r"data\.name=user/other: cannot be loaded \(Couldn't reach"):
        opened("huggingface", tmp_path / "root", name="user/other")
    (file,) = (tmp_path / "single").glob("*.arrow")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match=r"data\.root=.*single: cannot be loaded"):
        opened("huggingface", tmp_path / "single", name="bees")


def test_what_the_hub_cannot_give_is_one_line(hub, tmp_path, monkeypatch):
    def refused(said, name="user/set"):
        with pytest.raises(UserError, match=said):
            opened("huggingface", tmp_path / "root", name=name)

    refused("data.name=cifar: not USER/SET", "cifar")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "user" / "set").mkdir(parents=True)
    refused("data.name=user/set: not USER/SET .*data=folder")
    hub.secret = ("train", "validation", "test")
    refused(r"no split for training with known classes \(only train, validation, test\)", "user/other")
    hub.Image = type("Other", (), {})
    hub.load_dataset = lambda *_, **__: {"train": Split({"x": None}, {"x": [1]})}
    refused(r"has no column of the kind Other \(only x\)", "user/other")
    hub.load_dataset = None
    refused("data.name=user/other: cannot be loaded", "user/other")
    hub.__version__ = "2.21.0"
    refused("datasets 2.21.0 runs foreign code; install another: pip install", "user/other")
    monkeypatch.undo()
    if importlib.util.find_spec("datasets") is None:
        refused(r"datasets is not installed: pip install 'ekd-lightning\[datasets\]'", "user/other")
