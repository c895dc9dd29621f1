"""The parts beside the predictions: what they find, of what, and that they leave the student as it was."""

from __future__ import annotations

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss
from torch.nn import functional

from ekd_lightning.data import Dataset, ImageSet, choose_subset, load_dataset
from ekd_lightning.errors import UserError
from ekd_lightning.evaluation.robustness import EXTRA, MAIN, corrupt
from ekd_lightning.networks import BranchedStudent, NetworkSpec, normalization
from ekd_lightning.pipeline import context as context_module
from ekd_lightning.pipeline import evaluation as parts
from ekd_lightning.pipeline.context import EvaluationContext, merge
from ekd_lightning.runs.result import Result
from ekd_lightning.settings import DataSettings, Settings

RESULT = Result("ekd", "digits", seed=0, fraction=0.1, test_accuracy=0.5)


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    whole = load_dataset("digits", "unused")
    test = whole.test
    return Dataset(
        "digits", whole.train, ImageSet("digits", "test", test.images[:60], test.labels[:60], test.class_names)
    )


@pytest.fixture(scope="module")
def trained(dataset) -> BranchedStudent:
    """A student that knows many digits: its heads are fitted, by least squares, to what random stages see."""
    torch.manual_seed(0)
    spec = NetworkSpec("resnet8", 10, normalization("centered"), {"width": 0.5})
    student = BranchedStudent(spec, branches=2, split_after="stage1")
    images, labels = dataset.train.images[:500].float() / 255, dataset.train.labels[:500]
    with torch.no_grad():
        for _ in range(5):
            student(images)  # batch norms get statistics of their own
        wanted = 10 * functional.one_hot(labels, 10).float() - 5
        for branch, pooled in zip(student.branches, student.eval().outputs(images).pooled, strict=True):
            features = torch.cat([pooled, torch.ones(len(pooled), 1)], dim=1)
            fitted = torch.linalg.lstsq(features, wanted).solution
            branch.head.weight.copy_(fitted[:-1].T)
            branch.head.bias.copy_(fitted[-1])
    return student


@pytest.fixture
def context(dataset, trained, tmp_path) -> EvaluationContext:
    settings = Settings(data=DataSettings(root=str(tmp_path), eval_batch_size=50))
    subset = choose_subset(dataset.train.labels, fraction=0.1)
    return EvaluationContext(settings, RESULT, copy.deepcopy(trained), dataset, subset, torch.device("cpu"))


def scores(context, images, labels) -> tuple[float, float]:
    """Accuracy and NLL of the student, by scikit-learn."""
    with torch.no_grad():
        probs = context.student(images.float() / 255).double().softmax(-1).numpy()
    return accuracy_score(labels, probs.argmax(1)), log_loss(labels, probs, labels=range(10))


SMALL = {
    parts.generalisation: {},
    parts.flatness: {"sharpness_images": 40, "curve_images": 10, "directions": 1, "points": 2},
    parts.corruptions: {"images": 3},
    parts.efficiency: {"min_seconds": 0.01},
}


@pytest.mark.parametrize("part", SMALL)
def test_parts_leave_the_student_as_it_was_and_fit_the_record(context, part):
    before = {name: value.clone() for name, value in context.student.state_dict().items()}
    findings = part(context, **SMALL[part])
    after = context.student.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not context.student.training
    assert all(p.requires_grad and p.grad is None for p in context.student.parameters())
    fields = dict(merge(RESULT, findings, part.__name__, 1.0))
    assert json.loads(json.dumps(fields, allow_nan=False)) == fields
    assert all(array.dtype == np.float64 for array in findings.arrays.values())


def test_generalisation_on_the_images_that_were_seen(context, dataset):
    seen = context.subset.train_index
    train = scores(context, dataset.train.images[seen], dataset.train.labels[seen])
    test = scores(context, dataset.test.images, dataset.test.labels)
    assert parts.generalisation(context).fields == {
        "train_accuracy": pytest.approx(train[0]),
        "train_nll": pytest.approx(train[1], rel=1e-5),
        "gap_accuracy": pytest.approx(train[0] - test[0]),
        "gap_nll": pytest.approx(test[1] - train[1], rel=1e-4),
    }


def test_parts_share_one_pass_over_the_test_images(context, monkeypatch):
    asked = []

    def predict_student(student, images, **options):
        asked.append(images.split)
        return evaluation_predict(student, images, **options)

    evaluation_predict = context_module.predict_student
    monkeypatch.setattr(context_module, "predict_student", predict_student)
    fresh = dataclasses.replace(context)
    assert parts.generalisation(fresh) == parts.generalisation(fresh)
    assert asked == ["test"]


def test_flatness_on_a_fixed_choice_of_training_images(context, dataset):
    found = parts.flatness(context, sharpness_images=5000, curve_images=16, directions=2, points=3, seed=4)
    assert found.fields["sharpness_images"] == len(context.subset.train_index)
    assert found.fields["loss_curve_images"] == 16
    assert found.fields["sharpness_sam"] > 0
    assert found.fields["sharpness_adaptive"] > 0
    alphas, curves = found.arrays["loss_curve_alpha"], found.arrays["loss_curve_loss"]
    assert alphas.tolist() == [-1, -0.5, -0.25, 0, 0.25, 0.5, 1]
    assert curves.shape == (2, 7)
    index = context.subset.train_index[torch.arange(16) * len(context.subset.train_index) // 16]
    middle = scores(context, dataset.train.images[index], dataset.train.labels[index])[1]
    assert curves[:, 3] == pytest.approx([middle, middle], rel=1e-5)
    rises = curves - curves[:, 3:4]
    assert found.fields["loss_rise_at_half"] == pytest.approx(rises[:, [1, 5]].mean())
    assert found.fields["loss_rise_at_quarter"] == pytest.approx(rises[:, [2, 4]].mean())
    again = parts.flatness(context, sharpness_images=16, curve_images=16, directions=1, points=3, seed=5)
    assert again.arrays["loss_curve_loss"][0].tolist() == curves[1].tolist()
    none = parts.flatness(context, sharpness_images=8, directions=0)
    assert set(none.fields) == {"sharpness_sam", "sharpness_adaptive", "sharpness_images"}
    assert not none.arrays


def test_corruptions_that_are_regenerated(context, dataset):
    found = parts.corruptions(context, images=20, seed=2, extra=True).fields
    assert found["corruption_source"] == "regenerated"
    assert found["corruption_images"] == 20
    assert found["corruption_left_out"] == ["frost"]
    index = torch.arange(20) * 3
    labels = dataset.test.labels[index]
    clean = scores(context, dataset.test.images[index], labels)
    assert found["corruption_clean_accuracy"] == pytest.approx(clean[0])
    assert found["corruption_clean_nll"] == pytest.approx(clean[1], rel=1e-5)
    nll, accuracy = np.zeros((14, 5)), np.zeros((14, 5))
    main = [name for name in MAIN if name != "frost"]
    assert list(found["corruption_accuracy"]) == [*main, *EXTRA]
    for row, name in enumerate(main):
        for severity in range(5):
            images = corrupt(dataset.test.images, name, severity + 1, seed=2)[index]
            accuracy[row, severity], nll[row, severity] = scores(context, images, labels)
    for name, found_row in zip(main, accuracy, strict=True):
        assert found["corruption_accuracy"][name] == pytest.approx(found_row.tolist())
    assert 0.3 < accuracy.mean() < found["corruption_clean_accuracy"]
    assert found["corruption_accuracy_by_severity"] == pytest.approx(accuracy.mean(0).tolist())
    assert found["corruption_nll_by_severity"] == pytest.approx(nll.mean(0).tolist(), rel=1e-4)
    assert found["corruption_mce"] == pytest.approx(1 - accuracy.mean())
    assert len(found["corruption_ece_by_severity"]) == 5
    assert all(0 <= value <= 1 for value in found["corruption_ece_by_severity"])


def test_an_incomplete_folder_of_photographs_is_refused(context, tmp_path):
    (tmp_path / "frost").mkdir()
    with pytest.raises(UserError, match=r"frost1\.png: no such file"):
        parts.corruptions(context)


def test_efficiency_of_the_folded_student(context):
    found = parts.efficiency(context, min_seconds=0.01).fields
    assert found["throughput_batch128"] == pytest.approx(128e3 / found["latency_ms_batch128"])
    assert found["latency_ms_batch1"] > 0
    assert found["efficiency_threads"] == torch.get_num_threads()
    assert found["efficiency_device"]
    weights = sum(t.numel() for t in context.student.state_dict().values())
    assert found["deployed_bytes"] < 4 * weights + 10_000
    # The first stage's maps alone, twice, of 8 channels.
    assert found["memory_bytes_batch128"] > 2 * 128 * 8 * 32 * 32 * 4
