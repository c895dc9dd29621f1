"""Loaders: the same global batches for any number of processes, every evaluation image exactly once."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_images import random_set

from ekd_lightning.data.loader import EvalLoader, IndexBatch, TrainLoader, gather_batch
from ekd_lightning.data.order import epoch_order, epoch_views
from ekd_lightning.data.views import CropFlip, Identity, to_unit, unit_levels
from ekd_lightning.errors import UserError

TRAIN = random_set("train", 120)
INDEX = torch.arange(0, 120, 2)
VIEWS = CropFlip(2)
FIELDS = ("labels", "index", "view", "valid")


def epoch(loader: TrainLoader, number: int) -> list[IndexBatch]:
    loader.set_epoch(number)
    return list(loader)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([1, 2, 3, 4, 6]), st.integers(1, 5), st.integers(0, 3), st.integers(0, 3))
def test_global_batches_do_not_depend_on_the_number_of_processes(world_size, share, seed, number):
    size = world_size * share
    whole = epoch(TrainLoader(TRAIN, INDEX, VIEWS, size, seed), number)
    ranks = [
        epoch(TrainLoader(TRAIN, INDEX, VIEWS, size, seed, world_size=world_size, rank=rank), number)
        for rank in range(world_size)
    ]
    assert len(whole) == len(INDEX) // size
    for position, batch in enumerate(whole):
        for name in FIELDS:
            merged = torch.stack([getattr(rank[position], name) for rank in ranks], dim=1).flatten()
            assert torch.equal(merged, getattr(batch, name))


def test_batches_follow_order_and_views():
    loader = TrainLoader(TRAIN, INDEX, VIEWS, 16, seed=5)
    batches = epoch(loader, 7)
    index = torch.cat([batch.index for batch in batches])
    assert torch.equal(index, epoch_order(5, 7, INDEX)[:48])
    assert torch.equal(torch.cat([batch.view for batch in batches]), epoch_views(5, 7, index, 50))
    assert torch.equal(torch.cat([batch.labels for batch in batches]), TRAIN.labels[index])
    assert all(batch.valid.all() and batch.valid.dtype == torch.bool for batch in batches)


def test_no_image_is_left_out_for_good():
    loader = TrainLoader(TRAIN, INDEX, VIEWS, 50, seed=0)
    seen = {i for number in range(12) for batch in epoch(loader, number) for i in batch.index.tolist()}
    assert seen == set(INDEX.tolist())


def test_iterating_again_repeats_the_epoch():
    loader = TrainLoader(TRAIN, INDEX, VIEWS, 16, seed=0)
    assert torch.equal(next(iter(loader)).index, next(iter(loader)).index)


def test_batches_belong_to_the_caller():
    loader = TrainLoader(TRAIN, INDEX, VIEWS, 16, seed=0)
    wanted = torch.stack([batch.labels for batch in loader])
    for batch in loader:
        batch.labels.fill_(0)
    assert torch.equal(torch.stack([batch.labels for batch in loader]), wanted)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(1, 3)), max_size=8), st.booleans())
def test_rows_of_an_epoch_do_not_depend_on_what_was_asked_before(questions, frozen):
    loader = TrainLoader(TRAIN, INDEX, VIEWS, 16, seed=3)
    for number, ahead, batches in questions:
        loader.set_epoch(number)
        loader.frozen = frozen  # from the first question on
        index = epoch_order(3, loader.number + ahead * (not frozen), INDEX)[:48].view(3, 16)
        for values in (loader.epoch(batches, ahead)[1], loader.distinct_rows(batches, ahead)[0].view(batches, 16)):
            assert torch.equal(values, index[:batches])


@pytest.mark.parametrize(
    ("size", "world_size", "message"),
    [
        (61, 1, r"recipe\.batch_size=61 is larger than the 60 training images"),
        (10, 4, r"recipe\.batch_size=10 cannot be shared evenly by 4 processes"),
        (0, 1, r"recipe\.batch_size=0 must be at least 1"),
    ],
)
def test_batch_sizes_that_do_not_fit(size, world_size, message):
    with pytest.raises(UserError, match=message):
        TrainLoader(TRAIN, INDEX, VIEWS, size, 0, world_size=world_size)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 120), st.integers(1, 9), st.integers(1, 40))
def test_every_evaluation_image_exactly_once(count, world_size, batch_size):
    index = torch.arange(count).flip(0)
    ranks = [
        list(EvalLoader(TRAIN, index, 3, batch_size, world_size=world_size, rank=rank)) for rank in range(world_size)
    ]
    lengths = {len(batch.index) for batches in ranks for batch in batches}
    assert len({len(batches) for batches in ranks}) == 1
    assert len(lengths) <= 1
    assert max(lengths, default=0) <= batch_size
    rows = [batch for batches in ranks for batch in batches]
    valid = [i for batch in rows for i in batch.index[batch.valid].tolist()]
    assert sorted(valid) == list(range(count))
    padding = sum(int((~batch.valid).sum()) for batch in rows)
    assert padding < world_size * max(1, len(ranks[0]))
    for batch in rows:
        assert (batch.view == 3).all()
        assert torch.equal(batch.labels, TRAIN.labels[batch.index])
        assert (batch.index[~batch.valid] == 0).all()  # the last row, repeated


def test_one_process_evaluates_in_order():
    loader = EvalLoader(TRAIN, INDEX, 0, 25)
    assert torch.equal(torch.cat([batch.index for batch in loader]), INDEX)
    assert [len(batch.index) for batch in loader] == [20, 20, 20]
    assert len(loader) == 3
    with pytest.raises(UserError, match=r"eval_batch_size=0"):
        EvalLoader(TRAIN, INDEX, 0, 0)


def test_evaluation_images_are_no_view_where_the_family_has_no_identity():
    assert all((batch.view == -1).all() for batch in EvalLoader(TRAIN, INDEX, None, 25))


def test_gathered_images():
    rows = next(iter(TrainLoader(TRAIN, INDEX, VIEWS, 16, seed=0)))
    batch = gather_batch(TRAIN.images, rows, VIEWS)
    expected = VIEWS(TRAIN.images[rows.index], rows.view, rows.index)
    assert batch.images.dtype == torch.float32
    assert torch.equal((batch.images * 255).round().to(torch.uint8), expected)
    assert torch.equal(batch.images, expected.float() / 255)
    assert 0 <= float(batch.images.min()) <= float(batch.images.max()) <= 1
    assert (rows.mix, batch.soft_labels) == (None, None)
    for name in FIELDS:
        assert torch.equal(getattr(batch, name), getattr(rows, name))
    untouched = gather_batch(TRAIN.images, rows)
    assert torch.equal(untouched.images, TRAIN.images[rows.index].float() / 255)
    assert torch.equal(gather_batch(TRAIN.images, rows, Identity()).images, untouched.images)


def test_gathering_leaves_the_images_in_memory_alone():
    before = TRAIN.images.clone()
    for rows in TrainLoader(TRAIN, INDEX, VIEWS, 16, seed=0):
        gather_batch(TRAIN.images, rows, VIEWS).images.zero_()
    assert torch.equal(TRAIN.images, before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gathering_on_the_gpu_gives_the_same_batch():
    rows = next(iter(TrainLoader(TRAIN, INDEX, VIEWS, 16, seed=0)))
    held = gather_batch(TRAIN.images.cuda(), rows, VIEWS)
    streamed = gather_batch(TRAIN.images, rows, VIEWS, torch.device("cuda"))
    for ours, sent, reference in zip(held[:5], streamed[:5], gather_batch(TRAIN.images, rows, VIEWS)[:5], strict=True):
        assert (ours.device.type, sent.device.type) == ("cuda", "cuda")
        assert torch.equal(ours.cpu(), reference)
        assert torch.equal(sent.cpu(), reference)


def test_grey_levels_are_the_nearest_float32_to_parts_of_255():
    levels = torch.arange(256, dtype=torch.uint8).view(2, 128)
    exact = torch.from_numpy((np.arange(256) / 255).astype(np.float32))
    assert torch.equal(to_unit(levels), exact.view(2, 128))
    assert torch.equal(unit_levels(levels.device), exact)  # what accelerators look up
