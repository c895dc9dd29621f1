"""Mutual learning, ONE and OKDDip against loops over single numbers and closed-form gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ekd_lightning.methods import TermContext, build_method, build_term, losses
from ekd_lightning.networks import BranchedStudent, NetworkSpec, normalization

from . import reference
from .helpers import D, make_batch, make_student, preset, step_context, term_context

TERMS = ["mutual", "self_distillation", "peer_attention", "leader"]
T = 3.0


def case(K=4, B=5, C=4, seed=0):
    return make_student(K, B, C, seed=seed, dtype=torch.float64), make_batch(B, C)


def built(name, K=4, seed=0, **options):
    torch.manual_seed(seed)
    return build_term(name, 1.0, term_context(K, 0, temperature=T), **options).double()


def value(name, student, K=None, **options):
    term = built(name, K or len(student.branch_logits), **options)
    return term(step_context(student, None, make_batch(student.logits.shape[0])))


def kd_loop(student_BC, target_BC):
    """T² KL between rows of logits, averaged over the batch, number by number."""
    probs = [reference.softmax(row, T) for row in np.asarray(target_BC).tolist()]
    return reference.kd(np.asarray(student_BC).tolist(), probs, T)


def numpy(tensor):
    return tensor.detach().numpy()


def step(student, name, **options):
    """The term after a backward pass; branch logits and pooled features keep their gradients."""
    term = built(name, len(student.branch_logits), **options)
    term(step_context(student, None, make_batch())).backward()
    return term


def imitation(student_BC, target_BC):
    """Gradient of T² KL(target ‖ student), batchmean, to the student's logits: T (q - p) / B."""
    return T * ((student_BC / T).softmax(-1) - (target_BC / T).softmax(-1)) / len(student_BC)


@settings(max_examples=15, deadline=None)
@given(K=st.integers(2, 4), B=st.integers(1, 4), C=st.integers(2, 5), seed=st.integers(0, 999))
def test_mutual_learning_against_loops(K, B, C, seed):
    student, _ = case(K, B, C, seed)
    z, total = numpy(student.branch_logits), 0.0
    for k in range(K):
        for other in range(K):
            if other != k:
                total += kd_loop(z[k], z[other]) / (K - 1)
    assert value("mutual", student, reduction="sum").item() == pytest.approx(total)
    assert value("mutual", student).item() == pytest.approx(total / K)


@settings(max_examples=15, deadline=None)
@given(K=st.integers(2, 4), B=st.integers(1, 4), C=st.integers(2, 5), seed=st.integers(0, 999))
def test_self_distillation_and_leader_against_loops(K, B, C, seed):
    student, _ = case(K, B, C, seed)
    z, gated = numpy(student.branch_logits), torch.randn(B, C, dtype=torch.float64)
    student = student._replace(logits=gated)
    total = sum(kd_loop(z[k], gated.numpy()) for k in range(K))
    assert value("self_distillation", student, reduction="sum").item() == pytest.approx(total)
    assert value("self_distillation", student).item() == pytest.approx(total / K)
    if K >= 3:
        peers = [[sum(z[k, b, c] for k in range(K - 1)) / (K - 1) for c in range(C)] for b in range(B)]
        assert value("leader", student).item() == pytest.approx(kd_loop(z[-1], peers))


def attention_loop(term, features_PBD):
    P, B, _ = features_PBD.shape
    query, key = numpy(term.query.weight), numpy(term.key.weight)
    alpha = np.zeros((P, P, B))
    for a in range(P):
        for b in range(B):
            scores = [(query @ features_PBD[a, b]) @ (key @ features_PBD[other, b]) for other in range(P)]
            alpha[a, :, b] = reference.softmax(scores)
    return alpha


@pytest.mark.parametrize("combine", ["logits", "probabilities"])
@pytest.mark.parametrize("K", [3, 4])
@pytest.mark.parametrize("divisor", [1, 2, 100])
def test_peer_attention_against_loops(combine, K, divisor):
    student, batch = case(K)
    term = built("peer_attention", K, combine=combine, divisor=divisor, reduction="sum")
    assert term.query.weight.shape == term.key.weight.shape == (max(1, D // divisor), D)
    assert term.query.bias is None
    z, alpha = numpy(student.branch_logits), attention_loop(term, numpy(student.pooled)[:-1])
    np.testing.assert_allclose(numpy(term.log_attention(student.pooled[:-1]).exp()), alpha)
    total = 0.0
    for a in range(K - 1):
        probs = []
        for b in range(5):
            rows = [
                z[p, b].tolist() if combine == "logits" else reference.softmax(z[p, b].tolist(), T)
                for p in range(K - 1)
            ]
            mixed = [sum(alpha[a, p, b] * rows[p][c] for p in range(K - 1)) for c in range(4)]
            probs.append(reference.softmax(mixed, T) if combine == "logits" else mixed)
        total += reference.kd(z[a].tolist(), probs, T)
    assert term(step_context(student, None, batch)).item() == pytest.approx(total)
    term.factor = 1.0
    assert term(step_context(student, None, batch)).item() == pytest.approx(total / (K - 1))


@pytest.mark.parametrize("name", TERMS)
def test_zero_where_all_branches_agree(name):
    student, _ = case()
    agreed = student._replace(branch_logits=student.logits.expand(4, -1, -1))
    assert value(name, agreed).item() == pytest.approx(0, abs=1e-12)
    assert value(name, student) > 0


@settings(max_examples=15, deadline=None)
@given(order=st.permutations(range(3)), seed=st.integers(0, 99))
def test_the_order_of_peers_does_not_matter(order, seed):
    student, _ = case(seed=seed)
    moved = [*order, 3]
    permuted = student._replace(branch_logits=student.branch_logits[moved], pooled=student.pooled[moved])
    for name in TERMS:
        torch.testing.assert_close(value(name, permuted), value(name, student))


@pytest.mark.parametrize("name", TERMS)
def test_shifted_logits_mean_the_same(name):
    student, _ = case()
    shift = torch.randn(4, 5, 1, dtype=torch.float64)
    moved = student._replace(branch_logits=student.branch_logits + shift, logits=student.logits + shift[0])
    torch.testing.assert_close(value(name, moved), value(name, student))


def test_mutual_gradients_are_those_of_imitators_alone():
    student, _ = case(3)
    step(student, "mutual", reduction="sum")
    z = student.branch_logits.detach()
    for k in range(3):
        expected = sum(imitation(z[k], z[other]) for other in range(3) if other != k) / 2
        torch.testing.assert_close(student.branch_logits.grad[k], expected)


def test_the_ensemble_gets_no_gradient_from_self_distillation():
    student, _ = case(3)
    gated = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    step(student._replace(logits=gated), "self_distillation", reduction="sum")
    assert gated.grad is None
    for k in range(3):
        expected = imitation(student.branch_logits.detach()[k], gated.detach())
        torch.testing.assert_close(student.branch_logits.grad[k], expected)


def test_the_leader_follows_and_its_peers_do_not():
    student, _ = case()
    step(student, "leader")
    z = student.branch_logits.detach()
    torch.testing.assert_close(student.branch_logits.grad[-1], imitation(z[-1], z[:-1].mean(0)))
    assert not student.branch_logits.grad[:-1].any()
    other, _ = case()
    step(other, "leader", detach_targets=False)
    torch.testing.assert_close(other.branch_logits.grad[-1], student.branch_logits.grad[-1])
    assert other.branch_logits.grad[:-1].any()


def test_peers_are_moved_as_imitators_and_attention_as_in_the_published_code():
    student, published = case()[0], case()[0]
    term = step(student, "peer_attention", reduction="sum")
    theirs = step(published, "peer_attention", reduction="sum", detach_targets=False)
    z = student.branch_logits.detach()
    alpha = term.log_attention(student.pooled.detach()[:-1]).exp().detach()
    for a in range(3):
        target = (alpha[a][..., None] * z[:-1]).sum(0)
        torch.testing.assert_close(student.branch_logits.grad[a], imitation(z[a], target))
    assert student.pooled.grad is None
    assert not student.branch_logits.grad[-1].any()
    assert published.pooled.grad[:-1].any()
    assert not torch.allclose(published.branch_logits.grad, student.branch_logits.grad)
    for name in ("query", "key"):
        ours = getattr(term, name).weight.grad
        assert ours.any()
        torch.testing.assert_close(ours, getattr(theirs, name).weight.grad)


@pytest.mark.parametrize("combine", ["logits", "probabilities"])
def test_peer_attention_gradients_in_double_precision(combine):
    student, batch = case(3, B=2)
    term = built("peer_attention", 3, combine=combine, detach_targets=False, divisor=2)

    def loss(logits, pooled, query, key):
        moved = student._replace(branch_logits=logits, pooled=pooled)
        weights = {"query.weight": query, "key.weight": key}
        return torch.func.functional_call(term, weights, (step_context(moved, None, batch),))

    inputs = (student.branch_logits, student.pooled, term.query.weight, term.key.weight)
    assert torch.autograd.gradcheck(loss, tuple(x.detach().requires_grad_() for x in inputs))


def test_far_attention_gives_finite_gradients():
    student, _ = case()
    far = student._replace(pooled=(1e3 * student.pooled).detach().requires_grad_())
    for combine in ("logits", "probabilities"):
        term = step(far, "peer_attention", combine=combine, detach_targets=False)
        assert all(p.grad.isfinite().all() for p in term.parameters())
        assert far.pooled.grad.isfinite().all()


def whole(name):
    """A preset's method and its student, after one step of a real network."""
    torch.manual_seed(0)
    cfg = preset(name)
    spec = NetworkSpec("resnet8", 10, normalization("unit"))
    student = BranchedStudent(spec, **cfg["student"])
    method = build_method(
        name, cfg["method"]["terms"], TermContext.of(student), temperature=cfg["method"]["temperature"]
    )
    batch = make_batch(8, 10)
    batch = batch._replace(images=torch.rand(8, 3, 32, 32))
    return student, method, student.outputs(batch.images), batch


@pytest.mark.parametrize("name", ["dml", "one", "okddip"])
def test_a_step_of_a_preset_moves_every_parameter(name):
    student, method, output, batch = whole(name)
    method(output, None, batch, progress=0.1).total.backward()
    assert not method.needs_teachers
    for module in (student, method):
        assert all(p.grad is not None for p in module.parameters())
        assert all(p.grad.isfinite().all() for p in module.parameters())
    assert all(p.grad.any() for p in method.parameters())


@pytest.mark.parametrize("name", ["one", "okddip"])
def test_imitation_ramps_up_until_epoch_80_of_300(name):
    ramped = [term for key, term in whole(name)[1].named_terms() if not key.startswith("ce")]
    for term in ramped:
        found = [term.weight_at(progress) for progress in (0.0, 40 / 300, 80.1 / 300, 1.0)]
        assert found == pytest.approx([np.exp(-5), np.exp(-1.25), 1.0, 1.0], rel=1e-3)


def test_the_total_of_a_preset_is_the_published_sum():
    _, method, output, batch = whole("okddip")
    result = method(output, None, batch, progress=1.0)
    z = output.branch_logits
    expected = 4 * losses.cross_entropy(z, batch.labels) + sum(
        result.terms[name] for name in ("peer_attention", "leader")
    )
    torch.testing.assert_close(result.total, expected)
    _, method, output, batch = whole("dml")
    z = output.branch_logits
    expected = sum(losses.cross_entropy(z[k], batch.labels) + losses.kd_divergence(z[k], z[1 - k], 1.0) for k in (0, 1))
    torch.testing.assert_close(method(output, None, batch).total, expected)


def test_the_gate_of_one_mixes_the_branches_and_learns_from_its_own_labels_alone():
    student, method, output, batch = whole("one")
    maps, _ = student.trunk(batch.images)
    weights_BK = student.gate(maps)
    torch.testing.assert_close(weights_BK.sum(1), torch.ones(8))
    assert (weights_BK >= 0).all()
    low, high = output.branch_logits.min(0).values, output.branch_logits.max(0).values
    assert ((output.logits >= low - 1e-5) & (output.logits <= high + 1e-5)).all()
    terms, context = dict(method.named_terms()), step_context(output, None, batch)
    gate = list(student.gate.parameters())
    for name in ("self_distillation", "ce_branch"):
        grads = torch.autograd.grad(terms[name](context), gate, allow_unused=True, retain_graph=True)
        assert all(grad is None for grad in grads)
    assert any(grad.any() for grad in torch.autograd.grad(terms["ce_ensemble"](context), gate))
