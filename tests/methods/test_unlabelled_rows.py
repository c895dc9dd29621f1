"""Rows without labels: terms that need labels never see them, all others count them."""

import math
from pathlib import Path

import pytest
import torch
import yaml
from torch.nn import functional

import ekd_lightning.conf
from ekd_lightning.methods import StepContext, TermContext, build_method, needs_teachers, terms_with_labels
from ekd_lightning.methods.terms import TERMS
from ekd_lightning.networks import (
    BranchedStudent,
    NetworkSpec,
    TeacherEnsemble,
    TeacherIdentity,
    build_network,
    normalization,
)
from ekd_lightning.networks.frozen import NetworkAccess
from ekd_lightning.teachers.source import LiveTeachers, TeacherFormat

from .helpers import make_batch, make_student, make_teachers, sizes

FOLDER = Path(next(iter(ekd_lightning.conf.__path__))) / "method"
METHODS = sorted(path.stem for path in FOLDER.glob("*.yaml"))
ROWS, KNOWN, CLASSES = 8, 5, 4
SPEC = NetworkSpec("resnet8", CLASSES, normalization("centered"), {"width": 0.25})
TEACHERS = [build_network(SPEC).eval() for _ in range(2)]


def composed(name):
    """A method's file with those that it builds on: settings of the method, settings of the student."""
    text = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    method, student = {"terms": {}}, {"branches": 2, "split_after": "stage1"}
    for base in text.pop("defaults", ["_self_"]):
        layer = (text.get("method", text), text.get("student", {})) if base == "_self_" else composed(base)
        for key, options in layer[0].get("terms", {}).items():
            method["terms"][key] = {**method["terms"].get(key, {}), **options}
        method |= {key: value for key, value in layer[0].items() if key not in ("terms", "student")}
        student |= layer[1]
    return method, student


def built(name):
    method, student = composed(name)
    torch.manual_seed(0)
    network = BranchedStudent(
        SPEC,
        branches=student["branches"],
        split_after=student["split_after"],
        ensemble=student.get("ensemble", "mean_logits"),
    )
    teachers = TEACHERS if needs_teachers(method["terms"]) else []
    context = TermContext.of(network, teachers, train_index=torch.arange(40), train_labels=torch.arange(40) % CLASSES)
    terms = {key: {**term, "schedule": None} for key, term in method["terms"].items()}
    made = build_method(
        name, terms, context, temperature=method.get("temperature"), assignment=method.get("assignment")
    )
    return network, teachers, made


def loss_and_gradients(name, labels):
    """One training step from the same start, with these labels [B]."""
    network, teachers, method = built(name)
    batch = make_batch(ROWS, CLASSES)._replace(labels=labels, num_labelled=KNOWN)
    batch = batch._replace(images=torch.rand(ROWS, 3, 32, 32, generator=torch.Generator().manual_seed(1)))
    said = None
    ensemble = None
    if teachers:
        ensemble = TeacherEnsemble(teachers, [TeacherIdentity(str(m), str(m), "file", "resnet8") for m in range(2)])
        said = LiveTeachers(ensemble, TeacherFormat(compile="never")).outputs(batch, method.teacher_stages)
    student = network.train().outputs(batch.images, method.student_stages)
    live = NetworkAccess(network, ensemble)
    total, terms = method(student, said, batch, networks=live)
    parameters = [p for p in (*network.parameters(), *method.parameters()) if p.requires_grad]
    return total, terms, torch.autograd.grad(total, parameters, allow_unused=True)


@pytest.mark.parametrize("name", METHODS)
def test_labels_of_unlabelled_rows_have_no_effect(name):
    """A poisoned label anywhere would show: in the loss, in a term, or in the gradient of some parameter."""
    known = torch.arange(KNOWN) % CLASSES
    outcomes = []
    for poison in ([-1, -1, -1], [0, 1, 3]):
        outcomes.append(loss_and_gradients(name, torch.cat([known, torch.tensor(poison)])))
    (total, terms, gradients), *others = outcomes
    assert math.isfinite(float(total))
    for again, their_terms, theirs in others:
        assert torch.equal(total, again)
        assert {key: float(value) for key, value in terms.items()} == {k: float(v) for k, v in their_terms.items()}
        for one, other in zip(gradients, theirs, strict=True):
            assert (one is None and other is None) or torch.equal(one, other)


def test_a_mixed_batch_is_distilled_in_full_and_classified_in_part():
    context = sizes(K=1, M=3)
    terms = {"ce_ensemble": {"weight": 0.1}, "kd_ensemble": {"weight": 0.9}}
    method = build_method("kd_mean", terms, context, temperature=4.0)
    student, teachers = make_student(K=1, B=6, dtype=torch.float64), make_teachers(M=3, B=6, dtype=torch.float64)
    batch = make_batch(6)._replace(num_labelled=2)
    batch = batch._replace(labels=torch.cat([batch.labels[:2], torch.full((4,), -1)]))
    result = method(student, teachers, batch)
    z, t = student.logits, teachers.logits.mean(0)
    ce = sum(-z[b].log_softmax(0)[batch.labels[b]] for b in range(2)) / 2
    p, q = (t / 4).softmax(-1), (z / 4).softmax(-1)
    kd = 16 * (p * (p.log() - q.log())).sum() / 6
    torch.testing.assert_close(result.total, 0.1 * ce + 0.9 * kd)
    (ours,) = torch.autograd.grad(result.total, student.logits)
    (theirs,) = torch.autograd.grad(0.1 * ce + 0.9 * kd, student.logits)
    torch.testing.assert_close(ours, theirs)


def test_terms_that_need_labels_take_them_of_labelled_rows_alone():
    """Every such term gives what it gives of a batch of the labelled rows alone."""
    student, teachers, batch = make_student(B=6), make_teachers(B=6), make_batch(6)._replace(num_labelled=4)
    alone = StepContext(student, teachers, batch).labelled
    assert len(alone.batch.labels) == len(alone.student.logits) == 4
    for name in ("ce_ensemble", "ce_branch", "dkd", "kd_camkd"):
        method = build_method(name, {name: {"weight": 1.0}}, sizes(K=2, M=3))
        expected = method(alone.student, alone.teachers, alone.batch).total
        assert torch.equal(method(student, teachers, batch).total, expected)


def test_pseudo_labels_are_the_teachers_most_likely_classes():
    method = build_method("pseudo_labels", {"pseudo_labels": {"weight": 1.0}}, sizes(K=1, M=3))
    student, teachers, batch = make_student(K=1, B=6), make_teachers(M=3, B=6), make_batch(6)._replace(num_labelled=1)
    classes = (teachers.logits[0] + teachers.logits[1] + teachers.logits[2]).argmax(-1)
    expected = functional.nll_loss(student.logits.log_softmax(-1), classes)
    torch.testing.assert_close(method(student, teachers, batch).total, expected)


def test_every_term_says_whether_it_needs_labels():
    """By what it does to a batch whose labels were all taken away: it fails, or it gives the same."""
    needing = {"boundary", "ce_branch", "ce_ensemble", "crd", "dkd", "feature_camkd", "kd_camkd"}
    own = [name for name in TERMS.names() if TERMS[name].__module__.startswith("ekd_lightning")]
    assert {name for name in own if TERMS[name].needs_labels} == needing
    assert terms_with_labels({"ce_ensemble": {"weight": 1.0}, "kd_ensemble": {"weight": 0.0}}) == (
        ["ce_ensemble"],
        True,
    )
    assert terms_with_labels({"dkd": {"weight": 1.0}, "mutual": {"weight": 1.0}}) == (["dkd"], False)
