"""Augmentations of a batch against NumPy loops and against torchvision, one image at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from random_images import random_images
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from ekd_lightning.data import color
from ekd_lightning.data.augmentations import (
    Cutout,
    RandomErasing,
    ResizedCrop,
    build_augmentation,
    register_augmentation,
)
from ekd_lightning.data.order import STREAM_POOL, Draws, hash_uniform_u64, splitmix64
from ekd_lightning.errors import UserError

B, H, W = 200, 12, 9


def draws(count: int = B) -> Draws:
    """Always the same numbers, from the start."""
    return Draws(3, 1, torch.arange(count) % 7, torch.arange(count) * 11)


# -- the numbers ----------------------------------------------------------------------------------------


def test_the_bits_are_those_of_the_numpy_hash():
    index = np.array([0, 1, 7, 49_999, 2**40], dtype=np.int64)
    key = hash_uniform_u64(1, 2, 3, np.zeros(1, dtype=np.int64))
    assert splitmix64(torch.zeros(1, dtype=torch.int64)).item() & (2**64 - 1) == 0xE220A8397B1DCDAF
    # hash(..., index) = sm(K ^ index) with sm(K ^ 0) = hash(..., 0): undone by comparing whole chains.
    chain = torch.zeros(5, dtype=torch.int64)
    for part in (1, 2, 3):
        chain = splitmix64(chain ^ part)
    ours = splitmix64(chain ^ torch.from_numpy(index)).numpy().view(np.uint64)
    assert ours.tolist() == hash_uniform_u64(1, 2, 3, index).tolist()
    assert ours[0] == key[0]


def test_numbers_are_uniform_and_calls_are_independent():
    count = 20_000
    source = Draws(0, 0, torch.arange(count) % 64, torch.arange(count) // 64)
    first, second, many = source.uniform(), source.uniform(), source.uniform(-1.0, 3.0, count=3)
    assert first.dtype == torch.float32
    assert many.shape == (3, count)
    for unit in (first, second, *((many + 1) / 4)):
        assert 0 <= float(unit.min()) <= float(unit.max()) < 1
        counts = np.bincount((unit * 50).long().numpy(), minlength=50)
        assert ((counts - count / 50) ** 2 / (count / 50)).sum() < 49 + 5 * 98**0.5
    columns = torch.stack([first, second, *many]).numpy()
    assert np.abs(np.corrcoef(columns) - np.eye(5)).max() < 0.04
    ends = torch.arange(count) % 5 + 1
    for end in (7, ends):
        numbers = source.integers(end)
        assert numbers.dtype == torch.int64
        assert bool((numbers >= 0).all() and (numbers < end).all())
    assert source.integers(7).unique().tolist() == list(range(7))


def test_seed_place_view_and_index_all_matter():
    view, index = torch.arange(50), torch.arange(50) * 3
    reference = Draws(1, 0, view, index).uniform()
    others = [Draws(2, 0, view, index), Draws(1, 1, view, index), Draws(1, 0, view + 1, index)]
    for other in (*others, Draws(1, 0, view, index + 1), Draws(1, 0, index, view)):
        assert (other.uniform()[1:] == reference[1:]).sum() == 0
    assert STREAM_POOL == 5  # the numbers on users' disks


# -- cutout and random erasing --------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 4, 5, 30])
def test_cutout_against_a_loop(size):
    images, source = random_images(B, H, W), draws()
    centre_y, centre_x = source.integers(H).tolist(), source.integers(W).tolist()
    expected = images.numpy().copy()
    for b in range(B):
        for y in range(H):
            for x in range(W):
                dy, dx = y - (centre_y[b] - size // 2), x - (centre_x[b] - size // 2)
                if 0 <= dy < size and 0 <= dx < size:
                    expected[b, :, y, x] = 0
    made = Cutout(size=size)(images, draws())
    assert made.dtype == torch.uint8
    assert np.array_equal(made.numpy(), expected)
    assert set(centre_y) == set(range(H))
    assert set(centre_x) == set(range(W))


def test_random_erasing_against_a_loop():
    scale, ratio, p = (0.1, 0.9), (0.2, 5.0), 0.7
    images, source = random_images(B, H, W), draws()
    area = source.uniform(*scale, count=10).numpy()
    aspect = np.exp(source.uniform(math.log(ratio[0]), math.log(ratio[1]), count=10).numpy())
    heights, widths = np.ones(B, dtype=np.int64), np.ones(B, dtype=np.int64)
    found = np.zeros(B, dtype=bool)
    for b in range(B):
        for attempt in range(10):
            h = round(math.sqrt(H * W * area[attempt, b] * aspect[attempt, b]))
            w = round(math.sqrt(H * W * area[attempt, b] / aspect[attempt, b]))
            if h < H and w < W:
                heights[b], widths[b], found[b] = h, w, True
                break
    top = source.integers(torch.from_numpy(H - heights + 1)).numpy()
    left = source.integers(torch.from_numpy(W - widths + 1)).numpy()
    chosen = found & (source.uniform().numpy() < p)
    made = RandomErasing(p=p, scale=scale, ratio=ratio)(images, draws())
    for b in range(B):
        expected = images[b]
        if chosen[b]:
            zero = torch.zeros(1, 1, 1, dtype=torch.uint8)
            expected = tv.erase(expected, int(top[b]), int(left[b]), int(heights[b]), int(widths[b]), zero)
        assert torch.equal(made[b], expected)
    assert 0 < chosen.sum() < B


def test_random_erasing_erases_as_much_as_torchvision():
    count, side = 3000, 16
    white = torch.full((count, 3, side, side), 255, dtype=torch.uint8)
    ours = (RandomErasing()(white, draws(count))[:, 0] == 0).float().mean((1, 2))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        reference = v2.RandomErasing()
        theirs = torch.stack([(reference(image)[0] == 0).float().mean() for image in white])
    for quantile in (0.25, 0.5, 0.6, 0.75, 0.9, 0.99):
        assert abs(float(ours.quantile(quantile) - theirs.quantile(quantile))) < 0.02
    assert abs(float((ours > 0).float().mean() - 0.5)) < 0.03


def test_nothing_is_erased_when_no_rectangle_fits():
    images = random_images(B, H, W)
    made = RandomErasing(p=1.0, scale=(1.0, 1.0), ratio=(1.0, 1.0))(images, draws())
    assert torch.equal(made, images)


def crops_drawn(scale: tuple[float, float], ratio: tuple[float, float]):
    """Top, left, height and width of each image, by torchvision's rule from the same numbers."""
    source = draws()
    area = source.uniform(*scale, count=10).numpy() * H * W
    aspect = np.exp(-source.uniform(-math.log(ratio[1]), -math.log(ratio[0]), count=10).numpy())
    sides = np.full((2, B), [[H], [W]])
    for b in range(B):
        for attempt in range(10):
            h, w = (
                round(math.sqrt(area[attempt, b] / aspect[attempt, b])),
                round(math.sqrt(area[attempt, b] * aspect[attempt, b])),
            )
            if 0 < w <= W and 0 < h <= H:
                sides[:, b] = h, w
                break
    top, left = (source.integers(torch.from_numpy(whole - side + 1)) for whole, side in zip((H, W), sides, strict=True))
    return zip(top.tolist(), left.tolist(), *sides.tolist(), strict=True)


@pytest.mark.parametrize(("scale", "ratio"), [((0.1, 1.0), (0.75, 4 / 3)), ((0.5, 1.0), (1.0, 1.0)), ((1, 1), (9, 9))])
def test_resized_crop_is_torchvisions_image_by_image(scale, ratio):
    """Within one grey level: torchvision interpolates uint8 in integers."""
    images = random_images(B, H, W)
    made = ResizedCrop(scale=scale, ratio=ratio)(images, draws())
    assert made.dtype == torch.uint8
    boxes = list(crops_drawn(scale, ratio))
    for image, found, box in zip(images, made, boxes, strict=True):
        expected = tv.resized_crop(image, *box, [H, W], interpolation=v2.InterpolationMode.BILINEAR, antialias=True)
        assert (found.int() - expected.int()).abs().max() <= 1, box
    if scale == (1, 1):  # no such rectangle: the images stay as they are
        assert torch.equal(made, images)
    else:
        assert len(set(boxes)) > 20


# -- colour ---------------------------------------------------------------------------------------------

ADJUST = {
    "brightness": (color.adjust_brightness, tv.adjust_brightness, (0.0, 2.5)),
    "contrast": (color.adjust_contrast, tv.adjust_contrast, (0.0, 2.5)),
    "saturation": (color.adjust_saturation, tv.adjust_saturation, (0.0, 2.5)),
    "hue": (color.adjust_hue, tv.adjust_hue, (-0.5, 0.5)),
}


@pytest.mark.parametrize("name", ADJUST)
def test_colour_against_torchvision(name):
    """Within one grey level, and that in fewer than one pixel in a hundred."""
    ours, theirs, (low, high) = ADJUST[name]
    images = random_images(64, 32, 32)
    images[0], images[1], images[2, 1:] = 128, 0, 0  # grey, black, pure red
    images[3] = images[3, :1]
    factor = torch.linspace(low, high, 64)
    expected = torch.stack([theirs(x, float(f)) for x, f in zip(images, factor, strict=True)])
    made = ours(images, factor)
    assert made.dtype == torch.uint8
    off = (made.int() - expected.int()).abs()
    assert int(off.max()) <= 1
    assert float((off > 0).float().mean()) < 0.01


def test_colour_jitter_is_the_four_in_order():
    images, source = random_images(20, 32, 32), draws(20)
    jitter = color.ColorJitter(brightness=0.3, contrast=1.5, saturation=0.0, hue=0.2)
    brightness, contrast, hue = (source.uniform(0.7, 1.3), source.uniform(0.0, 2.5), source.uniform(-0.2, 0.2))
    expected = color.adjust_brightness(images, brightness)
    expected = color.adjust_hue(color.adjust_contrast(expected, contrast), hue)
    assert torch.equal(jitter(images, draws(20)), expected)
    assert not torch.equal(expected, images)
    off = color.ColorJitter(brightness=0, contrast=0, saturation=0, hue=0)
    assert torch.equal(off(images, draws(20)), images)


# -- RandAugment ----------------------------------------------------------------------------------------


def by_torchvision(image: torch.Tensor, name: str, negated: bool, magnitude: int) -> torch.Tensor:
    """One operation of torchvision's own RandAugment on one image."""
    transform = v2.RandAugment()
    magnitudes, signed = transform._AUGMENTATION_SPACE[name]
    levels = magnitudes(31, *image.shape[1:])
    value = 0.0 if levels is None else float(levels[magnitude])
    assert signed == (name in color.SIGNED)
    value *= -1 if negated else 1
    return transform._apply_image_or_video_transform(image, name, value, "nearest", transform._fill)


@pytest.mark.parametrize(("num_ops", "magnitude"), [(1, 9), (2, 9), (3, 30), (2, 0)])
def test_randaugment_equals_torchvision_image_by_image(num_ops, magnitude):
    images = random_images(B, 32, 32)
    augment = color.RandAugment(num_ops=num_ops, magnitude=magnitude)
    codes = augment.draw(draws())
    assert codes.shape == (num_ops, B)
    made = augment(images, draws())
    assert made.dtype == torch.uint8
    for b in range(B):
        expected = images[b]
        for code in codes[:, b].tolist():
            expected = by_torchvision(expected, color.NAMES[code // 2], code % 2 == 1, magnitude)
        assert torch.equal(made[b], expected), [color.NAMES[c // 2] for c in codes[:, b]]


def test_randaugment_draws_every_operation_and_sign():
    assert set(color.NAMES) == set(v2.RandAugment._AUGMENTATION_SPACE)
    count = 14_000
    codes = color.RandAugment(num_ops=1).draw(draws(count))[0]
    found = codes.bincount(minlength=28).view(14, 2)
    assert bool((found.sum(1) - count / 14).abs().max() < 5 * (count / 14) ** 0.5)
    assert found[9:, 1].tolist() == [0] * 5
    assert bool((found[:9, 0] - found[:9, 1]).abs().max() < 5 * (count / 14) ** 0.5)


def test_randaugment_calls_each_operation_once_for_all_its_images(monkeypatch):
    calls = []
    monkeypatch.setitem(color.UNSIGNED, "Equalize", lambda x, value: calls.append(len(x)) or tv.equalize(x))
    augment = color.RandAugment(num_ops=1)
    equalized = int((augment.draw(draws())[0] == 2 * color.NAMES.index("Equalize")).sum())
    augment(random_images(B, H, W), draws())
    assert calls == [equalized]
    assert equalized > 1


# -- names and options ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cutout", {"size": 0}, r"cutout\.size=0: must be at least 1"),
        ("cutout", {"size": 1.5}, r"data\.augmentation_options\.cutout\.size=1\.5: must be int"),
        ("cutout", {"size": True}, r"data\.augmentation_options\.cutout\.size=True: must be int"),
        ("cutout", {"sise": 8}, r"data\.augmentation_options\.cutout: 'sise'; did you mean 'size'"),
        ("random_erasing", {"p": 1.2}, r"random_erasing\.p=1\.2: must be in \[0, 1\]"),
        ("random_erasing", {"p": "half"}, r"data\.augmentation_options\.random_erasing\.p='half': must be float"),
        ("random_erasing", {"scale": 0.3}, r"random_erasing\.scale=0\.3: must be a pair"),
        ("random_erasing", {"scale": [0.5, 0.1]}, r"random_erasing\.scale=.*must not exceed"),
        ("random_erasing", {"ratio": [0.0, 1.0]}, r"random_erasing\.ratio=0\.0"),
        ("resized_crop", {"scale": [0.0, 1.0]}, r"resized_crop\.scale=0\.0: must be in \[1e-06, 1\]"),
        ("color", {"hue": 0.6}, r"color\.hue=0\.6: must be in \[0, 0\.5\]"),
        ("color", {"contrast": -1}, r"color\.contrast=-1"),
        ("color", {"contrast": float("nan")}, r"color\.contrast=nan"),
        ("color", {"contrast": 10**309}, r"color\.contrast=10{309}: must be a finite number"),
        ("randaugment", {"magnitude": 31}, r"randaugment\.magnitude=31: must be at most 30"),
        ("randaugment", {"num_ops": 0}, r"randaugment\.num_ops=0"),
        ("cut_out", {}, r"augmentation 'cut_out'; did you mean 'cutout'"),
    ],
)
def test_options_that_are_not_allowed(name, options, message):
    with pytest.raises(UserError, match=message) as caught:
        build_augmentation(name, options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["cutout", "none", "crop_flip"])
def test_a_name_is_given_once(name):
    with pytest.raises(ValueError, match=f"augmentation '{name}' is registered twice"):

        @register_augmentation(name)
        class Another:  # type: ignore[type-var]
            pass


# -- on an accelerator ----------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["cutout", "random_erasing", "resized_crop", "color", "randaugment"])
def test_on_the_gpu_as_on_the_cpu(name):
    """Within one grey level in almost every image; rounding may move a rectangle or a rotated pixel."""
    images, view, index = random_images(B, 32, 32), torch.arange(B) % 7, torch.arange(B) * 11
    augmentation, _ = build_augmentation(name, {})
    ours = augmentation(images.cuda(), Draws(3, 1, view.cuda(), index.cuda())).cpu()
    off = (ours.int() - augmentation(images, Draws(3, 1, view, index)).int()).abs()
    assert float((off > 1).float().mean()) < 0.002
