from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ekd_lightning.methods import build_term, losses
from ekd_lightning.methods.losses import decoupled, soft_cross_entropy, standardized

from .helpers import make_batch, make_student, make_teachers, rand, step_context, term_context
from .reference import kl, softmax


def logits(B=6, C=5, seed=0):
    return rand(B, C, seed=seed, scale=3.0)


LABELS = torch.tensor([0, 4, 2, 2, 1, 3])


def test_decoupled_against_loops():
    student, teacher, T = logits(seed=1), logits(seed=2), 3.0
    tckd, nckd = [], []
    for z, t, y in zip(student.tolist(), teacher.tolist(), LABELS.tolist(), strict=True):
        p, q = softmax(t, T), softmax(z, T)
        tckd.append(kl([p[y], 1 - p[y]], [q[y], 1 - q[y]]))
        others_t = softmax([v for c, v in enumerate(t) if c != y], T)
        others_z = softmax([v for c, v in enumerate(z) if c != y], T)
        nckd.append(kl(others_t, others_z))
    found = decoupled(student, teacher, LABELS, T)
    assert float(found[0]) == pytest.approx(T**2 * np.mean(tckd))
    assert float(found[1]) == pytest.approx(T**2 * np.mean(nckd))


@given(seed=st.integers(0, 500), T=st.sampled_from([1.0, 2.0, 4.0]))
def test_the_parts_make_up_hintons_divergence(seed, T):
    """KL = TCKD + (1 - p_y) NCKD, image by image."""
    student, teacher = logits(1, 5, seed), logits(1, 5, seed + 1)
    tckd, nckd = decoupled(student, teacher, LABELS[:1], T)
    rest = 1 - (teacher / T).softmax(-1)[0, LABELS[0]]
    expected = losses.kd_divergence(student, teacher, T)
    torch.testing.assert_close(tckd + rest * nckd, expected, atol=1e-12, rtol=1e-8)


def test_decoupled_is_zero_at_identity_and_blind_to_shifts():
    z = logits()
    assert max(map(abs, (float(x) for x in decoupled(z, z + 7.0, LABELS, 2.0)))) < 1e-12


def test_decoupled_over_branches_is_their_mean():
    both, teachers = torch.stack([logits(seed=3), logits(seed=4)]), torch.stack([logits(), logits(seed=9)])
    found = decoupled(both, teachers, LABELS, 4.0)
    each = [decoupled(z, t, LABELS, 4.0) for z, t in zip(both, teachers, strict=True)]
    for i in range(2):
        torch.testing.assert_close(found[i], (each[0][i] + each[1][i]) / 2)


@given(factor=st.floats(0.1, 20), shift=st.floats(-50, 50), seed=st.integers(0, 100))
def test_standardised_logits_do_not_know_of_affine_maps(factor, shift, seed):
    z = logits(seed=seed)
    torch.testing.assert_close(standardized(factor * z + shift), standardized(z), atol=1e-5, rtol=1e-5)


def test_standardised_logits_against_numpy():
    z = logits()
    array = z.numpy()
    expected = (array - array.mean(1, keepdims=True)) / (array.std(1, ddof=1, keepdims=True) + 1e-7)
    np.testing.assert_allclose(standardized(z).numpy(), expected)
    C = array.shape[1]
    paper = (array - array.mean(1, keepdims=True)) / array.std(1, keepdims=True)
    np.testing.assert_allclose(standardized(z).numpy() * np.sqrt(C / (C - 1)), paper, rtol=1e-6)


def test_soft_cross_entropy_has_the_gradient_of_the_divergence_over_t_squared():
    T, teacher = 3.0, logits(seed=8)
    student = logits(seed=7).requires_grad_()
    (first,) = torch.autograd.grad(soft_cross_entropy(student, teacher, T), student)
    (second,) = torch.autograd.grad(losses.kd_divergence(student, teacher, T) / T**2, student)
    torch.testing.assert_close(first, second)


def evaluate(name, assignment="mean", **options):
    term = build_term(name, 1.0, term_context(assignment=assignment), **options)
    return term(step_context(make_student(), make_teachers(), make_batch(), assignment))


def test_terms_compare_every_branch_with_its_teachers():
    student, teachers, batch = make_student(), make_teachers(), make_batch()
    target = teachers.logits[:2]
    tckd, nckd = decoupled(student.branch_logits, target, batch.labels, 4.0)
    torch.testing.assert_close(
        evaluate("dkd", "one_to_one", alpha=2.0, beta=3.0), 2 * tckd + 3 * nckd, check_dtype=False
    )
    expected = losses.kd_divergence(standardized(student.branch_logits), standardized(target), 2.0)
    torch.testing.assert_close(evaluate("kd_standardized", "one_to_one", temperature=2.0), expected)
    torch.testing.assert_close(evaluate("dkd", reduction="sum"), 2 * evaluate("dkd"))


def test_a_mixed_image_has_the_class_of_its_larger_share():
    batch = make_batch()
    soft = torch.nn.functional.one_hot((batch.labels + 1) % 4, 4).float() * 0.6
    soft += 0.4 * torch.nn.functional.one_hot(batch.labels, 4)
    term = build_term("dkd", 1.0, term_context())
    student, teachers = make_student(), make_teachers()
    mixed = term(step_context(student, teachers, batch._replace(soft_labels=soft)))
    plain = term(step_context(student, teachers, batch._replace(labels=(batch.labels + 1) % 4)))
    torch.testing.assert_close(mixed, plain)


ON_LOGITS = [
    ("kd_ensemble", {}),
    ("kd_ensemble", {"combine": "probabilities"}),
    ("kd_branch", {}),
    ("kd_branch", {"combine": "probabilities"}),
    ("kd_branch", {"loss": "kl_plain"}),
    ("dkd", {}),
    ("kd_ebkd", {}),
    ("kd_camkd", {}),
    ("kd_aekd", {}),
]


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("assignment", ["mean", "one_to_one"])
@pytest.mark.parametrize(("name", "options"), ON_LOGITS)
def test_masked_classes_of_a_teacher_are_classes_of_no_probability(name, options, assignment, soft):
    """-inf acts as -1e4, whose probability is 0 in float64: for some classes, the true one, all but the true one."""
    batch = make_batch()
    if soft:
        batch = batch._replace(soft_labels=torch.nn.functional.one_hot(batch.labels, 4).float())
    masked = torch.zeros(3, 5, 4, dtype=torch.bool)
    masked[0, :, 1] = masked[1, 0, batch.labels[0]] = True
    masked[2, 1] = torch.arange(4) != batch.labels[1]
    found = []
    for low in (-torch.inf, -1e4):
        student, teachers = make_student(dtype=torch.float64), make_teachers(dtype=torch.float64)
        teachers = teachers._replace(logits=teachers.logits.detach().masked_fill(masked, low))
        if (name, options) == ("kd_ensemble", {}) or assignment == "mean":
            # A mean of logits that masks every class has no distribution.
            teachers = teachers._replace(logits=teachers.logits.index_fill(0, torch.tensor([1, 2]), 0.5))
        term = build_term(name, 1.0, term_context(assignment=assignment), **options)
        value = term(step_context(student, teachers, batch, assignment))
        value.backward()
        found.append((value, student.branch_logits.grad))
        assert value.isfinite()
        assert student.branch_logits.grad.isfinite().all()
    torch.testing.assert_close(*found)


def test_a_masked_class_contributes_nothing_to_the_divergence():
    student, T = logits(1, 5), 2.0
    teacher = torch.tensor([[1.0, -torch.inf, 0.5, -torch.inf, 2.0]], dtype=torch.float64)
    p = softmax([1.0, 0.5, 2.0], T)
    q = np.array(softmax(student[0].tolist(), T))[[0, 2, 4]]
    assert losses.kd_divergence(student, teacher, T).item() == pytest.approx(T**2 * kl(p, q))
    both = losses.kd_divergence(student.masked_fill(teacher.isneginf(), -torch.inf), teacher, T)
    assert both.isfinite()
    missing = losses.kd_divergence(teacher, student, T)  # a class that the student rules out and the teacher does not
    assert missing.item() == torch.inf


def test_one_teachers_masked_class_stays_with_its_branches():
    teachers = make_teachers().logits.detach()
    masked = teachers.clone()
    masked[0, :, 2] = -torch.inf
    rows = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    for combine in ("logits", "probabilities"):
        found = losses.combine_teachers(masked, rows, 2.0, combine)
        assert found[0, :, 2].isneginf().all()
        torch.testing.assert_close(found[1], losses.combine_teachers(teachers, rows, 2.0, combine)[1])
    half = torch.full((3,), 1 / 3)
    assert losses.combine_teachers(masked, half)[:, 2].isneginf().all()  # a geometric mean
    assert losses.combine_teachers(masked, half, 2.0, "probabilities").isfinite().all()
