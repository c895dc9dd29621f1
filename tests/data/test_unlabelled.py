"""Batches with images without labels: what they hold, against NumPy; where the images come from; what is refused."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from random_images import random_set
from torch.utils._python_dispatch import TorchDispatchMode

from ekd_lightning.data import choose_subset, open_dataset, open_unlabelled
from ekd_lightning.data.datamodule import ImageDataModule
from ekd_lightning.data.images import Dataset, ImageSet, JoinedImages, Unlabelled
from ekd_lightning.data.loader import TrainLoader, gather_batch
from ekd_lightning.data.mixing import Mixing
from ekd_lightning.data.order import STREAM_ORDER, STREAM_VIEW, hash_uniform_u64
from ekd_lightning.data.views import CropFlip, Identity, OwnPlaces, make_views, to_unit
from ekd_lightning.errors import UserError
from ekd_lightning.settings import DataSettings

TRAIN = random_set("train", 120)
VIEWS = CropFlip(2)
NUM_VIEWS = 50


def images_without(index, share=0.5, leads=False):
    return Unlabelled(torch.tensor(index), "", "", share, leads)


def seen(seed, number, images):
    """One pass over images, by their hashes: (index, view)."""
    ranked = images[np.argsort(hash_uniform_u64(STREAM_ORDER, seed, number, images))]
    high = hash_uniform_u64(STREAM_VIEW, seed, number, ranked) >> np.uint64(32)
    return [(int(i), int(h) * NUM_VIEWS >> 32) for i, h in zip(ranked, high, strict=True)]


def of_kind(seed, epoch, images, rows, steps):
    """An epoch's (index, view) of one kind, told epoch by epoch from the first one on."""
    needed, number, left = rows * steps, 0, []
    for _ in range(epoch + 1):
        if needed > len(images):  # passes of its own for every epoch
            shown = []
            while len(shown) < needed:
                shown += seen(seed, number, images)
                number += 1
            shown = shown[:needed]
        else:
            if len(left) < needed:  # what is left of a pass would not last
                left, number = seen(seed, number, images), number + 1
            shown, left = left[:needed], left[needed:]
    return np.array(shown).reshape(steps, rows, 2)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(4, 60),
    st.integers(4, 60),
    st.integers(1, 4),
    st.integers(1, 4),
    st.booleans(),
    st.integers(0, 5),
    st.integers(0, 2),
)
def test_batches_against_numpy(labelled, unlabelled, own, others, leads, number, seed):  # fmt: skip
    known, withheld = np.arange(labelled) * 2, np.arange(unlabelled) * 2 + 1
    without = images_without(withheld, others / (own + others), leads)
    loader = TrainLoader(TRAIN, torch.from_numpy(known), VIEWS, own + others, seed, unlabelled=without)
    steps = unlabelled // others if leads else labelled // own
    assert len(loader) == steps
    loader.set_epoch(number)
    first = of_kind(seed, number, known, own, steps)
    second = of_kind(seed, number, withheld, others, steps)
    for rows, ours, theirs in zip(loader, first, second, strict=True):
        assert rows.num_labelled == own
        assert rows.index.tolist() == [*ours[:, 0], *theirs[:, 0]]
        assert rows.view.tolist() == [*ours[:, 1], *theirs[:, 1]]
        assert rows.labels.tolist() == [*TRAIN.labels[ours[:, 0]].tolist(), *[-1] * others]
    index, view = loader.distinct_rows()
    assert sorted(zip(index.tolist(), view.tolist(), strict=True)) == sorted(
        {(i, v) for part in (first, second) for i, v in part.reshape(-1, 2).tolist()}
    )


@pytest.mark.parametrize("leads", [False, True])
def test_any_number_of_processes_sees_the_batches_of_one(leads):
    known, without = torch.arange(30), images_without(np.arange(30, 120), 1 / 3, leads)
    for number in (0, 3):
        whole = TrainLoader(TRAIN, known, VIEWS, 12, 1, unlabelled=without)
        whole.set_epoch(number)
        for world_size in (2, 4):
            parts = []
            for rank in range(world_size):
                mine = TrainLoader(TRAIN, known, VIEWS, 12, 1, world_size=world_size, rank=rank, unlabelled=without)
                mine.set_epoch(number)
                parts.append(list(mine))
            for rows, *shares in zip(whole, *parts, strict=True):
                assert sum(share.num_labelled for share in shares) == rows.num_labelled == 8
                for name in ("labels", "index", "view"):
                    values = torch.stack([getattr(share, name) for share in shares], dim=1).flatten()
                    assert torch.equal(values, getattr(rows, name))


def test_labelled_rows_are_those_of_a_run_without_others():
    alone = TrainLoader(TRAIN, torch.arange(30), VIEWS, 6, 1)
    beside = TrainLoader(TRAIN, torch.arange(30), VIEWS, 12, 1, unlabelled=images_without(np.arange(30, 120)))
    for number in range(3):
        alone.set_epoch(number)
        beside.set_epoch(number)
        for one, other in zip(alone, beside, strict=True):
            assert torch.equal(one.index, other.index[:6])
            assert torch.equal(one.view, other.view[:6])


def test_all_images_without_labels_are_seen_before_any_is_seen_again():
    loader = TrainLoader(TRAIN, torch.arange(20), VIEWS, 10, 0, unlabelled=images_without(np.arange(20, 120)))
    seen_so_far = []
    for number in range(5):  # 4 batches with 5 of 100 images
        loader.set_epoch(number)
        seen_so_far += [i for rows in loader for i in rows.index[5:].tolist()]
    assert sorted(seen_so_far) == list(range(20, 120))


@pytest.mark.parametrize(
    ("batch_size", "share", "world_size", "message"),
    [
        (12, 0.01, 1, "0 unlabelled images"),
        (12, 0.99, 1, "0 labelled images"),
        (64, 0.5, 1, "32 labelled images, but there are only 20"),
        (64, 0.99, 1, "63 unlabelled images, but there are only 40"),
        (12, 0.25, 2, "9 labelled images, which 2 processes cannot share evenly"),
    ],
)
def test_batches_that_cannot_be_made(batch_size, share, world_size, message):
    without = images_without(np.arange(20, 60), share)
    with pytest.raises(UserError, match=message):
        TrainLoader(TRAIN, torch.arange(20), VIEWS, batch_size, 0, world_size=world_size, unlabelled=without)


@pytest.mark.parametrize(("batch_size", "leads", "repeats"), [(8, False, False), (10, True, True), (8, True, False)])
def test_a_loader_knows_whether_an_epoch_holds_an_image_twice(batch_size, leads, repeats):
    count = 40 if repeats else 20
    without = images_without(range(20, 20 + count), leads=leads)
    loader = TrainLoader(TRAIN, torch.arange(20), VIEWS, batch_size, 0, unlabelled=without)
    index = torch.cat([rows.index for rows in loader])
    assert loader.repeats == (len(index.unique()) < len(index)) == repeats


def test_images_without_labels_are_not_mixed():
    without = images_without(range(30, 40))
    data = dataset()
    subset = choose_subset(data.train.labels, fraction=0.5, val_fraction=0)
    for make in (
        lambda mixing: TrainLoader(TRAIN, torch.arange(20), VIEWS, 8, 0, mixing=mixing, unlabelled=without),
        lambda mixing: ImageDataModule(data, subset, VIEWS, batch_size=8, mixing=mixing, unlabelled=without),
    ):
        make(Mixing(0.0, 0.0))
        with pytest.raises(UserError, match="images without labels cannot be mixed"):
            make(Mixing(0.2, 0.0))


def dataset(size=40):
    return Dataset("two", random_set("train", size), random_set("test", 8))


def test_the_rest_is_what_neither_trains_nor_validates():
    data = dataset()
    subset = choose_subset(data.train.labels, fraction=0.5, val_fraction=0.25)
    rest = open_unlabelled(DataSettings(unlabelled="rest"), data, subset)
    others = {*subset.train_index.tolist(), *subset.val_index.tolist()}
    assert rest.index.tolist() == [i for i in range(len(data.train)) if i not in others]
    assert (rest.share, rest.leads, rest.own) == (0.5, False, None)
    held_out = torch.tensor([0, 1])
    again = choose_subset(data.train.labels, fraction=0.5, val_index=held_out)
    rest = open_unlabelled(
        DataSettings(unlabelled="rest", unlabelled_share=0.2, epoch="unlabelled"),
        Dataset("two", data.train, data.test, val_index=held_out),
        again,
    )
    assert not {0, 1} & set(rest.index.tolist())
    assert (rest.share, rest.leads) == (0.2, True)


def write_images(folder, count, side=9, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        path = folder / ("deep" if i % 2 else ".") / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def test_a_folder_flat_and_nested(tmp_path):
    side = TRAIN.images.shape[-1]
    pixels = write_images(tmp_path / "found", 7, side)
    data = dataset()
    subset = choose_subset(data.train.labels, val_fraction=0)
    words = DataSettings(unlabelled=str(tmp_path / "found"), cache=str(tmp_path / "cache"))
    found = open_unlabelled(words, data, subset)
    assert torch.equal(found.own.images, pixels[[0, 2, 4, 6, 1, 3, 5]])  # by their paths
    assert found.index.tolist() == list(range(40, 47))
    assert open_unlabelled(words, data, subset).sha256 == found.sha256 == found.own.sha256
    module = ImageDataModule(data, subset, VIEWS, batch_size=4, unlabelled=found)
    for rows in module.train_dataloader():
        batch = module.gather_training(rows, torch.device("cpu"))
        ours = VIEWS(data.train.images[rows.index[:2]], rows.view[:2], rows.index[:2])
        theirs = VIEWS(found.own.images[rows.index[2:] - 40], rows.view[2:], rows.index[2:])
        assert torch.equal(batch.images, to_unit(torch.cat([ours, theirs])))
        assert (batch.labelled.labels.tolist(), len(batch.labelled.images)) == (
            data.train.labels[rows.index[:2]].tolist(),
            2,
        )


def test_images_for_testing_or_validation_are_not_trained_on_without_labels(tmp_path):
    """Neither from the folder of the data set itself, nor from one above it."""
    root = tmp_path / "above" / "birds"
    for name in ("heron", "owl"):
        write_images(root / name, 10, seed=len(name))
    words = {"source": "folder", "name": "birds", "root": str(root), "cache": str(tmp_path / "cache")}
    data = open_dataset(DataSettings(**words))
    for val_fraction, count in ((0.0, 4), (0.25, 8)):
        subset = choose_subset(data.train.labels, val_fraction=val_fraction)
        assert len(subset.val_index) == count - len(data.test)
        for folder in (root, root.parent):
            with pytest.raises(UserError, match=f"{folder}: {count} of its 20 images are test or validation images"):
                open_unlabelled(DataSettings(**words, unlabelled=str(folder)), data, subset)
    again = Dataset("birds", data.train, data.test, val_index=torch.tensor([0, 5, 9]))
    subset = choose_subset(data.train.labels, val_index=again.val_index)
    with pytest.raises(UserError, match="7 of its 20 images"):
        open_unlabelled(DataSettings(**words, unlabelled=str(root)), again, subset)


def test_views_of_a_second_set_do_not_depend_on_the_first():
    family = make_views("cutout", pool_size=8)
    images, view = TRAIN.images[:6], torch.arange(6)
    joined = OwnPlaces(family, 100)
    assert torch.equal(joined(images, view, torch.arange(6) + 100), family(images, view, torch.arange(6)))
    assert torch.equal(joined(images, view, torch.arange(6)), family(images, view, torch.arange(6)))


def test_joined_images_are_one_behind_the_other():
    joined = JoinedImages(TRAIN.images[:50], TRAIN.images[50:])
    index = torch.randperm(120, generator=torch.Generator().manual_seed(0))
    assert torch.equal(joined[index], TRAIN.images[index])
    assert joined.nbytes == TRAIN.images.nbytes


def test_joined_images_are_held_once_on_a_device():
    class Storages(TorchDispatchMode):
        kept: list[torch.Tensor] = []  # noqa: RUF012

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            self.kept += [one for one in (made if isinstance(made, (list, tuple)) else [made]) if one.is_meta]
            return made

    with Storages() as seen:
        whole = JoinedImages(TRAIN.images[:50], TRAIN.images[50:]).to(torch.device("meta"))
    assert (whole.shape, whole.dtype) == (TRAIN.images.shape, torch.uint8)
    assert len({one.untyped_storage()._cdata for one in seen.kept}) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"unlabelled": "rest", "fraction": 1.0}, "data.unlabelled=rest: the subset leaves no training image out"),
        ({"unlabelled": "nowhere"}, "nowhere: no such folder"),
        ({"unlabelled": "."}, "holds no images"),
        ({"unlabelled": "split"}, "data.unlabelled=split needs data=torchvision"),
    ],
)
def test_what_is_refused(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    data = dataset()
    with pytest.raises(UserError, match=re.escape(message)) as error:
        open_unlabelled(DataSettings(**words), data, choose_subset(data.train.labels))
    assert "\n" not in str(error.value)


def test_the_split_of_stl10(tmp_path, monkeypatch):
    """Against a stand-in with the signature of torchvision's class: the real one is 2.6 GB."""
    from torchvision import datasets

    pixels = np.random.default_rng(0).integers(0, 256, (5, 9, 9, 3), dtype=np.uint8)

    class STL10:
        def __init__(self, root, split="train", folds=None, transform=None, target_transform=None, download=False):
            if split not in ("train", "train+unlabeled", "unlabeled", "test"):
                raise ValueError(f"Unknown value '{split}' for argument split.")
            self.data, self.labels = pixels, np.full(5, -1)

        def __len__(self):
            return 5

        def __getitem__(self, i):
            return Image.fromarray(self.data[i]), int(self.labels[i])

    monkeypatch.setattr(datasets, "STL10", STL10)
    images = ImageSet("stl10", "train", torch.zeros(6, 3, 9, 9, dtype=torch.uint8), torch.arange(6) % 2, ("a", "b"))
    data = Dataset("STL10", images, images)
    words = {"source": "torchvision", "unlabelled": "split", "root": str(tmp_path), "cache": str(tmp_path / "cache")}
    found = open_unlabelled(DataSettings(name="STL10", **words), data, choose_subset(images.labels, val_fraction=0))
    assert torch.equal(found.own.images, torch.from_numpy(pixels).permute(0, 3, 1, 2))
    tested = ImageSet("stl10", "test", found.own.images[:2], torch.arange(2), ("a", "b"))
    with pytest.warns(UserWarning, match="2 of its 5 images are test or validation images"):
        open_unlabelled(
            DataSettings(name="STL10", **words),
            Dataset("STL10", images, tested),
            choose_subset(images.labels, val_fraction=0),
        )
    monkeypatch.setattr(datasets, "SVHN", type("SVHN", (STL10,), {"__init__": _without}))
    with pytest.raises(UserError, match="SVHN has no split without labels"):
        open_unlabelled(DataSettings(name="SVHN", **words), data, choose_subset(images.labels, val_fraction=0))


def _without(self, root, split="train", download=False):
    raise ValueError(f"Unknown value '{split}' for argument split.")


def test_gathering_keeps_how_many_have_labels():
    rows = next(
        iter(TrainLoader(TRAIN, torch.arange(20), Identity(), 8, 0, unlabelled=images_without([50, 51, 52, 53])))
    )
    batch = gather_batch(TRAIN.images, rows, Identity())
    assert batch.num_labelled == 4
    assert torch.equal(batch.images, to_unit(TRAIN.images[rows.index]))
