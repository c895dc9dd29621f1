"""Image sets of random pixels."""

import torch

from ekd_lightning.data.images import ImageSet


def random_set(split: str, size: int, classes: int = 4, side: int = 8) -> ImageSet:
    generator = torch.Generator().manual_seed(size)
    images = torch.randint(0, 256, (size, 3, side, side), dtype=torch.uint8, generator=generator)
    names = tuple(f"class{c}" for c in range(classes))
    return ImageSet("random", split, images, torch.arange(size) % classes, names)
