"""Corruptions of CIFAR-10-C and CIFAR-100-C: noise, blur, weather, light and digital, each with one extra.

Source: D. Hendrycks and T. Dietterich, Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations, ICLR 2019, arXiv 1903.12261, with the constants of their `make_cifar_c.py`
(https://github.com/hendrycks/robustness). Every function takes images, float32 [N, 3, H, W] in [0, 1], a severity
1 .. 5 and the images' random numbers, and returns images of the same shape, whose values may lie outside [0, 1].
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from scipy import stats
from torch import Tensor
from torch.nn import functional

from ekd_lightning.data.views import to_unit
from ekd_lightning.evaluation import corruption_filters as filters
from ekd_lightning.evaluation.corruption_filters import ImageDraws


def gaussian_noise(images: Tensor, severity: int, draws: ImageDraws) -> Tensor:
    """Adds a normally distributed number to every value."""
    scale = (0.04, 0.06, 0.08, 0.09, 0.10)[severity - 1]
    return images + scale * draws.normal(*images.shape[1:])


def shot_noise(images: Tensor, severity: int, draws: ImageDraws) -> Tensor:
    """Simulates a photon count: replaces x by a Poisson number of mean c x, divided by c."""
    photons = (500, 250, 100, 75, 50)[severity - 1]
    flat = _poisson_table(photons).to(images.device)
    levels = (images * 255).round().long()
    # Row v of the table is the distribution for level v, plus v, so that all rows form one sorted list.
    found = torch.searchsorted(flat.view(-1), levels + draws.uniform(*images.shape[1:]).double(), right=True)
    return (found - levels * flat.shape[1]).to(images) / photons


@lru_cache(maxsize=5)
def _poisson_table(photons: int) -> Tensor:
    """Returns v + P(count <= k) for every level v, whose mean count is photons · v / 255; float64 [256, most + 1]."""
    most = int(photons + 9 * photons**0.5 + 9)  # larger counts have a probability below 2^-53
    level = np.arange(256)[:, None]
    table = stats.poisson.cdf(np.arange(most + 1), level * photons / 255)
    table[:, -1] = 1.0
    return torch.from_numpy(table + level)


def impulse_noise(images: Tensor, severity: int, draws: ImageDraws) -> Tensor:
    """Sets a share of all values to 0 or 1 with equal probability, for each channel separately."""
    amount = (0.01, 0.02, 0.03, 0.05, 0.07)[severity - 1]
    drawn = draws.uniform(*images.shape[1:])
    return images.masked_fill(drawn < amount, 0.0).masked_fill(drawn < amount / 2, 1.0)


def speckle_noise(images: Tensor, severity: int, draws: ImageDraws) -> Tensor:
    """Adds to every value a normally distributed number in proportion to the value."""
    scale = (0.06, 0.1, 0.12, 0.16, 0.2)[severity - 1]
    return images + images * scale * draws.normal(*images.shape[1:])


def gaussian_blur(images: Tensor, severity: int, draws: ImageDraws) -> Tensor:
    """Blurs by a Gaussian with a standard deviation of 0.4 to 1 pixels."""
    return filters.gaussian_blur(images, (0.4, 0.6, 0.7, 0.8, 1.0)[severity - 1])


def defocus_blur(images: Tensor, severity: int, draws: ImageDraws) -> Tensor:
    """Averages over a disk with a smoothed edge."""
    radius, alias = ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1.0, 0.2), (1.5, 0.1))[severity - 1]
    place = torch.arange(-4, 5)
    disk = (place[:, None] ** 2 + place**2 <= radius**2).float()
    edge = filters.gaussian_weights(alias, 1)
    kernel = filters.correlate(disk / disk.sum(), torch.outer(edge, edge), "mirror")
    return filters.correlate(images, kernel, "mirror")


def glass_blur(images: Tensor, severity: int, draws: ImageDraws) -> Tensor:
    """Blurs by a Gaussian, moves pixels at random by one, and blurs again.

    The source intends to swap pixels, but both sides of its swap are views of one array, so a pixel is overwritten by a
    neighbour above or left of it, and the neighbour does not change. The published images were made this way, and so
    are these. As the source goes from the last pixel to the first, it reads every neighbour before changing it.
    """
    sigma, passes = ((0.05, 1), (0.25, 1), (0.4, 1), (0.25, 2), (0.4, 2))[severity - 1]
    images = to_unit(filters.to_levels(filters.gaussian_blur(images, sigma)))
    size = images.shape[-1]
    place = torch.arange(size, device=images.device)
    fixed = (place < 2)[:, None] | (place < 2)
    for _ in range(passes):
        up, left = ((draws.uniform(size, size) < 0.5) & ~fixed for _ in range(2))
        images = filters.take(images, place[:, None] - up.long(), place - left.long())
    return filters.gaussian_blur(images, sigma)


def motion_blur(images: Tensor, severity: int, draws: ImageDraws) -> Tensor:
    """Blurs along a line at an angle of -45 to 45 degrees, drawn for each image."""
    radius, sigma = ((6, 1.0), (6, 1.5), (6, 2.0), (8, 2.0), (9, 2.5))[severity - 1]
    angle = draws.uniform(1)[:, 0].double() * 90 - 45
    return filters.motion_blur(images, radius, sigma, angle)


def zoom_blur(images: Tensor, severity: int, draws: ImageDraws) -> Tensor:
    """Averages the image and copies enlarged step by step, by up to 6 to 26 %."""
    end = (1.06, 1.11, 1.16, 1.21, 1.26)[severity - 1]
    factors = np.arange(1, end, 0.01)  # by rounding it sometimes contains the end, as in the source
    total = images.clone()
    for factor in factors:
        total += filters.zoomed(images, float(factor))
    return total / (len(factors) + 1)


def contrast(images: Tensor, severity: int, draws: ImageDraws) -> Tensor:
    """Moves every value towards the mean of its channel."""
    keep = (0.75, 0.5, 0.4, 0.3, 0.15)[severity - 1]
    H, W = images.shape[-2:]
    # A sum of integers is exact in any order.
    total = (images * 255).round().long().sum((2, 3), keepdim=True)
    mean = (total.double() / (255 * H * W)).to(images)
    return (images - mean) * keep + mean


def elastic_transform(images: Tensor, severity: int, draws: ImageDraws) -> Tensor:
    """Applies an affine map that moves three points at random, then a smooth random displacement of every pixel."""
    strength, smoothness, affine = (
        (0.0, 0.0, 0.08),
        (0.05, 0.2, 0.07),
        (0.08, 0.06, 0.06),
        (0.1, 0.04, 0.05),
        (0.1, 0.03, 0.03),
    )[severity - 1]
    size = images.shape[-1]
    row, column = torch.meshgrid(*[torch.arange(size).to(images)] * 2, indexing="ij")
    moves = (2 * draws.uniform(3, 2) - 1) * (affine * size)
    x, y = _sources(size, moves, torch.stack([column, row, torch.ones_like(row)], dim=-1))
    images = filters.bilinear(images, y, x, "mirror")
    right, down = (
        strength * size * filters.gaussian_blur(2 * draws.uniform(size, size) - 1, smoothness * size, "reflect", 3.0)
        for _ in range(2)
    )
    return filters.bilinear(images, row + down, column + right, "reflect")


def _sources(size: int, moves: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the source positions x and y, [N, S, S] each, of every pixel of the result of an affine map.

    `moves` [N, 3, 2] are the displacements (x, y) of three corners of a square around the middle, `places` [S, S, 3]
    are (x, y, 1) of each pixel.
    """
    corners = size // 2 + size // 3 * torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]]).to(moves)
    moved = functional.pad(corners + moves, (0, 1), value=1.0)
    back = torch.linalg.solve(moved.double(), corners.double())  # [N, 3, 2]
    x, y = torch.einsum("hwi,nij->jnhw", places.double(), back).to(moves)
    return x, y


def pixelate(images: Tensor, severity: int, draws: ImageDraws) -> Tensor:
    """Reduces the size by averaging over boxes, and enlarges the image again."""
    large = images.shape[-1]
    small, box = int(large * (0.95, 0.9, 0.85, 0.75, 0.65)[severity - 1]), Image.Resampling.BOX
    return _one_by_one(images, lambda image: image.resize((small, small), box).resize((large, large), box))


def jpeg_compression(images: Tensor, severity: int, draws: ImageDraws) -> Tensor:
    """Compresses as JPEG of quality 80 to 40."""
    quality = (80, 65, 58, 50, 40)[severity - 1]

    def written_and_read(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        return Image.open(file)

    return _one_by_one(images, written_and_read)


def _one_by_one(images: Tensor, change: Callable[[Image.Image], Image.Image]) -> Tensor:
    """Changes each image by Pillow, on the CPU."""
    levels = filters.to_levels(images).permute(0, 2, 3, 1).cpu().numpy()
    changed = np.stack([np.asarray(change(Image.fromarray(image))) for image in levels])
    return to_unit(torch.from_numpy(changed).to(images.device)).permute(0, 3, 1, 2)


def snow(images: Tensor, severity: int, draws: ImageDraws) -> Tensor:
    """Adds flakes that are blurred by motion to a whitened image."""
    mean, std, zoom, threshold, radius, sigma, keep = (
        (0.1, 0.2, 1.0, 0.6, 8, 3.0, 0.95),
        (0.1, 0.2, 1.0, 0.5, 10, 4.0, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4.0, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6.0, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12.0, 0.8),
    )[severity - 1]
    layer = filters.zoomed(mean + std * draws.normal(1, *images.shape[-2:]), zoom)
    layer = to_unit(filters.to_levels(layer.masked_fill(layer < threshold, 0.0)))
    angle = draws.uniform(1)[:, 0].double() * 90 - 135
    layer = filters.motion_blur(layer, radius, sigma, angle)
    red, green, blue = images.unbind(1)
    grey = 0.299 * red + 0.587 * green + 0.114 * blue
    white = torch.maximum(images, grey[:, None] * 1.5 + 0.5)
    return keep * images + (1 - keep) * white + layer + layer.flip(-2, -1)


def frost(images: Tensor, severity: int, draws: ImageDraws, textures: Sequence[Tensor]) -> Tensor:
    """Mixes each image with a random piece of a photograph of frost.

    The photographs are float32 [3, height, width] in [0, 1], larger than the images.
    """
    keep, share = ((1.0, 0.2), (1.0, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))[severity - 1]
    H, W = images.shape[-2:]
    which, down, right = draws.uniform(3).double().unbind(1)
    chosen = (which * len(textures)).long().tolist()
    pieces = []
    for number, top, left in zip(chosen, down.tolist(), right.tolist(), strict=True):
        texture = textures[number]
        row, column = int(top * (texture.shape[1] - H)), int(left * (texture.shape[2] - W))
        pieces.append(texture[:, row : row + H, column : column + W])
    return keep * images + share * torch.stack(pieces).to(images)


def fog(images: Tensor, severity: int, draws: ImageDraws) -> Tensor:
    """Adds a fractal cloud, and darkens the result so that its possible maximum stays that of the image."""
    amount, decay = ((0.2, 3.0), (0.5, 3.0), (0.75, 2.5), (1.0, 2.0), (1.5, 1.75))[severity - 1]
    H, W = images.shape[-2:]
    brightest = images.amax((1, 2, 3), keepdim=True)
    cloud = filters.plasma(draws, 1 << (max(H, W) - 1).bit_length(), decay)[:, None, :H, :W]
    return (images + amount * cloud) * brightest / (brightest + amount)


def brightness(images: Tensor, severity: int, draws: ImageDraws) -> Tensor:
    """Raises the value of HSV, keeping hue and saturation."""
    value, saturation, weakness = _hsv(images)
    brighter = (value + (0.05, 0.1, 0.15, 0.2, 0.3)[severity - 1]).clamp(0, 1)
    return brighter * (1 - saturation * weakness)


def saturate(images: Tensor, severity: int, draws: ImageDraws) -> Tensor:
    """Scales and shifts the saturation of HSV, keeping hue and value."""
    scale, shift = ((0.3, 0.0), (0.1, 0.0), (1.5, 0.0), (2.0, 0.1), (2.5, 0.2))[severity - 1]
    value, saturation, weakness = _hsv(images)
    return value * (1 - (saturation * scale + shift).clamp(0, 1) * weakness)


def _hsv(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns value and saturation [N, 1, H, W] of HSV, and a weakness [N, 3, H, W] instead of the hue.

    colour = value (1 - saturation · weakness), where the weakness of a channel x is (max - x) / (max - min); grey
    pixels get the weakness of red.
    """
    value = images.amax(1, keepdim=True)
    spread = value - images.amin(1, keepdim=True)
    red = torch.tensor([0.0, 1.0, 1.0]).to(images)[:, None, None]
    weakness = torch.where(spread > 0, (value - images) / spread, red)
    return value, torch.where(value > 0, spread / value, 0.0), weakness


def spatter(images: Tensor, severity: int, draws: ImageDraws) -> Tensor:
    """Adds transparent drops with bright edges at severities 1 .. 3, opaque mud at 4 and 5."""
    mean, std, sigma, threshold, strength, mud = (
        (0.62, 0.1, 0.7, 0.7, 0.5, False),
        (0.65, 0.1, 0.8, 0.7, 0.5, False),
        (0.65, 0.3, 1.0, 0.69, 0.5, False),
        (0.65, 0.1, 0.7, 0.69, 0.6, True),
        (0.65, 0.1, 0.5, 0.68, 0.6, True),
    )[severity - 1]
    layer = filters.gaussian_blur(mean + std * draws.normal(*images.shape[-2:]), sigma)
    if mud:
        cover = filters.gaussian_blur((layer > threshold).to(images), strength)
        cover = cover.masked_fill(cover < 0.8, 0.0)[:, None]
        return images * (1 - cover) + cover * _colour(63, 42, 20).to(images)
    layer = layer.masked_fill(layer < threshold, 0.0)
    light = _water((layer * 255).floor() % 256)  # levels above 255 wrap around, as in the source
    brightest = light.amax((1, 2), keepdim=True)
    light = torch.where(brightest > 0, light / brightest, 0.0) * strength
    return images + light[:, None] * _colour(175, 238, 238).to(images)


def _colour(*levels: int) -> Tensor:
    return to_unit(torch.tensor(levels))[:, None, None]


def _water(layer: Tensor) -> Tensor:
    """Returns the brightness of the drops in a layer [N, H, W]: grey levels times the embossed distance to edges."""
    distance = filters.edge_distance(filters.canny(layer, 50, 150))
    box = torch.full((3, 3), 1 / 9)
    distance = filters.equalize(filters.correlate(distance, box, "mirror").add(1e-4).floor())
    emboss = torch.tensor([[-2.0, -1, 0], [-1, 1, 1], [0, 1, 2]])
    distance = filters.correlate(distance, emboss, "mirror").clamp(0, 255)
    return layer * filters.correlate(distance, box, "mirror").round()
