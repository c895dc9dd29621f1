"""The part `predictions` against what its student and teachers say, computed here another way."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, log_loss

from ekd_lightning.data import choose_subset, load_dataset
from ekd_lightning.evaluation.diversity import spread_over_runs
from ekd_lightning.methods import TermContext
from ekd_lightning.networks import (
    BranchedStudent,
    NetworkSpec,
    TeacherEnsemble,
    TeacherIdentity,
    build_network,
    normalization,
    state_sha256,
)
from ekd_lightning.pipeline.context import EvaluationContext, plain
from ekd_lightning.pipeline.predictions import final_teachers, predictions
from ekd_lightning.runs.result import Result
from ekd_lightning.settings import DataSettings, MethodSettings, Settings, TeacherSettings

SPEC = NetworkSpec("resnet8", 10, normalization("centered"), {"width": 0.5})
TERMS = {"ce_ensemble": {"weight": 1.0}, "kd_branch": {"weight": 1.0}}


@pytest.fixture(scope="module")
def dataset():
    full = load_dataset("digits", "unused")
    test = replace(full.test, images=full.test.images[:90], labels=full.test.labels[:90])
    return replace(full, test=test)


@pytest.fixture(scope="module")
def teachers():
    torch.manual_seed(5)
    networks = [build_network(SPEC).eval() for _ in range(3)]
    identities = [TeacherIdentity(f"t{m}", state_sha256(n), "file", "resnet8") for m, n in enumerate(networks)]
    return TeacherEnsemble(networks, identities)


@pytest.fixture(scope="module")
def make(dataset, teachers, tmp_path_factory):
    """`make(...)` is the context of a student that knows nothing, but has batch norm statistics."""
    store = tmp_path_factory.mktemp("store")

    def context(branches=3, ensemble="mean_logits", taught=True, batch_size=40, val=0.1, **method):
        torch.manual_seed(1)
        student = BranchedStudent(SPEC, branches=branches, split_after="stage1", ensemble=ensemble)
        with torch.no_grad():
            student.train()(dataset.train.images[:64].float() / 255)
        settings = Settings(
            data=DataSettings(eval_batch_size=batch_size),
            teachers=TeacherSettings(store=str(store)),
            method=MethodSettings(terms=TERMS, **method),
        )
        named = [{"sha256": i.sha256} for i in teachers.identities] if taught else []
        result = Result("ekd", "digits", seed=0, fraction=0.2, teachers=named)
        subset = choose_subset(dataset.train.labels, fraction=0.2, val_fraction=val)
        gather = (lambda: teachers) if taught else None
        return EvaluationContext(settings, result, student.eval(), dataset, subset, torch.device("cpu"), gather)

    return context


def test_numbers_are_those_of_the_student_and_its_teachers(make, teachers, dataset):
    context = make()
    fields, arrays = predictions(context)
    images, labels = dataset.test.images.float() / 255, dataset.test.labels.numpy()
    with torch.no_grad():
        output, taught = context.student.outputs(images), teachers(images)
    probs = output.logits.double().softmax(-1).numpy()
    predicted, branches = probs.argmax(1), output.branch_logits.argmax(-1).numpy()

    matrix = confusion_matrix(labels, predicted, labels=range(10))
    np.testing.assert_array_equal(arrays["confusion"], matrix)
    assert fields["test_class_accuracy"] == pytest.approx(list(matrix.diagonal() / matrix.sum(1)))
    np.testing.assert_array_equal(arrays["branch_predictions"], branches)
    np.testing.assert_array_equal(arrays["labels"], labels)
    np.testing.assert_allclose(arrays["ensemble_probs"], probs, atol=1e-3)
    assert arrays["ensemble_probs"].dtype == np.float16

    each = [accuracy_score(labels, row) for row in branches]
    whole = accuracy_score(labels, predicted)
    assert fields["test_mean_branch_accuracy"] == pytest.approx(np.mean(each))
    assert fields["test_best_branch_accuracy"] == max(each)
    assert fields["test_gain_over_mean_branch"] == pytest.approx(whole - np.mean(each))
    assert fields["test_gain_over_best_branch"] == pytest.approx(whole - max(each))
    assert [row["accuracy"] for row in fields["test_subsets"][:3]] == pytest.approx(each)
    assert fields["test_subsets"][-1]["nll"] == pytest.approx(log_loss(labels, probs, labels=range(10)), rel=1e-5)

    said = [logits.argmax(-1).numpy() for logits in taught.logits]
    np.testing.assert_allclose(
        fields["test_branch_teacher_agreement"], [[accuracy_score(t, b) for t in said] for b in branches]
    )
    together = taught.logits.mean(0).argmax(-1).numpy()
    assert fields["test_teacher_agreement"] == pytest.approx(accuracy_score(together, predicted))
    assert fields["test_teacher_ensemble_accuracy"] == pytest.approx(accuracy_score(labels, together))
    margin = fields["test_branch_teacher_agreement"]
    own = [margin[k][k] - (sum(margin[k]) - margin[k][k]) / 2 for k in range(3)]
    assert fields["test_own_teacher_agreement_margin"] == pytest.approx(np.mean(own))
    assert np.diagonal(fields["test_branch_cka"]) == pytest.approx(np.ones(3))
    assert arrays["reliability_count"].sum() == 90


@pytest.mark.parametrize("ensemble", ["mean_logits", "gate"])
def test_the_batch_size_changes_nothing(make, ensemble):
    one, other = (predictions(make(ensemble=ensemble, batch_size=size)) for size in (7, 90))
    for name, value in one.fields.items():
        assert flat(other.fields[name]) == pytest.approx(flat(value), rel=1e-4, abs=1e-5, nan_ok=True), name
    for name, array in one.arrays.items():
        np.testing.assert_allclose(other.arrays[name], array, rtol=1e-3, atol=1e-3)


def test_every_student_has_the_same_fields_and_arrays(make):
    """So that evaluating again replaces all that was there."""
    found = [
        predictions(make()),
        predictions(make(branches=1)),
        predictions(make(taught=False, val=0.0)),
        predictions(make(branches=2, ensemble="mean_probs", assignment="mean")),
    ]
    assert len({tuple(one.fields) for one in found}) == 1
    assert len({(name, array.shape[-1:]) for one in found for name, array in one.arrays.items()}) == len(
        found[0].arrays
    )
    for one in found:
        json.dumps(plain(one.fields))
    _, plain_student, untaught, mean = (one.fields for one in found)
    assert [row["branches"] for row in plain_student["test_subsets"]] == [[0]]
    assert plain_student["test_pairwise_kl"] is None
    assert plain_student["test_gain_over_best_branch"] == 0
    assert untaught["test_branch_teacher_cka"] is None
    assert untaught["calibration_temperature"] is None
    assert np.isnan(found[2].arrays["reliability_accuracy_calibrated"]).all()
    assert mean["test_own_teacher_cka_margin"] is None
    assert mean["test_one_to_one_cka_margin"] is not None


def test_every_field_and_array_is_defined_in_the_docs(make):
    page = (Path(__file__).resolve().parents[2] / "docs" / "evaluation.md").read_text()
    found = predictions(make(branches=1))
    assert [name for name in (*found.fields, *found.arrays) if f"`{name}`" not in page] == []


def test_teachers_that_were_asked_before_are_not_needed(make):
    predictions(make())
    context = make()
    context.gather = pytest.fail
    assert predictions(context).fields["test_teacher_kl"] > 0


def test_student_and_teachers_stay_as_they_were(make, teachers):
    context = make()
    before = {name: value.clone() for name, value in context.student.state_dict().items()}
    predictions(context)
    assert all(torch.equal(value, before[name]) for name, value in context.student.state_dict().items())
    assert not context.student.training
    teachers.verify()


@pytest.mark.parametrize(
    ("method", "own"),
    [
        ({}, [0, 1, 2]),
        ({"assignment": "permuted"}, [1, 2, 0]),
        ({"assignment": "mean"}, [None] * 3),
        ({"assignment": "random"}, [None] * 3),
        ({"teacher": "mean"}, [None] * 3),
        ({"assignment": [[0, 0, 1], [1, 0, 0], [0.5, 0.5, 0]]}, [2, 0, None]),
        ({"assignment": {"schedule": [[0, "mean"], [0.5, "2,0,1"]]}}, [2, 0, 1]),
        ({"terms": {"kd_ensemble": {"weight": 1.0}}}, [None] * 3),
        ({"terms": {**TERMS, "kd_branch": {"weight": 0.0}}}, [None] * 3),
        ({"terms": {"feature_branch": {"weight": 1.0, "teachers": "all"}}}, [None] * 3),
        ({"terms": {"feature_branch": {"weight": 1.0, "teachers": "auto"}}}, [0, 1, 2]),
        ({"terms": {"feature_branch": {"weight": 1.0, "teachers": "auto", "feature": "stage2"}}}, [0, 1, 2]),
        ({"terms": {"feature_branch": {"weight": 1.0, "teachers": "auto", "feature": "stage1"}}}, [None] * 3),
    ],
)
def test_own_teachers_are_those_of_the_training(method, own):
    settings = Settings(method=MethodSettings(**{"terms": TERMS, **method}))
    shapes = {"stage1": (4, 8, 8), "stage2": (8, 4, 4)}
    student = TermContext(10, 3, 0, student_stage_shapes=shapes, shared_stages=("stage1",))
    assert final_teachers(settings, student, 3) == own


def test_arrays_of_several_runs_give_the_spread_over_seeds(make):
    runs = [predictions(make(ensemble=ensemble)).arrays for ensemble in ("mean_logits", "mean_probs")]
    spread = spread_over_runs(np.stack([run["ensemble_probs"] for run in runs]), runs[0]["labels"])
    assert spread.num_runs == 2
    assert 0 <= spread.variance < 1e-2


def flat(value):
    """The numbers in nested lists and mappings, in order; None as NaN."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for item in value for number in flat(item)]
    return [math.nan if value is None else float(value)]
