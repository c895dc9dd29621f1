from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from lived_networks import with_lived_norms
from torch import nn

from ekd_lightning.data import load_dataset
from ekd_lightning.methods import StepContext, build_term
from ekd_lightning.methods.boundary_terms import attack, choose_base, draw_targets
from ekd_lightning.networks import BranchedStudent, NetworkSpec, TeacherEnsemble, TeacherIdentity, build_network
from ekd_lightning.networks import normalization as statistics_of
from ekd_lightning.networks.convert import load_foreign
from ekd_lightning.networks.frozen import NetworkAccess
from ekd_lightning.networks.staged import TeacherOutput
from ekd_lightning.networks.weights import state_sha256
from ekd_lightning.networks.zoo import find_zoo_file, zoo

from .helpers import make_batch, term_context

B, C = 24, 4
SPEC = NetworkSpec("resnet8", C, statistics_of("cifar10"), {"width": 0.5})


def make_live(**options):
    torch.manual_seed(0)
    teachers = TeacherEnsemble(
        [with_lived_norms(build_network(SPEC)) for _ in range(2)],
        [TeacherIdentity(f"t{m}", "0" * 64, "file", "x") for m in range(2)],
    )
    return NetworkAccess(BranchedStudent(SPEC, branches=1, split_after="none"), teachers, **options)


@pytest.fixture
def live():
    return make_live()


def images(seed=1):
    return torch.rand(B, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def test_base_images_are_right_in_both_and_differ_most():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(40, 5, generator=generator) for _ in range(2))
    labels = teacher.argmax(1)
    found = choose_base(student, teacher, labels, 3).tolist()
    p, q = teacher.softmax(1).numpy(), student.softmax(1).numpy()
    right = [b for b in range(40) if student[b].argmax() == labels[b]]
    score = {b: sum((p[b, c] - q[b, c]) ** 2 for c in range(5) if c != labels[b]) for b in right}
    assert found == sorted(right, key=lambda b: -score[b])[:3]
    assert len(choose_base(student, teacher, labels, 64)) == len(right)
    assert len(choose_base(student, teacher, (labels + 1) % 5, 64)) == 0


def test_targets_are_drawn_in_proportion_to_the_wrong_classes():
    z = torch.tensor([[2.0, 0.0, 1.0, -1.0]])
    number = 20_000
    uniform = torch.from_numpy(np.random.default_rng(0).random(number))
    found = draw_targets(z.expand(number, 4), uniform)
    counts = np.bincount(found.numpy(), minlength=4) / number
    p = z.softmax(1)[0].numpy()
    expected = np.array([0.0, p[1], p[2], p[3]]) / (1 - p[0])
    np.testing.assert_allclose(counts, expected, atol=0.012)
    assert draw_targets(z, torch.tensor([0.0])).item() == 2  # the likeliest comes first
    assert draw_targets(z, torch.tensor([1.0 - 1e-9])).item() == 3


def test_attacked_images_flip_the_teachers_class_or_had_all_steps(live):
    def ask(x):
        return live.teacher_outputs(0, x).logits

    x = images()
    first = ask(x).argmax(1)
    target = (first + 1) % C
    # An untrained network's logits are small, and the step is proportional to their distance.
    moved = attack(ask, x, target, live.teacher_statistics(0)[1], steps=60, step_size=30.0)
    changed = ask(moved).argmax(1) != first
    assert changed.float().mean() > 0.9
    assert not moved.requires_grad
    assert 0.0 <= float(moved.min()) <= float(moved.max()) <= 1.0


def test_one_step_of_an_attack_by_hand():
    """For a linear teacher the gradient is known: the step is 0.3 (gap + 1e-4) g / |g| in normalised units."""
    weight = torch.randn(3, 3 * 4 * 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    mean, std = (torch.full((1, 3, 1, 1), 0.5).double(), torch.tensor([0.2, 0.25, 0.3]).double().view(1, 3, 1, 1))

    def ask(x):
        return ((x - mean) / std).flatten(1) @ weight.T

    x = 0.5 + 0.02 * torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    first = ask(x).argmax(1)
    target = (first + 1) % 3
    found = attack(ask, x, target, std, steps=1, step_size=0.3)
    for b in range(2):
        g = weight[target[b]] - weight[first[b]]
        gap = ask(x)[b, first[b]] - ask(x)[b, target[b]]
        step = 0.3 * (gap + 1e-4) * g / g.norm()
        expected = x[b] + std[0] * step.view(3, 4, 4)
        torch.testing.assert_close(found[b], expected)


def test_an_attack_asks_about_images_only_until_they_cross(live):
    """As if every image had been attacked alone; those that have crossed are not asked about again."""
    x, std, asked = images(), live.teacher_statistics(0)[1], []

    def ask(x):
        asked.append(len(x))
        return live.teacher_outputs(0, x).logits

    target = (ask(x).argmax(1) + 1) % C
    options = {"std": std, "steps": 25, "step_size": 3.0}
    asked.clear()
    together = attack(ask, x, target, **options)
    counts = list(asked)
    asked.clear()
    alone = [attack(ask, x[b : b + 1], target[b : b + 1], **options) for b in range(B)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=0)
    assert counts == sorted(counts, reverse=True)
    assert len(set(counts)) > 1, "all images crossed at once: the test shows nothing"
    assert sum(counts) == len(asked)


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("channels_last", [True, False])
def test_a_teacher_asked_live_is_the_teacher(fold, channels_last):
    """Folding batch norms changes its answers and its gradients by rounding only; both ways to be fast can be off."""
    live = make_live(fold=fold, channels_last=channels_last)
    x, member = images().requires_grad_(), live._members[1]
    with torch.autocast("cpu", torch.bfloat16):
        found = live.teacher_outputs(1, x)
    expected = member.outputs(x)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-5, rtol=1e-4)
    assert found.stages.keys() == expected.stages.keys()
    for name, stage in expected.stages.items():
        torch.testing.assert_close(found.stages[name], stage, atol=1e-5, rtol=1e-4)
        assert found.stages[name].is_contiguous(memory_format=torch.channels_last) is channels_last
    got, wanted = (torch.autograd.grad(out.logits.square().sum(), x)[0] for out in (found, expected))
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-3)
    norms = [m for frozen in live._frozen.values() for m in frozen.modules() if isinstance(m, nn.BatchNorm2d)]
    assert bool(norms) is not fold


def test_the_student_learns_from_attacked_images_and_teachers_are_copied_once_and_left_alone(live):
    before = [state_sha256(member) for member in live._members]
    for _ in range(2):
        value = make_term()(context(live))
        value.backward()
        assert float(value.detach()) > 0
    assert any(p.grad is not None and p.grad.any() for p in live._student.parameters())
    assert [state_sha256(member) for member in live._members] == before
    assert all(p.grad is None for member in live._members for p in member.parameters())
    assert len(live._frozen) == 2
    for frozen in live._frozen.values():
        assert not any(p.requires_grad or p.grad is not None for p in frozen.parameters())
        assert not any(module.training for module in frozen.modules())


def context(live, term_progress=0.0, step=0, labels=None):
    x = images()
    student = live.student_outputs(x)
    with torch.no_grad():
        logits = torch.stack([live.teacher_outputs(m, x).logits for m in range(2)])
    # As right as teacher 0, with gradients towards the student.
    student = student._replace(logits=student.logits + (logits[0] - student.logits).detach())
    batch = make_batch(B, C)._replace(images=x, labels=logits[0].argmax(1) if labels is None else labels)
    teachers = type("T", (), {"logits": logits})()
    return StepContext(student, teachers, batch, step=step, progress=term_progress, networks=live)


def make_term(**options):
    return build_term("boundary", 1.0, term_context(1, 2), **options)


def test_the_draw_depends_on_seed_and_step_alone(live):
    live._student.eval()
    term = make_term()
    values = [float(term(context(live, step=step)).detach()) for step in (3, 3, 4)]
    assert values[0] == values[1]
    other = build_term("boundary", 1.0, term_context(1, 2, seed=9))
    assert {float(other(context(live, step=3)).detach()), values[2]} != {values[0]}


@pytest.mark.assets
@pytest.mark.skipif(not os.environ.get("EKD_WEIGHTS_DIR"), reason="no pretrained weights")
def test_the_published_attack_flips_a_pretrained_teacher():
    """Real images, a real teacher, the published ten steps of 0.3."""
    entry = zoo()["cifar10_resnet20_akamaster"]
    path = find_zoo_file(entry, os.environ["EKD_WEIGHTS_DIR"])
    teacher = load_foreign(path, entry.spec, entry.key_map).requires_grad_(False)
    x = load_dataset("cifar10", os.environ["EKD_DATA_ROOT"]).test.images[:64].float() / 255
    first = teacher(x).argmax(1)
    target = draw_targets(teacher(x), torch.rand(64, generator=torch.Generator().manual_seed(0)))
    moved = attack(teacher, x, target, teacher.normalize.std, steps=10, step_size=0.3)
    assert float((teacher(moved).argmax(1) != first).float().mean()) > 0.9
    assert float((moved - x).abs().mean()) < 0.05  # just across the boundary


def test_without_a_fitting_image_the_value_is_zero_with_a_graph(live):
    with torch.no_grad():
        wrong = (live.teacher_outputs(0, images()).logits.argmax(1) + 1) % C
        wrong = torch.where(live.teacher_outputs(1, images()).logits.argmax(1) == wrong, (wrong + 1) % C, wrong)
    value = make_term()(context(live, labels=wrong))
    assert float(value.detach()) == 0.0
    value.backward()


def test_a_mixed_image_has_the_class_of_its_larger_share(live):
    live._student.eval()
    here = context(live)
    labels = here.batch.labels
    soft = 0.6 * torch.nn.functional.one_hot(labels, C) + 0.4 * torch.nn.functional.one_hot((labels + 1) % C, C)
    mixed = replace(here, batch=here.batch._replace(labels=(labels + 1) % C, soft_labels=soft))
    torch.testing.assert_close(make_term()(mixed), make_term()(here))


def test_a_single_image_to_attack_is_survived_where_maps_are_one_by_one():
    """Batch norm in training refuses one value per channel."""
    torch.manual_seed(0)
    student = BranchedStudent(SPEC, branches=1, split_after="none")
    teachers = TeacherEnsemble([build_network(SPEC)], [TeacherIdentity("t", "0" * 64, "file", "x")])
    live = NetworkAccess(student, teachers)
    x = torch.rand(B, 3, 4, 4, generator=torch.Generator().manual_seed(2))
    outputs = live.student_outputs(x)
    assert outputs.stages[0]["stage3"].shape[-2:] == (1, 1)
    logits = live.teacher_outputs(0, x).logits.detach()
    outputs = outputs._replace(logits=outputs.logits + (logits - outputs.logits).detach())
    labels = logits.argmax(1)
    labels[1:] = (labels[1:] + 1) % C
    batch = make_batch(B, C)._replace(images=x, labels=labels)
    value = build_term("boundary", 1.0, term_context(1, 1))(
        StepContext(outputs, TeacherOutput(logits[None], (), ()), batch, networks=live)
    )
    assert torch.isfinite(value)
    assert float(value.detach()) > 0
