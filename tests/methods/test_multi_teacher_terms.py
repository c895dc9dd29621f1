"""EBKD, CA-MKD and AE-KD against loops over single numbers, closed forms and another solver."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import nn

from ekd_lightning.methods import build_method, build_term, losses
from ekd_lightning.methods.losses import (
    MinNormWeights,
    confidence_weights,
    cross_entropies,
    entropy_weights,
    logit_gradients,
)

from . import reference
from .helpers import (
    D_TEACHER,
    Heads,
    make_batch,
    make_student,
    make_teachers,
    preset,
    sizes,
    step_context,
    term_context,
)

LOGIT_TERMS = ["kd_ebkd", "kd_camkd", "kd_aekd"]
T = 3.0


def case(K=1, M=3, B=5, C=4, seed=0):
    student = make_student(K, B, C, seed=seed + 1, dtype=torch.float64)
    teachers = make_teachers(M, B, C, seed=seed + 2, dtype=torch.float64)
    return student, teachers, make_batch(B, C, seed)


def built(name, K=1, M=3, **options):
    return build_term(name, 1.0, term_context(K, M, temperature=T), **options).double()


def value(name, student, teachers, batch, **options):
    K, M = len(student.branch_logits), len(teachers.logits)
    return built(name, K, M, **options)(step_context(student, teachers, batch))


def weighted_loop(student, teachers, weights_MB):
    """1/B Σ_b Σ_m w_mb T² KL(t_mb ‖ z_b), number by number."""
    M, B = weights_MB.shape
    total = 0.0
    for b in range(B):
        q = reference.softmax(student.logits[b].tolist(), T)
        for m in range(M):
            p = reference.softmax(teachers.logits[m, b].tolist(), T)
            total += weights_MB[m, b] * T**2 * reference.kl(p, q) / B
    return total


def entropy_weights_loop(teachers, divisor):
    M, B, _ = teachers.logits.shape
    H = np.zeros((M, B))
    for m in range(M):
        for b in range(B):
            H[m, b] = -sum(p * np.log(p) for p in reference.softmax(teachers.logits[m, b].tolist()))
    return (1 - H / H.sum(0)) / divisor


def confidence_weights_loop(errors_MB, divisor):
    M, B = errors_MB.shape
    weights = np.zeros((M, B))
    for b in range(B):
        share = np.exp(errors_MB[:, b]) / np.exp(errors_MB[:, b]).sum()
        weights[:, b] = 1.0 if M == 1 else (1 - share) / divisor
    return weights


def errors_loop(logits_MBC, labels):
    return np.array([[reference.ce([row], [y]) for row, y in zip(z, labels, strict=True)] for z in logits_MBC])


def slsqp(gradients, tolerance):
    G = (gradients @ gradients.T).numpy()
    G, M = G / np.trace(G), len(G)
    result = minimize(
        lambda w: 0.5 * w @ G @ w,
        np.full(M, 1 / M),
        jac=lambda w: G @ w,
        bounds=[(0, tolerance)] * M,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": lambda w: np.ones(M)},
        method="SLSQP",
        options={"ftol": 1e-16, "maxiter": 500},
    )
    return result.x


@settings(max_examples=20, deadline=None)
@given(M=st.integers(2, 4), B=st.integers(1, 5), C=st.integers(2, 6), seed=st.integers(0, 999))
def test_entropy_weighted_distillation_against_loops(M, B, C, seed):
    student, teachers, batch = case(1, M, B, C, seed)
    for scale, divisor in (("normalized", M - 1), ("published_code", M)):
        expected = weighted_loop(student, teachers, entropy_weights_loop(teachers, divisor))
        assert value("kd_ebkd", student, teachers, batch, scale=scale).item() == pytest.approx(expected)


@settings(max_examples=20, deadline=None)
@given(M=st.integers(1, 4), B=st.integers(1, 5), C=st.integers(2, 6), seed=st.integers(0, 999))
def test_confidence_weighted_distillation_against_loops(M, B, C, seed):
    student, teachers, batch = case(1, M, B, C, seed)
    errors = errors_loop(teachers.logits.tolist(), batch.labels.tolist())
    expected = weighted_loop(student, teachers, confidence_weights_loop(errors, M - 1))
    for scale, factor in (("normalized", 1), ("published_code", 1 / M)):
        found = value("kd_camkd", student, teachers, batch, scale=scale)
        assert found.item() == pytest.approx(factor * expected)


def test_cross_entropies_take_the_soft_labels_of_mixed_images():
    _, teachers, batch = case()
    soft = torch.softmax(torch.randn(5, 4, generator=torch.Generator().manual_seed(9)), -1)
    expected = -(soft.double() * teachers.logits.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(cross_entropies(teachers.logits, soft), expected)
    hot = nn.functional.one_hot(batch.labels, 4).double()
    torch.testing.assert_close(cross_entropies(teachers.logits, hot), cross_entropies(teachers.logits, batch.labels))
    mixed = batch._replace(soft_labels=soft)
    student = make_student(1, dtype=torch.float64)
    assert value("kd_camkd", student, teachers, mixed) != value("kd_camkd", student, teachers, batch)


@settings(max_examples=20, deadline=None)
@given(M=st.integers(1, 5), scale=st.floats(0, 50), seed=st.integers(0, 999))
def test_weights_sum_to_one_and_are_not_negative(M, scale, seed):
    logits = scale * torch.randn(M, 6, 4, generator=torch.Generator().manual_seed(seed))
    labels = torch.randint(0, 4, (6,), generator=torch.Generator().manual_seed(seed))
    for weights in (entropy_weights(logits), confidence_weights(cross_entropies(logits, labels))):
        assert (weights >= 0).all()
        torch.testing.assert_close(weights.sum(0), torch.ones(6))


def test_certain_teachers_weigh_the_same():
    certain = 1e4 * torch.eye(4)[torch.tensor([[0, 1], [2, 3], [0, 0]])]
    torch.testing.assert_close(entropy_weights(certain), torch.full((3, 2), 1 / 3))


@pytest.mark.parametrize("name", LOGIT_TERMS)
def test_one_teacher_is_plain_distillation(name):
    student, teachers, batch = case(M=1)
    expected = losses.kd_divergence(student.logits, teachers.logits[0], T)
    torch.testing.assert_close(value(name, student, teachers, batch), expected)


@settings(max_examples=20, deadline=None)
@given(order=st.permutations(range(4)), seed=st.integers(0, 99))
def test_the_order_of_the_teachers_does_not_matter(order, seed):
    student, teachers, batch = case(M=4, seed=seed)
    permuted = teachers._replace(logits=teachers.logits[list(order)])
    for name in LOGIT_TERMS:
        one, other = (value(name, student, t, batch) for t in (teachers, permuted))
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", LOGIT_TERMS)
def test_zero_at_identity_and_equal_teachers_are_one_teacher(name):
    student, teachers, batch = case()
    same = teachers._replace(logits=student.logits.detach().expand(3, -1, -1))
    assert value(name, student, same, batch).item() == pytest.approx(0, abs=1e-12)
    equal = teachers._replace(logits=teachers.logits[:1].expand(3, -1, -1))
    expected = losses.kd_divergence(student.logits, teachers.logits[0], T)
    torch.testing.assert_close(value(name, student, equal, batch), expected)


@pytest.mark.parametrize(("name", "options"), [("kd_ebkd", {}), ("kd_camkd", {}), ("kd_aekd", {"tolerance": 1 / 3})])
def test_gradients_in_double_precision(name, options):
    student, teachers, batch = case()
    term = built(name, **options)

    def loss(logits):
        return term(step_context(student._replace(logits=logits), teachers, batch))

    assert torch.autograd.gradcheck(loss, student.logits.detach().requires_grad_())


def gradients(M, N=6, seed=0, offset=0.5):
    return offset + torch.randn(M, N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("M", "tolerance"), [(2, 0.6), (3, 0.6), (3, 0.4), (5, 0.6), (5, 0.25), (8, 1.0)])
@pytest.mark.parametrize("seed", range(4))
def test_min_norm_weights_against_another_solver(M, tolerance, seed):
    g = gradients(M, 12, seed)
    np.testing.assert_allclose(MinNormWeights(M, tolerance)(g), slsqp(g, tolerance), atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    M=st.integers(1, 5),
    N=st.integers(1, 6),  # fewer numbers than teachers: many solutions
    slack=st.floats(1, 3),
    scale=st.sampled_from([1e-12, 1.0, 1e6]),
    offset=st.floats(-2, 2),
    seed=st.integers(0, 999),
)
def test_min_norm_weights_are_feasible_and_optimal(M, N, slack, scale, offset, seed):
    """w is optimal exactly if no feasible point lies further down the gradient G w; that point is greedy."""
    tolerance = min(1.0, slack / M)
    g = gradients(M, N, seed, offset) * scale
    w = MinNormWeights(M, tolerance)(g)
    assert w.sum().item() == pytest.approx(1)
    assert (w >= 0).all()
    assert (w <= tolerance + 1e-9).all()
    slope, room, lowest = g @ (w @ g), 1.0, 0.0
    for m in slope.argsort().tolist():
        share = min(tolerance, room)
        lowest, room = lowest + share * slope[m].item(), room - share
    assert (w @ slope).item() <= lowest + 1e-8 * g.square().sum(1).mean().item()


def test_min_norm_weights_where_the_answer_is_known():
    def solve(g, tolerance):
        return MinNormWeights(len(g), tolerance)(torch.tensor(g, dtype=torch.float64)).tolist()

    assert solve([[1.0], [1.0], [1.0]], 0.6) == pytest.approx([1 / 3] * 3)
    assert solve([[0.0], [0.0]], 0.6) == pytest.approx([0.5, 0.5])  # nothing left to learn
    assert solve([[1.0, 0.0], [0.0, 2.0]], 1.0) == pytest.approx([0.8, 0.2])  # w ∝ 1 / ‖g‖² if orthogonal
    assert solve([[1.0, 0.0], [0.0, 2.0]], 0.6) == pytest.approx([0.6, 0.4])
    assert solve([[3.0], [-1.0]], 1.0) == pytest.approx([0.25, 0.75])
    assert solve([[3.0, 1.0], [1.0, 0.0], [-9.0, 4.0]], 1 / 3) == pytest.approx([1 / 3] * 3)


def test_weights_do_not_depend_on_the_precision_around_them():
    g = gradients(3).float()
    solver = MinNormWeights(3, 0.6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(solver(g), MinNormWeights(3, 0.6)(g))
    assert solver(g).dtype == torch.float32
    assert not list(solver.parameters())
    assert not solver.state_dict()


def test_logit_gradients_are_those_of_autograd():
    student, teachers, _ = case()
    z = student.logits.detach().requires_grad_()
    found = logit_gradients(z, teachers.logits, T)
    for m in range(3):
        (expected,) = torch.autograd.grad(losses.kd_divergence(z, teachers.logits[m], T), z)
        torch.testing.assert_close(found[m] / len(z), expected)
    assert not found.requires_grad


@pytest.mark.parametrize("gradient", ["batch_mean", "images"])
def test_adaptive_distillation_against_loops_and_another_solver(gradient):
    student, teachers, batch = case()
    g = torch.zeros(3, 5, 4, dtype=torch.float64)
    for m, b, c in np.ndindex(3, 5, 4):
        p, q = (reference.softmax(z.tolist(), T)[c] for z in (teachers.logits[m, b], student.logits[b]))
        g[m, b, c] = T * (q - p)
    w = slsqp(g.mean(1) if gradient == "batch_mean" else g.flatten(1), 0.6)
    expected = weighted_loop(student, teachers, np.repeat(w[:, None], 5, 1))
    term = built("kd_aekd", gradient=gradient)
    context = step_context(student, teachers, batch)
    assert term(context).item() == pytest.approx(expected, rel=1e-6)
    # The weights are constants: the gradient is the weighted sum, and shorter than the plain mean's.
    (found,) = torch.autograd.grad(term(context), student.logits)
    weights_M1 = term.teacher_weights(context)
    torch.testing.assert_close(found, (weights_M1[..., None] * g).sum(0) / 5)
    if gradient == "images":
        assert found.norm() <= (g.mean(0) / 5).norm()


def feature_loop(term, student, teachers, labels, heads, *, pooled, divisor):
    """mean_k 1/B Σ_b Σ_m v MSE(r(h), h_m), number by number, with the batch norm of a training step."""
    K, M, B = len(student.pooled), len(teachers.logits), len(labels)
    total = 0.0
    for k in range(K):
        distance, error = np.zeros((M, B)), np.zeros((M, B))
        for m in range(M):
            projection = term.adapters[f"branch{k}_teacher{m}"][0].weight.detach().flatten(1).numpy()
            if pooled:
                h, target = student.pooled[k].detach().numpy(), teachers.pooled[m].detach().numpy()
                h, target = h[:, :, None], target[:, :, None]
            else:  # a student's 4×4 map against a teacher's 2×2
                h = student.stages[k]["stage2"].detach().numpy().reshape(B, -1, 2, 2, 2, 2).mean((3, 5))
                h, target = (h.reshape(B, -1, 4), teachers.stages[m]["stage2"].detach().numpy().reshape(B, -1, 4))
            r = np.array([projection @ image for image in h])
            for d in range(r.shape[1]):
                r[:, d] = (r[:, d] - r[:, d].mean()) / np.sqrt(r[:, d].var() + 1e-5)
            r = np.maximum(r, 0)
            head = heads.heads[m]
            for b in range(B):
                distance[m, b] = np.mean((r[b] - target[b]) ** 2)
                logits = head.weight.detach().numpy() @ r[b].mean(-1) + head.bias.detach().numpy()
                error[m, b] = reference.ce([logits.tolist()], [labels[b]])
        total += (confidence_weights_loop(error, divisor) * distance).sum() / B / K
    return total


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize(("K", "M"), [(1, 1), (1, 3), (2, 2)])
@pytest.mark.parametrize("scale", ["normalized", "published_code"])
def test_confidence_weighted_features_against_loops(pooled, K, M, scale):
    student, teachers, batch = case(K, M)
    heads = Heads([D_TEACHER if pooled else 6] * M)
    term = built("feature_camkd", K, M, feature="pooled" if pooled else "last", scale=scale)
    assert (term.needs_pooled, term.teacher_stages) == ((True, ()) if pooled else (False, ("stage2",)))
    assert term.needs_networks
    context = dataclasses.replace(step_context(student, teachers, batch), networks=heads)
    labels = batch.labels.tolist()
    expected = feature_loop(term, student, teachers, labels, heads, pooled=pooled, divisor=M - 1)
    factor = 1 if scale == "normalized" else 1 / M
    assert term(context).item() == pytest.approx(factor * expected, rel=1e-6)


def feature_step(student, teachers, batch, heads, **options) -> tuple:
    torch.manual_seed(3)
    term = built("feature_camkd", len(student.pooled), len(teachers.logits), **options)
    loss = term(dataclasses.replace(step_context(student, teachers, batch), networks=heads))
    loss.backward()
    return loss, term


def test_weights_of_features_carry_a_gradient_only_on_demand():
    heads, grads, values = Heads([6] * 3), [], []
    for detach in (True, False):
        student, teachers, batch = case()
        loss, _ = feature_step(student, teachers, batch, heads, detach_weights=detach)
        grads.append(student.stages[0]["stage2"].grad)
        values.append(loss)
    assert torch.equal(*values)
    assert not torch.allclose(*grads)


def test_feature_gradients_in_double_precision():
    (student, teachers, batch), heads = case(B=3, M=2), Heads([6] * 2)
    term = built("feature_camkd", 1, 2, detach_weights=False)

    def loss(maps):
        moved = student._replace(stages=({**student.stages[0], "stage2": maps},))
        return term(dataclasses.replace(step_context(moved, teachers, batch), networks=heads))

    assert torch.autograd.gradcheck(loss, student.stages[0]["stage2"].detach().requires_grad_())


def test_camkd_leaves_features_out_in_the_first_of_240_epochs():
    terms = preset("camkd")["method"]["terms"]
    term = dict(build_method("camkd", terms, sizes(K=1)).named_terms())["feature_camkd"]
    weights = [term.weight_at(progress) for progress in (0.0, 0.9 / 240, 1.01 / 240, 1.0)]
    assert weights == [0.0, 0.0, 50.0, 50.0]
