"""Mixup and CutMix: the same mixtures for any number of processes, by the formulas of their papers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_images import random_set
from scipy import stats

from ekd_lightning.data.loader import Batch, IndexBatch, TrainLoader, gather_batch
from ekd_lightning.data.mixing import Mix, Mixing, mix_images, mix_labels
from ekd_lightning.data.views import CropFlip, make_views
from ekd_lightning.errors import UserError

TRAIN = random_set("train", 120)
INDEX = torch.arange(0, 120, 2)
VIEWS = CropFlip(2)
BOTH_VIEWS = [VIEWS, make_views(["crop_flip", "cutout"], 2, pool_size=5)]
KINDS = {"mixup": Mixing(mixup=0.4), "cutmix": Mixing(cutmix=1.0), "both": Mixing(mixup=0.4, cutmix=1.0)}


def epoch(number: int, mixing: Mixing | None, views=VIEWS, size=12, **processes) -> list[Batch]:
    loader = TrainLoader(TRAIN, INDEX, views, size, seed=5, mixing=mixing, **processes)
    loader.set_epoch(number)
    return [gather_batch(TRAIN.images, rows, views) for rows in loader]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 9), st.sampled_from([1, 2, 3, 4, 6]), st.sampled_from(list(KINDS)), st.sampled_from(BOTH_VIEWS))
def test_any_number_of_processes_sees_the_mixtures_of_one(number, world_size, kind, views):
    whole = epoch(number, KINDS[kind], views)
    assert len(whole) == 5
    for rank in range(world_size):
        mine = epoch(number, KINDS[kind], views, world_size=world_size, rank=rank)
        for ours, batch in zip(mine, whole, strict=True):
            for own, all_of_it in zip(ours[:6], batch[:6], strict=True):
                assert torch.equal(own, all_of_it[rank::world_size])


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_batch_holds(kind):
    """Every row against the formula, from the unmixed batch of the same epoch."""
    plain = epoch(2, None)
    loader = TrainLoader(TRAIN, INDEX, VIEWS, 12, seed=5, mixing=KINDS[kind])
    loader.set_epoch(2)
    for rows, batch, unmixed in zip(loader, epoch(2, KINDS[kind]), plain, strict=True):
        mix = rows.mix
        assert sorted(mix.index.tolist()) == sorted(rows.index.tolist())  # within the batch, each once
        for name in ("labels", "index", "view", "valid"):
            assert torch.equal(getattr(batch, name), getattr(unmixed, name))
        for b in range(12):
            partner = rows.index.tolist().index(int(mix.index[b]))
            assert rows.view[partner] == mix.view[b]
            own, other = unmixed.images[b].numpy(), unmixed.images[partner].numpy()
            if mix.box is None:
                expected, share = mix.share * own + (1 - mix.share) * other, mix.share
            else:
                top, bottom, left, right = mix.box
                expected, share = own.copy(), 1 - (bottom - top) * (right - left) / 64
                expected[:, top:bottom, left:right] = other[:, top:bottom, left:right]
                assert mix.share == share
            np.testing.assert_allclose(batch.images[b].numpy(), expected, atol=1e-6)
            soft = np.zeros(4)
            soft[rows.labels[b]] += share
            soft[rows.labels[partner]] += 1 - share
            np.testing.assert_allclose(batch.soft_labels[b].numpy(), soft, atol=1e-6)
        assert batch.soft_labels.dtype == batch.images.dtype == torch.float32
        assert batch.targets is batch.soft_labels


def test_epochs_seeds_and_batches_are_mixed_differently():
    mixing = KINDS["mixup"]
    found = [share for n in range(3) for share, _ in mixing.shares(0, n, 50, 8, 8)]
    found += [share for share, _ in mixing.shares(1, 0, 50, 8, 8)]
    assert len(set(found)) == len(found)
    partners = [*mixing.partners(0, 0, 2, 40), *mixing.partners(0, 1, 2, 40), *mixing.partners(1, 0, 2, 40)]
    for i, first in enumerate(partners):
        assert all((first == other).sum() < 10 for other in partners[:i])
    assert mixing.shares(0, 0, 20, 8, 8) == mixing.shares(0, 0, 50, 8, 8)[:20]


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_shares_are_beta_distributed(alpha):
    drawn = [share for share, box in Mixing(mixup=alpha).shares(0, 0, 4000, 8, 8) if box is None]
    assert len(drawn) == 4000
    assert stats.kstest(drawn, stats.beta(alpha, alpha).cdf).pvalue > 0.01


def test_boxes_are_those_of_the_paper():
    shares = Mixing(cutmix=1.0).shares(0, 0, 4000, 20, 32)
    areas = []
    for share, (top, bottom, left, right) in shares:
        assert 0 <= top <= bottom <= 20
        assert 0 <= left <= right <= 32
        assert share == 1 - (bottom - top) * (right - left) / 640
        areas.append(1 - share)
    # The reference implementation, by NumPy's generator.
    rng, expected = np.random.default_rng(0), []
    for lam in rng.beta(1.0, 1.0, 4000):
        h, w = int(20 * np.sqrt(1 - lam)), int(32 * np.sqrt(1 - lam))
        cy, cx = rng.integers(20), rng.integers(32)
        rows = np.clip(cy + h // 2, 0, 20) - np.clip(cy - h // 2, 0, 20)
        expected.append(rows * (np.clip(cx + w // 2, 0, 32) - np.clip(cx - w // 2, 0, 32)) / 640)
    # It rounds odd sides down to even ones, ours does not.
    assert abs(np.mean(areas) - np.mean(expected)) < 0.03
    assert abs(np.quantile(areas, 0.9) - np.quantile(expected, 0.9)) < 0.05


def test_both_are_drawn_with_equal_chance():
    boxes = [box for _, box in KINDS["both"].shares(0, 0, 4000, 8, 8)]
    assert abs(sum(box is None for box in boxes) / 4000 - 0.5) < 0.04


def test_a_share_of_one_is_no_mixing():
    images, labels = TRAIN.images[:8].float() / 255, TRAIN.labels[:8]
    assert torch.equal(mix_images(images, images.flip(0), 1.0, None), images)
    assert torch.equal(mix_images(images, images.flip(0), 1.0, (3, 3, 0, 8)), images)
    hard = mix_labels(labels, labels.flip(0), 4, 1.0)
    assert torch.equal(hard, torch.nn.functional.one_hot(labels, 4).float())
    rows = next(iter(TrainLoader(TRAIN, INDEX, VIEWS, 8, 0)))
    mix = Mix(rows.index.flip(0), rows.view.flip(0), hard, 1.0, None)
    mixed = gather_batch(TRAIN.images, rows._replace(mix=mix), VIEWS)
    assert torch.equal(mixed.images, gather_batch(TRAIN.images, rows, VIEWS).images)


def test_nothing_is_mixed_when_both_are_off():
    assert not Mixing()
    assert Mixing(cutmix=0.1)
    for mixing in (None, Mixing()):
        rows = next(iter(TrainLoader(TRAIN, INDEX, VIEWS, 8, 0, mixing=mixing)))
        assert isinstance(rows, IndexBatch)
        assert rows.mix is None


@pytest.mark.parametrize("alpha", [-0.1, float("inf"), float("nan")])
def test_impossible_alphas(alpha):
    with pytest.raises(UserError, match=r"recipe\.cutmix="):
        Mixing(cutmix=alpha)
