"""Order and views: values never change, and depend on (seed, epoch, index) alone."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ekd_lightning.data.order import epoch_order, epoch_views, hash_uniform_u64

MASK = 2**64 - 1
GOLDEN_HASH = [16321491304643971414, 4585330820673184961, 10430974457111710706]
GOLDEN_ORDER = [3, 1, 9, 6, 2, 4, 7, 8, 0, 5]
GOLDEN_VIEWS = [91, 147, 11, 83, 20, 78, 22, 100, 20, 73]


def next_splitmix64(state: int) -> int:
    """One step of the published generator, with Python's own integers."""
    state = (state + 0x9E3779B97F4A7C15) & MASK
    z = state
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def slow_hash(stream: int, seed: int, epoch: int, index: int) -> int:
    value = 0
    for part in (stream, seed, epoch, index):
        value = next_splitmix64(value ^ (part & MASK))
    return value


def test_reference_generator_gives_published_outputs():
    # First outputs of splitmix64 for seed 1234567, as listed by several independent implementations.
    state, outputs = 1234567, []
    for _ in range(3):
        outputs.append(next_splitmix64(state))
        state = (state + 0x9E3779B97F4A7C15) & MASK
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@given(
    st.integers(0, 9), st.integers(-(2**63), 2**64), st.integers(0, 10**6), st.lists(st.integers(0, 2**62), min_size=1)
)
def test_hash_equals_pure_python(stream, seed, epoch, index):
    ours = hash_uniform_u64(stream, seed, epoch, np.array(index))
    assert ours.tolist() == [slow_hash(stream, seed, epoch, i) for i in index]


def test_golden_values():
    """A change here would silently change every published run."""
    assert hash_uniform_u64(1, 0, 0, np.arange(3)).tolist() == GOLDEN_HASH
    assert epoch_order(0, 0, torch.arange(10)).tolist() == GOLDEN_ORDER
    assert epoch_views(0, 0, torch.arange(10), 162).tolist() == GOLDEN_VIEWS


def test_order_is_a_permutation_whatever_the_input_order():
    index = torch.tensor([7, 3, 100, 42, 5])
    order = epoch_order(1, 2, index)
    assert sorted(order.tolist()) == sorted(index.tolist())
    assert torch.equal(order, epoch_order(1, 2, index.flip(0)))


@pytest.mark.parametrize("other", [(0, 1), (1, 0)])
def test_order_and_views_change_with_seed_and_epoch(other: tuple[int, int]):
    index = torch.arange(1000)
    assert not torch.equal(epoch_order(0, 0, index), epoch_order(*other, index))
    assert (epoch_views(0, 0, index, 162) == epoch_views(*other, index, 162)).float().mean() < 0.05


def chi_square(counts: np.ndarray) -> float:
    expected = counts.sum() / len(counts)
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("num_views", [2, 81, 162])
def test_views_are_uniform(num_views):
    """Over images of an epoch, and over epochs of an image."""
    index = torch.arange(20000)
    one_epoch = epoch_views(3, 5, index, num_views).numpy()
    one_image = np.array([epoch_views(3, e, torch.tensor([17]), num_views).item() for e in range(5000)])
    for views in (one_epoch, one_image):
        assert views.min() >= 0
        assert views.max() < num_views
        freedom = num_views - 1
        # Five standard deviations of the chi-square distribution.
        assert chi_square(np.bincount(views, minlength=num_views)) < freedom + 5 * (2 * freedom) ** 0.5 + 5


def test_places_in_the_order_are_uniform():
    """Image 3 of 50 comes anywhere, and its view does not depend on its place."""
    index = torch.arange(50)
    places, views = [], []
    for epoch in range(5000):
        places.append(int((epoch_order(0, epoch, index) == 3).nonzero()))
        views.append(int(epoch_views(0, epoch, index[3:4], 162)))
    assert chi_square(np.bincount(places, minlength=50)) < 49 + 5 * 98**0.5
    assert abs(np.corrcoef(places, views)[0, 1]) < 0.06


@settings(max_examples=30, deadline=None)
@given(st.sets(st.integers(0, 49999), min_size=1, max_size=50), st.integers(0, 99), st.integers(0, 99))
def test_view_does_not_depend_on_other_images(chosen, seed, epoch):
    everything = epoch_views(seed, epoch, torch.arange(50000), 162)
    some = torch.tensor(sorted(chosen))
    assert torch.equal(epoch_views(seed, epoch, some, 162), everything[some])


def test_relative_order_does_not_depend_on_other_images():
    everything = epoch_order(0, 3, torch.arange(1000)).tolist()
    evens = epoch_order(0, 3, torch.arange(0, 1000, 2)).tolist()
    assert [i for i in everything if i % 2 == 0] == evens


def test_one_view_is_always_view_zero():
    assert not epoch_views(0, 0, torch.arange(100), 1).any()
