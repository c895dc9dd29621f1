"""Batches of the user's data loaders, checked and converted.

Shape letters: B batch, C classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ekd_lightning.data.loader import Batch
from ekd_lightning.errors import UserError

_ROUNDING = 1e-3  # of resized images


def as_batch(given: Any, num_classes: int) -> Batch:
    """Returns what a user's data loader yielded as a `Batch`: images as in `as_images`, and labels, integers [B].

    Raises:
        UserError: If it is something else, or a label lies outside 0 .. C-1.
    """
    if not isinstance(given, tuple | list) or len(given) != 2:
        found = f"a {type(given).__name__}" + (f" of {len(given)}" if isinstance(given, tuple | list | dict) else "")
        raise UserError(f"a batch must be (images, labels), not {found}")
    images, labels = given
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dim() != 1:
        found = f"{labels.dtype} {list(labels.shape)}" if isinstance(labels, Tensor) else f"a {type(labels).__name__}"
        raise UserError(f"labels must be integers [B], not {found}")
    if isinstance(images, Tensor) and not 0 < len(labels) == len(images):
        raise UserError(f"a batch has {len(images)} images and {len(labels)} labels")
    images = as_images(images, (labels, num_classes))
    unknown = torch.full_like(labels, -1, dtype=torch.int64)
    return Batch(images, labels.long(), unknown, unknown, torch.ones_like(labels, dtype=torch.bool))


def as_images(images: Any, labels: tuple[Tensor, int] | None = None) -> Tensor:
    """Returns images [B, 3, H, W], or grey ones [B, 1, H, W], floating point in [0, 1], as float32 [B, 3, H, W].

    `labels` are labels and C, which are checked in the same read from the device.

    Raises:
        UserError: If they are something else, or a label lies outside 0 .. C-1.
    """
    wanted = "images must be floating point in [0, 1], [B, 3, H, W] or [B, 1, H, W]"
    if not isinstance(images, Tensor) or images.dim() != 4 or images.shape[1] not in (1, 3):
        found = f"{list(images.shape)}" if isinstance(images, Tensor) else f"a {type(images).__name__}"
        raise UserError(f"{wanted}, not {found}")
    if not images.is_floating_point():
        raise UserError(f"{wanted}, not {images.dtype}; divide by 255")
    known = (labels[0], labels[1] - 1) if labels else (torch.zeros(1, device=images.device), 0)
    ends = torch.stack([value.float() for value in (images.amin(), images.amax(), *known[0].aminmax())])
    low, high, first, last = ends.tolist()
    if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):
        raise UserError(f"{wanted}, but span {low:.4g} to {high:.4g}; networks normalise them")
    if first < 0 or last > known[1]:
        raise UserError(f"labels must be in 0 .. {known[1]}, but span {first:.0f} to {last:.0f}")
    return images.float().expand(-1, 3, -1, -1)
