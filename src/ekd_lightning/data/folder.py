"""Folders of images, one subfolder per class, with or without `train`, `val` and `test` above."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

from ekd_lightning.data.listing import SPLITS, Listing, Row, without_labels
from ekd_lightning.errors import UserError
from ekd_lightning.files import read_bytes

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif")


def list_folder(root: Path) -> Listing:
    """Lists the images of a folder in torchvision's order: classes by name, then paths by name.

    Args:
        root: The folder; hidden files and folders are left out, links are followed, but into no folder twice.

    Raises:
        UserError: If the folder is not there, holds no classes or no images, or its splits have other classes.
    """
    if not root.is_dir():
        raise UserError(f"data.root={root}: no such folder")
    splits = {split: root / split for split in SPLITS if any(_folders(root / split))}
    if "train" not in splits:
        splits = {"train": root}
    classes = tuple(folder.name for folder in _folders(splits["train"]))
    if not classes:
        raise UserError(f"data.root={root}: holds no subfolders; images must lie in one subfolder per class")
    rows = {split: _rows(root, folder, _labels(folder, classes)) for split, folder in splits.items()}
    return Listing(rows, classes, _content, str(root))


def file_stamp(path: str) -> tuple[int, int]:
    """Returns size and time of a file, which change with it."""
    try:
        stat = os.stat(path)
    except OSError:  # a link into nothing; reading it will say so
        return -1, 0
    return stat.st_size, stat.st_mtime_ns


def _folders(root: Path) -> Iterator[Path]:
    if root.is_dir():
        yield from sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def walk(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Walks through a folder, links included.

    Hidden files and folders are left out, as is a folder that was seen before or that lies above: a link may lead
    back to where it comes from.

    Yields:
        Paths of folders, and the names of the files in them.
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
    """Lists the unlabelled images of a folder, at any depth, in the order of their paths.

    Raises:
        UserError: If the folder is not there, or holds no images.
    """
    if not root.is_dir():
        raise UserError(f"data.unlabelled={root}: no such folder (rest takes the images that the subset leaves out)")
    return without_labels(_rows(root, root, {root: 0}), _content, str(root))


def _content(path: str) -> bytes:
    return read_bytes(Path(path))


def _labels(split: Path, classes: tuple[str, ...]) -> dict[Path, int]:
    """Returns the folders of a split with their class numbers."""
    folders = list(_folders(split))
    for folder in folders:
        if folder.name not in classes:
            raise UserError(f"{folder}: no such class among the training images ({', '.join(classes[:5])}, ...)")
    return {folder: classes.index(folder.name) for folder in folders}


def _rows(root: Path, split: Path, labels: dict[Path, int]) -> list[Row]:
    """Lists the images of a split's folders."""
    found, others = [], []
    for folder, label in labels.items():
        for parent, names in sorted(walk(folder)):
            for name in names:
                path = os.path.join(parent, name)  # of a million, Path would take half a minute
                if name.lower().endswith(EXTENSIONS):
                    below = path[len(str(root)) + 1 :].replace(os.sep, "/")
                    found.append(Row(below, label, path, file_stamp(path)))
                else:
                    others.append(path)
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        warnings.warn(f"left out, not images by their names: {others[0]}{more}", stacklevel=3)
    if not found:
        raise UserError(f"{split}: holds no images ({', '.join(EXTENSIONS)})")
    return found
