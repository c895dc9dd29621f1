from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from corruption_references import IMAGES, assert_levels, clipped_zoom, run, swept, the_draws, unit
from PIL import Image
from scipy import ndimage, stats

from ekd_lightning.evaluation.corruptions import SEVERITIES, corrupt


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
