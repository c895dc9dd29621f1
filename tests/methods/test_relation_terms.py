from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from ekd_lightning.errors import UserError
from ekd_lightning.methods import build_term
from ekd_lightning.methods.losses import angles, relative_distances, similarities

from .helpers import make_batch, make_student, make_teachers, step_context, term_context


def features(B=6, D=4, seed=0):
    return torch.randn(B, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(D, seed):
    return torch.linalg.qr(features(D, D, seed))[0]


def huber(a, b):
    return np.mean([0.5 * d * d if abs(d) < 1 else abs(d) - 0.5 for d in (np.ravel(a) - np.ravel(b))])


def test_distances_against_loops():
    x = features().numpy()
    plain = np.array([[np.sqrt(((a - b) ** 2).sum()) for b in x] for a in x])
    expected = plain / plain[plain > 0].mean()
    np.testing.assert_allclose(relative_distances(torch.from_numpy(x)).numpy(), expected, atol=1e-12)


def test_angles_against_loops():
    x = features().numpy()
    expected = np.zeros((6, 6, 6))
    for j in range(6):
        for i in range(6):
            for k in range(6):
                if j not in (i, k):
                    a, b = x[i] - x[j], x[k] - x[j]
                    expected[j, i, k] = a @ b / (np.linalg.norm(a) * np.linalg.norm(b))
    np.testing.assert_allclose(angles(torch.from_numpy(x)).numpy(), expected, atol=1e-12)


def test_similarities_against_loops():
    x = features().numpy()
    gram = np.array([[a @ b for b in x] for a in x])
    expected = [row / np.sqrt((row**2).sum()) for row in gram]
    np.testing.assert_allclose(similarities(torch.from_numpy(x)).numpy(), expected, atol=1e-12)


@settings(max_examples=30)
@given(seed=st.integers(0, 1000), scale=st.floats(0.01, 100), shift=st.floats(-10, 10))
def test_what_makes_no_difference(seed, scale, shift):
    x = features(seed=seed)
    turned = scale * (x @ rotation(4, seed + 1))
    moved = turned + shift
    torch.testing.assert_close(relative_distances(moved), relative_distances(x), atol=1e-7, rtol=1e-7)
    torch.testing.assert_close(angles(moved), angles(x), atol=1e-7, rtol=1e-7)
    torch.testing.assert_close(similarities(turned), similarities(x), atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("function", [relative_distances, angles, similarities])
def test_gradients_by_finite_differences(function):
    x = features(5, 3).requires_grad_()
    assert torch.autograd.gradcheck(function, x)


@pytest.mark.parametrize("function", [relative_distances, angles, similarities])
def test_images_in_one_place_have_finite_gradients(function):
    x = torch.ones(4, 3, dtype=torch.float64).requires_grad_()
    function(x).square().sum().backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("function", [relative_distances, angles, similarities])
@pytest.mark.parametrize("case", ["twins", "near twins", "dead"])
def test_a_degenerate_image_of_the_student_does_not_blow_up_the_gradient(function, case):
    """The teacher tells apart what the student does not; published codes give gradients of 1e9 and more here."""
    student, teacher = features(seed=1).float(), features(seed=2).float()
    if case == "dead":
        student[2] = 0.0
    else:
        student[1] = student[0] + (1e-7 if case == "near twins" else 0.0)
    student.requires_grad_()
    functional.smooth_l1_loss(function(student), function(teacher)).backward()
    assert torch.isfinite(student.grad).all()
    assert student.grad.abs().max() < 1.0
    assert student.grad.abs().sum() > 0


@pytest.mark.parametrize("function", [relative_distances, angles, similarities])
def test_a_last_batch_of_one_image_is_survived(function):
    x = features(1).requires_grad_()
    function(x).sum().backward()
    assert torch.isfinite(x.grad).all()


def test_products_are_not_rounded_under_autocast():
    student, teachers = make_student(), make_teachers()
    for name in ("rkd_distance", "rkd_angle", "similarity"):
        plain = term_value(name, student, teachers)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(term_value(name, student, teachers), plain)


def term_value(name, student, teachers, assignment="mean", **options):
    term = build_term(name, 1.0, term_context(assignment=assignment), **options)
    return term(step_context(student, teachers, make_batch(), assignment))


@pytest.mark.parametrize(
    ("name", "matrix", "loss"),
    [
        ("rkd_distance", relative_distances, huber),
        ("rkd_angle", angles, huber),
        ("similarity", similarities, lambda a, b: np.mean((a - b) ** 2)),
    ],
)
def test_terms_are_the_mean_over_branches_and_teachers(name, matrix, loss):
    student, teachers = make_student(dtype=torch.float64), make_teachers(dtype=torch.float64)
    found = term_value(name, student, teachers, feature="pooled")
    expected = [
        loss(matrix(student.pooled[k]).detach().numpy(), matrix(teachers.pooled[m]).detach().numpy())
        for k in range(2)
        for m in range(3)
    ]
    assert float(found.detach()) == pytest.approx(np.mean(expected))
    found.backward()
    assert student.pooled.grad.abs().sum() > 0
    assert all(pooled.grad is None for pooled in teachers.pooled)


def test_similarity_reads_flattened_maps_of_the_last_stage():
    student, teachers = make_student(), make_teachers()
    found = term_value("similarity", student, teachers, [[1, 0, 0], [0, 1, 0]])
    pairs = [(student.stages[k]["stage2"], teachers.stages[k]["stage2"]) for k in range(2)]
    expected = sum(functional.mse_loss(similarities(a), similarities(b)) for a, b in pairs) / 2
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["rkd_distance", "rkd_angle", "similarity"])
def test_zero_at_identity(name):
    student = make_student(K=1, d=7)
    teachers = make_teachers(M=1)._replace(pooled=(student.pooled[0],), stages=(student.stages[0],))
    term = build_term(name, 1.0, term_context(1, 1), feature="pooled")
    assert abs(float(term(step_context(student, teachers, make_batch())).detach())) < 1e-12


def test_a_missing_stage_is_one_line():
    with pytest.raises(UserError, match="stage9"):
        build_term("similarity", 1.0, term_context(), feature="stage9")
