"""Two forms of one network, compared image by image in a plain loop."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ekd_lightning.data import load_dataset
from ekd_lightning.evaluation.predict import compare_logits, default_tolerance, predict_logits


@given(
    seed=st.integers(0, 10_000),
    n=st.integers(1, 12),
    classes=st.integers(1, 5),
    noise=st.sampled_from([0.0, 1e-6, 1e-3, 1.0]),
)
def test_against_a_loop(seed, n, classes, noise):
    torch.manual_seed(seed)
    reference = torch.randn(n, classes).round(decimals=1)  # with ties
    logits = reference + noise * torch.randn(n, classes)
    labels = torch.randint(classes, (n,))
    found = compare_logits(logits, reference, labels, tolerance=1e-3)
    largest, right, expected_right, changed, clearly = 0.0, 0, 0, 0, 0
    for z, r, y in zip(logits.double().tolist(), reference.double().tolist(), labels.tolist(), strict=True):
        largest = max(largest, *(abs(a - b) for a, b in zip(z, r, strict=True)))
        prediction, expected = z.index(max(z)), r.index(max(r))
        right += prediction == y
        expected_right += expected == y
        changed += prediction != expected
        first, *rest = sorted(r, reverse=True)
        clearly += prediction != expected and first - rest[0] > 2e-3
    assert found.max_difference == pytest.approx(largest, abs=1e-15)
    assert (found.accuracy, found.reference_accuracy) == (right / n, expected_right / n)
    assert (found.images, found.changed, found.changed_clearly) == (n, changed, clearly)
    assert found.is_same == (largest <= 1e-3 and clearly == 0)


def test_logits_that_are_no_numbers_never_agree():
    reference = torch.tensor([[0.0, 1.0]])
    for value in (math.nan, math.inf):
        assert not compare_logits(torch.tensor([[value, 1.0]]), reference, torch.tensor([1]), 1e-3).is_same


def test_the_tolerance_follows_the_largest_logit():
    assert default_tolerance(torch.tensor([[0.1, -0.2]])) == pytest.approx(1e-4)
    assert default_tolerance(torch.tensor([[3.0, -50.0]])) == pytest.approx(5e-3)


def test_what_cannot_be_compared():
    for logits in (torch.zeros(2, 3), torch.zeros(0, 2)):
        with pytest.raises(ValueError, match="cannot be compared"):
            compare_logits(logits, torch.zeros(len(logits), 2), torch.zeros(len(logits)).long(), 1.0)


def test_every_image_is_asked_once_and_in_order(tmp_path):
    test = load_dataset("digits", tmp_path).test
    found = predict_logits(lambda batch: batch.mean((1, 2, 3))[:, None], test, batch_size=100)
    expected = test.images.double().div(255).mean((1, 2, 3))[:, None]
    assert torch.allclose(found.double(), expected, atol=1e-6)
