"""Folders of images with one subfolder per class, optionally within `train`, `val` and `test`."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

from ekd_lightning.data.listing import SPLITS, UNLABELLED, Listing, Row
from ekd_lightning.errors import UserError, few
from ekd_lightning.files import read_bytes

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif")


def list_folder(root: Path) -> Listing:
    """Lists the images of a folder in torchvision's order: by class name, then by path.

    Hidden files and folders are left out; links are followed, but no folder is entered twice.

    Raises:
        UserError: If the folder does not exist, has no subfolders or no images, or another split has classes that
            `train` lacks.
    """
    if not root.is_dir():
        raise UserError(f"data.root={root}: no such folder")
    splits = {split: root / split for split in SPLITS if any(_folders(root / split))}
    if "train" not in splits:
        splits = {"train": root}
    classes = tuple(folder.name for folder in _folders(splits["train"]))
    if not classes:
        raise UserError(f"data.root={root}: holds no subfolders; put the images into one subfolder per class")
    rows = {split: _rows(root, folder, _labels(folder, classes)) for split, folder in splits.items()}
    return Listing(rows, classes, _content, str(root))


def file_stamp(path: str) -> tuple[int, int]:
    """Returns the size in bytes and the modification time in ns of a file; (-1, 0) if it cannot be accessed."""
    try:
        stat = os.stat(path)
    except OSError:  # e.g. a broken link, which is reported when it is read
        return -1, 0
    return stat.st_size, stat.st_mtime_ns


def _folders(root: Path) -> Iterator[Path]:
    if root.is_dir():
        yield from sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def walk(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Walks through a folder and follows links.

    Hidden files and folders are left out. So are folders that were visited before or contain `folder`, because links
    may form cycles.

    Yields:
        The path of each folder, and the sorted names of its files.
    """
    seen = {
        os.path.realpath(above) for path in (folder.absolute(), folder.resolve()) for above in (path, *path.parents)
    }
    for parent, folders, names in os.walk(folder, followlinks=True):
        new = []
        for name in sorted(folders):
            real = os.path.realpath(os.path.join(parent, name))
            if not name.startswith(".") and real not in seen:
                seen.add(real)
                new.append(name)
        folders[:] = new
        yield parent, sorted(name for name in names if not name.startswith("."))


def list_images(root: Path) -> Listing:
    """Lists the unlabelled images of a folder, at any depth, in the order of their paths; raises as `list_folder`."""
    if not root.is_dir():
        raise UserError(
            f"data.unlabelled={root}: no such folder (data.unlabelled=rest uses the images that the subset leaves out)"
        )
    return Listing({"train": _rows(root, root, {root: 0})}, (UNLABELLED,), _content, str(root))


def _content(path: str) -> bytes:
    return read_bytes(Path(path))


def _labels(split: Path, classes: tuple[str, ...]) -> dict[Path, int]:
    """Returns the class number of each class folder of a split."""
    folders = list(_folders(split))
    for folder in folders:
        if folder.name not in classes:
            raise UserError(f"{folder}: no such class among the training images (classes: {few(classes, 5)})")
    return {folder: classes.index(folder.name) for folder in folders}


def _rows(root: Path, split: Path, labels: dict[Path, int]) -> list[Row]:
    """Lists the images of a split's folders."""
    found, others = [], []
    for folder, label in labels.items():
        for parent, names in sorted(walk(folder)):
            for name in names:
                path = os.path.join(parent, name)  # Path would take half a minute for a million files
                if name.lower().endswith(EXTENSIONS):
                    below = path[len(str(root)) + 1 :].replace(os.sep, "/")
                    found.append(Row(below, label, path, file_stamp(path)))
                else:
                    others.append(path)
    if others:
        warnings.warn(f"files without the suffix of an image are left out: {few(others, 1)}", stacklevel=3)
    if not found:
        raise UserError(f"{split}: holds no images (files with the suffix {', '.join(EXTENSIONS)})")
    return found
