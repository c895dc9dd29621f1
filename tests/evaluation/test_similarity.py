"""Similarity against the definition of CKA over kernels, scikit-learn, loops and designed matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_logits import random_logits
from scipy.special import softmax
from scipy.stats import entropy, ortho_group
from sklearn.metrics import accuracy_score
from sklearn.preprocessing import KernelCenterer

from ekd_lightning.evaluation import similarity as sim
from ekd_lightning.methods.assignment import make_assignment


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


def test_agreement_and_fidelity():
    students, teachers = random_logits(3, 50, 4, 0)[0], random_logits(2, 50, 4, 1)[0]
    a, b = students.argmax(-1), teachers.argmax(-1)
    found = sim.agreement_matrix(a, b)
    np.testing.assert_allclose(found, [[accuracy_score(x, y) for y in b] for x in a])
    p, q = (softmax(z.double().numpy(), axis=-1) for z in (students, teachers))
    expected = [[entropy(t, s, axis=-1).mean() for t in q] for s in p]
    np.testing.assert_allclose(sim.kl_matrix(students, teachers), expected, rtol=1e-9)
    one = sim.fidelity(students[1], teachers[0])
    assert one == pytest.approx((found[1, 0], expected[1][0]))
    assert sim.fidelity(students[1], students[1]) == (1.0, 0.0)


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
