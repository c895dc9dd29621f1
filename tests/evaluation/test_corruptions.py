"""Each corruption against the published code's steps in NumPy, SciPy and Pillow, and what all have in common."""

from __future__ import annotations

import colorsys
import io

import numpy as np
import pytest
import torch
from corruption_references import ALL, IMAGES, assert_levels, clipped_zoom, made, run, swept, the_draws, unit
from PIL import Image
from scipy import ndimage, stats

from ekd_lightning.evaluation.robustness import EXTRA, MAIN, SEVERITIES, corrupt


def noisy(name: str, severity: int, level: int) -> np.ndarray:
    """What becomes of 60 images of one grey level."""
    images = torch.full((60, 3, 32, 32), level, dtype=torch.uint8)
    return corrupt(images, name, severity).numpy().ravel().astype(float)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_moments_of_gaussian_and_speckle_noise(severity):
    scale = (0.04, 0.06, 0.08, 0.09, 0.10)[severity - 1]
    values = noisy("gaussian_noise", severity, 128) + 0.5  # cutting off takes half a level on average
    count = len(values)
    assert abs(values.mean() - 128) < 4 * 255 * scale / count**0.5
    assert values.std() == pytest.approx(255 * scale, rel=4 / (2 * count) ** 0.5 + 1e-3)
    scale = (0.06, 0.1, 0.12, 0.16, 0.2)[severity - 1]
    values = noisy("speckle_noise", severity, 100) + 0.5
    assert abs(values.mean() - 100) < 4 * 100 * scale / count**0.5
    assert values.std() == pytest.approx(100 * scale, rel=4 / (2 * count) ** 0.5 + 2e-3)
    assert (noisy("speckle_noise", severity, 0) == 0).all()


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("level", [0, 3, 90])
def test_shot_noise_is_poisson(severity, level):
    photons = (500, 250, 100, 75, 50)[severity - 1]
    values = noisy("shot_noise", severity, level)
    mean = photons * level / 255
    counts = np.arange(photons + 1)
    expected = np.bincount(
        np.floor(counts / photons * 255 + 1e-4).astype(int), stats.poisson.pmf(counts, mean), minlength=256
    )
    expected[255] += stats.poisson.sf(photons, mean)
    found = np.bincount(values.astype(int), minlength=256)
    if level == 0:
        assert found[0] == len(values)
        return
    common = expected * len(values) >= 20
    grouped = (np.append(found[common], found[~common].sum()), np.append(expected[common], expected[~common].sum()))
    chi = stats.chisquare(grouped[0], grouped[1] / grouped[1].sum() * len(values))
    assert chi.pvalue > 1e-3


@pytest.mark.parametrize("severity", SEVERITIES)
def test_impulse_noise_makes_salt_and_pepper(severity):
    amount = (0.01, 0.02, 0.03, 0.05, 0.07)[severity - 1]
    values = noisy("impulse_noise", severity, 77)
    assert set(np.unique(values)) == {0, 77, 255}
    for level in (0, 255):
        share = (values == level).mean()
        assert abs(share - amount / 2) < 4 * (amount / 2 / len(values)) ** 0.5


@pytest.mark.parametrize("severity", SEVERITIES)
def test_gaussian_blur(severity):
    sigma = (0.4, 0.6, 0.7, 0.8, 1.0)[severity - 1]
    expected = ndimage.gaussian_filter(unit(), (0, 0, sigma, sigma), mode="nearest")
    assert_levels(run("gaussian_blur", severity), expected)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_defocus_blur(severity):
    radius, alias = ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))[severity - 1]
    y, x = np.mgrid[-8:9, -8:9]
    disk = (x**2 + y**2 <= radius**2).astype(float)
    side = np.exp(-1 / (2 * alias**2))
    line = np.array([side, 1, side]) / (1 + 2 * side)
    kernel = ndimage.correlate(disk / disk.sum(), np.outer(line, line))
    expected = np.stack([[ndimage.correlate(c, kernel, mode="mirror") for c in image] for image in unit()])
    # A fifth of a level is cut off exactly: float32 and float64 may disagree there.
    assert_levels(run("defocus_blur", severity), expected, share=0.1 if severity == 4 else 0.01)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_glass_blur_by_a_loop_over_pixels(severity):
    sigma, passes = ((0.05, 1), (0.25, 1), (0.4, 1), (0.25, 2), (0.4, 2))[severity - 1]
    images = np.floor(ndimage.gaussian_filter(unit(), (0, 0, sigma, sigma), mode="nearest") * 255 + 1e-4) / 255
    draws = the_draws("glass_blur", severity)
    for _ in range(passes):
        up, left = draws.uniform(32, 32) < 0.5, draws.uniform(32, 32) < 0.5
        for n in range(len(images)):
            for row in range(31, 1, -1):
                for column in range(31, 1, -1):
                    source = row - int(up[n, row, column]), column - int(left[n, row, column])
                    images[n, :, row, column] = images[n, :, source[0], source[1]]
    expected = ndimage.gaussian_filter(images, (0, 0, sigma, sigma), mode="nearest")
    assert_levels(run("glass_blur", severity), expected, share=0.03)


def test_motion_blur_by_the_angle_that_was_drawn():
    for severity in SEVERITIES:
        radius, sigma = ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))[severity - 1]
        angles = the_draws("motion_blur", severity).uniform(1).double()[:, 0] * 90 - 45
        assert (angles.abs() <= 45).all()
        expected = np.stack([swept(image, radius, sigma, float(a)) for image, a in zip(unit(), angles, strict=True)])
        assert_levels(run("motion_blur", severity), np.round(expected * 255) / 255)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_zoom_blur(severity):
    factors = np.arange(1, (1.06, 1.11, 1.16, 1.21, 1.26)[severity - 1], 0.01)
    zoomed = np.stack([[sum(clipped_zoom(c, f) for f in factors) for c in image] for image in unit()])
    assert_levels(run("zoom_blur", severity), (unit() + zoomed) / (len(factors) + 1))


@pytest.mark.parametrize("severity", SEVERITIES)
def test_contrast(severity):
    keep = (0.75, 0.5, 0.4, 0.3, 0.15)[severity - 1]
    mean = unit().mean((2, 3), keepdims=True)
    assert_levels(run("contrast", severity), (unit() - mean) * keep + mean)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_elastic_transform(severity):
    strength, smooth, affine = (
        (0, 0, 0.08),
        (0.05, 0.2, 0.07),
        (0.08, 0.06, 0.06),
        (0.1, 0.04, 0.05),
        (0.1, 0.03, 0.03),
    )[severity - 1]
    draws = the_draws("elastic_transform", severity)
    moves = (2 * draws.uniform(3, 2).double().numpy() - 1) * affine * 32
    shifts = [2 * draws.uniform(32, 32).double().numpy() - 1 for _ in range(2)]
    corners = np.array([[26.0, 26], [26, 6], [6, 6]])
    y, x = np.mgrid[:32, :32].astype(float)
    expected = []
    for n, image in enumerate(unit()):
        # x' = A (x, y, 1); the rows of A from three equations each.
        system = np.column_stack([corners, np.ones(3)])
        forward = np.vstack([np.linalg.solve(system, corners + moves[n]).T, [0, 0, 1]])
        source = np.linalg.inv(forward) @ np.stack([x.ravel(), y.ravel(), np.ones(1024)])
        right, down = (
            ndimage.gaussian_filter(s[n], smooth * 32, mode="reflect", truncate=3) * strength * 32 for s in shifts
        )
        warped = [ndimage.map_coordinates(c, source[[1, 0]], order=1, mode="mirror") for c in image]
        expected.append(
            [ndimage.map_coordinates(c.reshape(32, 32), [y + down, x + right], order=1, mode="reflect") for c in warped]
        )
    assert_levels(run("elastic_transform", severity), np.array(expected))


@pytest.mark.parametrize("severity", SEVERITIES)
def test_pixelate_and_jpeg_are_those_of_pillow(severity):
    small = (30, 28, 27, 24, 20)[severity - 1]
    quality = (80, 65, 58, 50, 40)[severity - 1]
    for n, image in enumerate(IMAGES):
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        boxes = picture.resize((small, small), Image.Resampling.BOX).resize((32, 32), Image.Resampling.BOX)
        assert np.array_equal(run("pixelate", severity)[n].permute(1, 2, 0), np.asarray(boxes))
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=quality)
        assert np.array_equal(run("jpeg_compression", severity)[n].permute(1, 2, 0), np.asarray(Image.open(file)))


@pytest.mark.parametrize("severity", SEVERITIES)
def test_snow(severity):
    mean, std, zoom, threshold, radius, sigma, keep = (
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
        (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    )[severity - 1]
    draws = the_draws("snow", severity)
    noise, angles = draws.normal(32, 32).double().numpy(), draws.uniform(1).double().numpy()[:, 0]
    expected = []
    for image, normal, angle in zip(unit(), noise, angles, strict=True):
        layer = clipped_zoom(mean + std * normal, zoom)
        layer[layer < threshold] = 0
        layer = np.floor(layer.clip(0, 1) * 255) / 255
        layer = np.round(swept(layer[None], radius, sigma, angle * 90 - 135) * 255) / 255
        grey = 0.299 * image[0] + 0.587 * image[1] + 0.114 * image[2]
        white = np.maximum(image, grey * 1.5 + 0.5)
        expected.append(keep * image + (1 - keep) * white + layer + np.rot90(layer, 2, axes=(1, 2)))
    assert_levels(run("snow", severity), np.stack(expected))


def test_frost_mixes_a_piece_of_a_photograph():
    plain = [torch.full((3, 40, 40), 0.4), torch.full((3, 40, 40), 0.8)]
    images = IMAGES[[0] * 40]
    for severity, (keep, share) in enumerate(((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)), start=1):
        found = corrupt(images, "frost", severity, frost=plain)
        either = [keep * unit(images[:1]) + share * value for value in (0.4, 0.8)]
        levels = [np.floor(np.clip(e, 0, 1) * 255 + 1e-4) for e in either]
        matches = [np.abs(found.numpy() - level).max((1, 2, 3)) <= 1 for level in levels]
        assert (matches[0] ^ matches[1]).all()
        assert 5 < matches[0].sum() < 35


def test_frost_takes_pieces_from_everywhere():
    ramp = torch.arange(1000.0).view(1, 1, 1000).expand(3, 40, 1000) / 1000
    black = torch.zeros(50, 3, 32, 32, dtype=torch.uint8)
    starts = corrupt(black, "frost", 1, frost=[ramp])[:, 0, 0, 0].float() / 255 / 0.2
    assert starts.min() < 0.1
    assert starts.max() > 0.85


def diamond_square(take, size: int, decay: float) -> np.ndarray:
    """One map by loops over points; `take(n)` gives the next n × n random numbers in [-1, 1]."""
    height = np.zeros((size, size))
    step, wibble = size, 100.0
    while step >= 2:
        half, count = step // 2, size // step
        for part in range(3):
            noise = take(count)
            for i in range(count):
                for j in range(count):
                    row, column = i * step, j * step
                    if part == 0:
                        row, column = row + half, column + half
                        near = [(row + a, column + b) for a in (-half, half) for b in (-half, half)]
                    else:
                        row, column = (row, column + half) if part == 1 else (row + half, column)
                        near = [(row - half, column), (row + half, column)]
                        near += [(row, column - half), (row, column + half)]
                    mean = sum(height[r % size, c % size] for r, c in near) / 4
                    height[row, column] = mean + wibble * wibble * noise[i, j]
        step, wibble = half, wibble / decay
    height -= height.min()
    return height / height.max()


@pytest.mark.parametrize("severity", SEVERITIES)
def test_fog(severity):
    amount, decay = ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))[severity - 1]
    draws = the_draws("fog", severity)
    draws.uniform(1)
    numbers: list[np.ndarray] = []

    def take(n: int, which: int, cursor: list[int]) -> np.ndarray:
        if cursor[0] == len(numbers):
            numbers.append(2 * draws.uniform(n, n).double().numpy() - 1)
        cursor[0] += 1
        return numbers[cursor[0] - 1][which]

    expected = []
    for which, image in enumerate(unit()):
        cursor = [0]
        cloud = diamond_square(lambda n, w=which, c=cursor: take(n, w, c), 32, decay)
        brightest = image.max()
        expected.append((image + amount * cloud) * brightest / (brightest + amount))
    assert_levels(run("fog", severity), np.stack(expected))


def by_colorsys(images: torch.Tensor, change) -> np.ndarray:
    result = np.zeros(images.shape)
    for n, image in enumerate(unit(images)):
        for row in range(image.shape[1]):
            for column in range(image.shape[2]):
                hsv = colorsys.rgb_to_hsv(*image[:, row, column])
                result[n, :, row, column] = colorsys.hsv_to_rgb(*change(*hsv))
    return result


@pytest.mark.parametrize("severity", SEVERITIES)
def test_brightness_and_saturate_are_those_of_hsv(severity):
    images = IMAGES[:, :, :10, :10]
    shift = (0.05, 0.1, 0.15, 0.2, 0.3)[severity - 1]
    expected = by_colorsys(images, lambda h, s, v: (h, s, min(v + shift, 1)))
    # Round numbers on both sides: which way a whole level falls is a matter of the last bit.
    assert_levels(run("brightness", severity, images), expected, share=0.05)
    scale, offset = ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2))[severity - 1]
    expected = by_colorsys(images, lambda h, s, v: (h, min(max(s * scale + offset, 0), 1), v))
    assert_levels(run("saturate", severity, images), expected, share=0.1)


def test_water_brightens_and_mud_covers():
    black = torch.zeros(20, 3, 32, 32, dtype=torch.uint8)
    for severity in (1, 2, 3):
        drops = corrupt(black, "spatter", severity).float()
        brightest = drops.amax((2, 3))
        wet = brightest[:, 1] > 0
        assert wet.any()
        # The brightest point of every image has half of pale turquoise.
        assert (brightest[wet] - 0.5 * torch.tensor([175.0, 238, 238])).abs().max() <= 1
        assert torch.equal(drops[:, 1], drops[:, 2])
    white = torch.full_like(black, 255)
    for severity in (4, 5):
        spots = corrupt(white, "spatter", severity).float()
        assert spots.min() >= 20
        darkest = spots.amin((0, 2, 3))
        assert (darkest - torch.tensor([63.0, 42, 20])).abs().max() <= 5
        assert (spots == 255).float().mean() > 0.5


def test_there_are_fifteen_and_four():
    assert (len(MAIN), len(EXTRA), len(set(ALL))) == (15, 4, 19)


@pytest.mark.parametrize("name", ALL)
def test_an_image_comes_out_the_same_whatever_its_batch(name):
    for severity in (1, 3, 5):
        whole = run(name, severity)
        assert whole.dtype == torch.uint8
        assert whole.shape == IMAGES.shape
        order = torch.tensor([4, 0, 2])
        assert torch.equal(run(name, severity, IMAGES[order], index=order), whole[order])
        alone = [run(name, severity, IMAGES[n : n + 1], index=torch.tensor([n])) for n in range(6)]
        assert torch.equal(torch.cat(alone), whole)
    assert run(name, 1, IMAGES[:0]).shape == (0, 3, 32, 32)


RANDOM = (
    *("gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise", "glass_blur", "motion_blur"),
    *("snow", "frost", "fog", "elastic_transform", "spatter"),
)


@pytest.mark.parametrize("name", ALL)
def test_the_seed_and_the_index_matter_where_there_is_chance(name):
    textured = IMAGES[:3]
    first = run(name, 3, textured)
    assert torch.equal(run(name, 3, textured, seed=1), first) == (name not in RANDOM)
    assert torch.equal(run(name, 3, textured, index=torch.arange(3, 6)), first) == (name not in RANDOM)
    assert not torch.equal(first, textured)


@pytest.mark.parametrize("size", [16, 24, 32, 40])
def test_other_sizes(size):
    images = made(4, size)
    large = [torch.rand(3, 64, 64)]
    for name in ALL:
        assert corrupt(images, name, 5, frost=large).shape == images.shape


def distance(name: str) -> list[float]:
    images = made(40)[:-3]
    return [float((run(name, s, images).float() - images.float()).square().mean()) for s in SEVERITIES]


def test_severity_moves_images_further_away():
    found = {name: distance(name) for name in ALL}
    means = np.mean([np.sqrt(found[name]) for name in MAIN], axis=0)
    assert (np.diff(means) > 0).all(), means
    # The others' constants trade one thing for another between severities.
    other = {"glass_blur", "elastic_transform", "snow", "frost", "spatter", "saturate"}
    for name in set(ALL) - other:
        assert (np.diff(found[name]) > 0).all(), (name, found[name])
