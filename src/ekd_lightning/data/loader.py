"""Loaders of indices, batches, and the function that turns indices into images on the device.

Global batches depend only on (seed, epoch); each of `world_size` processes takes its share of every batch. The
loaders are plain iterables, which Lightning neither wraps nor re-creates; they work in any PyTorch loop:

    loader = TrainLoader(train_set, subset.train_index, views, batch_size=128, seed=0)
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        for rows in loader:
            batch = gather_batch(images_on_device, rows, views)
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ekd_lightning.data.images import ImageSet, JoinedImages, Unlabelled
from ekd_lightning.data.mixing import Mix, Mixing, mix_images, mix_labels
from ekd_lightning.data.order import epoch_order, epoch_views
from ekd_lightning.data.views import ViewFamily, to_unit
from ekd_lightning.errors import UserError


class Batch(NamedTuple):
    """B images with labels, and the numbers that identify image and view.

    Attributes:
        images: float32 [B, 3, H, W] in [0, 1], not normalised (networks do that themselves).
        labels: int64 [B]; -1 for images without labels.
        index: int64 [B], position of each image in the whole training (or test) set, not in the subset.
        view: int64 [B], the number of the image's augmentation, 0 .. V-1; -1 for unchanged images (evaluation) if the
            family has no identity view.
        valid: bool [B]; False for padding rows, which make evaluation batches equally long on all devices and must not
            be counted. Always True in training.
        soft_labels: float32 [B, C], rows summing to 1, if every image was mixed with another one (mixup, CutMix);
            labels, index and view are then those of the first image. None without mixing.
        num_labelled: Number of labelled rows, which come first; None if all rows are labelled.
    """

    images: Tensor
    labels: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index
    view: Tensor
    valid: Tensor
    soft_labels: Tensor | None = None
    num_labelled: int | None = None

    @property
    def labelled(self) -> Batch:
        """The labelled rows, as a batch."""
        if self.num_labelled is None:
            return self
        rows = slice(self.num_labelled)
        soft_labels = None if self.soft_labels is None else self.soft_labels[rows]
        known = {name: getattr(self, name)[rows] for name in self._fields[:5]}
        return self._replace(**known, soft_labels=soft_labels, num_labelled=None)

    @property
    def targets(self) -> Tensor:
        """The targets of cross-entropy: the soft labels [B, C] if there are any, else the labels [B]."""
        return self.labels if self.soft_labels is None else self.soft_labels

    @property
    def hard_labels(self) -> Tensor:
        """One class per image, int64 [B]; for a mixed image the class with the larger share."""
        return self.labels if self.soft_labels is None else self.soft_labels.argmax(-1)


class IndexBatch(NamedTuple):
    """A batch before its images are gathered: fields as in `Batch`, and the mixing partners."""

    labels: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index
    view: Tensor
    valid: Tensor
    mix: Mix | None = None
    num_labelled: int | None = None


def check_batch_size(batch_size: int, num_images: int, world_size: int = 1, *, recipe_key: str = "recipe") -> None:
    """Refuses a global batch size that is below 1, exceeds the training images, or is no multiple of the processes.

    `recipe_key` is the dotted key of the recipe in the configuration, for messages.
    """
    given = f"{recipe_key}.batch_size={batch_size}"
    if batch_size < 1:
        raise UserError(f"{given} must be at least 1")
    if batch_size > num_images:
        raise UserError(f"{given} is larger than the {num_images} training images: lower it or train on more images")
    if batch_size % world_size:
        raise UserError(f"{given} cannot be shared evenly by {world_size} processes: choose a multiple of {world_size}")


def rows_of_batch(
    batch_size: int, num_labelled: int, unlabelled: Unlabelled | None = None, world_size: int = 1
) -> list[int]:
    """Splits a global batch into labelled rows and, with unlabelled images, unlabelled ones: the numbers of rows.

    Unlabelled rows are `share` of the batch, rounded half up.

    Raises:
        UserError: If the batch does not fit the images or the processes, or one of the two numbers is 0.
    """
    if unlabelled is None:
        check_batch_size(batch_size, num_labelled, world_size)
        return [batch_size]
    share = unlabelled.share
    withheld = int(batch_size * Fraction(str(float(share))) + Fraction(1, 2))
    parts = {"labelled": (batch_size - withheld, num_labelled), "unlabelled": (withheld, len(unlabelled))}
    for kind, (rows, images) in parts.items():
        has = f"recipe.batch_size={batch_size} with data.unlabelled_share={share} has {rows} {kind} images"
        if not rows:
            raise UserError(f"{has}, and both kinds are needed: choose another share")
        if rows > images:
            raise UserError(f"{has}, but there are only {images}: lower the batch size, or choose another share")
        if rows % world_size:
            raise UserError(
                f"{has}, which {world_size} processes cannot share evenly: choose a share that gives a multiple of "
                f"{world_size}"
            )
    return [batch_size - withheld, withheld]


class TrainLoader:
    """Training batches: the epoch's order is cut into global batches, of which each process takes every n-th row.

    The last, incomplete batch is dropped; its images differ from epoch to epoch.

    With unlabelled images, the labelled rows of a batch come first. An epoch is one pass over the images of one kind
    (`Unlabelled.leads`). A pass over the other kind lasts as many whole epochs as it has images for; if an epoch needs
    more images than there are, it contains several passes.

    Args:
        image_set: The whole training set.
        index: int64 [N], the positions to train on, all different.
        views: The view family.
        batch_size: Images in a global batch.
        seed: The run's seed.
        world_size: Number of processes.
        rank: Number of this process, 0 .. world_size-1.
        mixing: Mixup, CutMix or both; None for neither.
        unlabelled: Images without labels; None without any.

    Raises:
        UserError: If the batch size does not fit the images or the processes, or for mixing with unlabelled images.
    """

    def __init__(
        self,
        image_set: ImageSet,
        index: Tensor,
        views: ViewFamily,
        batch_size: int,
        seed: int,
        *,
        world_size: int = 1,
        rank: int = 0,
        mixing: Mixing | None = None,
        unlabelled: Unlabelled | None = None,
    ) -> None:
        if mixing and unlabelled is not None:
            raise UserError(
                "images without labels cannot be mixed: switch off recipe.mixup and recipe.cutmix, or leave out "
                "data.unlabelled"
            )
        rows = rows_of_batch(batch_size, len(index), unlabelled, world_size)
        kinds = [index] if unlabelled is None else [index, unlabelled.index]
        self._parts = list(zip(kinds, rows, strict=True))
        self.num_labelled = None if unlabelled is None else rows[0] // world_size
        leads = unlabelled is not None and unlabelled.leads
        self._num_batches = len(kinds[leads]) // rows[leads]
        self.index, self.seed, self.number, self.frozen = index, seed, 0, False
        self.batch_size, self.world_size, self.rank = batch_size, world_size, rank
        self._labels, self._num_views = image_set.labels, views.num_views
        self._num_classes, self._image_shape = image_set.num_classes, image_set.images.shape[2:]
        self._mixing = mixing or None  # a Mixing that is off is falsy
        self._epochs: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return self._num_batches

    @property
    def repeats(self) -> bool:
        """Whether an epoch, over all processes, contains an image more than once."""
        return any(len(self) * rows > len(images) for images, rows in self._parts)

    @property
    def sampler(self) -> TrainLoader:
        """This loader: Lightning calls `loader.sampler.set_epoch(epoch)` before every epoch, also after a resume."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, counted from 0; no effect while `frozen`."""
        if not self.frozen:
            self.number = epoch

    def epoch(self, num_batches: int | None = None, ahead: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Returns this process's rows of an epoch, or of its first batches, without making images.

        `ahead` counts epochs after the current one. The rows are labels (-1 for unlabelled ones), index and view, each
        int64 [batches, images in a batch].
        """
        number = self.number if self.frozen else self.number + ahead
        if number not in self._epochs:  # the current epoch and the next are asked for several times
            self._epochs = {self.number: self._epochs[self.number]} if self.number in self._epochs else {}
            self._epochs[number] = self._rows_of(number)
        labels, index, view = (values[:num_batches] for values in self._epochs[number])
        return labels, index, view

    def distinct_rows(self, num_batches: int | None = None, ahead: int = 0) -> tuple[Tensor, Tensor]:
        """Returns index and view, each int64 [N], of the distinct rows of `epoch`."""
        _, index, view = (values.flatten() for values in self.epoch(num_batches, ahead))
        if not self.repeats:
            return index, view
        distinct = torch.unique(index * self._num_views + view)
        if len(distinct) == len(index):
            return index, view
        return distinct // self._num_views, distinct % self._num_views

    def _rows_of(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Returns labels, index and view of all batches of an epoch; see `epoch`."""
        places = torch.arange(len(self) * self.batch_size).view(len(self), self.batch_size)
        index, view = self._rows_at(places, number)
        known = slice(self.num_labelled)
        labels = torch.full_like(index, -1)
        labels[:, known] = self._labels[index[:, known]]
        return labels, index, view

    def _rows_at(self, places: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """Returns index and view of this process's share of global batches, given as positions in an epoch's order."""
        streams = [self._stream(images, rows, number) for images, rows in self._parts]
        mine = places[:, self.rank :: self.world_size]
        index, view = (torch.cat(kinds, dim=1).flatten()[mine] for kinds in zip(*streams, strict=True))
        return index, view

    def _stream(self, images: Tensor, rows: int, epoch: int) -> tuple[Tensor, Tensor]:
        """Returns index and view of one kind of images in an epoch's batches, each int64 [batches, rows]."""
        needed = len(self) * rows
        passes = -(-needed // len(images))
        epochs_per_pass = len(images) // needed  # 0 if an epoch needs several passes
        first, part = divmod(epoch, epochs_per_pass) if epochs_per_pass else (epoch * passes, 0)
        pieces = []
        for number in range(first, first + passes):
            index = epoch_order(self.seed, number, images)[part * needed : (part + 1) * needed]
            pieces.append((index, epoch_views(self.seed, number, index, self._num_views)))
        index, view = (torch.cat(values)[:needed].view(-1, rows) for values in zip(*pieces, strict=True))
        return index, view

    def __iter__(self) -> Iterator[IndexBatch]:
        labels, index, view = (values.clone() for values in self.epoch())  # batches are the caller's own
        mixes = repeat(None) if self._mixing is None else self._mixes(labels)
        for own, rows, views, mix in zip(labels, index, view, mixes, strict=False):
            yield IndexBatch(own, rows, views, torch.ones_like(rows, dtype=torch.bool), mix, self.num_labelled)

    def _mixes(self, labels: Tensor) -> Iterator[Mix]:
        """Yields each batch's mixing; partners come from its whole global batch."""
        assert self._mixing is not None
        rows = self._mixing.partners(self.seed, self.number, len(self), self.batch_size)
        index, view = self._rows_at(torch.arange(len(self))[:, None] * self.batch_size + rows, self.number)
        shares = self._mixing.shares(self.seed, self.number, len(self), *self._image_shape)
        for number, (share, box) in enumerate(shares):
            partner_labels = self._labels[index[number]]
            soft = mix_labels(labels[number], partner_labels, self._num_classes, share)
            yield Mix(index[number], view[number], soft, share, box)


class EvalLoader:
    """Evaluation batches, in which every image of `index`, int64 [N], occurs once with `valid=True` over all processes.

    All processes get the same number of equally long batches, with at most `batch_size` images and as little padding as
    possible; padding rows repeat the last image with `valid=False`. `Batch.view` is `identity_view`, or -1 for None.

    Raises:
        UserError: For a batch size below 1.
    """

    def __init__(
        self,
        image_set: ImageSet,
        index: Tensor,
        identity_view: int | None,
        batch_size: int,
        *,
        world_size: int = 1,
        rank: int = 0,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"data.eval_batch_size={batch_size} must be at least 1")
        self._labels, self._index = image_set.labels, index
        self._identity_view = -1 if identity_view is None else identity_view
        self.world_size, self.rank = world_size, rank
        self._num_batches = -(-len(index) // (batch_size * world_size))
        self.batch_size = -(-len(index) // (self._num_batches * world_size)) if self._num_batches else batch_size

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[IndexBatch]:
        if not self._num_batches:
            return
        shape = (self._num_batches, self.batch_size * self.world_size)
        position = torch.arange(shape[0] * shape[1]).view(shape)[:, self.rank :: self.world_size]
        index = self._index[position.clamp(max=len(self._index) - 1)]
        view = torch.full_like(index, self._identity_view)
        yield from map(IndexBatch, self._labels[index], index, view, position < len(self._index))


def gather_batch(
    images: Tensor | JoinedImages, rows: IndexBatch, views: ViewFamily | None = None, device: torch.device | None = None
) -> Batch:
    """Gathers, augments and mixes the images of a batch on a device.

    Args:
        images: uint8 [N, 3, H, W], the whole set that `rows.index` refers to; on the device, or in memory or on disk
            (only the images of the batch are then sent to the device).
        rows: B rows from one of the loaders, on any device.
        views: The family of `rows.view`; None for unchanged images (evaluation).
        device: The device of the batch; None for that of the images.

    Returns:
        The batch, with images float32 [B, 3, H, W] in [0, 1], mixed if `rows.mix` is set.
    """
    device = device or images.device
    rows = tree_map_only(Tensor, lambda values: values.to(device, non_blocking=True), rows)
    index, view, mix = rows.index, rows.view, rows.mix
    if mix is not None:  # partners may belong to the share of another process
        index, view = torch.cat((index, mix.index)), torch.cat((view, mix.view))
    chosen = images[index.to(images.device)].to(device, non_blocking=True)
    if views is not None:
        chosen = views(chosen, view, index)
    chosen = to_unit(chosen)
    soft_labels = None
    if mix is not None:
        own, partners = chosen.chunk(2)
        chosen, soft_labels = mix_images(own, partners, mix.share, mix.box), mix.soft_labels
    return Batch(chosen, rows.labels, rows.index, rows.view, rows.valid, soft_labels, rows.num_labelled)
