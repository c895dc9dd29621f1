"""Catalogue of data sets by name, and scikit-learn's bundled digits (1,797 scans)."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Hashable
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ekd_lightning.data.arrays import list_huggingface, list_npz, list_torchvision, list_unlabelled
from ekd_lightning.data.cifar import CIFAR_NAMES, cifar_spec, find_cifar, read_cifar
from ekd_lightning.data.download import obtain
from ekd_lightning.data.folder import list_folder, list_images
from ekd_lightning.data.images import Dataset, ImageSet, Unlabelled
from ekd_lightning.data.listing import Listing, check_image_size, read_listing, read_without_labels, with_test_images
from ekd_lightning.data.order import STREAM_SPLIT, hash_uniform_u64
from ekd_lightning.data.subset import Subset, choose_subset, left_out, take_evenly
from ekd_lightning.data.views import ViewFamily, configured_views
from ekd_lightning.errors import Registry, UserError
from ekd_lightning.settings import DataSettings

NUM_TEST = 360
UNLABELLED_SHARE = 0.5


def read_digits() -> Dataset:
    """Reads the digits as 3×32×32 images, 1,437 for training and 360 for testing.

    The 8×8 scans (0 .. 16) are enlarged four times by bilinear interpolation and repeated for three channels. The split
    is stratified and fixed.
    """
    from sklearn.datasets import load_digits  # noqa: PLC0415  # takes seconds, and is not always needed

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
    """Marks about a fifth of the N images, sorted by class and then by hash; bool [N]."""
    by_class = np.lexsort((hash_uniform_u64(STREAM_SPLIT, 0, 0, np.arange(len(labels))), labels))
    is_test = np.zeros(len(labels), dtype=bool)
    is_test[by_class] = take_evenly(len(labels), Fraction(NUM_TEST, len(labels)))
    return torch.from_numpy(is_test)


Loader = Callable[[Path, bool], Dataset]

DATASETS: Registry[Loader] = Registry("data set")
_LOADED: dict[Hashable, Dataset] = {}


def register_dataset(name: str) -> Callable[[Loader], Loader]:
    """Registers a data set under a name.

    Args:
        name: The name for `load_dataset` and `data.name`.

    Returns:
        A decorator for the loader: `loader(root, download)` returns the Dataset, and raises UserError if the data are
        missing or damaged.

    Raises:
        ValueError: If another loader already has the name.
    """
    return DATASETS.register(name)


def load_dataset(name: str, root: str | Path, download: bool = False) -> Dataset:
    """Loads a data set, and keeps it for later calls in this process.

    Args:
        name: A registered name.
        root: The folder with the data.
        download: Whether missing data may be downloaded.

    Returns:
        The data set; the same object for the same name and root.

    Raises:
        UserError: For an unknown name, or missing or damaged data.
    """
    load, folder = DATASETS[name], Path(root).expanduser().resolve()
    if (name, folder) not in _LOADED:
        _LOADED[name, folder] = load(folder, download)
    return _LOADED[name, folder]


def open_dataset(data: DataSettings) -> Dataset:
    """Opens the data set of the settings: a registered one, or the user's own images (`data.source`).

    Returns:
        The data set; the same object for the same settings, unless the images have changed.

    Raises:
        UserError: For unknown names, missing or damaged data, or settings that do not fit the data.
    """
    if data.source is None:
        own = {"image_size": data.image_size is not None, "skip_broken": data.skip_broken and data.unlabelled is None}
        for name in (name for name, given in own.items() if given):
            warnings.warn(f"data.{name}={getattr(data, name)} has no effect without data.source", stacklevel=2)
        return load_dataset(data.name, data.root, data.download)
    list_images = _SOURCES[data.source]
    root, size = Path(data.root).expanduser().resolve(), check_image_size(data.image_size)
    cache = Path(data.cache).expanduser().resolve()
    listing = with_test_images(list_images(data, root), data.test_fraction, data.subset_seed)
    key = data.source, data.name, root, size, data.skip_broken, cache, listing.digest()
    if key not in _LOADED:
        _LOADED[key] = read_listing(listing, data.name, image_size=size, cache=cache, skip_broken=data.skip_broken)
    return _LOADED[key]


def open_images(data: DataSettings) -> tuple[Dataset, Subset, ViewFamily]:
    """Opens the data set of the settings; returns it with the subset that a run may see and the augmentation.

    Raises:
        UserError: As `open_dataset` and `choose_subset`, or if the augmentation does not fit the images.
    """
    dataset = open_dataset(data)
    height, width = dataset.train.images.shape[2:]
    side = min(height, width)
    padding = side // 8 if data.padding is None else data.padding
    if padding >= side:
        raise UserError(f"data.padding={padding}: must be less than the images' shorter side of {side} pixels")
    views, one = configured_views(data, padding), torch.zeros(1, dtype=torch.int64)
    views(torch.zeros(1, 3, height, width, dtype=torch.uint8), one, one)  # raises now if they cannot be made
    subset = choose_subset(
        dataset.train.labels,
        fraction=data.fraction,
        per_class=data.per_class,
        val_fraction=data.val_fraction,
        seed=data.subset_seed,
        val_index=dataset.val_index,
    )
    return dataset, subset, views


def open_unlabelled(data: DataSettings, dataset: Dataset, subset: Subset) -> Unlabelled | None:
    """Opens the unlabelled images of the settings; returns None if `data.unlabelled` is None.

    Images that do not belong to the data set are resized to its image size.

    Raises:
        UserError: If there are no such images, they cannot be read, or a folder contains test or validation images.
    """
    if data.unlabelled is None:
        return None
    share = UNLABELLED_SHARE if data.unlabelled_share is None else data.unlabelled_share
    leads = data.epoch == "unlabelled"
    if data.unlabelled == "rest":
        index = left_out(len(dataset.train), dataset.val_index, subset)
        digest = hashlib.sha256(f"rest {len(index)}|".encode() + index.numpy().astype("<i8").tobytes())
        return Unlabelled(index, f"the rest of {dataset.name}", digest.hexdigest(), share, leads)
    if data.unlabelled == "split":
        if data.source != "torchvision":
            raise UserError(
                "data.unlabelled=split needs data=torchvision and a data set with unlabelled images (data.name=STL10); "
                "otherwise give a folder, or rest"
            )
        listing = list_unlabelled(data.name, Path(data.root).expanduser().resolve(), data.download)
    else:
        listing = list_images(Path(data.unlabelled).expanduser().resolve())
    height, width = dataset.train.images.shape[2:]
    cache = Path(data.cache).expanduser().resolve()
    own = read_without_labels(listing, image_size=(height, width), cache=cache, skip_broken=data.skip_broken)
    if count := _held_out(own.images, dataset, subset):
        found = f"data.unlabelled={data.unlabelled}: {count} of its {len(own)} images are test or validation images"
        if data.unlabelled != "split":
            raise UserError(f"{found}, which must not be trained on: remove them from the folder")
        warnings.warn(f"{found}, as in the published data set", stacklevel=2)
    index = torch.arange(len(dataset.train), len(dataset.train) + len(own))
    return Unlabelled(index, listing.source, own.sha256, share, leads, own)


def _held_out(images: Tensor, dataset: Dataset, subset: Subset) -> int:
    """Counts the images, uint8 [U, 3, H, W], with the pixels of a test or validation image."""
    train, val = dataset.train.images, [subset.val_index, *([] if dataset.val_index is None else [dataset.val_index])]
    held_out = [*dataset.test.images, *(train[i] for index in val for i in index.tolist())]
    middle = images.shape[2] // 2  # few images share this row of pixels, so most need not be hashed as a whole
    rows = {image[:, middle].numpy().tobytes() for image in held_out}
    digests = {hashlib.sha256(image.numpy().tobytes()).digest() for image in held_out}
    alike = (image.numpy() for image in images if image[:, middle].numpy().tobytes() in rows)
    return sum(hashlib.sha256(image.tobytes()).digest() in digests for image in alike)


_SOURCES: Registry[Callable[[DataSettings, Path], Listing]] = Registry(
    "data.source",
    {
        "folder": lambda data, root: list_folder(root),
        "npz": lambda data, root: list_npz(root),
        "torchvision": lambda data, root: list_torchvision(data.name, root, data.download),
        "huggingface": lambda data, root: list_huggingface(data.name, root, data.download),
    },
)


def _load_cifar(name: str, root: Path, download: bool) -> Dataset:
    spec = cifar_spec(name)
    if download and find_cifar(spec, root) is None:
        obtain(spec, root)
    return read_cifar(spec, root)


for _name in CIFAR_NAMES:
    register_dataset(_name)(partial(_load_cifar, _name))


@register_dataset("digits")
def _load_digits(root: Path, download: bool) -> Dataset:
    return read_digits()
