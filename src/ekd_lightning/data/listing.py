"""Listings of images that are not decoded yet, and their conversion to data sets: decoded once, checked, cached."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from ekd_lightning.data.decoding import DECODER, Decoded, cached_images, decode_all
from ekd_lightning.data.images import Dataset, ImageSet
from ekd_lightning.errors import UserError

log = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")
UNLABELLED = "unlabelled"
"""The only class of unlabelled images; the labels of their rows are 0."""


class Row(NamedTuple):
    """An image that is not decoded yet.

    Attributes:
        name: The image's name in messages; for a file, its path below the root.
        label: Its class, 0 .. C-1.
        item: The argument of `Listing.load` for this image.
        stamp: JSON-able; differs if the image has changed.
    """

    name: str
    label: int
    item: Any
    stamp: Any = None


@dataclass(frozen=True)
class Listing:
    """Images by split: `train` and possibly others of `SPLITS`.

    Attributes:
        load: Returns the content of a file, or an image, for a row's item; called by several threads.
        source: Description of the images' origin.
    """

    splits: Mapping[str, Sequence[Row]]
    class_names: tuple[str, ...]
    load: Callable[[Any], bytes | Image.Image]
    source: str

    def digest(self) -> str:
        """Returns the SHA-256 of classes, names, labels and stamps, which changes with any image."""
        rows = {split: [(row.name, row.label, row.stamp) for row in own] for split, own in self.splits.items()}
        return hashlib.sha256(json.dumps([self.class_names, rows]).encode()).hexdigest()


def check_image_size(value: Any) -> tuple[int, int] | None:
    """Returns `data.image_size` as (height, width) in pixels: the side of a square, or [height, width]; None for null.

    Any other value is a `UserError`.
    """
    sides = [value, value] if isinstance(value, int) else value
    if sides is None:
        return None
    whole = isinstance(sides, Sequence) and all(isinstance(side, int) and not isinstance(side, bool) for side in sides)
    if not whole or isinstance(sides, str) or len(sides) != 2 or min(sides) < 1:
        raise UserError(f"data.image_size={value}: must be null, a number of pixels >= 1, or [height, width]")
    return sides[0], sides[1]


def with_test_images(listing: Listing, share: float, seed: int) -> Listing:
    """Sets test images aside if a listing has none: in every class, the first images by a seeded hash of their names.

    Most images therefore stay in their split when others are added. A share, in (0, 1), of every class is rounded down.

    Raises:
        UserError: If the share is out of range, or gives a class no test image.
    """
    if "test" in listing.splits:
        return listing
    if not 0 < share < 1:
        raise UserError(f"data.test_fraction={share} must lie in (0, 1)")
    rows, chosen = listing.splits["train"], set()
    members: dict[int, list[str]] = {}
    for row in rows:
        members.setdefault(row.label, []).append(row.name)
    for label, own in members.items():
        own.sort(key=lambda name: hashlib.sha256(f"{seed}|{name}".encode(errors="surrogateescape")).digest())
        first = own[: int(Fraction(str(float(share))) * len(own))]
        if not first:
            raise UserError(
                f"data.test_fraction={share} sets no image of the class {listing.class_names[label]!r} aside for "
                f"testing, as it has only {len(own)}: add images of the class, raise the fraction, or add test/"
            )
        chosen.update(first)
    train = [row for row in rows if row.name not in chosen]
    return replace(
        listing, splits={**listing.splits, "train": train, "test": [row for row in rows if row.name in chosen]}
    )


def read_listing(
    listing: Listing, name: str, *, image_size: tuple[int, int] | None, cache: Path, skip_broken: bool
) -> Dataset:
    """Decodes the images of a listing with test images, or reads them memory-mapped from the cache folder.

    An image size of None is that of the images, which must then be equal. With `skip_broken`, images that cannot be
    read are left out, with a warning.

    Raises:
        UserError: For a single class, a class without images, images that cannot be read or differ in size.
    """
    _check_classes(listing, name, [row.label for row in listing.splits["train"]])
    dataset, train_labels = _decoded(listing, name, image_size, cache, skip_broken)
    _check_classes(listing, name, train_labels)
    if not len(dataset.test):
        raise UserError(f"data set {name!r} ({listing.source}): none of its images for testing can be read")
    return dataset


def read_without_labels(listing: Listing, *, image_size: tuple[int, int], cache: Path, skip_broken: bool) -> ImageSet:
    """Decodes unlabelled images, raising as `read_listing`. Their labels are 0 and have no meaning."""
    return _decoded(listing, UNLABELLED, image_size, cache, skip_broken)[0].train


def _decoded(
    listing: Listing, name: str, image_size: tuple[int, int] | None, cache: Path, skip_broken: bool
) -> tuple[Dataset, list[int]]:
    """Returns the data set of a listing, and the labels of its split `train` (without `val`)."""
    rows = [(split, row) for split in SPLITS for row in listing.splits.get(split, ())]
    images = [(split, row.name, row.label, row.stamp) for split, row in rows]
    options = {"size": image_size, "skip_broken": skip_broken}
    key = {"decoder": DECODER, "name": name, "source": listing.source, "images": images, **options}

    def build(target: Path) -> dict[str, Any]:
        log.info("%s: decoding %d images; later runs read them from %s", name, len(rows), cache)
        title = f"{name}: decoding images"
        found = decode_all(target, lambda i: listing.load(rows[i][1].item), len(rows), image_size, title)
        if found.broken and not skip_broken:
            raise UserError(f"{_first_broken(rows, found)}; data.skip_broken=true leaves such images out")
        return _facts(listing, rows, found, target, name)

    pixels, facts = cached_images(cache, key, build)
    for remark in facts["remarks"]:
        warnings.warn(remark, stacklevel=3)
    return _dataset(listing, name, pixels, facts), facts["labels"][: facts["counts"]["train"]]


def _check_classes(listing: Listing, name: str, train_labels: Sequence[int]) -> None:
    if len(listing.class_names) < 2:
        raise UserError(
            f"data set {name!r} ({listing.source}) has a single class, {listing.class_names[0]!r}; two are needed"
        )
    present = set(train_labels)
    empty = [text for label, text in enumerate(listing.class_names) if label not in present]
    if empty:
        more = f", and {len(empty) - 1} more classes have none" if len(empty) > 1 else ""
        raise UserError(
            f"data set {name!r} ({listing.source}): class {empty[0]!r} has no training image{more}; add images or "
            "remove the class"
        )


def _first_broken(rows: Sequence[tuple[str, Row]], found: Decoded) -> str:
    first, reason = next(iter(found.broken.items()))
    more = len(found.broken) - 1
    return f"{rows[first][1].name} {reason}" + (f", and {more} more cannot be read" if more else "")


def _facts(
    listing: Listing, rows: Sequence[tuple[str, Row]], found: Decoded, target: Path, name: str
) -> dict[str, Any]:
    """Returns the facts to be cached with the decoded images; removes the rows of broken images from the file."""
    kept = [position for position in range(len(rows)) if position not in found.broken]
    if not kept:
        raise UserError(f"data set {name!r} ({listing.source}): none of its images can be read")
    remarks = [f"data.skip_broken=true: {_first_broken(rows, found)}"] if found.broken else []
    remarks += _overlap(rows, found, kept)
    pixels = np.memmap(target, np.uint8, "r+", shape=(len(rows), 3, *found.size))
    if found.broken:
        for place, position in enumerate(kept):
            pixels[place] = pixels[position]
    pixels.flush()
    os.truncate(target, len(kept) * pixels[0].nbytes)
    splits = [rows[position][0] for position in kept]
    facts = {
        "shape": (len(kept), *pixels.shape[1:]),
        "labels": [rows[position][1].label for position in kept],
        "counts": {split: splits.count(split) for split in SPLITS},
    }
    dataset = _dataset(listing, name, torch.from_numpy(pixels[: len(kept)]), facts)
    return {**facts, "remarks": remarks, "sha256": {"train": dataset.train.sha256, "test": dataset.test.sha256}}


def _overlap(rows: Sequence[tuple[str, Row]], found: Decoded, kept: Sequence[int]) -> list[str]:
    """Returns a remark if images of other splits are also training images."""
    first = {found.digests[i]: i for i in reversed(kept) if rows[i][0] == "train"}
    twice = [(first[found.digests[i]], i) for i in kept if rows[i][0] != "train" and found.digests[i] in first]
    if not twice:
        return []
    one, other = twice[0]
    more = f", as are {len(twice) - 1} more" if len(twice) > 1 else ""
    seen = f"{rows[other][1].name} ({rows[other][0]}) is among the images for training, too, as {rows[one][1].name}"
    return [seen + more]


def _dataset(listing: Listing, name: str, images: torch.Tensor, facts: Mapping[str, Any]) -> Dataset:
    labels = torch.tensor(facts["labels"], dtype=torch.int64)
    train, val = facts["counts"]["train"], facts["counts"]["val"]
    parts = {"train": slice(0, train + val), "test": slice(train + val, None)}
    sets = {
        split: ImageSet(name, split, images[rows], labels[rows], listing.class_names) for split, rows in parts.items()
    }
    for split, digest in facts.get("sha256", {}).items():
        vars(sets[split])["sha256"] = digest  # fills the cached property, which would read all pixels
    return Dataset(
        name=name,
        train=sets["train"],
        test=sets["test"],
        source=listing.source,
        normalization="imagenet",
        val_index=torch.arange(train, train + val) if val else None,
    )
