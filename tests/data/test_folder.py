"""Folders of images: what becomes of them, once; splits; mistakes in one line."""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ekd_lightning.data import catalog, choose_subset, listing, open_dataset
from ekd_lightning.data.catalog import read_digits
from ekd_lightning.data.decoding import cached_images
from ekd_lightning.data.folder import list_folder
from ekd_lightning.data.images import Dataset, ImageSet
from ekd_lightning.data.loader import TrainLoader, gather_batch
from ekd_lightning.data.views import CropFlip
from ekd_lightning.errors import UserError
from ekd_lightning.networks import NetworkSpec, build_network, normalization
from ekd_lightning.settings import DataSettings


@pytest.fixture(autouse=True)
def nothing_loaded(monkeypatch):
    monkeypatch.setattr(catalog, "_LOADED", {})


def save(path: Path, seed: int, size=(6, 6), **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)).save(path, **options)
    return path


def make(root: Path, counts: dict[str, int]) -> Path:
    """Folders below the root with so many images each, all of them different."""
    for folder, count in counts.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            save(root / folder / f"{number:02}.png", hash((folder, number)) % 2**32)
    return root


def opened(root: Path, **changes) -> Dataset:
    catalog._LOADED.clear()
    cache = str(root.parent / "cache")
    return open_dataset(replace(DataSettings("own", "folder", str(root), cache=cache), **changes))


def in_memory(split: ImageSet, order: list[int]) -> ImageSet:
    return replace(split, name="own", images=split.images[order].clone(), labels=split.labels[order].clone())


def as_files(dataset: Dataset, root: Path, every: int) -> tuple[Path, dict[str, ImageSet]]:
    """Every n-th image of a data set as a PNG file, and in memory, brought into the folder's order."""
    memory = {}
    for name, split in (("train", dataset.train), ("test", dataset.test)):
        chosen = range(0, len(split), every)
        for i in chosen:
            path = root / name / split.class_names[int(split.labels[i])] / f"{i:05}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(split.images[i].permute(1, 2, 0).numpy()).save(path)
        order = sorted(chosen, key=lambda i: (split.class_names[int(split.labels[i])], i))
        memory[name] = in_memory(split, order)
    return root, memory


@pytest.fixture(scope="module")
def digits_as_files(tmp_path_factory) -> tuple[Path, dict[str, ImageSet]]:
    return as_files(read_digits(), tmp_path_factory.mktemp("digits") / "own", 4)


@pytest.fixture
def cifar10_as_files(tmp_path, real_root) -> tuple[Path, dict[str, ImageSet]]:
    return as_files(catalog.load_dataset("cifar10", real_root), tmp_path / "own", 40)


def batches(image_set: ImageSet):
    loader = TrainLoader(image_set, torch.arange(0, len(image_set), 2), CropFlip(2), 32, seed=3)
    loader.set_epoch(2)
    for rows in loader:
        yield gather_batch(image_set.images, rows, CropFlip(2))


@pytest.mark.parametrize("files", ["digits_as_files", "cifar10_as_files"])
def test_a_folder_is_the_same_data_set_as_memory(request, files):
    """Images, batches and losses, bit for bit."""
    root, memory = request.getfixturevalue(files)
    folder = opened(root)
    for split in ("train", "test"):
        ours, expected = getattr(folder, split), memory[split]
        assert torch.equal(ours.images, expected.images)
        assert torch.equal(ours.labels, expected.labels)
        assert (ours.sha256, ours.class_names) == (expected.sha256, expected.class_names)
        assert replace(ours, labels=ours.labels.flip(0)).sha256 != ours.sha256
    torch.manual_seed(0)
    network = build_network(NetworkSpec("resnet8", 10, normalization("imagenet"), {"width": 0.25})).eval()
    for ours, expected in zip(batches(folder.train), batches(memory["train"]), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours[:5], expected[:5], strict=True))
        losses = [torch.nn.functional.cross_entropy(network(batch.images), batch.labels) for batch in (ours, expected)]
        assert torch.equal(*losses)


def test_images_are_mapped_and_decoded_once(digits_as_files, monkeypatch):
    root, _ = digits_as_files
    first = opened(root)
    monkeypatch.setattr(listing, "decode_all", lambda *_: pytest.fail("decoded again"))
    again = opened(root)
    assert again.train.sha256 == first.train.sha256
    (pixels,) = (root.parent / "cache").glob("*.pixels")
    level = int(again.train.images[0, 0, 0, 0])
    with pixels.open("r+b") as file:
        file.write(bytes([255 - level]))
    assert int(again.train.images[0, 0, 0, 0]) == 255 - level  # a copy in memory would not have changed
    pixels.unlink()


@pytest.mark.parametrize("change", ["touched", "added", "size", "name"])
def test_whatever_changes_the_images_decodes_them_anew(tmp_path, monkeypatch, change):
    root = make(tmp_path / "own", {"a": 5, "b": 5})
    before = opened(root).train.sha256
    options: Any = {}
    if change == "touched":
        save(root / "a" / "00.png", 99)
        os.utime(root / "a" / "00.png", ns=(1, 1))
    elif change == "added":
        save(root / "b" / "99.png", 99)
    else:
        options = {"size": {"image_size": 5}, "name": {"name": "other"}}[change]
    assert opened(root, **options).train.sha256 != before


def test_what_a_killed_or_damaged_builder_left_is_not_believed(tmp_path, monkeypatch):
    root, cache = make(tmp_path / "own", {"a": 5, "b": 5}), tmp_path / "cache"
    whole = listing.decode_all

    def killed(*arguments):
        whole(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(listing, "decode_all", killed)
    with pytest.raises(KeyboardInterrupt):
        opened(root)
    assert not [path for path in cache.iterdir() if path.suffix != ".lock"]
    monkeypatch.setattr(listing, "decode_all", whole)
    expected = opened(root).train.sha256
    (pixels,), (facts,) = cache.glob("*.pixels"), cache.glob("*.json")
    for path, content in ((pixels, pixels.read_bytes()[:-1]), (facts, facts.read_bytes().replace(b"1", b"0"))):
        path.write_bytes(content)
        found = opened(root).train
        assert found.sha256 == expected == replace(found).sha256


def test_several_at_once_decode_once_and_read_the_same(tmp_path):
    built = []

    def build(target: Path) -> dict[str, object]:
        built.append(target)
        target.write_bytes(bytes(range(24)))
        return {"shape": [2, 3, 2, 2]}

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: cached_images(tmp_path, {"of": "two"}, build), range(8)))
    assert len(built) == 1
    assert all(torch.equal(images.flatten(), torch.arange(24, dtype=torch.uint8)) for images, _ in found)


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(UserError, match=r"data\.cache=.*cache: cannot be written"):
        opened(make(tmp_path / "own", {"a": 5, "b": 5}))


def test_jpegs_of_any_size_become_squares_or_rectangles(tmp_path):
    for number in range(12):
        save(tmp_path / "own" / "ab"[number % 2] / f"{number}.JPG", number, (20 + number, 30), format="JPEG")
    assert opened(tmp_path / "own", image_size=16).image_size == 16
    assert opened(tmp_path / "own", image_size=[8, 12]).image_size == (8, 12)


# -- splits -----------------------------------------------------------------------------------------------


def test_folders_of_splits_are_kept(tmp_path):
    counts = {"train/a": 6, "train/b": 4, "val/a": 2, "val/b": 1, "test/b": 3}
    dataset = opened(make(tmp_path / "own", counts))
    assert torch.bincount(dataset.train.labels[:10]).tolist() == [6, 4]
    assert dataset.test.labels.tolist() == [1, 1, 1]
    subset = choose_subset(dataset.train.labels, fraction=0.5, val_index=dataset.val_index)
    assert dataset.train.labels[subset.val_index].tolist() == [0, 0, 1]
    assert torch.bincount(dataset.train.labels[subset.train_index]).tolist() == [3, 2]
    assert int(subset.train_index.max()) < 10
    assert subset.fraction == 0.5
    assert choose_subset(dataset.train.labels, per_class=4, val_index=dataset.val_index).fraction == 0.8


def names_of_test(root: Path, share: float = 0.2, seed: int = 0) -> set[str]:
    found = listing.with_test_images(list_folder(root), share, seed).splits
    names = {split: {row.name for row in rows} for split, rows in found.items()}
    assert not names["train"] & names["test"]
    assert names["train"] | names["test"] == {row.name for row in list_folder(root).splits["train"]}
    return names["test"]


def test_images_for_testing_are_set_aside_class_by_class(tmp_path):
    root = make(tmp_path / "own", {"a": 20, "b": 10})
    chosen = names_of_test(root)
    assert sorted(name[0] for name in chosen) == list("aaaabb")
    assert names_of_test(root) == chosen != names_of_test(root, seed=1)
    assert chosen < names_of_test(root, share=0.5)
    save(root / "a" / "another.png", 5)
    assert len(names_of_test(root) & chosen) >= 5  # the others stay where they were


def test_settings_of_own_images_without_effect_are_warned_of(tmp_path):
    for change in ({"image_size": 16}, {"skip_broken": True}):
        with pytest.warns(UserWarning, match=r"data\.\w+=(16|True) has no effect without data\.source"):
            open_dataset(replace(DataSettings(root=str(tmp_path)), **change))


def test_names_that_are_no_utf8(tmp_path):
    root = make(tmp_path / "own", {"a": 5, "b": 5})
    os.rename(root / "a" / "00.png", os.fsencode(root / "a") + b"/\xff.png")
    assert len(opened(root).train) == 8


# -- mistakes ---------------------------------------------------------------------------------------------


def with_text(root: Path) -> None:
    (root / "a" / "00.png").write_text("no image")
    (root / "b" / "01.png").write_bytes(b"")


def without_test(root: Path) -> None:
    (root / "test" / "a" / "00.png").write_bytes(b"")


@pytest.mark.parametrize(
    ("counts", "change", "settings", "message"),
    [
        ({"a": 5}, None, {}, r"has a single class, 'a'"),
        ({"a": 5, "b": 0, "c": 0}, None, {}, r"class 'b' has no training image, and 1 more classes have none"),
        ({"train/a": 2, "train/b": 2, "test/c": 1}, None, {}, r"test/c: no such class among the training"),
        ({"train/a": 2, "train/b": 2, "test/a": 0}, None, {}, r"test: holds no images"),
        (
            {"a": 5, "b": 5},
            with_text,
            {},
            r"a/00\.png is not an image, and 1 more cannot be read; .*\.skip_broken=true",
        ),
        (
            {"train/a": 2, "train/b": 2, "test/a": 1},
            without_test,
            {"skip_broken": True},
            r"none of its images for test",
        ),
        ({"a": 5, "b": 2}, None, {}, r"sets no image of the class 'b' aside for testing, as it has only 2: add"),
        ({"a": 5, "b": 5}, None, {"test_fraction": 1.0}, r"data\.test_fraction=1\.0 must lie in \(0, 1\)"),
        ({"a": 5, "b": 5}, None, {"image_size": 0}, r"data\.image_size=0: must be"),
        ({"a": 5, "b": 5}, None, {"image_size": [1, 2, 3]}, r"data\.image_size=\[1, 2, 3\]: must be"),
        ({"a": 5, "b": 5}, None, {"source": "foldr"}, r"data\.source 'foldr'; did you mean 'folder'"),
        ({}, lambda root: root.mkdir(), {}, r"holds no subfolders"),
        ({}, None, {}, r"data\.root=.*: no such folder"),
    ],
)
def test_mistakes_are_one_line(tmp_path, counts, change, settings, message):
    root = make(tmp_path / "own", counts)
    if change:
        change(root)
    with pytest.raises(UserError, match=message) as caught:
        opened(root, **settings)
    assert "\n" not in str(caught.value)


def test_broken_images_can_be_left_out(tmp_path):
    root = make(tmp_path / "own", {"train/a": 5, "train/b": 5, "test/a": 2})
    whole = opened(root)
    with_text(root / "train")
    for _ in range(2):  # fresh, and from the cache
        with pytest.warns(UserWarning, match=r"data\.skip_broken=true: train/a/00\.png is not an image, and 1 more"):
            found = opened(root, skip_broken=True)
        kept = [i for i in range(10) if i not in (0, 6)]
        assert torch.equal(found.train.images, whole.train.images[kept])
        assert torch.equal(found.train.labels, whole.train.labels[kept])
        assert torch.equal(found.test.images, whole.test.images)
        assert found.train.sha256 == replace(found.train).sha256


def test_a_file_in_two_splits_is_told(tmp_path):
    root = make(tmp_path / "own", {"train/a": 3, "train/b": 3, "test/a": 2})
    shutil.copy(root / "train" / "b" / "02.png", root / "test" / "a" / "copy.png")
    with pytest.warns(
        UserWarning, match=r"test/a/copy\.png \(test\) is among the images for training, too, as train/b/02"
    ):
        opened(root)


def test_other_files_are_left_out_and_told(tmp_path):
    root = make(tmp_path / "own", {"a": 5, "b": 5, ".hidden": 1, "a/.ipynb_checkpoints": 1})
    (root / "a" / "notes.txt").write_text("x")
    (root / "a" / ".DS_Store").write_text("x")
    with pytest.warns(UserWarning, match=r"files without the suffix of an image are left out: .*notes\.txt$"):
        found = opened(root)
    assert (found.num_classes, len(found.train) + len(found.test)) == (2, 10)


@pytest.mark.parametrize("target", ["..", ".", "../../b/deep", "../.."])
def test_links_that_lead_back_end(tmp_path, target):
    """A link to another folder is followed, into each folder once."""
    root = make(tmp_path / "own", {"a/deep": 5, "b/deep": 5})
    (root / "a" / "deep" / "loop").symlink_to(target)
    (root / "b" / "deep" / "back").symlink_to(root / "a")
    names = [row.name for row in list_folder(root).splits["train"]]
    of_b = [name for name in names if name.startswith("a/deep/loop/")]
    assert len(of_b) == (5 if target == "../../b/deep" else 0)
    assert len(names) == 15 + len(of_b)
