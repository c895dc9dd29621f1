"""The 162 views against torchvision, one by one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import functional as tv

from ekd_lightning.data.views import CropFlip, Identity, make_views
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


def random_images(count: int, height: int, width: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8)


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
    families = [CropFlip(), CropFlip(3), CropFlip(4, flip=False), Identity()]
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
