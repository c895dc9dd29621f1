"""What all corruptions have in common."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from corruption_references import ALL, IMAGES, made, run

from ekd_lightning.errors import UserError
from ekd_lightning.evaluation.corruptions import EXTRA, MAIN, SEVERITIES, corrupt


def test_there_are_fifteen_and_four():
    assert (len(MAIN), len(EXTRA), len(set(ALL))) == (15, 4, 19)


@pytest.mark.parametrize("name", ALL)
def test_an_image_comes_out_the_same_whatever_its_batch(name):
    for severity in (1, 3, 5):
        whole = run(name, severity)
        assert whole.dtype == torch.uint8
        assert whole.shape == IMAGES.shape
        order = torch.tensor([4, 0, 2])
        assert torch.equal(run(name, severity, IMAGES[order], index=order), whole[order])
        alone = [run(name, severity, IMAGES[n : n + 1], index=torch.tensor([n])) for n in range(6)]
        assert torch.equal(torch.cat(alone), whole)
    assert run(name, 1, IMAGES[:0]).shape == (0, 3, 32, 32)


RANDOM = (
    *("gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise", "glass_blur", "motion_blur"),
    *("snow", "frost", "fog", "elastic_transform", "spatter"),
)


@pytest.mark.parametrize("name", ALL)
def test_the_seed_and_the_index_matter_where_there_is_chance(name):
    textured = IMAGES[:3]
    first = run(name, 3, textured)
    assert torch.equal(run(name, 3, textured, seed=1), first) == (name not in RANDOM)
    assert torch.equal(run(name, 3, textured, index=torch.arange(3, 6)), first) == (name not in RANDOM)
    assert not torch.equal(first, textured)


@pytest.mark.parametrize("size", [16, 24, 32, 40])
def test_other_sizes(size):
    images = made(4, size)
    large = [torch.rand(3, 64, 64)]
    for name in ALL:
        assert corrupt(images, name, 5, frost=large).shape == images.shape


def distance(name: str) -> list[float]:
    images = made(40)[:-3]
    return [float((run(name, s, images).float() - images.float()).square().mean()) for s in SEVERITIES]


def test_severity_moves_images_further_away():
    found = {name: distance(name) for name in ALL}
    means = np.mean([np.sqrt(found[name]) for name in MAIN], axis=0)
    assert (np.diff(means) > 0).all(), means
    # The others' constants trade one thing for another between severities.
    other = {"glass_blur", "elastic_transform", "snow", "frost", "spatter", "saturate"}
    for name in set(ALL) - other:
        assert (np.diff(found[name]) > 0).all(), (name, found[name])


def test_mistakes():
    with pytest.raises(UserError, match="unknown corruption 'fogg'; did you mean 'fog'"):
        corrupt(IMAGES, "fogg", 1)
    for severity in (0, 6):
        with pytest.raises(UserError, match=f"severity={severity} of fog"):
            corrupt(IMAGES, "fog", severity)
    with pytest.raises(UserError, match=r"frost needs the photographs frost1\.png"):
        corrupt(IMAGES, "frost", 1)
    with pytest.raises(UserError, match="not larger than the images"):
        corrupt(IMAGES, "frost", 1, frost=[torch.rand(3, 32, 80)])
    for wrong in (IMAGES.float(), IMAGES[:, :1], IMAGES[0], IMAGES[..., :30]):
        with pytest.raises(ValueError, match="uint8"):
            corrupt(wrong, "fog", 1)
