from __future__ import annotations

import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ekd_lightning.methods import losses
from ekd_lightning.methods.terms import TERMS

from . import reference
from .helpers import rand as unit_rand

rand = partial(unit_rand, scale=2.0)
LABELS = torch.tensor([0, 4, 2])
MAPS = (2, 4, 4, 4)


@settings(max_examples=40, deadline=None)
@given(
    B=st.integers(1, 6),
    C=st.integers(2, 7),
    temperature=st.floats(0.5, 20),
    scale=st.floats(0, 20),
    seed=st.integers(0, 999),
)
def test_kd_divergence_is_the_textbook_formula(B, C, temperature, scale, seed):
    s, t = rand(B, C, seed=seed, scale=scale), rand(B, C, seed=seed + 1, scale=scale)
    probs = [reference.softmax(row, temperature) for row in t.numpy()]
    expected = reference.kd(s.numpy(), probs, temperature)
    assert losses.kd_divergence(s, t, temperature).item() == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_kd_divergence_ignores_shifts_of_either_side():
    s, t, shift = rand(5, 4), rand(5, 4, seed=1), rand(5, 1, seed=2, scale=30)
    plain = losses.kd_divergence(s, t, 3.0)
    torch.testing.assert_close(losses.kd_divergence(s + shift, t - shift, 3.0), plain)


def test_kd_divergence_averages_over_leading_dimensions():
    s, t = rand(3, 5, 4), rand(3, 5, 4, seed=1)
    each = torch.stack([losses.kd_divergence(s[k], t[k], 2.0) for k in range(3)])
    torch.testing.assert_close(losses.kd_divergence(s, t, 2.0), each.mean())


@pytest.mark.parametrize("temperature", [1e3, 1e4])
def test_kd_divergence_tends_to_half_the_mean_squared_difference_of_centred_logits(temperature):
    s, t = rand(6, 5), rand(6, 5, seed=1)
    diff = (s - s.mean(-1, keepdim=True)) - (t - t.mean(-1, keepdim=True))
    limit = 0.5 * diff.square().sum(-1).mean() / 5
    torch.testing.assert_close(losses.kd_divergence(s, t, temperature), limit, rtol=20 / temperature, atol=0)


def test_confident_teacher_gives_a_finite_loss_and_gradient():
    s = torch.zeros(1, 3, requires_grad=True)
    loss = losses.kd_divergence(s, torch.tensor([[1e4, -1e4, 0.0]]), 1.0)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(3))
    assert s.grad.isfinite().all()


def test_mean_of_divergences_and_divergence_to_the_mean_probability_have_the_same_gradient():
    teachers, T = rand(3, 5, 4, seed=1), 3.0
    s1, s2 = rand(5, 4).requires_grad_(), rand(5, 4).requires_grad_()
    torch.stack([losses.kd_divergence(s1, t, T) for t in teachers]).mean().backward()
    third = torch.full((3,), 1 / 3, dtype=torch.float64)
    mixture = losses.combine_teachers(teachers, third, T, "probabilities")
    losses.kd_divergence(s2, mixture, T).backward()
    torch.testing.assert_close(s1.grad, s2.grad)
    s3 = rand(5, 4).requires_grad_()
    losses.kd_divergence(s3, losses.combine_teachers(teachers, third, T, "logits"), T).backward()
    assert not torch.allclose(s1.grad, s3.grad, rtol=1e-3), "the logit mean is another target"


@pytest.mark.parametrize("combine", ["logits", "probabilities"])
def test_combine_teachers_against_loops(combine):
    teachers = rand(3, 5, 4)
    A = torch.tensor([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0]], dtype=torch.float64)
    got = (losses.combine_teachers(teachers, A, 2.5, combine) / 2.5).softmax(-1)
    expected = [reference.target(teachers.numpy(), row, 2.5, combine) for row in A.numpy()]
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-12)


def test_one_hot_weights_select_a_teacher_exactly():
    teachers = rand(3, 5, 4).float()
    got = losses.combine_teachers(teachers, torch.eye(3)[[2, 0]], 4.0, "logits")
    assert torch.equal(got, teachers[[2, 0]])


def test_sum_of_logits_is_the_mean_at_a_lower_temperature():
    s, teachers, T, M = rand(5, 4), rand(3, 5, 4, seed=1), 6.0, 3
    mean = losses.combine_teachers(teachers, torch.full((M,), 1 / M), combine="logits")
    summed = losses.kd_divergence(M * s, teachers.sum(0), T)
    torch.testing.assert_close(summed, M**2 * losses.kd_divergence(s, mean, T / M), rtol=1e-6, atol=0)


def test_combine_is_not_touched_by_autocast():
    teachers = rand(3, 5, 4).float()
    A = torch.tensor([[0.2, 0.3, 0.5]])
    plain = [losses.combine_teachers(teachers, A, 2.0, c) for c in ("logits", "probabilities")]
    with torch.autocast("cpu", torch.bfloat16):
        mixed = [losses.combine_teachers(teachers, A, 2.0, c) for c in ("logits", "probabilities")]
    for a, b in zip(plain, mixed, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_with_branches_is_the_mean_of_each(smoothing):
    z, y = rand(3, 5, 4), torch.tensor([0, 3, 1, 1, 2])
    each = torch.stack([torch.nn.functional.cross_entropy(z[k], y, label_smoothing=smoothing) for k in range(3)])
    torch.testing.assert_close(losses.cross_entropy(z, y, smoothing), each.mean())
    assert losses.cross_entropy(z[0], y).item() == pytest.approx(reference.ce(z[0].numpy(), y.numpy()))


@settings(max_examples=30, deadline=None)
@given(K=st.integers(1, 5), scale=st.floats(0, 10), seed=st.integers(0, 999))
def test_ambiguity_identity_is_exact_for_mean_logits(K, scale, seed):
    z, y = rand(K, 6, 4, seed=seed, scale=scale), torch.randint(0, 4, (6,))
    gain = losses.cross_entropy(z, y) - losses.cross_entropy(z.mean(0), y)
    torch.testing.assert_close(losses.ambiguity(z), gain, rtol=1e-9, atol=1e-12)


def test_ambiguity_against_the_definition():
    z = rand(3, 5, 4)
    expected = np.mean(
        [
            reference.kl(reference.softmax(z[:, b].mean(0).numpy()), reference.softmax(z[k, b].numpy()))
            for b in range(5)
            for k in range(3)
        ]
    )
    assert losses.ambiguity(z).item() == pytest.approx(expected)
    assert losses.ambiguity(z[:1]).item() == pytest.approx(0, abs=1e-12)


def flow(pooling):
    return lambda s, t: losses.flow_loss([s[:, :1], s[:, 1:]], [t[:, :1], t[:, 1:]], pooling)


# Loss of (student, teacher), the shapes of both, and whether it is 0 where they are equal.
LOSSES = {
    "cross_entropy": (lambda s, t: losses.cross_entropy(s, LABELS), (3, 5), (3, 5), False),
    "kd_divergence": (lambda s, t: losses.kd_divergence(s, t, 3.0), (3, 5), (3, 5), True),
    "soft_cross_entropy": (lambda s, t: losses.soft_cross_entropy(s, t, 3.0), (3, 5), (3, 5), False),
    "mse": (losses.mse, (3, 5), (3, 5), True),
    "decoupled": (lambda s, t: sum(losses.decoupled(s, t, LABELS, 2.0)), (3, 5), (3, 5), True),
    "standardized": (
        lambda s, t: losses.kd_divergence(losses.standardized(s), losses.standardized(t), 2.0),
        (3, 5),
        (3, 5),
        True,
    ),
    "divergences": (lambda s, t: losses.divergences(s, t, 2.0), (3, 5), (2, 3, 5), False),
    "ambiguity": (lambda s, t: losses.ambiguity(s), (2, 3, 4), (1,), False),
    "attention": (losses.attention_loss, MAPS, (2, 3, 2, 2), True),
    "attention_norm": (lambda s, t: losses.attention_loss(s, t, "norm"), MAPS, (2, 3, 2, 2), True),
    "flow": (flow("max"), MAPS, MAPS, True),
    "flow_average": (flow("average"), MAPS, MAPS, True),
    "flow_matrix": (lambda s, t: losses.flow_matrix(s[:, :2], s[:, 2:, :2, :2]), MAPS, (1,), False),
    "gaussian": (lambda s, t: losses.gaussian_loss(s, torch.full((4,), 2.0), t), MAPS, MAPS, False),
    "distance": (losses.distance_loss, (5, 3), (5, 4), True),
    "angle": (losses.angle_loss, (5, 3), (5, 4), True),
    "similarity": (losses.similarity_loss, (5, 3), (5, 4), True),
    "relative_distances": (lambda s, t: losses.relative_distances(s), (5, 3), (1,), False),
    "angles": (lambda s, t: losses.angles(s), (5, 3), (1,), False),
    "similarities": (lambda s, t: losses.similarities(s), (5, 3), (1,), False),
}


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_has_right_gradients_and_gives_its_target_none(name):
    loss, ours, theirs, is_distance = LOSSES[name]
    student, teacher = rand(*ours).requires_grad_(), rand(*theirs, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher.detach()), student)
    loss(student, teacher).sum().backward()
    assert teacher.grad is None
    assert student.grad.any()
    if is_distance:
        assert loss(student, student.detach().clone()).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_gives_float32_losses_close_to_full_precision(name):
    loss, ours, theirs, _ = LOSSES[name]
    student, teacher = rand(*ours).bfloat16(), rand(*theirs, seed=1).bfloat16()
    # Products of relations are kept from autocast by their term.
    with torch.autocast("cpu", torch.bfloat16, enabled=name not in ("angle", "angles", "similarity", "similarities")):
        found = loss(student, teacher)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), loss(student.double(), teacher.double()), rtol=1e-4, atol=1e-5)


def test_combined_teachers_have_no_gradient():
    teachers = rand(1, 3, 5).requires_grad_()
    assert not losses.combine_teachers(teachers, torch.ones(1), 2.0, "probabilities").requires_grad


@pytest.mark.parametrize("loss", [lambda s, t: losses.kd_divergence(s, t, 2.0), losses.mse])
def test_shapes_that_would_broadcast_are_refused(loss):
    with pytest.raises(ValueError, match=r"\[3, 5, 4\].*\[1, 5, 4\]"):
        loss(rand(3, 5, 4), rand(1, 5, 4))


def test_labels_of_fewer_images_are_refused():
    with pytest.raises(ValueError, match=r"\b6\b.*\b3\b"):
        losses.cross_entropy(rand(6, 5), LABELS)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("leading", [(), (3,)])
def test_cross_entropy_with_soft_labels_is_the_textbook_formula(leading, label_smoothing):
    logits, targets = rand(*leading, 5, 4), torch.softmax(rand(5, 4, seed=1), dim=-1)
    smooth = (1 - label_smoothing) * targets.numpy() + label_smoothing / 4
    rows = [
        -sum(p * np.log(q) for p, q in zip(smooth[b], reference.softmax(z[b]), strict=True))
        for z in logits.numpy().reshape(-1, 5, 4)
        for b in range(5)
    ]
    for given_targets, relative in ((targets, 1e-9), (targets.float(), 1e-6)):
        found = losses.cross_entropy(logits, given_targets, label_smoothing)
        assert found.item() == pytest.approx(np.mean(rows), rel=relative)


def test_the_page_of_methods_lists_every_loss_and_its_snippet_runs():
    page = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()
    section = page.split("## The losses as functions")[1].split("\n## ")[0]
    named = set(re.findall(r"`(\w+)`", section))
    assert {name for part in (losses.features, losses.logits, losses.weights) for name in part.__all__} <= named
    assert {name for name in TERMS.names() if TERMS[name].__module__.startswith("ekd_lightning")} <= named
    (snippet,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    space: dict[str, Any] = {}
    exec(snippet, space)
    student, teachers, labels = (space[name] for name in ("student", "teachers", "labels"))
    loss = 0.1 * torch.nn.functional.cross_entropy(student, labels)
    soft = [(x / 4).log_softmax(1) for x in (student, teachers.mean(0))]
    loss += 0.9 * 16 * (soft[1].exp() * (soft[1] - soft[0])).sum(1).mean()
    torch.testing.assert_close(space["loss"], loss)
