"""Subsets of the training images: stratified, seeded, nested."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ekd_lightning.data.order import STREAM_SUBSET, hash_uniform_u64
from ekd_lightning.errors import UserError


@dataclass(frozen=True, eq=False)
class Subset:
    """The images selected for training and validation.

    Attributes:
        train_index: int64, sorted positions in the whole training set.
        val_index: int64, sorted, disjoint from train_index; may be empty.
        sha256: Hex SHA-256 of both indices.
        fraction: The requested share of the whole training set, validation included (the number of images is rounded
            class by class); with `per_class` the resulting share.
        per_class: The requested number of images per class, else None.
        seed: Seed of the choice.
    """

    train_index: Tensor
    val_index: Tensor
    sha256: str
    fraction: float
    per_class: int | None
    seed: int


def take_evenly(count: int, share: Fraction) -> NDArray[np.bool_]:
    """Marks floor(count * share) of count positions, evenly spread; a larger count only adds marks.

    Position j is marked iff floor((j+1) share) > floor(j share). Returns bool [count].
    """
    edges = np.array([j * share.numerator // share.denominator for j in range(count + 1)], dtype=np.int64)
    return np.diff(edges) > 0


def choose_subset(
    labels: Tensor,
    *,
    fraction: float | None = None,
    per_class: int | None = None,
    val_fraction: float = 0.1,
    seed: int = 0,
    val_index: Tensor | None = None,
) -> Subset:
    """Selects the training and validation images of a run.

    The images of each class are ranked by a seeded hash, and the first n are chosen, where n is `per_class`, or
    `fraction` of the class rounded half up. Subsets with one seed are nested, and so are their training and their
    validation parts.

    Args:
        labels: int64 [N], labels of the whole training set.
        fraction: Share of every class, in (0, 1]; 1 if neither `fraction` nor `per_class` is given.
        per_class: Images of every class, 1 .. size of the smallest class.
        val_fraction: Share of the subset that is used for validation, in [0, 1).
        seed: Seed of the choice.
        val_index: Positions of a published validation split: they are the validation images, none of them is chosen
            for training, and `val_fraction` has no effect.

    Returns:
        The subset.

    Raises:
        UserError: For a value out of range, both `fraction` and `per_class`, or a class without training or validation
            images.
    """
    own, held_out = labels.cpu().numpy(), np.empty(0, dtype=np.int64)
    if val_index is not None:
        held_out, val_fraction = val_index.numpy(), 0.0
    offered = np.setdiff1d(np.arange(len(own)), held_out)
    sizes = _class_sizes(labels[offered], fraction, per_class)
    if not 0 <= val_fraction < 1:
        raise UserError(f"data.val_fraction={val_fraction} must lie in [0, 1)")
    share = Fraction(str(float(val_fraction)))
    train_parts, val_parts = [], [held_out]
    for label, size in sizes.items():
        members = offered[own[offered] == label]
        ranked = members[np.argsort(hash_uniform_u64(STREAM_SUBSET, seed, 0, members), kind="stable")][:size]
        is_val = take_evenly(size, share)
        if share > 0 and not is_val.any():
            raise UserError(
                f"data.val_fraction={val_fraction} leaves class {label} without validation images "
                f"({size} in the subset): choose a larger subset, or set data.val_fraction=0"
            )
        train_parts.append(ranked[~is_val])
        val_parts.append(ranked[is_val])
    train, val = np.sort(np.concatenate(train_parts)), np.sort(np.concatenate(val_parts))
    digest = hashlib.sha256(f"train {len(train)} val {len(val)}|".encode())
    digest.update(np.concatenate((train, val)).astype("<i8").tobytes())
    return Subset(
        train_index=torch.from_numpy(train),
        val_index=torch.from_numpy(val),
        sha256=digest.hexdigest(),
        fraction=float(fraction or 1) if per_class is None else sum(sizes.values()) / len(offered),
        per_class=per_class,
        seed=seed,
    )


def left_out(num_images: int, val_index: Tensor | None, subset: Subset) -> Tensor:
    """Returns the training images that are neither in the subset nor validation images: int64 [U], ascending.

    If there are none, it raises a `UserError`.
    """
    chosen = torch.zeros(num_images, dtype=torch.bool)
    for index in (subset.train_index, subset.val_index, val_index):
        if index is not None:
            chosen[index] = True
    if chosen.all():
        raise UserError(
            "data.unlabelled=rest: the subset leaves no training image out; lower data.fraction or data.per_class, "
            "or give a folder of images (for STL10: data.unlabelled=split)"
        )
    return (~chosen).nonzero()[:, 0]


def _class_sizes(labels: Tensor, fraction: float | None, per_class: int | None) -> dict[int, int]:
    """Returns the number of images to choose from each class that occurs."""
    counts = {label: count for label, count in enumerate(torch.bincount(labels).tolist()) if count}
    if fraction is not None and per_class is not None:
        raise UserError(f"data.fraction={fraction} and data.per_class={per_class} exclude each other: set one to null")
    if per_class is not None:
        smallest = min(counts.values())
        if not 1 <= per_class <= smallest:
            raise UserError(f"data.per_class={per_class} must lie in 1..{smallest} (the smallest class has {smallest})")
        return dict.fromkeys(counts, per_class)
    fraction = 1.0 if fraction is None else fraction
    if not 0 < fraction <= 1:
        raise UserError(f"data.fraction={fraction} must lie in (0, 1]")
    # The user's decimal number, not its binary approximation, so that halves are rounded up exactly.
    share = Fraction(str(float(fraction)))
    sizes = {label: math.floor(share * count + Fraction(1, 2)) for label, count in counts.items()}
    empty = [label for label, size in sizes.items() if size == 0]
    if empty:
        raise UserError(
            f"data.fraction={fraction} leaves class {empty[0]} without images ({counts[empty[0]]} in the "
            f"whole training set): choose at least {0.5 / min(counts.values()):.2g}, or set data.per_class"
        )
    return sizes
