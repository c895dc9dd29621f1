"""Spatter, and the steps of OpenCV in it against loops and graphs."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy import ndimage
from scipy.sparse import csgraph, lil_matrix

from ekd_lightning.evaluation import corruption_spatter
from ekd_lightning.evaluation.corruptions import corrupt


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
    found = corruption_spatter.canny(layers(), 50, 150)
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
    for edge, found in zip(edges[:2], corruption_spatter.edge_distance(edges)[:2], strict=True):
        starts = np.flatnonzero(edge.numpy())
        expected = csgraph.dijkstra(graph.tocsr(), directed=False, indices=starts, min_only=True)
        np.testing.assert_allclose(found.numpy().ravel(), np.minimum(expected, 20), atol=1e-5)
    assert (corruption_spatter.edge_distance(edges)[2] == 20).all()


def test_equalized_histogram_by_a_loop():
    found = corruption_spatter.equalize(layers())
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
