"""Batches of the user's data loaders: what is accepted, converted and refused."""

from __future__ import annotations

import pytest
import torch

from ekd_lightning.data.batches import as_batch, as_images
from ekd_lightning.errors import UserError

IMAGES, LABELS = torch.rand(4, 3, 8, 8), torch.tensor([0, 4, 2, 1])


@pytest.mark.parametrize("kind", [torch.int32, torch.uint8, torch.int64])
@pytest.mark.parametrize("real", [torch.float32, torch.float64])
def test_a_pair_becomes_a_batch(kind, real):
    batch = as_batch([IMAGES.to(real), LABELS.to(kind)], 5)
    assert (batch.images.dtype, batch.labels.dtype, batch.index.dtype) == (torch.float32, torch.int64, torch.int64)
    assert torch.equal(batch.images, IMAGES)
    assert torch.equal(batch.labels, LABELS)
    assert batch.valid.all()
    assert batch.index.tolist() == batch.view.tolist() == [-1] * 4


def test_a_label_is_not_rounded_to_the_type_of_the_images():
    labels = torch.tensor([0, 2049])
    assert as_batch((IMAGES[:2].half(), labels), 2050).labels.tolist() == [0, 2049]
    with pytest.raises(UserError, match=r"in 0 .. 2048, but span 0 to 2049"):
        as_batch((IMAGES[:2].half(), labels), 2049)


def test_resized_images_may_leave_the_range_by_rounding():
    as_images(torch.full((1, 3, 8, 8), 1.00001))
    as_images(torch.full((1, 3, 8, 8), -0.00001))


def test_grey_images_are_rgb():
    assert torch.equal(as_images(IMAGES[:, :1]), IMAGES[:, :1].repeat(1, 3, 1, 1))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((IMAGES * 255, LABELS), "span .* to 2"),
        ((IMAGES - 0.5, LABELS), "networks normalise them"),
        ((IMAGES * float("nan"), LABELS), "span nan to nan"),
        (((IMAGES * 255).byte(), LABELS), "not torch.uint8; divide by 255"),
        ((IMAGES.permute(0, 2, 3, 1), LABELS), r"not \[4, 8, 8, 3\]"),
        ((IMAGES[:, :2], LABELS), r"not \[4, 2, 8, 8\]"),
        ((["a.png"], LABELS), "not a list"),
        ((IMAGES, LABELS.float()), r"integers \[B\], not torch.float32 \[4\]"),
        ((IMAGES, LABELS[:, None]), r"not torch.int64 \[4, 1\]"),
        ((IMAGES, LABELS - 1), "in 0 .. 4, but span -1 to 3"),
        ((IMAGES, LABELS + 1), "but span 1 to 5"),
        ((IMAGES, LABELS[:2]), "4 images and 2 labels"),
        ((IMAGES[:0], LABELS[:0]), "0 images and 0 labels"),
        ((IMAGES * 0 + 1.01, LABELS), "span 1.01 to 1.01"),
        ((IMAGES, ["owl"]), "not a list"),
        ((IMAGES, LABELS, LABELS), r"must be \(images, labels\), not a tuple of 3"),
        ({"image": IMAGES, "label": LABELS}, "not a dict of 2"),
        (IMAGES, "not a Tensor"),
    ],
)
def test_other_batches_are_refused(batch, message):
    with pytest.raises(UserError, match=message):
        as_batch(batch, 5)
