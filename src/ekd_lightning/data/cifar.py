"""Reading CIFAR-10 and CIFAR-100 from the official binary files or python batches, MD5 first."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ekd_lightning.data.cifar_official import PIXELS, CifarSpec, Layout, OfficialFile, read_pickled_dict
from ekd_lightning.data.images import Dataset, ImageSet
from ekd_lightning.errors import UserError

UInt8Array = NDArray[np.uint8]


@dataclass(frozen=True)
class Found:
    """A folder that holds all files of one form."""

    path: Path
    layout: Layout


def find_cifar(spec: CifarSpec, root: Path) -> Found | None:
    """Looks for the data set, in the binary form first.

    Args:
        spec: What is published about it.
        root: The folder that holds e.g. `cifar-10-batches-bin`, or that folder itself.

    Returns:
        The complete folder, or None if neither form is there at all.

    Raises:
        UserError: A folder is there but lacks files, and no other form is complete.
    """
    incomplete: list[tuple[Path, list[str]]] = []
    for layout in (spec.binary, spec.python):
        for path in (root / layout.folder, root):
            absent = [file.name for file in layout.files if not (path / file.name).is_file()]
            if not absent:
                return Found(path, layout)
            if path.name == layout.folder and path.is_dir():
                incomplete.append((path, absent))
    if incomplete:
        path, absent = incomplete[0]
        raise UserError(
            f"{path.absolute()} lacks {', '.join(absent)}: delete the folder, then {_advice(spec, path.parent)}"
        )
    return None


def read_cifar(spec: CifarSpec, root: Path) -> Dataset:
    """Reads both splits; every file is checked against its published MD5 before it is parsed.

    Args:
        spec: What is published about the data set: `cifar_spec(name)`, or other sums in tests.
        root: The folder that holds e.g. `cifar-10-batches-bin`, or that folder itself.

    Returns:
        The data set. CIFAR-100 has its 100 fine labels.

    Raises:
        UserError: Nothing found, files missing, truncated or altered, or a pickle that asks for anything but
            arrays.
    """
    found = find_cifar(spec, root)
    if found is None:
        raise UserError(
            f"{spec.name} not found: looked for {spec.binary.folder} and {spec.python.folder} in "
            f"{root.absolute()}; {_advice(spec, root)}"
        )
    names = _class_names(spec, found)
    return Dataset(
        name=spec.name,
        train=_read_split(spec, found, "train", found.layout.train, names),
        test=_read_split(spec, found, "test", found.layout.test, names),
        source=str(found.path.absolute()),
        normalization=spec.name,
    )


def checked_bytes(path: Path, official: OfficialFile) -> bytes:
    """Reads a file that must be the published one.

    Args:
        path: The file.
        official: Its published MD5 and, where known, length.

    Returns:
        Its bytes.

    Raises:
        UserError: It cannot be read, or is not the published file.
    """
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


def _read_split(
    spec: CifarSpec, found: Found, split: str, files: Iterable[OfficialFile], names: tuple[str, ...]
) -> ImageSet:
    parse = _parse_binary if found.layout == spec.binary else _parse_python
    pixels, labels = [], []
    for file in files:
        path = found.path / file.name
        part_pixels, part_labels = parse(spec, checked_bytes(path, file), path)
        if part_labels.size and not 0 <= part_labels.min() <= part_labels.max() < len(names):
            raise UserError(f"{path.absolute()} has labels outside 0..{len(names) - 1}")
        pixels.append(part_pixels)
        labels.append(part_labels)
    images = np.concatenate(pixels).reshape(-1, 3, 32, 32)
    label_tensor = torch.from_numpy(np.concatenate(labels).astype(np.int64))
    return ImageSet(spec.name, split, torch.from_numpy(images), label_tensor, names)


def _parse_binary(spec: CifarSpec, data: bytes, path: Path) -> tuple[UInt8Array, NDArray[np.int64]]:
    """Rows of label bytes, then 3,072 pixels, channel-first RGB."""
    if len(data) % spec.row_bytes:
        raise UserError(f"{path.absolute()} has {len(data)} bytes, not a multiple of {spec.row_bytes}")
    rows = np.frombuffer(data, dtype=np.uint8).reshape(-1, spec.row_bytes)
    return rows[:, spec.label_bytes :], rows[:, spec.label_bytes - 1].astype(np.int64)


def _parse_python(spec: CifarSpec, data: bytes, path: Path) -> tuple[UInt8Array, NDArray[np.int64]]:
    """A dict with "data", uint8 [n, 3072], and a list of labels."""
    batch = read_pickled_dict(data, path)
    pixels = batch.get("data")
    labels = np.asarray(batch.get(spec.label_key, ()))
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape != (len(labels), PIXELS):
        raise UserError(f"{path.absolute()} lacks 'data' or {spec.label_key!r} in the form of a CIFAR batch")
    return pixels, labels.astype(np.int64)


def _class_names(spec: CifarSpec, found: Found) -> tuple[str, ...]:
    path = found.path / spec.names_file
    if not path.is_file():
        return spec.class_names
    names = tuple(path.read_text(encoding="utf-8").split())
    if len(names) != len(spec.class_names):
        raise UserError(f"{path.absolute()} names {len(names)} classes instead of {len(spec.class_names)}: delete it")
    return names
