"""Listing of images that are not decoded yet, and the data set that they become: decoded once, checked, cached."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ekd_lightning.data.cache import cached_images
from ekd_lightning.data.decoding import DECODER, Decoded, decode_all
from ekd_lightning.data.images import Dataset, ImageSet
from ekd_lightning.errors import UserError

log = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Listing:
    """N images, those for training first, then those for validation, if any, and those for testing.

    Attributes:
        names: What each is called in messages; for files, their path below the root.
        labels: The class of each, 0 .. C-1.
        counts: How many belong to each of `SPLITS`.
        class_names: C names.
        load: Gives the content of a file, or an image, by its position.
        key: JSON-able; what tells these images from others, beside names, labels and counts.
        source: Where they come from, for people to read.
    """

    names: Sequence[str]
    labels: Sequence[int]
    counts: Mapping[str, int]
    class_names: tuple[str, ...]
    load: Callable[[int], bytes | Image.Image]
    key: Any
    source: str

    def split(self, position: int) -> str:
        """Which split an image belongs to."""
        train, val = self.counts["train"], self.counts["val"]
        return "train" if position < train else "val" if position < train + val else "test"


def check_image_size(value: Any) -> tuple[int, int] | None:
    """Checks `data.image_size`: null, pixels of a square, or [height, width].

    Raises:
        UserError: If it is something else.
    """
    sides = [value, value] if isinstance(value, int) else value
    if sides is None:
        return None
    whole = isinstance(sides, Sequence) and all(isinstance(side, int) and not isinstance(side, bool) for side in sides)
    if not whole or isinstance(sides, str) or len(sides) != 2 or min(sides) < 1:
        raise UserError(f"data.image_size={value}: must be a number of pixels, or [height, width]")
    return sides[0], sides[1]


def read_listing(
    listing: Listing, name: str, *, image_size: tuple[int, int] | None, cache: Path, skip_broken: bool
) -> Dataset:
    """Decodes the images of a listing, or takes them from the cache.

    Args:
        listing: Which images.
        name: What the data set is called.
        image_size: Height and width; None for that of the first image, if all have it.
        cache: The folder of decoded images.
        skip_broken: Whether to go on without images that cannot be read.

    Returns:
        The data set; its images are mapped from disk.

    Raises:
        UserError: For a single class, a class without images, images that cannot be read or differ in size.
    """
    _check_classes(listing, name)
    key = {
        "decoder": DECODER,
        "name": name,
        "images": listing.key,
        "names": list(listing.names),
        "labels": list(listing.labels),
        "counts": dict(listing.counts),
        "size": image_size,
        "skip_broken": skip_broken,
    }

    def build(target: Path) -> dict[str, Any]:
        log.info("%s: decoding %d images, once; they are kept in %s", name, len(listing.names), cache)
        found = decode_all(target, listing.load, len(listing.names), image_size, f"{name}: decoding images")
        if found.broken and not skip_broken:
            raise UserError(f"{_first_broken(listing, found)}; data.skip_broken=true goes on without such")
        return _facts(listing, found, target, name)

    images, facts = cached_images(cache, key, build)
    _check_classes(listing, name, facts["labels"][: facts["counts"]["train"]])
    for remark in facts["remarks"]:
        warnings.warn(remark, stacklevel=2)
    return _dataset(listing, name, images, facts)


def _check_classes(listing: Listing, name: str, train_labels: Sequence[int] | None = None) -> None:
    if len(listing.class_names) < 2:
        raise UserError(f"data set {name!r} ({listing.source}) has a single class, {listing.class_names[0]!r}")
    labels = listing.labels[: listing.counts["train"]] if train_labels is None else train_labels
    present = set(labels)
    empty = [text for label, text in enumerate(listing.class_names) if label not in present]
    if empty:
        more = f", nor have {len(empty) - 1} more" if len(empty) > 1 else ""
        raise UserError(f"data set {name!r} ({listing.source}): class {empty[0]!r} has no training image{more}")


def _first_broken(listing: Listing, found: Decoded) -> str:
    first, reason = next(iter(found.broken.items()))
    more = len(found.broken) - 1
    return f"{listing.names[first]} {reason}" + (f", and {more} more cannot be read" if more else "")


def _facts(listing: Listing, found: Decoded, target: Path, name: str) -> dict[str, Any]:
    """What is kept of the decoded images; rows of broken ones are closed up in the file."""
    kept = [position for position in range(len(listing.names)) if position not in found.broken]
    shape = (len(kept), 3, *found.size)
    remarks = [f"data.skip_broken=true: {_first_broken(listing, found)}"] if found.broken else []
    remarks += _seen_twice(listing, found, kept)
    if not kept:
        raise UserError(f"data set {name!r}: none of its {len(listing.names)} images can be read")
    pixels = np.memmap(target, np.uint8, "r+", shape=(len(listing.names), *shape[1:]))
    if found.broken:
        for row, position in enumerate(kept):
            pixels[row] = pixels[position]
    pixels.flush()
    with target.open("r+b") as file:
        file.truncate(int(np.prod(shape)))
    labels = [listing.labels[position] for position in kept]
    splits = [listing.split(position) for position in kept]
    facts = {"shape": shape, "labels": labels, "counts": {split: splits.count(split) for split in SPLITS}}
    dataset = _dataset(listing, name, torch.from_numpy(pixels[: len(kept)]), facts)
    return {**facts, "remarks": remarks, "sha256": {"train": dataset.train.sha256, "test": dataset.test.sha256}}


def _seen_twice(listing: Listing, found: Decoded, kept: Sequence[int]) -> list[str]:
    """Says which images of other splits are among those for training, if any."""
    first = {found.digests[i]: i for i in reversed(kept) if listing.split(i) == "train"}
    twice = [(first[found.digests[i]], i) for i in kept if listing.split(i) != "train" and found.digests[i] in first]
    if not twice:
        return []
    one, other = (listing.names[i] for i in twice[0])
    more = f", as are {len(twice) - 1} more" if len(twice) > 1 else ""
    return [f"{other} ({listing.split(twice[0][1])}) is among the images for training, too, as {one}{more}"]


def _dataset(listing: Listing, name: str, images: torch.Tensor, facts: Mapping[str, Any]) -> Dataset:
    labels = torch.tensor(facts["labels"], dtype=torch.int64)
    train, val = facts["counts"]["train"], facts["counts"]["val"]
    parts = {"train": slice(0, train + val), "test": slice(train + val, None)}
    sets = {
        split: ImageSet(name, split, images[rows], labels[rows], listing.class_names) for split, rows in parts.items()
    }
    for split, digest in facts.get("sha256", {}).items():
        vars(sets[split])["sha256"] = digest  # what the property would compute from all pixels
    return Dataset(
        name=name,
        train=sets["train"],
        test=sets["test"],
        source=listing.source,
        normalization="imagenet",
        val_index=torch.arange(train, train + val) if val else None,
    )
