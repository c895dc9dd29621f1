"""Transforms of `torchvision.transforms.v2` as augmentations, by class name.

A transform draws from PyTorch's global generator, which is seeded here for every image. A view is therefore still a
pure function of the image, its index and the view's number, and teacher outputs can be tabulated.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ekd_lightning.data.augmentations import OPTIONS_KEY
from ekd_lightning.data.order import Draws
from ekd_lightning.errors import UserError, one_line, quiet


def is_transform(name: object) -> bool:
    """Returns whether torchvision has a transform of this name, e.g. `GaussianBlur`."""
    # The capital letter is checked first, as the import of torchvision takes a second.
    return isinstance(name, str) and name[:1].isupper() and name in transform_names()


def transform_names() -> list[str]:
    """Returns the names of all transforms of torchvision."""
    from torchvision.transforms import v2  # noqa: PLC0415

    return [name for name, found in vars(v2).items() if inspect.isclass(found) and issubclass(found, v2.Transform)]


class Transform:
    """A transform of torchvision, applied image by image on the CPU; results are moved to the images' device.

    Raises:
        UserError: If its class refuses the options.
    """

    captures = False  # see `data.augmentations.Augmentation`

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        import torchvision  # noqa: PLC0415
        from torchvision.transforms import v2  # noqa: PLC0415

        self.name = name
        try:
            self._transform = getattr(v2, name)(**options)
        except Exception as error:  # the classes raise many kinds
            raise UserError(f"{OPTIONS_KEY}.{name}: torchvision refuses it ({one_line(error)})") from None
        # The results for a seed may change with torchvision's version.
        self.key = (
            f"{name}{json.dumps(dict(options), sort_keys=True, default=str)}-torchvision{torchvision.__version__}"
        )

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        """Augments a batch; see `data.augmentations.Augmentation`.

        Raises:
            UserError: If the transform fails, or changes the size or the type of images.
        """
        seeds = draws.integers((1 << 31) - 1).tolist()
        with torch.random.fork_rng(devices=[]), quiet():
            made = [self._one(image, seed) for image, seed in zip(images.cpu(), seeds, strict=True)]
        return torch.stack(made).to(images.device)

    def _one(self, image: Tensor, seed: int) -> Tensor:
        torch.default_generator.manual_seed(seed)
        try:
            made = self._transform(image)
        except Exception as error:  # transforms raise many kinds
            raise UserError(f"data.augmentation: torchvision's {self.name} fails: {one_line(error)}") from None
        if not isinstance(made, Tensor) or made.shape != image.shape or made.dtype != image.dtype:
            what = f"{made.dtype} {list(made.shape)}" if isinstance(made, Tensor) else f"a {type(made).__name__}"
            raise UserError(
                f"data.augmentation: torchvision's {self.name} turns {image.dtype} {list(image.shape)} into {what}; "
                "choose a transform that keeps size and type"
            )
        return made
