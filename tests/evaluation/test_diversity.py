"""Diversity of members, and similarity of branches and teachers."""

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
from scipy.stats import entropy, ortho_group
from sklearn.metrics import accuracy_score
from sklearn.preprocessing import KernelCenterer

from ekd_lightning.evaluation import diversity as sim
from ekd_lightning.evaluation.diversity import diversity, spread_over_runs
from ekd_lightning.methods.assignment import make_assignment

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
    variance = np.mean([sum(np.var([p[r, i, c] for r in range(4)], ddof=1) for c in range(5)) for i in range(30)])
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


def kernel_cka(x, y):
    """HSIC(K, M) / sqrt(HSIC(K, K) HSIC(M, M)) with centred linear kernels [N, N]."""
    k, m = (KernelCenterer().fit_transform(a @ a.T) for a in (x, y))
    return (k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum())


def features(N, D, seed):
    return torch.from_numpy(np.random.default_rng(seed).normal(3.0, 2.0, (N, D)).astype(np.float32))


def test_cka_is_that_of_the_kernels():
    first, second = [features(40, 8, 0), features(40, 8, 1)], [features(40, 5, 2), features(40, 60, 3)]
    found = sim.cka_matrix(first, second)
    expected = [[kernel_cka(x.double().numpy(), y.double().numpy()) for y in second] for x in first]
    np.testing.assert_allclose(found, expected, rtol=1e-9)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.01, 100))
def test_cka_knows_no_rotation_shift_or_scale(seed, scale):
    x, y = features(30, 6, seed).double(), features(30, 4, seed + 1).double()
    rotation = torch.from_numpy(ortho_group.rvs(6, random_state=seed))
    found = sim.cka_matrix([x, scale * x @ rotation + 7], [x, y])
    np.testing.assert_allclose(found[0], found[1], rtol=1e-9)
    assert found[0, 0] == pytest.approx(1.0)
    assert 0 <= found[0, 1] <= 1


def test_features_that_do_not_vary_have_no_cka():
    x = features(20, 3, 0)
    for constant in (torch.zeros(20, 3), torch.full((20, 3), 0.1), x[:1].expand(20, -1)):
        found = sim.cka_matrix([x, constant], [x, constant])
        assert found[0, 0] == pytest.approx(1.0)
        assert np.isnan([found[0, 1], found[1, 0], found[1, 1]]).all()
    assert np.isnan(sim.cka_matrix([x[:1]], [x[:1]])).all()


def test_agreement_and_divergence():
    students, teachers = random_logits(3, 50, 4, 0)[0], random_logits(2, 50, 4, 1)[0]
    a, b = students.argmax(-1), teachers.argmax(-1)
    found = sim.agreement_matrix(a, b)
    np.testing.assert_allclose(found, [[accuracy_score(x, y) for y in b] for x in a])
    p, q = (softmax(z.double().numpy(), axis=-1) for z in (students, teachers))
    expected = [[entropy(t, s, axis=-1).mean() for t in q] for s in p]
    np.testing.assert_allclose(sim.kl_matrix(students, teachers), expected, rtol=1e-9)
    assert sim.agreement_matrix(a, a).diagonal().tolist() == [1.0] * 3
    assert sim.kl_matrix(students, students).diagonal().tolist() == [0.0] * 3


@pytest.mark.parametrize(
    ("kind", "own"),
    [
        ("one_to_one", [0, 1, 2]),
        ("permuted", [1, 2, 0]),
        ("mean", [None, None, None]),
        ([[0.6, 0.2, 0.2], [0, 0.5, 0.5], [0, 0, 1]], [0, None, 2]),
    ],
)
def test_own_teachers_are_those_of_the_assignment(kind, own):
    assert sim.own_teachers(make_assignment(kind, 3, 3)) == own


def test_the_margin_finds_what_was_put_in_and_the_controls_do_not():
    """S_km = a_k + b_m + 0.3 [m = own]: the margin under the true assignment is 0.3, whatever a and b."""
    rng = np.random.default_rng(0)
    base = rng.normal(size=(3, 1)) + rng.normal(size=(1, 3))
    trained_one_to_one, trained_with_mean = base + 0.3 * np.eye(3), base
    assert sim.teacher_margin(trained_one_to_one, [0, 1, 2]) == pytest.approx(0.3)
    assert sim.teacher_margin(trained_one_to_one, [1, 2, 0]) == pytest.approx(-0.15)
    assert sim.teacher_margin(trained_with_mean, [0, 1, 2]) == pytest.approx(0, abs=1e-12)


def test_margins_are_means_of_own_minus_others():
    s = np.array([[0.9, 0.5, 0.1], [0.2, 0.8, 0.4]])
    assert sim.teacher_margin(s, [0, 1]) == pytest.approx(((0.9 - 0.3) + (0.8 - 0.3)) / 2)
    assert sim.teacher_margin(s, [0, None]) == pytest.approx(0.6)
    for nothing in (sim.teacher_margin(s, [None, None]), sim.teacher_margin(s[:, :1], [0, 0])):
        assert nothing is None
    s[0, 2] = np.nan
    assert sim.teacher_margin(s, [0, 1]) is None
