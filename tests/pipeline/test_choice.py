from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from ekd_lightning.errors import UserError
from ekd_lightning.pipeline import teachers
from ekd_lightning.pipeline.prepare import PLAIN_METHODS, describe_teacher, prepare
from ekd_lightning.pipeline.teachers import choose_teacher
from ekd_lightning.training.pool import gather_teachers

CONF = Path(__file__).resolve().parents[2] / "conf" / "method"
PLAIN = ("student.branches=1", "student.split_after=none")
FEATURES = (*PLAIN, "+method.terms.feature_branch={weight: 1.0, feature: stage2}")


def ready(settings):
    return prepare(settings, "cpu")


def test_best_is_the_one_with_most_right_validation_images(tiny_settings):
    settings = tiny_settings("method=kd_mean", "method.teacher=best", "data.val_fraction=0.3")
    prepared = ready(settings)
    assert [plan.id for plan in prepared.candidates] == ["resnet8-s0", "resnet8-s1"]
    assert len(prepared.teachers) == 1
    chosen = choose_teacher(settings, prepared)
    images = prepared.dataset.train.images[prepared.subset.val_index].float() / 255
    labels = prepared.dataset.train.labels[prepared.subset.val_index]
    with torch.no_grad():
        right = [
            float((network.eval()(images).argmax(-1) == labels).float().mean())
            for network in gather_teachers(list(prepared.candidates)).members
        ]
    assert [row["val_accuracy"] for row in chosen.candidate_scores] == pytest.approx(right)
    winner = prepared.candidates[right.index(max(right))]
    assert [plan.id for plan in chosen.teachers] == [winner.id]
    assert not chosen.candidates


@pytest.mark.parametrize(("nlls", "winner"), [((0.3, 0.1), 1), ((0.1, 0.3), 0), ((0.2, 0.2), 0)])
def test_teachers_that_know_the_validation_images_differ_in_their_certainty(tiny_settings, monkeypatch, nlls, winner):
    """Networks trained on these images are right on all of them; the first is not the best for that."""
    scores = iter([{"accuracy": 1.0, "nll": nll} for nll in nlls])
    monkeypatch.setattr(teachers, "score_logits", lambda *args, **kwargs: next(scores))
    settings = tiny_settings("method=kd_mean", "method.teacher=best")
    assert [plan.id for plan in choose_teacher(settings, ready(settings)).teachers] == [f"resnet8-s{winner}"]


def test_first_and_mean(tiny_settings):
    first = ready(tiny_settings("method=kd_mean", "method.teacher=first"))
    assert [plan.id for plan in first.teachers] == ["resnet8-s0"]
    mean = ready(tiny_settings("method=kd_mean", "method.teacher=mean", *FEATURES))
    assert len(mean.teachers) == 2
    torch.testing.assert_close(mean.method.assignment.matrix(0), torch.tensor([[0.5, 0.5]]))


def test_the_method_fits_the_teacher_that_was_chosen(tiny_settings):
    settings = tiny_settings("method=kd_mean", "method.teacher=best", *FEATURES)
    prepared = choose_teacher(settings, ready(settings))
    wide = prepared.teachers[0].id == "resnet8-s1"
    adapters = [p.shape[0] for p in prepared.method.parameters() if p.ndim == 4]
    assert adapters == ([32] if wide else [])


def test_adapters_depend_on_the_seed_and_not_on_the_candidates(tiny_settings):
    common = ("method=kd_mean", *FEATURES, "teachers.pool=[{train: resnet8, seed: 1}]")

    def adapter(*overrides):
        return next(ready(tiny_settings(*common, *overrides)).method.parameters())

    assert torch.equal(adapter("method.teacher=first"), adapter())
    assert not torch.equal(adapter(), adapter("seed=1"))


def test_choosing_needs_validation_images(tiny_settings):
    settings = tiny_settings("method=kd_mean", "method.teacher=best", "data.val_fraction=0")
    with pytest.raises(UserError, match=r"data\.val_fraction"):
        ready(settings)


def test_an_unknown_choice_names_the_nearest(tiny_settings):
    with pytest.raises(UserError, match="'best'"):
        ready(tiny_settings("method=kd_mean", "method.teacher=bets"))


def test_a_choice_without_teachers_warns(tiny_settings):
    with pytest.warns(UserWarning, match="no effect"):
        ready(tiny_settings("method=ce", "method.teacher=best"))


@pytest.mark.filterwarnings("error:.*teacher=mean")
def test_the_mean_beside_an_assignment_warns_and_is_not_recorded(tiny_settings):
    beside, alone = (tiny_settings(f"method={name}", "method.teacher=mean") for name in ("ekd", "kd_mean"))
    with pytest.warns(UserWarning, match="method.teacher=mean has no effect with method.assignment=one_to_one"):
        prepared = ready(beside)
    assert describe_teacher(beside, prepared)["teacher_choice"] is None
    assert describe_teacher(alone, ready(alone))["teacher_choice"] == "mean"


@pytest.mark.parametrize("method", ["ce", "kd_mean"])
def test_a_plain_control_with_branches_warns(tiny_settings, method, recwarn):
    for plain in (f"method={method}", "method=branched_ce"):
        ready(tiny_settings(plain))
    assert not [one for one in recwarn if "gives branches" in str(one.message)]
    with pytest.warns(UserWarning, match=f"student.branches=3 gives branches to the student of {method}"):
        ready(tiny_settings(f"method={method}", "student.branches=3"))


def test_plain_methods_are_those_whose_files_set_one_branch():
    files = {path.stem: yaml.safe_load(path.read_text()) for path in CONF.glob("*.yaml")}
    plain = [name for name, content in files.items() if (content.get("student") or {}).get("branches") == 1]
    assert set(plain) - {"simkd"} == set(PLAIN_METHODS)  # simkd with branches: each has its own teacher's classifier


def test_every_candidate_must_fit_the_method(tiny_settings):
    identity = "+method.terms.feature_branch={weight: 1.0, feature: stage2, adapter: identity}"
    with pytest.raises(UserError, match="resnet8-s1"):
        ready(tiny_settings("method=kd_mean", "method.teacher=best", *PLAIN, identity))


def test_the_record_says_who_taught_and_why(train, tmp_path):
    outcome = train(tmp_path / "run", "method=kd_mean", "method.teacher=best")
    assert outcome.code == 0, outcome.err
    result = outcome.result
    assert result["teacher_choice"] == "best"
    assert result["num_teachers"] == 1
    assert result["teacher"] == result["teachers"][0]["id"]
    accuracies = {row["id"]: row["val_accuracy"] for row in result["teacher_candidates"]}
    assert accuracies[result["teacher"]] == max(accuracies.values())
