"""Blurs against references written from the description, with the same random numbers."""

from __future__ import annotations

import numpy as np
import pytest
from corruption_references import (
    assert_levels,
    clipped_zoom,
    run,
    swept,
    the_draws,
    unit,
)
from scipy import ndimage

from ekd_lightning.evaluation.corruptions import SEVERITIES


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
    images = (
        np.floor(ndimage.gaussian_filter(unit(), (0, 0, sigma, sigma), mode="nearest") * 255 + 1e-4) / 255
    )
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
        expected = np.stack(
            [swept(image, radius, sigma, float(a)) for image, a in zip(unit(), angles, strict=True)]
        )
        assert_levels(run("motion_blur", severity), np.round(expected * 255) / 255)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_zoom_blur(severity):
    factors = np.arange(1, (1.06, 1.11, 1.16, 1.21, 1.26)[severity - 1], 0.01)
    zoomed = np.stack([[sum(clipped_zoom(c, f) for f in factors) for c in image] for image in unit()])
    assert_levels(run("zoom_blur", severity), (unit() + zoomed) / (len(factors) + 1))
