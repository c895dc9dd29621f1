"""Folder of images, one subfolder a class, with or without `train`, `val` and `test` above them."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

from ekd_lightning.data.listing import Listing
from ekd_lightning.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif")


def list_folder(root: Path, *, test_fraction: float, seed: int) -> Listing:
    """Lists the images of a folder in torchvision's order: classes by name, then paths by name.

    Without a `test` folder, a share of every class is set aside for testing. An image's place in that split depends
    on its own path, the seed and the ranks of its class, so that it stays when others come.

    Args:
        root: The folder; hidden files and folders are left out, links are followed.
        test_fraction: Share of every class that is set aside where there is no `test` folder, in (0, 1).
        seed: Of that choice.

    Raises:
        UserError: If the folder is not there, holds no classes or no images, or its splits have other classes.
    """
    if not root.is_dir():
        raise UserError(f"data.root={root}: no such folder")
    splits = {split: root / split for split in ("train", "val", "test") if any(_folders(root / split))}
    if "train" not in splits:
        splits = {"train": root}
    classes = tuple(folder.name for folder in _folders(splits["train"]))
    if not classes:
        raise UserError(f"data.root={root}: holds no subfolders; images lie in one subfolder a class")
    files = {split: _files(folder, classes) for split, folder in splits.items()}
    if "test" not in files:
        files["train"], files["test"] = _set_aside(root, files["train"], classes, test_fraction, seed)
    rows = [row for split in ("train", "val", "test") for row in files.get(split, ())]
    return Listing(
        names=[path.relative_to(root).as_posix() for path, _ in rows],
        labels=[label for _, label in rows],
        counts={split: len(files.get(split, ())) for split in ("train", "val", "test")},
        class_names=classes,
        load=lambda position: rows[position][0].read_bytes(),
        key=[_stamp(path) for path, _ in rows],
        source=str(root),
    )


def _stamp(path: Path) -> tuple[int, int]:
    """Size and time of a file, which tell whether it changed."""
    try:
        stat = path.stat()
    except OSError:  # a link into nothing; reading it will say so
        return -1, 0
    return stat.st_size, stat.st_mtime_ns


def _folders(root: Path) -> Iterator[Path]:
    if root.is_dir():
        yield from sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _files(split: Path, classes: tuple[str, ...]) -> list[tuple[Path, int]]:
    """The images of a split, with their classes."""
    found, others = [], []
    for folder in _folders(split):
        if folder.name not in classes:
            raise UserError(f"{folder}: no such class among the training images ({', '.join(classes[:5])}, ...)")
        for parent, _, names in sorted(os.walk(folder, followlinks=True)):
            for name in sorted(names):
                path = Path(parent, name)
                if path.suffix.lower() in EXTENSIONS and not name.startswith("."):
                    found.append((path, classes.index(folder.name)))
                elif not name.startswith("."):
                    others.append(path)
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        warnings.warn(f"left out, by their names no images: {others[0]}{more}", stacklevel=3)
    if not found:
        raise UserError(f"{split}: holds no images ({', '.join(EXTENSIONS)})")
    return found


def _set_aside(
    root: Path, files: list[tuple[Path, int]], classes: tuple[str, ...], share: float, seed: int
) -> tuple[list[tuple[Path, int]], list[tuple[Path, int]]]:
    """Splits the images into those for training and those for testing, class by class, each in the order given."""
    if not 0 < share < 1:
        raise UserError(f"data.test_fraction={share} must lie in (0, 1)")

    def rank(path: Path) -> bytes:
        return hashlib.sha256(f"{seed}|{path.relative_to(root).as_posix()}".encode()).digest()

    chosen: set[Path] = set()
    for label, name in enumerate(classes):
        members = sorted((path for path, own in files if own == label), key=rank)
        first = members[: int(Fraction(str(float(share))) * len(members))]
        if members and not first:
            raise UserError(
                f"data.test_fraction={share} leaves class {name!r} ({len(members)} images) without an image for "
                "testing: choose more, or make a folder named test"
            )
        chosen.update(first)
    return [row for row in files if row[0] not in chosen], [row for row in files if row[0] in chosen]
