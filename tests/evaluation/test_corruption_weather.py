from __future__ import annotations

import colorsys
import math

import numpy as np
import pytest
import torch
from corruption_references import IMAGES, assert_levels, clipped_zoom, run, swept, the_draws, unit
from PIL import Image
from scipy import ndimage
from scipy.sparse import csgraph, lil_matrix

from ekd_lightning.errors import UserError
from ekd_lightning.evaluation import corruption_weather, corruptions
from ekd_lightning.evaluation.corruptions import SEVERITIES, corrupt


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


def test_photographs_are_read_at_a_fifth(tmp_path):
    assert corruptions.read_frost(tmp_path / "frost") == []
    folder = tmp_path / "frost"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (200, 175, 3), dtype=np.uint8)
    for name in corruptions.FROST_FILES:
        Image.fromarray(pixels).save(folder / name.replace(".jpg", ".png"))
        (folder / name.replace(".jpg", ".png")).rename(folder / name)
    read = corruptions.read_frost(folder)
    assert len(read) == 5
    # A fifth with pixel centres aligned: every fifth pixel from the third on.
    np.testing.assert_allclose(read[0].permute(1, 2, 0).numpy() * 255, pixels[2::5, 2::5], atol=1e-3)
    (folder / "frost4.jpg").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"frost4\.jpg: not an image, or damaged"):
        corruptions.read_frost(folder)
    (folder / "frost2.png").unlink()
    with pytest.raises(UserError, match=r"frost2\.png: no such file; frost needs frost1\.png"):
        corruptions.read_frost(folder)


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


def test_plasma_fills_the_unit_interval():
    maps = corruption_weather.plasma(the_draws("fog", 1), 64, 2.0)
    assert (maps.amin((1, 2)) == 0).all()
    assert (maps.amax((1, 2)) == 1).all()


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
    found = corruption_weather.canny(layers(), 50, 150)
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
    for edge, found in zip(edges[:2], corruption_weather.edge_distance(edges)[:2], strict=True):
        starts = np.flatnonzero(edge.numpy())
        expected = csgraph.dijkstra(graph.tocsr(), directed=False, indices=starts, min_only=True)
        np.testing.assert_allclose(found.numpy().ravel(), np.minimum(expected, 20), atol=1e-5)
    assert (corruption_weather.edge_distance(edges)[2] == 20).all()


def test_equalized_histogram_by_a_loop():
    found = corruption_weather.equalize(layers())
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
