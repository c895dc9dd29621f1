"""View families: crop and flip, and pools of draws."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_images import random_images, random_set
from torchvision.transforms import functional as tv
from torchvision.transforms import v2

from ekd_lightning.data.loader import TrainLoader, gather_batch
from ekd_lightning.data.order import Draws
from ekd_lightning.data.views import CropFlip, Identity, Pool, ViewFamily, make_views
from ekd_lightning.errors import UserError


def slow_view(image: torch.Tensor, number: int, padding: int) -> torch.Tensor:
    """One view by torchvision's pad, crop, hflip, counted in reading order, flips last."""
    height, width = image.shape[1:]
    padded = tv.pad(image, [padding] * 4)
    views = [
        variant(tv.crop(padded, top, left, height, width))
        for variant in (lambda x: x, tv.hflip)
        for top in range(2 * padding + 1)
        for left in range(2 * padding + 1)
    ]
    return views[number]


def test_all_162_views_equal_torchvision():
    family = CropFlip()
    assert family.num_views == 162
    images, view = random_images(162, 32, 32), torch.randperm(162)
    ours = family(images, view, torch.arange(162))
    assert ours.dtype == torch.uint8
    for image, number, made in zip(images, view.tolist(), ours, strict=True):
        assert torch.equal(made, slow_view(image, number, 4))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 5), st.booleans(), st.data())
def test_any_size_and_padding_equals_torchvision(height, width, padding, flip, data):
    family = CropFlip(padding, flip)
    assert family.num_views == (2 * padding + 1) ** 2 * (1 + flip)
    numbers = data.draw(st.lists(st.integers(0, family.num_views - 1), min_size=1, max_size=6))
    images = random_images(len(numbers), height, width)
    ours = family(images, torch.tensor(numbers), torch.zeros(len(numbers), dtype=torch.int64))
    for image, number, made in zip(images, numbers, ours, strict=True):
        assert torch.equal(made, slow_view(image, number, padding))


@pytest.mark.parametrize("family", [CropFlip(), CropFlip(0), CropFlip(2, flip=False), Identity()])
def test_identity_view_leaves_images_alone(family):
    images = random_images(5, 9, 7)
    view = torch.full((5,), family.identity_view)
    assert torch.equal(family(images, view, torch.arange(5)), images)
    assert 0 <= family.identity_view < family.num_views


def test_keys_tell_families_apart():
    families: list[ViewFamily] = [CropFlip(), CropFlip(3), CropFlip(4, flip=False), Identity()]
    assert len({family.key for family in families}) == len(families)
    # Tables and teachers on users' disks have these keys.
    assert [family.key for family in families] == [
        "crop_flip-padding4-flip",
        "crop_flip-padding3-flip",
        "crop_flip-padding4-noflip",
        "none",
    ]


def test_make_views():
    assert make_views("none", 4, True).num_views == 1
    assert make_views("crop_flip", 2, False).num_views == 25
    with pytest.raises(UserError, match=r"data\.augmentation 'cropflip'; did you mean 'crop_flip'"):
        make_views("cropflip", 4, True)
    with pytest.raises(UserError, match=r"data\.padding=-1"):
        make_views("crop_flip", -1, True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_views_on_the_gpu_equal_those_on_the_cpu():
    images, view = random_images(162, 32, 32), torch.arange(162)
    on_gpu = CropFlip()(images.cuda(), view.cuda(), view.cuda())
    assert torch.equal(on_gpu.cpu(), CropFlip()(images, view, view))


IMAGES = random_set("train", 60, side=17).images
EVERYTHING = ["crop_flip", "resized_crop", "randaugment", "color", "random_erasing", "cutout"]
OPTIONS = {"cutout": {"size": 5}, "random_erasing": {"p": 0.8}}
V = 9
FAMILY = make_views(EVERYTHING, 2, options=OPTIONS, pool_size=V, pool_seed=4)


def views_of(family, pairs: list[tuple[int, int]]) -> torch.Tensor:
    index, view = torch.tensor(pairs).T
    return family(IMAGES[index], view, index)


WHOLE = views_of(FAMILY, [(i, v) for i in range(60) for v in range(V)]).view(60, V, 3, 17, 17)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 59), st.integers(0, V - 1)), min_size=1, max_size=70))
def test_a_view_does_not_depend_on_the_batch_it_is_in(pairs):
    index, view = torch.tensor(pairs).T
    made = views_of(FAMILY, pairs)
    assert made.dtype == torch.uint8
    assert torch.equal(made, WHOLE[index, view])


@pytest.mark.parametrize("name", ["crop_flip", "resized_crop", "randaugment", "color", "random_erasing", "cutout"])
def test_each_augmentation_alone_is_pure_and_does_something(name):
    family = make_views([name, name], pool_size=V)
    pairs = [(i, v) for i in range(60) for v in range(V)]
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)).tolist()
    before = IMAGES.clone()
    whole = views_of(family, pairs)
    shuffled = torch.cat([views_of(family, [pairs[k] for k in order[at : at + 7]]) for at in range(0, 540, 7)])
    assert torch.equal(shuffled, whole[order])
    assert torch.equal(IMAGES, before)
    different = {bytes(view.numpy().tobytes()) for view in whole[:V]}
    assert len(different) > V // 2


def test_the_views_of_crop_flip_in_a_pool_are_some_of_the_162():
    family, finite = make_views(["crop_flip", "crop_flip"], pool_size=V), CropFlip()
    index, view = torch.arange(60), torch.arange(60) % V
    once = finite(IMAGES, Draws(0, 0, view, index).integers(162), index)
    assert torch.equal(family(IMAGES, view, index), finite(once, Draws(0, 1, view, index).integers(162), index))


def test_augmentations_are_applied_in_order():
    white = torch.full_like(IMAGES, 255)
    view, index = torch.zeros(60, dtype=torch.int64), torch.arange(60)
    last = make_views(["color", "cutout"])(white, view, index)
    assert (last == 0).flatten(1).any(1).all()  # still black where cutout came last
    assert not torch.equal(last, make_views(["cutout", "color"])(white, view, index))


def test_an_epoch_of_a_loader_sees_views_of_the_pool():
    images = random_set("train", 60, side=17)
    rows = next(iter(TrainLoader(images, torch.arange(60), FAMILY, 20, seed=0)))
    assert rows.view.max() < V
    batch = gather_batch(IMAGES, rows, FAMILY)
    assert torch.equal((batch.images * 255).round().to(torch.uint8), WHOLE[rows.index, rows.view])


TRANSFORMS = {
    "GaussianBlur": {"kernel_size": 5},
    "RandomPerspective": {"p": 1.0},
    "RandomResizedCrop": {"size": 17},
    "GaussianNoise": {},
    "AutoAugment": {},
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_of_torchvision_are_pure_and_draw_as_torchvision_does(name):
    """A view is what the transform makes of its image after the generator was seeded by the image's draw."""
    family: Any = make_views(["crop_flip", name], 2, options={name: TRANSFORMS[name]}, pool_size=V, pool_seed=4)
    index, view = torch.arange(60), torch.arange(60) % V
    state = torch.get_rng_state()
    whole = family(IMAGES, view, index)
    assert torch.equal(torch.get_rng_state(), state)
    some = torch.tensor([41, 3, 3])
    assert torch.equal(family(IMAGES[some], view[some], index[some]), whole[some])
    crops: Any = make_views(["crop_flip", "crop_flip"], 2, pool_size=V, pool_seed=4)
    before = crops.augmentations[0]
    cropped = before(IMAGES, Draws(4, 0, view, index))
    transform = getattr(v2, name)(**TRANSFORMS[name])
    for row, seed in enumerate(Draws(4, 1, view, index).integers(2**31 - 1).tolist()):
        torch.manual_seed(seed)
        assert torch.equal(whole[row], transform(cropped[row]))
    assert not torch.equal(whole, cropped)
    assert not family.captures


def test_transforms_that_make_no_views_are_refused():
    zeros = torch.zeros(2, dtype=torch.int64)
    for name, options, message in (
        ("Resize", {"size": 5}, r"torchvision's Resize turns torch\.uint8 \[3, 17, 17\] into torch\.uint8 \[3, 5, 5\]"),
        ("ToImage", {}, None),
        ("RandomCrop", {"size": 99}, r"torchvision's RandomCrop fails: "),
        ("Normalize", {"mean": [0.5], "std": [0.5]}, r"torchvision's Normalize fails: .*float"),
    ):
        family = make_views(name, options={name: options})
        if message is None:
            assert torch.equal(family(IMAGES[:2], zeros, zeros), IMAGES[:2])
        else:
            with pytest.raises(UserError, match=message):
                family(IMAGES[:2], zeros, zeros)
    with pytest.raises(UserError, match=r"options\.GaussianBlur: torchvision refuses it .*kern"):
        make_views("GaussianBlur")
    with pytest.raises(UserError, match=r"data\.augmentation 'Gaussianblur'"):
        make_views("Gaussianblur")


def test_keys_tell_all_that_determines_the_views():
    cut = {"cutout": {"size": 8}}
    families: list[ViewFamily] = [
        Identity(),
        CropFlip(),
        make_views("cutout"),
        make_views("cutout", options=cut),
        make_views("cutout", options=cut, pool_size=32),
        make_views("cutout", options=cut, pool_seed=1),
        make_views(["crop_flip", "cutout"]),
        make_views(["crop_flip", "cutout"], padding=3),
        make_views(["crop_flip", "cutout"], flip=False),
        make_views(["cutout", "crop_flip"]),
        make_views(["cutout", "cutout"]),
        make_views("random_erasing"),
        *(make_views("random_erasing", options={"random_erasing": {k: v}}) for k, v in ERASING.items()),
        make_views("color"),
        *(make_views("color", options={"color": {k: 0.3}}) for k in COLOR),
        make_views("GaussianBlur", options={"GaussianBlur": {"kernel_size": 3}}),
        make_views("GaussianBlur", options={"GaussianBlur": {"kernel_size": 5}}),
        make_views("randaugment"),
        make_views("randaugment", options={"randaugment": {"num_ops": 1}}),
        make_views("randaugment", options={"randaugment": {"magnitude": 5}}),
    ]
    assert len({family.key for family in families}) == len(families)
    defaults = make_views("cutout", options={"cutout": {"size": 16}})
    assert defaults.key == make_views(["cutout"]).key == 'pool64-seed0-cutout{"size": 16}'


ERASING = {"p": 0.4, "scale": [0.1, 0.2], "ratio": [0.5, 2.0]}
COLOR = ("brightness", "contrast", "saturation", "hue")


def test_plain_names_keep_their_families():
    assert isinstance(make_views(["none"]), Identity)
    assert (make_views(["crop_flip"]).key, make_views("crop_flip").num_views) == (CropFlip().key, 162)
    pool = make_views("cutout", pool_size=3)
    assert isinstance(pool, Pool)
    assert (pool.num_views, pool.identity_view) == (3, None)


@pytest.mark.parametrize(
    ("augmentation", "changes", "message"),
    [
        ("cut_out", {}, r"data\.augmentation 'cut_out'; did you mean 'cutout'"),
        (["crop_flip", "cuttout"], {}, r"data\.augmentation 'cuttout'; did you mean 'cutout'"),
        (["none", "cutout"], {}, r"data\.augmentation=.*none cannot be combined"),
        ([], {}, r"data\.augmentation=\[\]: must be a name or a list of names"),
        (None, {}, r"data\.augmentation=None"),
        ([["cutout"]], {}, r"data\.augmentation \['cutout'\]"),
        ("cutout", {"pool_size": 0}, r"data\.pool_size=0 must lie in 1\.\."),
        ("cutout", {"options": {"cutuot": {}}}, r"data\.augmentation_options: 'cutuot'; did you mean 'cutout'"),
        ("cutout", {"options": {"cutout": 8}}, r"data\.augmentation_options\.cutout=8: must be a mapping"),
        ("none", {"options": {"crop_flip": {"padding": 1}}}, r"data\.augmentation_options: 'crop_flip'"),
        (["crop_flip", "cutout"], {"padding": -1}, r"data\.padding=-1"),
    ],
)
def test_mistakes_get_one_line(augmentation, changes, message):
    with pytest.raises(UserError, match=message) as caught:
        make_views(augmentation, **changes)
    assert "\n" not in str(caught.value)


def test_options_without_effect_are_warned_of():
    with pytest.warns(UserWarning, match=r"data\.augmentation_options\.cutout has no effect"):
        make_views("crop_flip", options={"cutout": {"size": 8}})
    with pytest.warns(UserWarning, match=r"data\.pool_size=3 has no effect"):
        make_views("none", pool_size=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_views(["crop_flip", "cutout"], options={"cutout": {"size": 8}})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_no_wait_for_the_device_but_that_of_randaugment():
    family = make_views(["crop_flip", "color", "random_erasing", "cutout"])
    images, view, index = IMAGES.cuda(), torch.arange(60).cuda(), torch.arange(60).cuda()
    family(images, view, index)
    torch.cuda.set_sync_debug_mode("error")
    try:
        family(images, view, index)
    finally:
        torch.cuda.set_sync_debug_mode("default")
