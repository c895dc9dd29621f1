"""Calibration against loops over images, torchmetrics, scikit-learn and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_logits import degenerate, random_logits
from scipy.optimize import brentq
from scipy.special import log_softmax, softmax
from sklearn.calibration import calibration_curve
from sklearn.metrics import log_loss
from torchmetrics.functional.classification import multiclass_calibration_error

from ekd_lightning.evaluation import calibration as cal

CASES = degenerate()


def probabilities(logits):
    return softmax(logits.double().numpy(), axis=-1)


@pytest.mark.parametrize("name", CASES)
def test_the_diagram_and_its_errors_are_those_of_a_loop(name):
    branches, labels = CASES[name]
    p, y = probabilities(branches[0]), labels.numpy()
    conf, hit, N = p.max(1), p.argmax(1) == y, len(y)
    bins = [[i for i in range(N) if b / 15 < min(conf[i], 1.0) <= (b + 1) / 15] for b in range(15)]
    ece = sum(len(b) / N * abs(np.mean(hit[b]) - np.mean(conf[b])) for b in bins if b)
    over = sum(len(b) / N * np.mean(conf[b]) * max(np.mean(conf[b]) - np.mean(hit[b]), 0) for b in bins if b)

    found = cal.reliability(torch.from_numpy(p), labels)
    assert found.count.tolist() == [len(b) for b in bins]
    for b, inside in enumerate(bins):
        expected = (np.mean(conf[inside]), np.mean(hit[inside])) if inside else (np.nan, np.nan)
        np.testing.assert_allclose((found.confidence[b], found.accuracy[b]), expected, rtol=1e-12)
    assert cal.calibration_error(found) == pytest.approx(ece, abs=1e-12)
    assert cal.overconfidence(found) == pytest.approx(over, abs=1e-12)
    onehot = np.eye(5)[y]
    scores = cal.score_probabilities(branches[0], labels)
    assert scores.ece == pytest.approx(ece, abs=1e-12)
    assert scores.brier == pytest.approx(((p - onehot) ** 2).sum(1).mean(), rel=1e-12, abs=1e-12)
    nll = -log_softmax(branches[0].double().numpy(), axis=-1)[np.arange(N), y].mean()
    assert scores.nll == pytest.approx(nll, rel=1e-12, abs=1e-12)


def test_the_diagram_and_its_error_are_those_of_published_packages():
    branches, labels = random_logits(N=500, C=5, seed=3)
    probs = branches[0].double().softmax(-1)
    found = cal.reliability(probs, labels)
    published = multiclass_calibration_error(probs, labels, num_classes=5, n_bins=15, norm="l1")
    assert cal.calibration_error(found) == pytest.approx(float(published), abs=1e-6)
    confidence, predicted = probs.max(-1)
    accuracy, mean_confidence = calibration_curve((predicted == labels).numpy(), confidence.numpy(), n_bins=15)
    full = found.count > 0
    np.testing.assert_allclose(found.accuracy[full], accuracy, rtol=1e-12)
    np.testing.assert_allclose(found.confidence[full], mean_confidence, rtol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_the_adaptive_error_is_that_of_a_loop(name):
    branches, labels = CASES[name]
    probs = torch.from_numpy(probabilities(branches[0]))
    conf, hit = probs.max(1).values.tolist(), (probs.argmax(1) == labels).tolist()
    N = len(hit)
    order = sorted(range(N), key=lambda i: conf[i])
    expected, start, bins = 0.0, 0, min(15, N)
    for b in range(bins):
        size = N // bins + (b < N % bins)
        inside, start = order[start : start + size], start + size
        right = 0.0
        for i in inside:  # what is equally sure counts as right to the same degree
            equal = [j for j in range(N) if conf[j] == conf[i]]
            right += sum(hit[j] for j in equal) / len(equal)
        expected += abs(right - sum(conf[i] for i in inside)) / N
    assert cal.adaptive_calibration_error(probs, labels) == pytest.approx(expected, abs=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 40), st.booleans())
def test_errors_do_not_depend_on_the_order_of_images(seed, N, coarse):
    branches, labels = random_logits(1, N, 4, seed)
    logits = branches[0].round() if coarse else branches[0]
    order = torch.randperm(N, generator=torch.Generator().manual_seed(seed))
    one, other = (cal.score_probabilities(logits, labels), cal.score_probabilities(logits[order], labels[order]))
    assert one == pytest.approx(other, abs=1e-12)
    assert all(0 <= value <= 1 for value in (one.ece, one.adaptive_ece, one.overconfidence))
    assert one.overconfidence <= one.ece + 1e-12


def test_of_all_equal_confidences_both_errors_are_the_same_gap():
    labels = torch.tensor([0] * 13 + [1] * 7)
    scores = cal.score_probabilities(torch.tensor([[1.0, 0.0]]).expand(20, -1), labels)
    gap = abs(13 / 20 - 1 / (1 + np.exp(-1)))
    assert scores.ece == pytest.approx(gap)
    assert scores.adaptive_ece == pytest.approx(gap)


def test_the_temperature_is_where_the_derivative_vanishes():
    """At the best T the mean logit of the label equals the mean expected logit, found here by bisection."""
    branches, labels = random_logits(N=300, scale=3.0)
    z, y = branches[0].double().numpy(), labels.numpy()

    def slope(inverse):
        return float(np.mean(z[np.arange(300), y] - (softmax(inverse * z, axis=1) * z).sum(1)))

    expected = 1 / brentq(slope, 0.05, 20.0, xtol=1e-12)
    assert cal.fit_temperature(branches[0], labels) == pytest.approx(expected, rel=1e-4)
    calibrated = cal.score_probabilities(branches[0] / expected, labels)
    assert calibrated.nll == pytest.approx(log_loss(y, softmax(z / expected, axis=1), labels=range(5)))
    assert calibrated.nll < cal.score_probabilities(branches[0], labels).nll


def test_the_temperature_of_the_true_model_is_recovered():
    """Labels drawn from softmax(z) and logits of 3 z: T is 3, but for chance."""
    g = torch.Generator().manual_seed(0)
    z = 2 * torch.randn(20_000, 6, generator=g)
    labels = torch.multinomial(z.softmax(-1), 1, generator=g)[:, 0]
    assert cal.fit_temperature(3 * z, labels) == pytest.approx(3.0, rel=0.03)


def test_there_is_no_temperature_where_none_is_best():
    fits = {name: cal.fit_temperature(branches[0], labels) for name, (branches, labels) in CASES.items()}
    assert fits["all right"] is None
    assert fits["all wrong"] is None
    assert fits["uniform"] == 1.0
    assert fits["very sure"] is None
    assert cal.fit_temperature(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64)) is None
    assert cal.fit_temperature(torch.full((3, 5), torch.nan), torch.zeros(3, dtype=torch.int64)) is None
