"""View families: a finite, numbered set of augmentations of an image, made for a whole batch at once."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from ekd_lightning.errors import UserError, unknown_name


class ViewFamily(Protocol):
    """A numbered family of augmentations.

    Attributes:
        num_views: V, how many views an image has.
        identity_view: The number of the view that leaves the image as it is.
        key: Says which family this is; part of content hashes.
    """

    num_views: int
    identity_view: int
    key: str

    def __call__(self, images: Tensor, view: Tensor) -> Tensor:
        """Makes one view of each image.

        Args:
            images: uint8 [B, 3, H, W].
            view: int64 [B], 0 .. V-1, on the images' device.

        Returns:
            uint8 [B, 3, H, W].
        """
        ...


class Identity:
    """The family of one view: the image itself."""

    num_views = 1
    identity_view = 0
    key = "none"

    def __call__(self, images: Tensor, view: Tensor) -> Tensor:
        """Returns the images [B, 3, H, W] unchanged."""
        return images


class CropFlip:
    """Zero padding, a crop of the old size anywhere in it, and a horizontal flip.

    With P = 2 padding + 1 positions along each axis, view = flip P² + top P + left: the views without flip
    come first, in reading order. Padding 4 gives 81 crops and, with flips, V = 162.

    Args:
        padding: Pixels added on every side, at least 0.
        flip: Whether mirrored views belong to the family.

    Raises:
        UserError: A negative padding.
    """

    def __init__(self, padding: int = 4, flip: bool = True) -> None:
        if padding < 0:
            raise UserError(f"data.padding={padding} must be at least 0")
        self.padding, self.flip = padding, flip
        self.positions = 2 * padding + 1
        self.num_views = self.positions**2 * (2 if flip else 1)
        self.identity_view = padding * self.positions + padding
        self.key = f"crop_flip-padding{padding}-{'flip' if flip else 'noflip'}"

    def __call__(self, images: Tensor, view: Tensor) -> Tensor:
        """Makes one view of each image; see `ViewFamily`."""
        B, _, H, W = images.shape
        P = self.positions
        padded = functional.pad(images, (self.padding,) * 4)
        windows = padded.unfold(2, H, 1).unfold(3, W, 1)  # [B, 3, P, P, H, W], without copying
        rows = torch.arange(B, device=images.device)
        crop = windows[rows, :, view // P % P, view % P]
        if not self.flip:
            return crop
        return torch.where((view >= P * P)[:, None, None, None], crop.flip(-1), crop)


def make_views(augmentation: str, padding: int = 4, flip: bool = True) -> ViewFamily:
    """Builds a view family by name.

    Args:
        augmentation: "crop_flip" or "none".
        padding: For crop_flip: pixels added on every side.
        flip: For crop_flip: whether mirrored views belong to the family.

    Returns:
        The family.

    Raises:
        UserError: An unknown name or a negative padding.
    """
    if augmentation == "crop_flip":
        return CropFlip(padding, flip)
    if augmentation == "none":
        return Identity()
    raise unknown_name("data.augmentation", augmentation, ("crop_flip", "none"))
