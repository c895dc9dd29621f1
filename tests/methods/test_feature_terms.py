"""Terms of features against loops over single numbers: attention, flow matrices, Gaussian models, relations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from ekd_lightning.methods import build_term
from ekd_lightning.methods.feature_terms import GaussianModel
from ekd_lightning.methods.losses import (
    angles,
    attention_loss,
    attention_map,
    flow_matrix,
    gaussian_loss,
    relative_distances,
    similarities,
)
from ekd_lightning.networks.staged import TeacherOutput

from .helpers import STUDENT_STAGES, make_batch, make_student, make_teachers, rand, step_context, term_context


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
def test_attention_against_loops(form):
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


FLOW = ["stem", "stage1", "stage2"]


def flow_context(K=1, M=1):
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
def test_the_flow_matrix_against_loops(pooling):
    first, second = rand(2, 3, 4, 6), rand(2, 5, 2, 3, seed=1)
    expected = torch.stack([reference_matrix(f, s, pooling) for f, s in zip(first, second, strict=True)])
    torch.testing.assert_close(flow_matrix(first, second, pooling), expected)
    torch.testing.assert_close(flow_matrix(second, first, pooling), expected.mT)


@pytest.mark.parametrize("pooling", ["max", "average"])
@pytest.mark.parametrize("elements", ["mean", "sum"])
def test_the_flow_loss_against_loops(pooling, elements):
    term = build_term("fsp", 1.0, flow_context(), stages=FLOW, pooling=pooling, elements=elements)
    assert term.student_stages == term.teacher_stages == tuple(FLOW)
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


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999))
def test_positions_may_be_permuted_alike(seed):
    first, second = rand(2, 3, 2, 3, seed=seed), rand(2, 5, 2, 3, seed=seed + 1)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    moved = [f.flatten(2)[:, :, order].view_as(f) for f in (first, second)]
    torch.testing.assert_close(flow_matrix(*moved), flow_matrix(first, second))


STAGES = ["stage1", "stage2"]


def test_the_loss_is_the_gaussian_nll_less_its_constant():
    mean, target, variance = rand(2, 3, 2, 4), rand(2, 3, 2, 4, seed=1), rand(3, seed=2).exp()
    normal = torch.distributions.Normal(mean, variance.sqrt()[:, None, None])
    expected = -normal.log_prob(target).mean() - 0.5 * np.log(2 * np.pi)
    torch.testing.assert_close(gaussian_loss(mean, variance, target), expected)


def test_a_gaussian_model_against_loops():
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


def test_structure_of_gaussian_models():
    term = build_term("vid", 1.0, term_context(assignment=[[0, 1, 0], [0, 0, 1]]), stages=STAGES)
    assert list(term.models) == ["branch0_teacher1", "branch1_teacher2"]
    assert term.student_stages == term.teacher_stages == tuple(STAGES)
    first = term.models["branch0_teacher1"][0]
    assert [type(layer) for layer in first.mean] == [nn.Conv2d, nn.ReLU, nn.Conv2d, nn.ReLU, nn.Conv2d]
    assert [tuple(first.mean[i].weight.shape) for i in (0, 2, 4)] == [(5, 4, 1, 1), (5, 5, 1, 1), (5, 5, 1, 1)]
    assert all(first.mean[i].bias is None for i in (0, 2, 4))


def test_gaussian_losses_of_stages_are_added_and_of_pairs_averaged():
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


def test_gradients_of_the_gaussian_loss():
    model = GaussianModel(3, 4, 5.0, 1e-5).double()
    target = rand(2, 4, 2, 2, seed=1)
    inputs = rand(2, 3, 2, 2).requires_grad_(), model.raw_variance.detach().clone().requires_grad_()

    def value(student, raw):
        return torch.func.functional_call(model, {"raw_variance": raw}, (student, target))

    assert torch.autograd.gradcheck(value, inputs)


def features(B=6, D=4, seed=0):
    return rand(B, D, seed=seed)


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
def test_relations_survive_a_last_batch_of_one_image(function):
    x = features(1).requires_grad_()
    function(x).sum().backward()
    assert torch.isfinite(x.grad).all()


def test_relations_are_not_rounded_under_autocast():
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


def test_similarity_reads_flattened_maps_of_the_last_stage():
    student, teachers = make_student(), make_teachers()
    found = term_value("similarity", student, teachers, [[1, 0, 0], [0, 1, 0]])
    pairs = [(student.stages[k]["stage2"], teachers.stages[k]["stage2"]) for k in range(2)]
    expected = sum(functional.mse_loss(similarities(a), similarities(b)) for a, b in pairs) / 2
    torch.testing.assert_close(found, expected)
