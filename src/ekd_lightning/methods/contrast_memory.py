"""Memory banks and negatives of contrastive representation distillation.

Shape letters: B batch, N scores of one anchor, C classes, D embedding size; n is the number of training images.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional

from ekd_lightning.data.order import splitmix64
from ekd_lightning.errors import UserError

STREAM_NEGATIVES = 9  # a number of its own among the streams of data.order
_LOW_32 = (1 << 32) - 1


class TrainingImages(nn.Module):
    """Where an image stands in the banks, and images of other classes as its negatives.

    Rows of the banks are sorted by class, so that all images of other classes are two slices.

    Args:
        index: int64 [n], positions in the whole image set, ascending.
        labels: int64 [n].
        seed: Of the draws.

    Raises:
        UserError: If all images are of one class, so that there are no negatives.
    """

    same_in_all_processes = True

    def __init__(self, index: Tensor, labels: Tensor, seed: int) -> None:
        super().__init__()
        counts_C = torch.bincount(labels)
        if int(counts_C.max()) == len(labels):
            raise UserError("contrast needs training images of at least two classes, and there is one")
        self._key = int(splitmix64(splitmix64(torch.tensor(STREAM_NEGATIVES)) ^ seed))
        by_class = torch.argsort(labels, stable=True)
        # Configuration, not state: kept out of checkpoints.
        self.register_buffer("index", index.clone(), persistent=False)
        self.register_buffer("row_of", torch.argsort(by_class), persistent=False)
        self.register_buffer("image_of", index[by_class], persistent=False)
        self.register_buffer("label_of", labels[by_class], persistent=False)
        self.register_buffer("count_C", counts_C, persistent=False)
        self.register_buffer("start_C", counts_C.cumsum(0) - counts_C, persistent=False)

    def __len__(self) -> int:
        return len(cast(Tensor, self.index))

    def rows(self, index: Tensor) -> Tensor:
        """Returns the rows of images in the banks.

        Args:
            index: int64 [B], positions in the whole image set.

        Returns:
            int64 [B], 0 .. n-1.

        Raises:
            ValueError: On a processor, if an image is not among the training images. On an accelerator, where
                looking would wait for the device, such an image gets the row n, at which the device stops.
        """
        known = cast(Tensor, self.index)
        place = torch.searchsorted(known, index).clamp(max=len(known) - 1)
        found = known[place] == index
        if index.device.type == "cpu" and not bool(found.all()):
            stranger = int(index[~found][0])
            raise ValueError(f"image {stranger} is not among the {len(known)} training images of the banks")
        return torch.where(found, cast(Tensor, self.row_of)[place], len(known))

    def negatives(self, row: Tensor, number: int, step: Tensor) -> Tensor:
        """Draws images of other classes, uniformly and with replacement.

        The draw of an image is a pure function of (seed, step, image): the same whatever else is in the batch, on
        whatever device and in whichever process, and after a resume.

        Args:
            row: int64 [B], rows in the banks.
            number: How many for each.
            step: Optimiser steps so far, an int64 scalar.

        Returns:
            int64 [B, number], rows in the banks.
        """
        key = splitmix64(splitmix64(step ^ self._key))
        # On a processor a few images at a time, which then stay in its cache: three times as fast.
        at_once = 8 if row.device.type == "cpu" else max(1, len(row))
        return torch.cat([self._negatives(part, number, key) for part in row.split(at_once)])

    def _negatives(self, row: Tensor, number: int, key: Tensor) -> Tensor:
        half = torch.arange((number + 1) // 2, device=row.device)
        bits = splitmix64(splitmix64(cast(Tensor, self.image_of)[row] ^ key)[:, None] ^ half)
        # Two draws from the two halves of each 64 bits, scaled to the number of other images.
        both = torch.cat([bits & _LOW_32, (bits >> 32) & _LOW_32], dim=1)[:, :number]
        label = cast(Tensor, self.label_of)[row]
        start, count = (cast(Tensor, t)[label][:, None] for t in (self.start_C, self.count_C))
        place = (both * (len(self) - count)) >> 32
        return place + count * (place >= start)


class MemoryBank(nn.Module):
    """One embedding of each training image, a moving average of what was computed for it.

    Args:
        num_images: n.
        features: D.
        momentum: Share of the old embedding in the new one, in [0, 1].
        generator: Draws the start, uniform with the variance of a random unit vector's elements, as published.
    """

    bank: Tensor
    same_in_all_processes = True  # drawn alike, and `update` gathers; tells the trainer not to broadcast it

    def __init__(self, num_images: int, features: int, momentum: float, generator: torch.Generator) -> None:
        super().__init__()
        self.momentum = momentum
        limit = math.sqrt(3 / features)
        start = torch.empty(num_images, features).uniform_(-limit, limit, generator=generator)
        self.register_buffer("bank", start)

    def scores(self, anchors: Tensor) -> Tensor:
        """Inner products with the whole bank: [B, D] -> [B, n]."""
        # A copy, since the gradient needs the bank of this step and `update` comes before it.
        return anchors @ self.bank.clone().T

    def gathered_scores(self, anchors: Tensor, rows: Tensor) -> Tensor:
        """Inner products with some rows: [B, D] and int64 [B, N] -> [B, N]."""
        return torch.bmm(self.bank[rows], anchors[:, :, None])[:, :, 0]

    @torch.no_grad()
    def update(self, rows: Tensor, embeddings: Tensor) -> None:
        """Moves the embeddings of some images and brings them back to length 1.

        Args:
            rows: int64 [B], each once.
            embeddings: [B, D], of length 1.
        """
        moved = self.momentum * self.bank[rows] + (1 - self.momentum) * embeddings.to(self.bank)
        self.bank.index_copy_(0, rows, functional.normalize(moved))


def of_all_processes(values: Tensor) -> Tensor:
    """Returns the rows of all processes, [world size · B, ...], without gradient; B is the same in each."""
    values = values.detach().contiguous()
    if not (distributed.is_available() and distributed.is_initialized()):
        return values
    gathered = [torch.empty_like(values) for _ in range(distributed.get_world_size())]
    distributed.all_gather(gathered, values)
    return torch.cat(gathered)
