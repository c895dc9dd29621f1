"""Filters and resampling against SciPy, draws against their distributions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from corruption_references import clipped_zoom
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage, stats

from ekd_lightning.data.views import to_unit
from ekd_lightning.evaluation import corruption_tools as tools
from ekd_lightning.evaluation.corruption_tools import ImageDraws

BORDERS = ("nearest", "reflect", "mirror")


def maps(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@given(size=st.integers(2, 9), border=st.sampled_from(BORDERS))
@settings(max_examples=30, deadline=None)
def test_borders_are_those_of_numpy(size, border):
    reach = 20
    mode = {"nearest": "edge", "reflect": "symmetric", "mirror": "reflect"}[border]
    expected = np.pad(np.arange(size), reach, mode=mode)
    found = tools.inside(torch.arange(-reach, size + reach), size, border)
    assert found.tolist() == expected.tolist()


def test_unknown_border():
    with pytest.raises(ValueError, match="wrap"):
        tools.inside(torch.arange(3), 3, "wrap")


@pytest.mark.parametrize("border", ["nearest", "reflect"])
@pytest.mark.parametrize(("sigma", "truncate"), [(0.05, 4.0), (0.4, 4.0), (1.0, 4.0), (2.56, 3.0), (6.4, 3.0)])
def test_gaussian_blur_is_that_of_scipy(border, sigma, truncate):
    images = maps(2, 3, 32, 32)
    expected = ndimage.gaussian_filter(images.double().numpy(), (0, 0, sigma, sigma), mode=border, truncate=truncate)
    found = tools.gaussian_blur(images, sigma, border, truncate)
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-6)


@pytest.mark.parametrize("border", BORDERS)
def test_correlation_is_that_of_scipy(border):
    images, kernel = maps(2, 7, 9), maps(5, 3, seed=1) - 0.5
    kernel[0] = 0
    found = tools.correlate(images, kernel, border)
    for image, result in zip(images.numpy(), found.numpy(), strict=True):
        expected = ndimage.correlate(image.astype(float), kernel.double().numpy(), mode=border)
        np.testing.assert_allclose(result, expected, atol=1e-6)


@pytest.mark.parametrize("border", BORDERS)
def test_reading_between_pixels_is_that_of_scipy(border):
    images = maps(2, 3, 8, 8)
    # Within a pixel of the images, where SciPy's own treatment of the border agrees with its documentation.
    rows, columns = maps(2, 5, 6, seed=1) * 7, maps(2, 5, 6, seed=2) * 7
    found = tools.bilinear(images, rows, columns, border)
    for n in range(2):
        for c in range(3):
            place = np.stack([rows[n].double().numpy(), columns[n].double().numpy()])
            expected = ndimage.map_coordinates(images[n, c].double().numpy(), place, order=1, mode=border)
            np.testing.assert_allclose(found[n, c].numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("border", ["reflect", "mirror"])
def test_reading_beyond_the_border_goes_on_in_the_mirror(border):
    images = maps(1, 1, 6, 6)
    pad = 4
    mode = {"reflect": "symmetric", "mirror": "reflect"}[border]
    larger = torch.from_numpy(np.pad(images[0, 0].numpy(), pad, mode=mode))[None, None]
    place = maps(1, 7, 7, seed=3) * 10 - 3
    found = tools.bilinear(images, place, place.mT, border)
    expected = tools.bilinear(larger, place + pad, place.mT + pad, "nearest")
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("factor", [1.0, 1.01, 1.06, 1.13, 1.25, 1.75, 2.25])
def test_zoom_is_that_of_scipy(factor):
    images = maps(2, 1, 32, 32)
    for image, found in zip(images[:, 0], tools.zoomed(images, factor)[:, 0], strict=True):
        np.testing.assert_allclose(found.numpy(), clipped_zoom(image.double().numpy(), factor), atol=1e-5)


@pytest.mark.parametrize("angle", [0.0, 30.0, -45.0, -90.0, -135.0])
def test_motion_blur_follows_the_line_of_imagemagick(angle):
    radius, sigma, size = 6, 2.0, 12
    images = maps(1, 2, size, size)
    weights = [math.exp(-(tap**2) / (2 * sigma**2)) for tap in range(2 * radius + 1)]
    expected = np.zeros((2, size, size))
    for tap, weight in enumerate(weights):
        right = math.ceil(tap * math.cos(math.radians(angle)) - 0.5)
        down = math.ceil(tap * math.sin(math.radians(angle)) - 0.5)
        for row in range(size):
            for column in range(size):
                at = min(max(row + down, 0), size - 1), min(max(column + right, 0), size - 1)
                expected[:, row, column] += weight / sum(weights) * images[0, :, at[0], at[1]].numpy()
    found = tools.motion_blur(images, radius, sigma, torch.tensor([angle], dtype=torch.float64))
    assert np.abs(found[0].numpy() - expected).max() <= 0.5 / 255 + 1e-6


def test_levels_are_cut_off_and_forgive_rounding():
    third = torch.tensor([100 / 255])
    values = torch.tensor([-1.0, 0.0, 0.999 / 255, 99.9999 / 255, 0.9999999, 2.0])
    assert tools.to_levels(values).tolist() == [0, 0, 0, 100, 255, 255]
    assert tools.to_levels(torch.tensor([99.99 / 255])).tolist() == [99]
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(tools.to_levels(to_unit(levels)), levels)
    assert tools.to_levels(third * 0.5 + third * 0.5).item() == 100


def draws(count: int = 1, *, seed: int = 0, name: str = "fog", severity: int = 1, start: int = 0) -> ImageDraws:
    return ImageDraws(seed, name, severity, torch.arange(start, start + count))


def test_draws_have_their_distributions():
    uniform = draws(7).uniform(40, 100).double().numpy().ravel()
    assert uniform.min() >= 0
    assert uniform.max() < 1
    assert stats.kstest(uniform, "uniform").pvalue > 0.01
    normal = draws(7).normal(4001).double().numpy()
    assert stats.kstest(normal.ravel(), "norm").pvalue > 0.01
    # The two halves come in pairs; they must not know of each other.
    assert abs(np.corrcoef(normal[:, :2000].ravel(), normal[:, 2001:].ravel())[0, 1]) < 0.03
    assert abs(np.corrcoef(normal[0], normal[1])[0, 1]) < 0.06


def test_draws_are_functions_of_all_their_arguments():
    one = draws().uniform(8)
    assert torch.equal(draws().uniform(8), one)
    others = [draws(seed=1), draws(name="snow"), draws(severity=2), draws(start=1)]
    assert not any(bool((other.uniform(8) == one).any()) for other in others)
    source = draws()
    assert not bool((source.uniform(8) == source.uniform(8)).any())
    assert torch.equal(draws(5).normal(3, 2)[4:], draws(start=4).normal(3, 2))
