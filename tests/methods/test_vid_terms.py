from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from ekd_lightning.errors import UserError
from ekd_lightning.methods import build_term
from ekd_lightning.methods.losses import gaussian_loss
from ekd_lightning.methods.map_terms import GaussianModel

from .helpers import make_batch, make_student, make_teachers, step_context, term_context

STAGES = ["stage1", "stage2"]


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_loss_is_the_gaussian_nll_less_its_constant():
    mean, target, variance = rand(2, 3, 2, 4), rand(2, 3, 2, 4, seed=1), rand(3, seed=2).exp()
    normal = torch.distributions.Normal(mean, variance.sqrt()[:, None, None])
    expected = -normal.log_prob(target).mean() - 0.5 * np.log(2 * np.pi)
    torch.testing.assert_close(gaussian_loss(mean, variance, target), expected)


def test_against_loops():
    """The whole term on one stage, its convolutions as sums over channels."""
    term = build_term("vid", 1.0, term_context(1, 1), stages=["stage1"]).double()
    student, teachers = (make(1, B=2, dtype=torch.float64) for make in (make_student, make_teachers))
    model = term.models["branch0_teacher0"][0]
    matrices = [model.mean[i].weight.detach().numpy()[:, :, 0, 0] for i in (0, 2, 4)]
    s, t = (o.stages[0]["stage1"].detach().numpy() for o in (student, teachers))
    total = 0.0
    for b in range(2):
        for i in range(8):
            for j in range(8):
                hidden = s[b, :, i, j]
                for matrix in matrices[:2]:
                    hidden = [max(0.0, sum(row * hidden)) for row in matrix]
                mu = [sum(row * hidden) for row in matrices[2]]
                for c in range(5):
                    total += 0.5 * ((mu[c] - t[b, c, i, j]) ** 2 / 5.0 + np.log(5.0))
    found = term(step_context(student, teachers, make_batch(B=2)))
    assert found.item() == pytest.approx(total / (2 * 5 * 64), rel=1e-6)


@pytest.mark.parametrize(("initial", "eps"), [(5.0, 1e-5), (0.01, 1e-5), (100.0, 1e-3)])
def test_the_variance_starts_where_it_should_and_stays_positive(initial, eps):
    model = GaussianModel(3, 5, initial, eps)
    torch.testing.assert_close(model.variance(), torch.full((5,), initial), rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        model.raw_variance.fill_(-1e4)
    assert (model.variance() >= 0.99 * eps).all()


def test_the_best_variance_is_the_mean_squared_error():
    mean, target = rand(8, 3, 4, 4), rand(8, 3, 4, 4, seed=1)
    variance = (mean - target).square().mean((0, 2, 3)).requires_grad_()
    gaussian_loss(mean, variance, target).backward()
    torch.testing.assert_close(variance.grad, torch.zeros_like(variance))


def test_structure():
    term = build_term("vid", 1.0, term_context(assignment=[[0, 1, 0], [0, 0, 1]]), stages=STAGES)
    assert list(term.models) == ["branch0_teacher1", "branch1_teacher2"]
    assert term.student_stages == term.teacher_stages == tuple(STAGES)
    first = term.models["branch0_teacher1"][0]
    assert [type(layer) for layer in first.mean] == [nn.Conv2d, nn.ReLU, nn.Conv2d, nn.ReLU, nn.Conv2d]
    assert [tuple(first.mean[i].weight.shape) for i in (0, 2, 4)] == [
        (5, 4, 1, 1),
        (5, 5, 1, 1),
        (5, 5, 1, 1),
    ]
    assert all(first.mean[i].bias is None for i in (0, 2, 4))


def test_the_term_adds_stages_and_averages_branches_and_teachers():
    term = build_term("vid", 1.0, term_context(), stages=STAGES)
    student, teachers = make_student(), make_teachers()
    value = term(step_context(student, teachers, make_batch()))
    expected = 0.0
    for k in range(2):
        for m in range(3):
            one, two = term.models[f"branch{k}_teacher{m}"]
            expected += one(student.stages[k]["stage1"], teachers.stages[m]["stage1"])
            small = nn.functional.avg_pool2d(student.stages[k]["stage2"], 2)  # 4×4 to the teacher's 2×2
            expected += two(small, teachers.stages[m]["stage2"])
    torch.testing.assert_close(value, expected / 6)
    value.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in term.parameters())
    assert all(s["stage1"].grad is not None for s in student.stages)
    assert all(t["stage1"].grad is None for t in teachers.stages)


def test_gradients():
    model = GaussianModel(3, 4, 5.0, 1e-5).double()
    target = rand(2, 4, 2, 2, seed=1)
    inputs = rand(2, 3, 2, 2).requires_grad_(), model.raw_variance.detach().clone().requires_grad_()

    def value(student, raw):
        return torch.func.functional_call(model, {"raw_variance": raw}, (student, target))

    assert torch.autograd.gradcheck(value, inputs)


def test_half_precision_gives_a_float32_loss():
    term = build_term("vid", 1.0, term_context(), stages=STAGES)
    with torch.autocast("cpu", torch.bfloat16):
        value = term(step_context(make_student(dtype=torch.bfloat16), make_teachers(), make_batch()))
    assert value.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"initial_variance": 0}, "initial_variance=0 is not allowed; give a number > eps=1e-05"),
        ({"eps": 0}, "eps=0 .* > 0"),
        ({"stages": ["stage4"]}, "no stage 'stage4'"),
    ],
)
def test_user_mistakes_are_one_line(options, message):
    with pytest.raises(UserError, match=message) as error:
        build_term("vid", 1.0, term_context(), **{"stages": STAGES, **options})
    assert "\n" not in str(error.value)
