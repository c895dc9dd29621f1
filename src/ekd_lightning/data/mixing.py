"""Mixup and CutMix: images mixed in pairs, as pure functions of (seed, epoch, batch number).

Partners come from the same global batch, so mixed images do not depend on the number of processes. Their number is not
finite, so teacher outputs for them cannot be tabulated.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from ekd_lightning.data.order import STREAM_MIX, STREAM_PARTNER, hash_uniform_u64
from ekd_lightning.errors import UserError

Box = tuple[int, int, int, int]
_USES = 4  # random numbers per batch


class Mix(NamedTuple):
    """The partners of a batch of B images, and the parameters of their mixing.

    Attributes:
        index: int64 [B], positions of the partners in the whole training set.
        view: int64 [B], their views.
        soft_labels: float32 [B, C], the mixed labels; rows sum to 1.
        share: λ in [0, 1], the share of the image itself; the partner's is 1 - λ.
        box: For CutMix, the half-open rectangle (top, bottom, left, right) that comes from the partner; None for mixup.
    """

    index: Tensor  # type: ignore[assignment]  # hides tuple.index
    view: Tensor
    soft_labels: Tensor
    share: float
    box: Box | None


class Mixing:
    """Mixup and CutMix of an epoch's batches, drawn from (seed, epoch).

    mixup (Zhang et al. 2017, arXiv 1710.09412): x̃ = λ x + (1-λ) x', λ ~ Beta(α, α) once per batch. CutMix (Yun
    et al. 2019, arXiv 1905.04899): a rectangle of the partner, whose sides are sqrt(1-λ) of the image's and whose
    centre is uniform, clipped at the edges; λ is then set to the remaining share. Labels are mixed with the same λ.

    Args:
        mixup: α of mixup; 0 switches it off.
        cutmix: α of CutMix; 0 switches it off. With both on, each batch uses either with equal probability.

    Raises:
        UserError: For a negative or infinite α.
    """

    def __init__(self, mixup: float = 0.0, cutmix: float = 0.0) -> None:
        for key, alpha in (("mixup", mixup), ("cutmix", cutmix)):
            if not 0 <= alpha < float("inf"):
                raise UserError(f"recipe.{key}={alpha} must be 0 (off) or a finite number above 0")
        self.mixup, self.cutmix = mixup, cutmix

    def __bool__(self) -> bool:
        """Whether mixup or CutMix is on."""
        return bool(self.mixup or self.cutmix)

    def partners(self, seed: int, epoch: int, num_batches: int, batch_size: int) -> Tensor:
        """Returns each row's partner in its global batch, a permutation: int64 [num_batches, batch_size]."""
        rows = np.arange(num_batches * batch_size)
        bits = hash_uniform_u64(STREAM_PARTNER, seed, epoch, rows).reshape(num_batches, batch_size)
        return torch.from_numpy(bits.argsort(axis=1, kind="stable"))

    def shares(
        self, seed: int, epoch: int, num_batches: int, height: int, width: int
    ) -> list[tuple[float, Box | None]]:
        """Returns λ and rectangle (see `Mix`) of each batch of an epoch, for images of height × width pixels."""
        bits = hash_uniform_u64(STREAM_MIX, seed, epoch, np.arange(num_batches * _USES))
        unit = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53  # inside (0, 1)
        return [self._share(row, height, width) for row in unit.reshape(num_batches, _USES)]

    def _share(self, unit: NDArray[np.float64], height: int, width: int) -> tuple[float, Box | None]:
        from scipy.special import betaincinv  # noqa: PLC0415  # slow to import, not always needed

        is_cutmix = unit[0] < 0.5 if self.mixup and self.cutmix else bool(self.cutmix)
        alpha = self.cutmix if is_cutmix else self.mixup
        share = float(betaincinv(alpha, alpha, unit[1]))  # the quantile function of Beta(α, α)
        if not is_cutmix:
            return share, None
        side = (1 - share) ** 0.5
        top, bottom = _edges(unit[2], side, height)
        left, right = _edges(unit[3], side, width)
        return 1 - (bottom - top) * (right - left) / (height * width), (top, bottom, left, right)


def _edges(unit: float, side: float, size: int) -> tuple[int, int]:
    """Returns the first and last (exclusive) pixel along an axis, around a random centre."""
    length, centre = int(size * side), int(size * unit)
    first = centre - length // 2
    return max(first, 0), min(first + length, size)


def mix_labels(labels: Tensor, partner_labels: Tensor, num_classes: int, share: float) -> Tensor:
    """Returns λ y + (1-λ) y' of one-hot labels, float32 [B, C], for labels int64 [B] and λ = `share` in [0, 1]."""
    own, partner = (functional.one_hot(y, num_classes).float() for y in (labels, partner_labels))
    return share * own + (1 - share) * partner


def mix_images(images: Tensor, partners: Tensor, share: float, box: Box | None) -> Tensor:
    """Mixes each image with its partner, both float32 [B, 3, H, W].

    The share λ in [0, 1] is not used for CutMix, where the box determines the shares; see `Mix`.
    """
    if box is None:
        return share * images + (1 - share) * partners
    top, bottom, left, right = box
    mixed = images.clone()
    mixed[..., top:bottom, left:right] = partners[..., top:bottom, left:right]
    return mixed
