"""View families: finite, numbered sets of augmentations of an image, computed for whole batches."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ekd_lightning.data import color  # noqa: F401  # it registers its augmentations
from ekd_lightning.data.augmentations import AUGMENTATIONS, OPTIONS_KEY, Augmentation, build_augmentation
from ekd_lightning.data.order import Draws
from ekd_lightning.data.transforms import Transform, is_transform, transform_names
from ekd_lightning.errors import UserError, unknown_name
from ekd_lightning.settings import DataSettings

POOL_SIZE = 64


def to_unit(levels: Tensor) -> Tensor:
    """Converts pixel values k, uint8, to float32 k / 255, correctly rounded and therefore equal on every device."""
    if levels.device.type == "cpu":
        return levels.float().div_(255)
    # CUDA replaces a division by a constant by a multiplication with its reciprocal, which rounds differently.
    return unit_levels(levels.device)[levels.int()]


@cache
def unit_levels(device: torch.device) -> Tensor:
    """Returns 0/255 .. 255/255, float32 [256]; copied to each device once."""
    return to_unit(torch.arange(256, dtype=torch.uint8)).to(device)


class ViewFamily:
    """A numbered family of augmentations; a view is a pure function of the image, its index and the view's number.

    Attributes:
        num_views: V, the number of views of an image.
        key: Everything that determines the family's views, as text; part of content hashes.
        identity_view: Number of the view that leaves every image unchanged; None if there is none. Evaluation does not
            need it, as it uses images without views.
        captures: Whether views can be computed without the host, and so within a CUDA graph.
    """

    num_views: int
    key: str
    identity_view: int | None = None
    captures = True

    def __call__(self, images: Tensor, view: Tensor, index: Tensor) -> Tensor:
        """Makes one view of each image.

        Args:
            images: uint8 [B, 3, H, W].
            view: int64 [B], 0 .. V-1, on the images' device.
            index: int64 [B], position of each image in the whole training set, on the images' device.

        Returns:
            uint8 [B, 3, H, W].
        """
        raise NotImplementedError


class Identity(ViewFamily):
    """The family with a single view, the unchanged image."""

    num_views = 1
    identity_view = 0
    key = "none"

    def __call__(self, images: Tensor, view: Tensor, index: Tensor) -> Tensor:
        """Returns the images [B, 3, H, W] unchanged."""
        return images


class CropFlip(ViewFamily):
    """Crop-and-flip views: zero padding, any crop of the original size, and optionally a horizontal flip.

    With P = 2 padding + 1 positions along each axis, view = flip P² + top P + left: the views without flip come first,
    in reading order. Padding 4 gives 81 crops and, with flips, V = 162. A negative padding is a `UserError`.
    """

    def __init__(self, padding: int = 4, flip: bool = True) -> None:
        if padding < 0:
            raise UserError(f"data.padding={padding} must be at least 0")
        self.padding, self.flip = padding, flip
        self.positions = 2 * padding + 1
        self.num_views = self.positions**2 * (2 if flip else 1)
        self.identity_view = padding * self.positions + padding
        self.key = f"crop_flip-padding{padding}-{'flip' if flip else 'noflip'}"

    def __call__(self, images: Tensor, view: Tensor, index: Tensor) -> Tensor:
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


class Pool(ViewFamily):
    """A pool of V random views per image, of augmentations without a finite number of views.

    View v of image i is a pure function of (i, v, the pool's seed, the augmentations with their options), with random
    numbers from `Draws` on the images' device. The augmentations, each with a key of its name and options, are applied
    in order. The seed is separate from a run's seed, so that runs with one pool share teacher tables.

    Raises:
        UserError: Unless V is in 1 .. 2^31 - 1.
    """

    def __init__(
        self, augmentations: Sequence[tuple[Augmentation, str]], num_views: int = POOL_SIZE, seed: int = 0
    ) -> None:
        if not 1 <= num_views < 1 << 31:
            raise UserError(f"data.pool_size={num_views} must lie in 1..{(1 << 31) - 1}")
        self.num_views, self.seed = num_views, seed
        self.augmentations = [augmentation for augmentation, _ in augmentations]
        self.key = f"pool{num_views}-seed{seed}-" + "+".join(key for _, key in augmentations)
        self.captures = all(getattr(augmentation, "captures", True) for augmentation in self.augmentations)

    def __call__(self, images: Tensor, view: Tensor, index: Tensor) -> Tensor:
        """Makes one view of each image; see `ViewFamily`."""
        for place, augmentation in enumerate(self.augmentations):
            images = augmentation(images, Draws(self.seed, place, view, index))
        return images


class OwnPlaces(ViewFamily):
    """A family for images of two sets under one index, in which each image has the index of its own set.

    Views and teacher outputs therefore do not depend on the size of the other set. The first set has `first` images.
    """

    def __init__(self, family: ViewFamily, first: int) -> None:
        self._family, self._first = family, first
        self.num_views, self.key = family.num_views, family.key
        self.identity_view, self.captures = family.identity_view, family.captures

    def __call__(self, images: Tensor, view: Tensor, index: Tensor) -> Tensor:
        """Makes one view of each image; see `ViewFamily`."""
        return self._family(images, view, torch.where(index < self._first, index, index - self._first))


def make_views(
    augmentation: str | Sequence[str],
    padding: int = 4,
    flip: bool = True,
    *,
    options: Mapping[str, Any] | None = None,
    pool_size: int = POOL_SIZE,
    pool_seed: int = 0,
) -> ViewFamily:
    """Builds a view family by name.

    Args:
        augmentation: "none", "crop_flip", a registered augmentation, a transform of torchvision (`GaussianBlur`), or
            a list of these, applied in order.
        padding: For crop_flip: pixels added on every side.
        flip: For crop_flip: whether mirrored views are included.
        options: Options of the augmentations, by name.
        pool_size: V, the number of random views per image; no effect for none and crop_flip alone.
        pool_seed: Seed of the random views.

    Returns:
        `Identity` for none, `CropFlip` for crop_flip alone, else a `Pool`.

    Raises:
        UserError: For an unknown name or option, or a value that is not allowed.
    """
    names = _checked_names(augmentation)
    options = options or {}
    _check_options(options, names)
    if names in (["none"], ["crop_flip"]) and pool_size != POOL_SIZE:
        warnings.warn(f"data.pool_size={pool_size} has no effect with data.augmentation={names}", stacklevel=2)
    if names == ["none"]:
        return Identity()
    crop_flip = CropFlip(padding, flip)
    if names == ["crop_flip"]:
        return crop_flip

    def random_view(images: Tensor, draws: Draws) -> Tensor:
        number = draws.integers(crop_flip.num_views)
        return crop_flip(images, number, number)  # the family does not use the index

    parts: list[tuple[Augmentation, str]] = []
    for name in names:
        if name == "crop_flip":
            parts.append((random_view, crop_flip.key))
        elif name in AUGMENTATIONS.names():
            parts.append(build_augmentation(name, options.get(name, {})))
        else:
            transform = Transform(name, options.get(name, {}))
            parts.append((transform, transform.key))
    return Pool(parts, pool_size, pool_seed)


def configured_views(data: DataSettings, padding: int) -> ViewFamily:
    """Builds the view family of the settings, with their padding in pixels; raises as `make_views`."""
    return make_views(
        data.augmentation,
        padding,
        data.flip,
        options=data.augmentation_options,
        pool_size=data.pool_size,
        pool_seed=data.pool_seed,
    )


def _checked_names(augmentation: object) -> list[str]:
    names = [augmentation] if isinstance(augmentation, str) else augmentation
    if not isinstance(names, Sequence) or not names:
        raise UserError(f"data.augmentation={augmentation}: must be a name or a list of names")
    allowed = ("none", "crop_flip", *AUGMENTATIONS.names())
    for name in names:
        if name not in allowed and not is_transform(name):
            raise unknown_name("data.augmentation", name, [*allowed, *transform_names()])
    if "none" in names and len(names) > 1:
        raise UserError(f"data.augmentation={augmentation}: none cannot be combined; remove it from the list")
    return list(names)


def _check_options(options: Mapping[str, Any], names: list[str]) -> None:
    for name, values in options.items():
        if name not in AUGMENTATIONS.names() and not is_transform(name):
            raise unknown_name(f"augmentation in {OPTIONS_KEY}:", name, AUGMENTATIONS.names())
        if not isinstance(values, Mapping):
            raise UserError(f"{OPTIONS_KEY}.{name}={values!r}: must be a mapping from options to values")
        if name not in names:
            warnings.warn(f"{OPTIONS_KEY}.{name} has no effect with data.augmentation={names}", stacklevel=3)
