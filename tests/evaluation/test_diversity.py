"""Diversity against loops over images and pairs, SciPy, NumPy and exact identities."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_logits import degenerate, random_logits
from scipy.spatial.distance import jensenshannon
from scipy.special import rel_entr, softmax
from scipy.stats import entropy

from ekd_lightning.evaluation.diversity import diversity, spread_over_runs

CASES = degenerate()
SEVERAL = [name for name in CASES if name != "one branch"]


def mean_of(values):
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


@pytest.mark.parametrize("name", SEVERAL)
def test_who_is_right_is_counted_as_in_a_loop(name):
    branches, labels = CASES[name]
    hits = branches.argmax(-1).eq(labels).tolist()
    K, N = len(hits), len(labels)
    q, rho, fault = [], [], []
    for i, j in itertools.combinations(range(K), 2):
        n = {
            (a, b): sum(x == a and y == b for x, y in zip(hits[i], hits[j], strict=True))
            for a in (0, 1)
            for b in (0, 1)
        }
        plus, minus = n[1, 1] * n[0, 0], n[1, 0] * n[0, 1]
        q.append((plus - minus) / (plus + minus) if plus + minus else None)
        constant = len(set(hits[i])) == 1 or len(set(hits[j])) == 1
        rho.append(None if constant else float(np.corrcoef(hits[i], hits[j])[0, 1]))
        fault.append(n[0, 0] / N)
    found = diversity(branches, labels)
    assert found.q_statistic == pytest.approx(mean_of(q))
    assert found.error_correlation == pytest.approx(mean_of(rho))
    assert found.double_fault == pytest.approx(mean_of(fault))
    assert found.oracle_accuracy == sum(any(row) for row in zip(*hits, strict=True)) / N


@pytest.mark.parametrize("name", SEVERAL)
def test_divergences_are_those_of_scipy(name):
    branches, labels = CASES[name]
    p = softmax(branches.double().numpy(), axis=-1)
    pairs = list(itertools.combinations(range(len(p)), 2))
    found = diversity(branches, labels)
    js = np.mean([jensenshannon(p[i], p[j], axis=1) ** 2 for i, j in pairs])
    assert found.pairwise_js == pytest.approx(js, abs=1e-9)
    information = np.mean(entropy(p.mean(0), axis=-1) - entropy(p, axis=-1).mean(0))
    assert found.mutual_information == pytest.approx(information, abs=1e-9)
    if name != "very sure":  # probabilities underflow, log-probabilities do not
        kl = [(rel_entr(p[i], p[j]) + rel_entr(p[j], p[i])).sum(1).mean() / 2 for i, j in pairs]
        assert found.pairwise_kl == pytest.approx(np.mean(kl), abs=1e-9)
    assert math.isfinite(found.pairwise_kl)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 5), st.integers(1, 30))
def test_the_variance_is_what_averaging_wins_in_brier(seed, K, N):
    branches, labels = random_logits(K, N, 4, seed)
    p, onehot = branches.double().softmax(-1), torch.nn.functional.one_hot(labels, 4)
    members = (p - onehot).square().sum(-1).mean()
    together = (p.mean(0) - onehot).square().sum(-1).mean()
    found = diversity(branches, labels)
    assert found.variance == pytest.approx(float(members - together), abs=1e-12)
    assert 0 <= found.pairwise_js <= math.log(2)
    assert found.mutual_information <= math.log(K)
    again = diversity(branches.flip(0), labels)
    assert again.pairwise_kl == pytest.approx(found.pairwise_kl)
    assert found.oracle_accuracy >= float((branches.argmax(-1) == labels).double().mean(-1).max())


def test_one_member_has_an_oracle_and_no_diversity():
    branches, labels = CASES["one branch"]
    found = diversity(branches, labels)
    accuracy = float((branches[0].argmax(-1) == labels).double().mean())
    assert found == (None, None, None, None, None, None, accuracy, None)


def test_equal_members_do_not_differ():
    found = diversity(*CASES["identical branches"])
    assert (found.pairwise_kl, found.pairwise_js, found.variance) == (0, pytest.approx(0, abs=1e-15), 0)
    assert (found.q_statistic, found.error_correlation) == (1, 1)


def test_the_spread_over_seeds_is_that_of_a_loop():
    logits, labels = random_logits(4, 30, 5, seed=2)
    p = logits.double().softmax(-1).numpy()
    found = spread_over_runs(p, labels.numpy())
    variance = np.mean(
        [sum(np.var([p[r, i, c] for r in range(4)], ddof=1) for c in range(5)) for i in range(30)]
    )
    predicted = p.argmax(-1)
    differ = [np.mean(predicted[i] != predicted[j]) for i, j in itertools.combinations(range(4), 2)]
    accuracies = [np.mean(row == labels.numpy()) for row in predicted]
    expected = (4, variance, np.mean(differ), np.mean(accuracies), np.std(accuracies, ddof=1))
    assert found == pytest.approx(expected)
    half = spread_over_runs(p.astype(np.float16), labels.numpy())  # as arrays files hold them
    assert half.variance == pytest.approx(found.variance, rel=1e-2)
    same = spread_over_runs(np.repeat(p[:1], 3, 0), labels.numpy())
    assert (same.variance, same.disagreement, same.std_accuracy) == pytest.approx((0, 0, 0), abs=1e-15)


@pytest.mark.parametrize("shape", [(1, 30, 5), (2, 29, 5), (30, 5)])
def test_runs_that_do_not_fit_are_refused(shape):
    with pytest.raises(ValueError, match="must be"):
        spread_over_runs(np.zeros(shape), np.zeros(30, dtype=int))
