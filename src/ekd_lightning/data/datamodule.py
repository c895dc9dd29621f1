"""Data module for Lightning: images in the device's memory if they fit, and batches gathered there."""

from __future__ import annotations

import math
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from ekd_lightning.data.images import Dataset, ImageSet, JoinedImages, Unlabelled
from ekd_lightning.data.loader import Batch, EvalLoader, IndexBatch, TrainLoader, gather_batch
from ekd_lightning.data.mixing import Mixing
from ekd_lightning.data.subset import Subset
from ekd_lightning.data.views import OwnPlaces, ViewFamily

HELD_SHARE = 0.5
"""The largest share of a device's free memory for images; if they need more, they are sent batch by batch."""


def free_bytes(device: torch.device) -> float:
    """Returns the free memory of a CUDA device in bytes; infinity for other devices."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else math.inf


class ImageDataModule(pl.LightningDataModule):
    """Feeds a Trainer from images in memory; the training step receives a `Batch`.

    Training batches depend only on (seed, epoch), not on the number of processes. Validation images come from the
    training set, unaugmented. The test set is moved to the device only for testing.

    Args:
        dataset: The images.
        subset: The positions of training and validation images.
        views: The view family for training.
        batch_size: Images in a global training batch, shared by all processes.
        eval_batch_size: The largest number of images per process in an evaluation batch.
        seed: Seed of order, views and mixing.
        mixing: Mixup or CutMix of training batches; None for neither.
        unlabelled: Training images without labels; None without any.

    Raises:
        UserError: If the batch size does not fit the subset, or for mixing with unlabelled images; later, when training
            starts, if the batch size does not fit the processes.
    """

    def __init__(
        self,
        dataset: Dataset,
        subset: Subset,
        views: ViewFamily,
        *,
        batch_size: int,
        eval_batch_size: int = 500,
        seed: int = 0,
        mixing: Mixing | None = None,
        unlabelled: Unlabelled | None = None,
    ) -> None:
        super().__init__()
        self.dataset, self.subset, self.unlabelled = dataset, subset, unlabelled
        self.batch_size, self.eval_batch_size, self.seed, self.mixing = batch_size, eval_batch_size, seed, mixing
        joins = unlabelled is not None and unlabelled.own is not None
        self.views = OwnPlaces(views, len(dataset.train)) if joins else views
        self.check_processes(1)  # early, before teachers are trained
        self._on_device: dict[tuple[str, torch.device], Tensor | JoinedImages] = {}

    def check_processes(self, world_size: int) -> None:
        """Refuses training batches that do not fit the images and the processes by a `UserError`."""
        self._train_loader(world_size, 0)

    @property
    def num_train_images(self) -> int:
        """Number of labelled training images, without validation images."""
        return len(self.subset.train_index)

    @property
    def num_val_images(self) -> int:
        """Number of validation images."""
        return len(self.subset.val_index)

    def train_dataloader(self) -> TrainLoader:
        """Returns the training batches of this process."""
        loader = self._train_loader(*self._processes())
        # With Lightning's overfit_batches every epoch has the same batches; it cannot freeze this loader itself.
        loader.frozen = getattr(self.trainer, "overfit_batches", 0) > 0
        return loader

    def _train_loader(self, world_size: int, rank: int) -> TrainLoader:
        return TrainLoader(
            self.dataset.train,
            self.subset.train_index,
            self.views,
            self.batch_size,
            self.seed,
            world_size=world_size,
            rank=rank,
            mixing=self.mixing,
            unlabelled=self.unlabelled,
        )

    def val_dataloader(self) -> EvalLoader | list[EvalLoader]:
        """Returns the validation batches of this process; an empty list without a validation split."""
        return self._eval_loader(self.dataset.train, self.subset.val_index) if self.num_val_images else []

    def test_dataloader(self) -> EvalLoader:
        """Returns the test batches of this process."""
        return self._eval_loader(self.dataset.test, torch.arange(len(self.dataset.test)))

    @property
    def bytes_on_device(self) -> int:
        """Bytes of images on accelerators."""
        return sum(images.nbytes for images in self._on_device.values() if images.device.type != "cpu")

    def _leaves_rows(self) -> bool:
        """Whether the module gathers the images of its training steps itself, from the loader's rows."""
        if self.trainer is None or not self.trainer.training:
            return False
        return bool(getattr(self.trainer.lightning_module, "gathers_images", False))

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Moves a batch to the device, unless training steps gather their images themselves."""
        if self._leaves_rows():
            return batch
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def gather_training(self, rows: IndexBatch, device: torch.device) -> Batch:
        """Gathers the training batch of some rows, with images float32 [B, 3, H, W] in [0, 1] on the device."""
        return gather_batch(self._images("train", device), rows, self.views, device)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Gathers the images of an IndexBatch on its device; returns any other batch unchanged."""
        if not isinstance(batch, IndexBatch) or self._leaves_rows():
            return batch
        trainer, device = self.trainer, batch.index.device
        if trainer is None or trainer.training:
            return self.gather_training(batch, device)
        return gather_batch(self._images("test" if trainer.testing else "train", device), batch, None, device)

    def training_images(self, index: Tensor, view: Tensor, device: torch.device) -> Tensor:
        """Makes views of training images on a device as in a training batch: float32 [B, 3, H, W] in [0, 1].

        `index`, int64 [B], are positions in the whole training set, or behind it for separate unlabelled images;
        `view`, int64 [B], are their views.
        """
        valid = torch.ones_like(index, dtype=torch.bool)
        rows = IndexBatch(torch.full_like(index, -1), index, view, valid)
        return self.gather_training(rows, device).images

    def _images(self, split: str, device: torch.device) -> Tensor | JoinedImages:
        """Returns a split's images, uint8 [N, 3, H, W], on the device if they fit there; they are moved once.

        Separate unlabelled images follow the images of the training set.
        """
        key = split, device
        if key not in self._on_device:
            images: Tensor | JoinedImages = getattr(self.dataset, split).images
            own = None if self.unlabelled is None else self.unlabelled.own
            if split == "train" and own is not None:
                images = JoinedImages(self.dataset.train.images, own.images)
            held = images.nbytes <= HELD_SHARE * free_bytes(device)
            self._on_device[key] = images.to(device) if held else images
        return self._on_device[key]

    def why_not_recorded(self, device: torch.device) -> str | None:
        """Returns the reason why images prevent recording a training step; None if they are on the device."""
        held = self._images("train", device).device.type == device.type
        return None if held else "the images do not fit into the device's memory"

    def _eval_loader(self, image_set: ImageSet, index: Tensor) -> EvalLoader:
        world_size, rank = self._processes()
        return EvalLoader(
            image_set, index, self.views.identity_view, self.eval_batch_size, world_size=world_size, rank=rank
        )

    def _processes(self) -> tuple[int, int]:
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
