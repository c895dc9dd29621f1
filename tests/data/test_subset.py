"""Subsets: stratified, nested, seeded, and refused where they make no sense."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ekd_lightning.data.subset import choose_subset, take_evenly
from ekd_lightning.errors import UserError

BALANCED = torch.arange(1000) % 10
UNEVEN = torch.cat([torch.full((n,), c) for c, n in enumerate([30, 57, 200, 111])])[torch.randperm(398)]

two_labels = st.sampled_from([BALANCED, UNEVEN])
per_mille = st.integers(40, 1000)


def counts(labels, index):
    return torch.bincount(labels[index], minlength=int(labels.max()) + 1).tolist()


@settings(max_examples=60, deadline=None)
@given(two_labels, per_mille, st.integers(0, 5))
def test_every_class_gives_its_rounded_share(labels, mille, seed):
    subset = choose_subset(labels, fraction=mille / 1000, val_fraction=0, seed=seed)
    sizes = counts(labels, torch.arange(len(labels)))
    expected = [math.floor(Fraction(mille, 1000) * n + Fraction(1, 2)) for n in sizes]
    assert counts(labels, subset.train_index) == expected
    assert len(subset.val_index) == 0
    assert subset.fraction == mille / 1000


@settings(max_examples=60, deadline=None)
@given(two_labels, per_mille, per_mille, st.sampled_from([0.0, 0.5, 0.9]), st.integers(0, 5))
def test_smaller_lies_inside_larger(labels, a, b, val_fraction, seed):
    small, large = (
        choose_subset(labels, fraction=mille / 1000, val_fraction=val_fraction, seed=seed)
        for mille in sorted((max(a, 70), max(b, 70)))
    )
    assert set(small.train_index.tolist()) <= set(large.train_index.tolist())
    assert set(small.val_index.tolist()) <= set(large.val_index.tolist())


@settings(max_examples=60, deadline=None)
@given(two_labels, st.integers(10, 30), st.integers(10, 90), st.integers(0, 5))
def test_validation_is_stratified_and_disjoint(labels, per_class, percent, seed):
    subset = choose_subset(labels, per_class=per_class, val_fraction=percent / 100, seed=seed)
    classes = int(labels.max()) + 1
    assert counts(labels, subset.val_index) == [per_class * percent // 100] * classes
    both = torch.cat([subset.train_index, subset.val_index])
    assert len(both.unique()) == len(both) == per_class * classes
    for part in (subset.train_index, subset.val_index):
        assert part.dtype == torch.int64
        assert torch.equal(part, part.sort().values)


def test_a_tenth_is_exactly_every_tenth():
    """In floating point floor((j + 1) * 0.1) goes astray."""
    for count in (10, 500, 5000):
        marked = take_evenly(count, Fraction("0.1")).nonzero()[0]
        assert marked.tolist() == list(range(9, count, 10))


def test_cifar_sizes():
    labels = torch.arange(50000) % 10
    subset = choose_subset(labels, fraction=0.1)
    assert (len(subset.train_index), len(subset.val_index)) == (4500, 500)
    assert subset.fraction == 0.1


def test_seed_decides_and_hash_says_so():
    first, again, other = (choose_subset(BALANCED, fraction=0.5, seed=seed) for seed in (0, 0, 1))
    assert first.sha256 == again.sha256
    assert torch.equal(first.train_index, again.train_index)
    assert first.sha256 != other.sha256
    assert not torch.equal(first.train_index, other.train_index)
    assert first.sha256 != choose_subset(BALANCED, fraction=0.5, val_fraction=0).sha256
    assert first.sha256 == "f7465a168789ce3ce7032d9a9d5988178e3e809761ae2e6696824827ed6c9e3c"


def test_everything_by_default():
    subset = choose_subset(BALANCED, val_fraction=0)
    assert torch.equal(subset.train_index, torch.arange(1000))
    assert (subset.fraction, subset.per_class, subset.seed) == (1.0, None, 0)


def test_absent_classes_are_not_missed():
    assert len(choose_subset(torch.tensor([0, 2] * 10), per_class=10).train_index) == 18


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fraction": 0.0}, r"data\.fraction=0.0 must lie in \(0, 1\]"),
        ({"fraction": 1.5}, r"data\.fraction=1.5 must lie in \(0, 1\]"),
        ({"fraction": -0.1}, r"data\.fraction=-0.1"),
        ({"fraction": math.nan}, r"data\.fraction=nan"),
        ({"fraction": 0.001}, r"data\.fraction=0.001 leaves class 0 without images \(100 in the whole"),
        ({"fraction": 0.5, "per_class": 5}, r"data\.fraction=0.5 and data\.per_class=5 exclude"),
        ({"per_class": 0}, r"data\.per_class=0 must lie in 1\.\.100"),
        ({"per_class": -3}, r"data\.per_class=-3"),
        ({"per_class": 101}, r"data\.per_class=101 must lie in 1\.\.100 \(the smallest class has 100\)"),
        ({"val_fraction": 1.0}, r"data\.val_fraction=1.0 must lie in \[0, 1\)"),
        ({"val_fraction": -0.1}, r"data\.val_fraction=-0.1"),
        ({"per_class": 9}, r"data\.val_fraction=0.1 leaves class 0 without validation.*data\.val_fraction=0$"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        choose_subset(BALANCED, **arguments)
    assert "\n" not in str(caught.value)
