"""Image sets of random pixels."""

import torch

from ekd_lightning.data.images import ImageSet


def random_images(count: int, height: int, width: int) -> torch.Tensor:
    """The same uint8 pixels for the same shape."""
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)


def random_set(split: str, size: int, classes: int = 4, side: int = 8) -> ImageSet:
    images = random_images(size, side, side)
    names = tuple(f"class{c}" for c in range(classes))
    return ImageSet("random", split, images, torch.arange(size) % classes, names)
