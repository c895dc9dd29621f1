from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ekd_lightning.errors import UserError
from ekd_lightning.methods import build_method, build_term
from ekd_lightning.methods.losses import flow_matrix
from ekd_lightning.networks.outputs import TeacherOutput

from .helpers import STUDENT_STAGES, make_batch, make_student, sizes, step_context, term_context

STAGES = ["stem", "stage1", "stage2"]


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def context(K=1, M=1):
    return term_context(K, M, teacher_stage_shapes=(STUDENT_STAGES,) * M)


def equal_teachers(M=1, B=5, seed=8):
    """Teachers of the student's shapes."""
    other = make_student(M, B, seed=seed, dtype=torch.float64)
    return TeacherOutput(other.branch_logits, tuple(other.pooled), other.stages)


def reference_matrix(first, second, pooling):
    """One image's G by loops: first [C_1, 2h, 2w] is pooled to second [C_2, h, w]."""
    C_1, C_2, (h, w) = len(first), len(second), second.shape[1:]
    G = torch.zeros(C_1, C_2, dtype=torch.float64)
    for i in range(h):
        for j in range(w):
            for a in range(C_1):
                block = first[a, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
                value = block.max() if pooling == "max" else block.mean()
                for c in range(C_2):
                    G[a, c] += value * second[c, i, j] / (h * w)
    return G


@pytest.mark.parametrize("pooling", ["max", "average"])
def test_the_matrix_against_loops(pooling):
    first, second = rand(2, 3, 4, 6), rand(2, 5, 2, 3, seed=1)
    expected = torch.stack([reference_matrix(f, s, pooling) for f, s in zip(first, second, strict=True)])
    torch.testing.assert_close(flow_matrix(first, second, pooling), expected)
    torch.testing.assert_close(flow_matrix(second, first, pooling), expected.mT)


@pytest.mark.parametrize("pooling", ["max", "average"])
@pytest.mark.parametrize("elements", ["mean", "sum"])
def test_the_loss_against_loops(pooling, elements):
    term = build_term("fsp", 1.0, context(), stages=STAGES, pooling=pooling, elements=elements)
    assert term.student_stages == term.teacher_stages == tuple(STAGES)
    student, teachers = make_student(1, dtype=torch.float64), equal_teachers()
    expected = 0.0
    for one, two in (("stem", "stage1"), ("stage1", "stage2")):
        for b in range(5):
            matrices = []
            for stages in (student.stages[0], teachers.stages[0]):
                first, second = stages[one][b].detach(), stages[two][b].detach()
                if one == "stem":  # equal sizes
                    matrices.append(torch.einsum("aij,cij->ac", first, second) / 64)
                else:
                    matrices.append(reference_matrix(first, second, pooling))
            squares = (matrices[0] - matrices[1]).square()
            expected += float(squares.sum() if elements == "sum" else squares.mean()) / 5
    found = term(step_context(student, teachers, make_batch()))
    assert found.item() == pytest.approx(expected, rel=1e-9)


def test_zero_at_identity():
    term = build_term("fsp", 1.0, context(), stages=STAGES)
    student = make_student(1, dtype=torch.float64)
    same = TeacherOutput(student.branch_logits, tuple(student.pooled), student.stages)
    assert term(step_context(student, same, make_batch())).item() == 0


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999))
def test_positions_may_be_permuted_alike(seed):
    first, second = rand(2, 3, 2, 3, seed=seed), rand(2, 5, 2, 3, seed=seed + 1)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    moved = [f.flatten(2)[:, :, order].view_as(f) for f in (first, second)]
    torch.testing.assert_close(flow_matrix(*moved), flow_matrix(first, second))


@pytest.mark.parametrize("pooling", ["max", "average"])
def test_gradients(pooling):
    term = build_term("fsp", 1.0, context(), stages=["stage1", "stage2"], pooling=pooling)
    student, teachers = make_student(1, B=2, dtype=torch.float64), equal_teachers(B=2)

    def value(stage1, stage2):
        changed = student._replace(stages=({"stage1": stage1, "stage2": stage2},))
        return term(step_context(changed, teachers, make_batch(B=2)))

    inputs = [student.stages[0][name].detach().requires_grad_() for name in ("stage1", "stage2")]
    assert torch.autograd.gradcheck(value, inputs)


def test_no_gradient_into_teachers_and_branches_are_averaged():
    student, teachers = make_student(2, dtype=torch.float64), equal_teachers(3)
    term = build_term("fsp", 1.0, context(2, 3), stages=STAGES)
    value = term(step_context(student, teachers, make_batch()))
    pairs = []
    for k in range(2):
        for m in range(3):
            one = student._replace(stages=(student.stages[k],), branch_logits=student.branch_logits[:1])
            other = TeacherOutput(teachers.logits[:1], teachers.pooled[:1], teachers.stages[m : m + 1])
            pairs.append(
                build_term("fsp", 1.0, context(), stages=STAGES)(step_context(one, other, make_batch()))
            )
    torch.testing.assert_close(value, torch.stack(pairs).mean())
    value.backward()
    assert all(s["stem"].grad is not None for s in student.stages)
    assert all(t["stem"].grad is None for t in teachers.stages)


def test_products_are_not_in_half_precision():
    first, second = rand(2, 3, 4, 4).bfloat16(), rand(2, 5, 4, 4, seed=1).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = flow_matrix(first, second)
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found.double(), flow_matrix(first.double(), second.double()), rtol=1e-5, atol=1e-6
    )


def test_the_published_form_has_two_stages():
    jump = [[0, 1], [0.1111, 1], [0.1111, 0]]
    terms = {
        "fsp": {"weight": 1.0, "stages": STAGES, "schedule": {"linear": jump}},
        "ce_ensemble": {"weight": 1.0, "schedule": {"linear": [[s, 1 - f] for s, f in jump]}},
    }
    method = build_method("x", terms, sizes(1, 1, teacher_stage_shapes=(STUDENT_STAGES,)))
    for progress, name in ((0.1, "fsp"), (0.12, "ce_ensemble")):
        loss = method(make_student(1), equal_teachers(), make_batch(), progress=progress)
        torch.testing.assert_close(loss.total.double(), loss.terms[name].double())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"stages": ["stem", "stage1"]},
            r"equal width: the student 'small' has shape \[4, 8, 8\], .*'big0' \[5, 8, 8\] .*'stage1'",
        ),
        ({"stages": ["stem"]}, "give a list of 2 or more"),
        ({"stages": ["stem", "stage2"], "pooling": "mean"}, "pooling 'mean'"),
        ({"stages": ["stem", "stage2"], "elements": "all"}, "elements 'all'"),
    ],
)
def test_user_mistakes_are_one_line(options, message):
    with pytest.raises(UserError, match=message) as error:
        build_term("fsp", 1.0, term_context(), **options)
    assert "\n" not in str(error.value)
