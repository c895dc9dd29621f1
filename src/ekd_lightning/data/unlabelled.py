"""Opens images that are trained on without labels: those that a subset leaves out, a split, or a folder."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from ekd_lightning.data.arrays import list_unlabelled
from ekd_lightning.data.folder import list_images
from ekd_lightning.data.images import Dataset, Unlabelled
from ekd_lightning.data.listing import read_without_labels
from ekd_lightning.data.subset import Subset
from ekd_lightning.errors import UserError
from ekd_lightning.settings import DataSettings

DEFAULT_SHARE = 0.5


def open_unlabelled(data: DataSettings, dataset: Dataset, subset: Subset) -> Unlabelled | None:
    """The images without labels that settings ask for; None for none.

    Args:
        data: The settings.
        dataset: The data set; images of other sources are brought to its size.
        subset: What is trained on with labels, and validated on.

    Raises:
        UserError: If there are none, or they cannot be read.
    """
    if data.unlabelled is None:
        return None
    share = DEFAULT_SHARE if data.unlabelled_share is None else data.unlabelled_share
    leads = data.epoch == "unlabelled"
    if data.unlabelled == "rest":
        index = left_out(len(dataset.train), dataset.val_index, subset)
        digest = hashlib.sha256(f"rest {len(index)}|".encode() + index.numpy().astype("<i8").tobytes())
        return Unlabelled(index, f"the rest of {dataset.name}", digest.hexdigest(), share, leads)
    if data.unlabelled == "split":
        if data.source != "torchvision":
            raise UserError("data.unlabelled=split: for data=torchvision data.name=STL10; name a folder, or rest")
        listing = list_unlabelled(data.name, Path(data.root).expanduser().resolve(), data.download)
    else:
        listing = list_images(Path(data.unlabelled).expanduser().resolve())
    height, width = dataset.train.images.shape[2:]
    cache = Path(data.cache).expanduser().resolve()
    own = read_without_labels(listing, image_size=(height, width), cache=cache, skip_broken=data.skip_broken)
    index = torch.arange(len(dataset.train), len(dataset.train) + len(own))
    return Unlabelled(index, listing.source, own.sha256, share, leads, own)


def left_out(num_images: int, val_index: Tensor | None, subset: Subset) -> Tensor:
    """Positions of the training images that are in no part of a subset, nor there for validation; int64, ascending.

    Raises:
        UserError: If there are none.
    """
    chosen = torch.zeros(num_images, dtype=torch.bool)
    for index in (subset.train_index, subset.val_index, val_index):
        if index is not None:
            chosen[index] = True
    if chosen.all():
        raise UserError(
            "data.unlabelled=rest: the subset leaves no training image out; lower data.fraction or data.per_class, "
            "or name a folder (of STL10: data.unlabelled=split)"
        )
    return (~chosen).nonzero()[:, 0]
