"""Filters and edges against SciPy and loops, draws against their distributions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage, stats
from scipy.sparse import csgraph, lil_matrix

from ekd_lightning.data.views import to_unit
from ekd_lightning.evaluation import corruption_filters as filters
from ekd_lightning.evaluation.corruption_filters import ImageDraws

BORDERS = ("nearest", "reflect", "mirror")


def maps(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@given(size=st.integers(2, 9), border=st.sampled_from(BORDERS))
@settings(max_examples=30, deadline=None)
def test_borders_are_those_of_numpy(size, border):
    reach = 20
    mode: Any = {"nearest": "edge", "reflect": "symmetric", "mirror": "reflect"}[border]
    expected = np.pad(np.arange(size), reach, mode=mode)
    found = filters.inside(torch.arange(-reach, size + reach), size, border)
    assert found.tolist() == expected.tolist()


def test_unknown_border():
    with pytest.raises(ValueError, match="wrap"):
        filters.inside(torch.arange(3), 3, "wrap")


@pytest.mark.parametrize("border", BORDERS)
def test_correlation_is_that_of_scipy(border):
    images, kernel = maps(2, 7, 9), maps(5, 3, seed=1) - 0.5
    kernel[0] = 0
    found = filters.correlate(images, kernel, border)
    for image, result in zip(images.numpy(), found.numpy(), strict=True):
        expected = ndimage.correlate(image.astype(float), kernel.double().numpy(), mode=border)
        np.testing.assert_allclose(result, expected, atol=1e-6)


@pytest.mark.parametrize("border", ["reflect", "mirror"])
def test_reading_beyond_the_border_goes_on_in_the_mirror(border):
    images = maps(1, 1, 6, 6)
    pad = 4
    mode: Any = {"reflect": "symmetric", "mirror": "reflect"}[border]
    larger = torch.from_numpy(np.pad(images[0, 0].numpy(), pad, mode=mode))[None, None]
    place = maps(1, 7, 7, seed=3) * 10 - 3
    found = filters.bilinear(images, place, place.mT, border)
    expected = filters.bilinear(larger, place + pad, place.mT + pad, "nearest")
    torch.testing.assert_close(found, expected)


def test_levels_are_cut_off_and_forgive_rounding():
    third = torch.tensor([100 / 255])
    values = torch.tensor([-1.0, 0.0, 0.999 / 255, 99.9999 / 255, 0.9999999, 2.0])
    assert filters.to_levels(values).tolist() == [0, 0, 0, 100, 255, 255]
    assert filters.to_levels(torch.tensor([99.99 / 255])).tolist() == [99]
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(filters.to_levels(to_unit(levels)), levels)
    assert filters.to_levels(third * 0.5 + third * 0.5).item() == 100


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


def test_plasma_fills_the_unit_interval():
    maps = filters.plasma(draws(6), 64, 2.0)
    assert (maps.amin((1, 2)) == 0).all()
    assert (maps.amax((1, 2)) == 1).all()


def layers(count: int = 8, size: int = 20) -> torch.Tensor:
    rng = np.random.default_rng(1)
    soft = ndimage.gaussian_filter(rng.normal(0.65, 0.3, (count, size, size)), (0, 1, 1))
    soft[soft < 0.69] = 0
    soft[0] = 0
    return torch.from_numpy(np.floor(soft.clip(0, 1) * 255)).float()


def canny_by_loops(layer: np.ndarray, low: float, high: float) -> np.ndarray:
    dx, dy = (ndimage.sobel(layer, axis, mode="nearest") for axis in (1, 0))
    size = np.pad(np.abs(dx) + np.abs(dy), 1)
    H, W = layer.shape
    kept = np.zeros((H, W), bool)
    for r in range(H):
        for c in range(W):
            angle = math.degrees(math.atan2(abs(dy[r, c]), abs(dx[r, c])))
            here, strict = size[r + 1, c + 1], False
            if angle < 22.5:
                before, after = (0, -1), (0, 1)
            elif angle > 67.5:
                before, after = (-1, 0), (1, 0)
            else:
                sign = -1 if (dx[r, c] < 0) != (dy[r, c] < 0) else 1
                before, after, strict = (-1, -sign), (1, sign), True
            a, b = (size[r + 1 + d[0], c + 1 + d[1]] for d in (before, after))
            kept[r, c] = here > low and here > a and (here > b if strict else here >= b)
    strong = kept & (size[1:-1, 1:-1] > high)
    return ndimage.binary_propagation(strong, np.ones((3, 3)), mask=kept)


def test_edges_by_loops():
    found = filters.canny(layers(), 50, 150)
    expected = np.stack([canny_by_loops(layer, 50, 150) for layer in layers().double().numpy()])
    assert np.array_equal(found.numpy(), expected)
    assert 0.05 < expected.mean() < 0.6


def test_edge_distance_by_dijkstra():
    size = 26
    edges = torch.zeros(3, size, size, dtype=torch.bool)
    edges[0, 0, 0] = edges[1, 5, 7] = edges[1, 20, 3] = True
    graph = lil_matrix((size * size, size * size))
    steps = [(0, 1, 1), (1, 0, 1), (1, 1, 1.4), (1, -1, 1.4)]
    steps += [(a, b, 2.1969) for a, b in ((1, 2), (2, 1), (1, -2), (2, -1))]
    for r in range(size):
        for c in range(size):
            for down, right, cost in steps:
                if r + down < size and 0 <= c + right < size:
                    graph[r * size + c, (r + down) * size + c + right] = cost
    for edge, found in zip(edges[:2], filters.edge_distance(edges)[:2], strict=True):
        starts = np.flatnonzero(edge.numpy())
        expected = csgraph.dijkstra(graph.tocsr(), directed=False, indices=starts, min_only=True)
        np.testing.assert_allclose(found.numpy().ravel(), np.minimum(expected, 20), atol=1e-5)
    assert (filters.edge_distance(edges)[2] == 20).all()


def test_equalized_histogram_by_a_loop():
    found = filters.equalize(layers())
    for layer, result in zip(layers().long().numpy(), found.numpy(), strict=True):
        counts = np.bincount(layer.ravel(), minlength=256)
        first = layer.min()
        table, total = np.arange(256.0), 0
        if counts[first] < layer.size:
            for level in range(first + 1, 256):
                total += counts[level]
                table[level] = total * 255 / (layer.size - counts[first])
            table[first] = 0
        assert np.abs(table[layer] - result).max() <= 0.5 + 1e-4
