"""Listings of images in arrays: .npz files, labelled data sets of torchvision, data sets of the Hugging Face hub."""

from __future__ import annotations

import hashlib
import inspect
import logging
import os
import re
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.npyio import NpzFile
from PIL import Image

from ekd_lightning.data.folder import file_stamp, walk
from ekd_lightning.data.listing import SPLITS, UNLABELLED, Listing, Row
from ekd_lightning.errors import UserError, few, one_line, require, unknown_name

log = logging.getLogger(__name__)

_NPZ_NAMES = (("x_{}", "y_{}"), ("{}_images", "{}_labels"))
"""Names of a split's images and labels in .npz files."""
_SPLIT_NAMES = {
    "train": ("train", "trainval", "train-standard"),
    "val": ("val", "valid", "validation"),
    "test": ("test",),
    UNLABELLED: ("unlabeled",),
}
"""Names of splits in data sets, the most common first."""
_SAFE_DATASETS = 4
"""First major version of the package `datasets` that does not run code of data sets."""
_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_LABELS = ("targets", "labels", "_labels", "y")
_CLASSES = ("classes", "categories")
_DAMAGED = (OSError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error, EOFError)
"""Errors of NumPy for damaged files and files of other formats."""


def list_npz(path: Path) -> Listing:
    """Lists the images of an .npz file, in which nothing is unpickled.

    It holds `x_train` and `y_train` (or `train_images` and `train_labels`), optionally the same for `test` and `val`;
    or only `images` and `labels`; and optionally `class_names`. Images are uint8 [N, H, W], [N, H, W, channels] or [N,
    channels, H, W]; labels are integers [N].

    Raises:
        UserError: If the file is missing or damaged, or its arrays have other names, shapes or types.
    """
    if not path.is_file():
        raise UserError(f"data.root={path}: no such file")
    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, NpzFile):
            raise ValueError("it holds a single array")
        with file:
            arrays = {name: file[name] for name in file.files}
        stamp = [path.stat().st_size, path.stat().st_mtime_ns]
    except _DAMAGED as error:
        raise UserError(f"data.root={path}: not an .npz file of plain arrays, or damaged ({one_line(error)})") from None
    found = {split: pair for split in SPLITS if (pair := _pair(arrays, split, path))}
    if "train" not in found:
        known = few(sorted(arrays)) or "none"
        raise UserError(f"data.root={path}: holds neither x_train and y_train nor images and labels (only {known})")
    return _listing(found, _class_names(arrays, found, path), str(path), dict.fromkeys(found, stamp))


def list_torchvision(name: str, root: Path, download: bool) -> Listing:
    """Lists the images of a data set of `torchvision.datasets`, in its order; if `download`, torchvision may fetch it.

    Raises:
        UserError: For an unknown name, a data set without classes, or one that is missing and cannot be downloaded.
    """
    from torchvision import datasets  # noqa: PLC0415  # over a second, and not always needed

    if name not in datasets.__all__:
        raise unknown_name("data set of torchvision", name, datasets.__all__)
    if name.startswith("LSUN"):
        raise UserError(
            f"data.name={name}: refused, because torchvision would unpickle a cache file from the working directory"
        )
    parts = {split: _torchvision_split(getattr(datasets, name), name, root, split, download) for split in SPLITS}
    found = {split: part for split, part in parts.items() if part is not None}
    if "val" in found and "test" not in found:
        found["test"] = found.pop("val")  # e.g. ImageNet, whose test images have no labels
    if "train" not in found:
        raise UserError(f"data.name={name}: torchvision has no training images of it; choose another data set")
    first = found["train"]
    classes = next((getattr(first, key) for key in _CLASSES if hasattr(first, key)), ())
    names = tuple(text if isinstance(text, str) else ", ".join(map(str, text)) for text in classes)
    labelled = {split: (_Column(part), _labels(part, name)) for split, part in found.items()}
    stamp = {split: _stamp(part, root) for split, part in found.items()}
    return _listing(labelled, names, f"{name} of torchvision in {root}", stamp)


def list_huggingface(name: str, root: Path, download: bool) -> Listing:
    """Lists the images of a Hugging Face data set, in its order; no code of its repository is run.

    The first column of images and the first column of classes are used. Splits without classes are skipped. The root is
    a folder written by `save_to_disk`, whatever the name, or the cache folder of the package `datasets` for USER/SET on
    the hub.

    Raises:
        UserError: If `datasets` is missing or too old, the name is not USER/SET, or the data set has no images with
            classes, or is missing and cannot be downloaded.
    """
    require("datasets", "datasets")
    import datasets  # noqa: PLC0415  # optional

    if int(datasets.__version__.partition(".")[0]) < _SAFE_DATASETS:
        raise UserError(
            f"datasets {datasets.__version__} runs foreign code; install another: pip install 'ekd-lightning[datasets]'"
        )
    saved = any((root / file).is_file() for file in ("dataset_dict.json", "state.json"))
    if not saved and (not _REPOSITORY.fullmatch(name) or Path(name).exists()):
        raise UserError(f"data.name={name}: not USER/SET on the Hugging Face hub (data=folder reads a folder)")
    offline = datasets.config.HF_HUB_OFFLINE  # `datasets` ignores `local_files_only` without it
    datasets.config.HF_HUB_OFFLINE = offline or not download
    try:
        if saved:
            loaded = datasets.load_from_disk(str(root))
        else:
            config = datasets.DownloadConfig(cache_dir=str(root / "downloads"), local_files_only=not download)
            loaded = datasets.load_dataset(name, cache_dir=str(root), download_config=config)
    except Exception as error:  # no network, no such data set, several configurations
        where = f"data.root={root}" if saved else f"data.name={name}"
        raise UserError(f"{where}: cannot be loaded ({one_line(error)})") from None
    finally:
        datasets.config.HF_HUB_OFFLINE = offline
    if hasattr(loaded, "features"):  # a single split
        loaded = {"train": loaded}
    parts, names = {}, ()
    for split in SPLITS:
        part = next((loaded[key] for key in _SPLIT_NAMES[split] if key in loaded), None)
        if part is None:
            continue
        images, labels = (_first_column(part, name, kind) for kind in (datasets.Image, datasets.ClassLabel))
        classes = [-1 if label is None else int(label) for label in part[labels]]
        if min(classes, default=-1) >= 0:  # classes of test images are often not published
            parts[split], names = (_Column(part, images), classes), tuple(part.features[labels].names)
    source = f"{root}, as `datasets` saved it" if saved else f"{name} of the Hugging Face hub"
    if "val" in parts and "test" not in parts:
        parts["test"] = parts.pop("val")
        source += ", its validation split for testing"
        log.info("%s: the test split has no classes, so the validation split is used for testing", name)
    if "train" not in parts:
        raise UserError(f"data.name={name}: has no split for training with known classes (only {', '.join(loaded)})")
    stamp = {split: column.part._fingerprint for split, (column, _) in parts.items()}
    return _listing(parts, names, source, stamp)


def _first_column(part: Any, name: str, kind: type) -> str:
    """Returns the name of the first column of a kind in a split of a Hugging Face data set."""
    for key, feature in part.features.items():
        if isinstance(feature, kind):
            return str(key)
    raise UserError(f"data.name={name}: has no column of the kind {kind.__name__} (only {', '.join(part.features)})")


def list_unlabelled(name: str, root: Path, download: bool) -> Listing:
    """Lists the unlabelled images of a data set of torchvision, such as STL10's; raises as `list_torchvision`."""
    from torchvision import datasets  # noqa: PLC0415  # over a second, and not always needed

    kind = getattr(datasets, name, None)
    part = kind and _torchvision_split(kind, name, root, UNLABELLED, download)
    if part is None:
        raise UserError(
            f"data.unlabelled=split: {name} has no split without labels (STL10 has one); give a folder of images"
        )
    images, stamp = _Column(part), _stamp(part, root)
    rows = [Row(f"image {i}", 0, i, stamp) for i in range(len(part))]
    source = f"{name} of torchvision in {root}, without labels"
    return Listing({"train": rows}, (UNLABELLED,), images.__getitem__, source)


def _stamp(part: Any, root: Path) -> str:
    """Returns a stamp of a split's images: a hash of them, or of sizes and times of their files."""
    pixels = getattr(part, "data", None)
    if hasattr(pixels, "dtype") and hasattr(pixels, "shape"):
        array = np.ascontiguousarray(pixels)
        return hashlib.sha256(array.data if array.size else b"").hexdigest()[:16]
    digest = hashlib.sha256()
    for parent, names in sorted(walk(root)):
        if not any(name.endswith(".pixels") for name in names):  # a cache of decoded images
            for path in (os.path.join(parent, name) for name in names):
                digest.update(f"{path}|{file_stamp(path)}|".encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]


class _Column:
    """A column of images by position: with a name in Hugging Face data sets, the first in torchvision's."""

    def __init__(self, part: Any, key: str | int = 0) -> None:
        self.part, self._key = part, key

    def __getitem__(self, position: int) -> Any:
        return self.part[position][self._key]


def _listing(
    parts: Mapping[str, tuple[Any, Any]], names: tuple[str, ...], source: str, stamps: Mapping[str, Any]
) -> Listing:
    """Builds a listing from images and labels by split; classes without names get their numbers as names."""
    rows = {
        split: [Row(f"image {i} of {split}", int(label), (split, i), stamps[split]) for i, label in enumerate(labels)]
        for split, (_, labels) in parts.items()
    }
    count = max(row.label for own in rows.values() for row in own) + 1
    if count > (most := len(rows.get("train", ()))):  # checked first, as a wrong label may ask for 2**63 names
        raise UserError(
            f"{source}: holds class {count - 1}, but only {most} images for training; classes must be 0, 1, ..."
        )

    def load(item: tuple[str, int]) -> Image.Image:
        image = parts[item[0]][0][item[1]]
        return image if isinstance(image, Image.Image) else Image.fromarray(image)

    return Listing(rows, names if len(names) >= count else tuple(map(str, range(count))), load, source)


def _pair(arrays: Mapping[str, np.ndarray], split: str, path: Path) -> tuple[np.ndarray, np.ndarray] | None:
    names = [(x.format(split), y.format(split)) for x, y in _NPZ_NAMES]
    names += [("images", "labels")] if split == "train" else []
    for x, y in names:
        if x in arrays and y in arrays:
            images, labels = arrays[x], arrays[y]
            if images.ndim == 4 and images.shape[1] in (1, 3) and images.shape[3] not in (1, 3, 4):
                images = images.transpose(0, 2, 3, 1)
            images = images[..., 0] if images.ndim == 4 and images.shape[3] == 1 else images
            fits = images.ndim in (3, 4) and images.shape[3:] in ((), (3,), (4,)) and images.size > 0
            if images.dtype != np.uint8 or not fits:
                raise UserError(f"{path}: {x} is {images.dtype} {list(images.shape)}, but must be uint8 [N, H, W, 3]")
            labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
            if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1] or labels.min() < 0:
                raise UserError(
                    f"{path}: {y} must be {len(images)} classes, 0, 1, ..., but is {labels.dtype} {list(labels.shape)}"
                )
            return images, labels
    return None


def _class_names(arrays: Mapping[str, np.ndarray], found: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    """Reads the class names of an .npz file; empty if it has none."""
    if "class_names" not in arrays:
        return ()
    given = arrays["class_names"]
    count = 1 + max(int(labels.max()) for _, labels in found.values())
    if given.ndim != 1 or len(given) < count:
        raise UserError(
            f"data.root={path}: class_names is {given.dtype} {list(given.shape)}, but must be [{count}] names"
        )
    try:
        return tuple(name.decode() if isinstance(name, bytes) else str(name) for name in given.tolist())
    except UnicodeDecodeError as error:
        raise UserError(f"data.root={path}: class_names is not UTF-8 ({error})") from None


def _torchvision_split(kind: Any, name: str, root: Path, split: str, download: bool) -> Any:
    """Opens a split of a torchvision data set; returns None if it has no such split."""
    own = inspect.signature(kind).parameters
    parameters = dict(own)
    if "kwargs" in own:  # passed on to the parent class, as in QMNIST
        parameters = {**inspect.signature(kind.__base__).parameters, **own}
        if own.get("split", own["kwargs"]).default is inspect.Parameter.empty and {"split", "train"} <= set(parameters):
            raise UserError(
                f"data.name={name}: torchvision needs an argument `split`, which cannot be set here; choose another "
                "data set"
            )
    fetch = {"download": download} if "download" in parameters else {}
    if "train" in parameters:
        choices: list[dict[str, Any]] = [{"train": split == "train"}] if split in ("train", "test") else []
    elif "split" in parameters:
        choices = [{"split": value} for value in _SPLIT_NAMES[split]]
    else:
        choices = [{}] if split == "train" else []
    for choice in choices:
        try:
            return kind(str(root), **choice, **fetch)
        except ValueError as error:  # raised for a split that does not exist, and for other reasons
            if "split" not in str(error):
                raise UserError(f"data.name={name}: {one_line(error)}") from None
        except Exception as error:  # missing files or packages, or no network, raise many kinds
            raise UserError(f"data.name={name}: torchvision cannot read it from {root} ({one_line(error)})") from None
    return None


def _labels(part: Any, name: str) -> list[int]:
    for attribute in _LABELS:
        values = getattr(part, attribute, None)
        if values is not None and len(values) == len(part):
            labels = np.asarray(values)
            if labels.dtype.kind in "iu" and labels.ndim == 1:
                return [int(label) for label in labels]
    try:
        return [int(part[i][1]) for i in range(len(part))]
    except (TypeError, ValueError, RuntimeError):  # the target is not a number
        raise UserError(
            f"data.name={name}: torchvision gives its images no classes; choose a data set for classification"
        ) from None
