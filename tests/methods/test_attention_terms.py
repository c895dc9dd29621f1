from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ekd_lightning.errors import UserError
from ekd_lightning.methods import build_term
from ekd_lightning.methods.losses import attention_loss, attention_map

from .helpers import make_batch, make_student, make_teachers, step_context, term_context


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reference_map(f):
    """[B][H·W] by loops over single numbers."""
    B, C, H, W = f.shape
    rows = []
    for b in range(B):
        row = [sum(f[b, c, i, j] ** 2 for c in range(C)) / C for i in range(H) for j in range(W)]
        length = np.sqrt(sum(v * v for v in row))
        rows.append([v / length for v in row])
    return rows


@pytest.mark.parametrize("form", ["squared", "norm"])
def test_against_loops(form):
    s, t = rand(3, 4, 2, 5), rand(3, 6, 2, 5, seed=1)
    total = 0.0
    for row_s, row_t in zip(reference_map(s.numpy()), reference_map(t.numpy()), strict=True):
        squares = sum((a - b) ** 2 for a, b in zip(row_s, row_t, strict=True))
        total += squares if form == "squared" else 0.5 * np.sqrt(squares)
    assert attention_loss(s, t, form).item() == pytest.approx(total / (3 * 10), rel=1e-12)


@settings(max_examples=30, deadline=None)
@given(scale=st.floats(1e-3, 1e3), seed=st.integers(0, 999), form=st.sampled_from(["squared", "norm"]))
def test_channel_order_and_positive_factors_make_no_difference(scale, seed, form):
    s, t = rand(3, 4, 2, 5, seed=seed), rand(3, 6, 2, 5, seed=seed + 1)
    plain = attention_loss(s, t, form)
    permutation = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(attention_loss(scale * s[:, permutation], t, form), plain)
    torch.testing.assert_close(attention_loss(s, scale * t.flip(1), form), plain)


@pytest.mark.parametrize("form", ["squared", "norm"])
def test_zero_at_identity_with_a_finite_gradient(form):
    s = rand(3, 4, 2, 5).requires_grad_()
    loss = attention_loss(s, s.detach().clone(), form)
    loss.backward()
    assert loss.item() == 0
    assert s.grad.isfinite().all()


def test_maps_have_length_one_and_dead_ones_are_zero():
    f = rand(3, 4, 2, 5)
    f[1] = 0
    torch.testing.assert_close(attention_map(f).norm(dim=1), torch.tensor([1, 0, 1.0], dtype=torch.float64))


@pytest.mark.parametrize("form", ["squared", "norm"])
def test_gradients(form):
    t = rand(2, 3, 2, 2, seed=1)
    s = rand(2, 4, 4, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: attention_loss(x, t, form), s)


def test_half_precision_features_give_a_float32_loss_close_to_full_precision():
    s, t = rand(2, 4, 4, 4).bfloat16(), rand(2, 3, 2, 2, seed=1).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = attention_loss(s, t)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), attention_loss(s.double(), t.double()), rtol=1e-5, atol=0)


def test_the_term_adds_stages_and_averages_branches_and_teachers():
    term = build_term("attention", 1.0, term_context(), stages=["stage1", "stage2"])
    assert term.student_stages == term.teacher_stages == ("stage1", "stage2")
    assert not list(term.parameters())
    student, teachers = make_student(), make_teachers()
    value = term(step_context(student, teachers, make_batch()))
    expected = sum(
        attention_loss(student.stages[k][name], teachers.stages[m][name])
        for k in range(2)
        for m in range(3)
        for name in ("stage1", "stage2")
    )
    torch.testing.assert_close(value, expected / 6)
    value.backward()
    assert all(s["stage1"].grad is not None for s in student.stages)
    assert all(t["stage1"].grad is None for t in teachers.stages)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "student 'small' has no stage 'stage3'"),
        ({"stages": "stage1"}, "stages='stage1' is not allowed; give a list"),
        ({"stages": []}, "give a list of 1 or more"),
        ({"stages": ["stage1", "stage1"]}, "different stages"),
        ({"stages": ["pooled"]}, "is not allowed"),
        ({"stages": [1]}, "is not allowed"),
        ({"stages": ["stage1"], "form": "l2"}, "form 'l2'"),
    ],
)
def test_user_mistakes_are_one_line(options, message):
    with pytest.raises(UserError, match=message) as error:
        build_term("attention", 1.0, term_context(), **options)
    assert "\n" not in str(error.value)
