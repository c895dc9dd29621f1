"""Pools: a view is a pure function of (image, index, view, seed, options), and the key says which."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_images import random_set

from ekd_lightning.data.loader import TrainLoader, gather_batch
from ekd_lightning.data.order import Draws
from ekd_lightning.data.views import CropFlip, Identity, Pool, make_views
from ekd_lightning.errors import UserError

IMAGES = random_set("train", 60, side=17).images
EVERYTHING = ["crop_flip", "randaugment", "color", "random_erasing", "cutout"]
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


@pytest.mark.parametrize("name", ["crop_flip", "randaugment", "color", "random_erasing", "cutout"])
def test_each_augmentation_alone_is_pure_and_does_something(name):
    family = make_views([name, name], pool_size=V)
    pairs = [(i, v) for i in range(60) for v in range(V)]
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)).tolist()
    before = IMAGES.clone()
    whole = views_of(family, pairs)
    shuffled = torch.cat(
        [views_of(family, [pairs[k] for k in order[at : at + 7]]) for at in range(0, 540, 7)]
    )
    assert torch.equal(shuffled, whole[order])
    assert torch.equal(IMAGES, before)
    different = {bytes(view.numpy().tobytes()) for view in whole[:V]}
    assert len(different) > V // 2


def test_the_views_of_crop_flip_in_a_pool_are_some_of_the_162():
    family, finite = make_views(["crop_flip", "crop_flip"], pool_size=V), CropFlip()
    index, view = torch.arange(60), torch.arange(60) % V
    once = finite(IMAGES, Draws(0, 0, view, index).integers(162), index)
    assert torch.equal(
        family(IMAGES, view, index), finite(once, Draws(0, 1, view, index).integers(162), index)
    )


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


def test_keys_tell_all_that_determines_the_views():
    cut = {"cutout": {"size": 8}}
    families = [
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
        (["none", "cutout"], {}, r"data\.augmentation=.*none stands alone"),
        ([], {}, r"data\.augmentation=\[\]: must be a name or a list of names"),
        (None, {}, r"data\.augmentation=None"),
        ([["cutout"]], {}, r"data\.augmentation \['cutout'\]"),
        ("cutout", {"pool_size": 0}, r"data\.pool_size=0 must lie in 1\.\."),
        (
            "cutout",
            {"options": {"cutuot": {}}},
            r"data\.augmentation_options: 'cutuot'; did you mean 'cutout'",
        ),
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
