"""Contrast, elastic transform, pixelate and JPEG against NumPy, SciPy and Pillow."""

from __future__ import annotations

import io

import numpy as np
import pytest
from corruption_references import (
    IMAGES,
    assert_levels,
    run,
    the_draws,
    unit,
)
from PIL import Image
from scipy import ndimage

from ekd_lightning.evaluation.corruptions import SEVERITIES


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
            ndimage.gaussian_filter(s[n], smooth * 32, mode="reflect", truncate=3) * strength * 32
            for s in shifts
        )
        warped = [ndimage.map_coordinates(c, source[[1, 0]], order=1, mode="mirror") for c in image]
        expected.append(
            [
                ndimage.map_coordinates(c.reshape(32, 32), [y + down, x + right], order=1, mode="reflect")
                for c in warped
            ]
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
        assert np.array_equal(
            run("jpeg_compression", severity)[n].permute(1, 2, 0), np.asarray(Image.open(file))
        )
