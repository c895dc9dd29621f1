"""How parts of an evaluation are run, kept, replaced and refused; the parts here are made up."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ekd_lightning.data import choose_subset, load_dataset
from ekd_lightning.errors import UserError
from ekd_lightning.networks import BranchedStudent, NetworkSpec, normalization
from ekd_lightning.pipeline import evaluation
from ekd_lightning.pipeline.context import EvaluationContext, Findings, merge
from ekd_lightning.pipeline.evaluation import PARTS, evaluate_finished_run, evaluate_new_run
from ekd_lightning.progress import session
from ekd_lightning.runs.lock import DirectoryLock
from ekd_lightning.runs.result import Result
from ekd_lightning.runs.writer import RunWriter
from ekd_lightning.settings import EVALUATION_PARTS, EvaluationSettings, Settings

RESULT = Result.of({"method": "ekd", "data": "digits", "seed": 0, "fraction": 0.1, "test_accuracy": 0.5})


@pytest.fixture
def parts(monkeypatch):
    """Made-up parts by name; each counts its calls in `parts.calls`."""

    class Parts(dict):
        calls: list[str]

    found = Parts()
    found.calls = []

    def called(name):
        found.calls.append(name)
        if isinstance(found[name], BaseException):
            raise found[name]
        return found[name]

    made = {name: lambda _, name=name: called(name) for name in EVALUATION_PARTS}
    monkeypatch.setattr(evaluation, "PARTS", made)
    return found


def context(*parts, result=RESULT):
    dataset = load_dataset("digits", "unused")
    spec = NetworkSpec("resnet8", 10, normalization("centered"), {"width": 0.5})
    student = BranchedStudent(spec, branches=2, split_after="stage1").eval()
    settings = Settings(evaluation=EvaluationSettings(parts=list(parts)))
    subset = choose_subset(dataset.train.labels, fraction=0.1)
    return EvaluationContext(settings, result, student, dataset, subset, torch.device("cpu"))


@pytest.fixture
def directory(tmp_path):
    return RunWriter(tmp_path)


@pytest.fixture
def finished(directory):
    """The directory of a run without evaluation."""
    directory.write_result(RESULT)
    return directory


def read(directory):
    return directory.read_result()


def test_a_new_run_gets_what_its_parts_find(directory, parts):
    parts["predictions"] = Findings({"a": np.float32(0.5), "b": np.arange(3)}, {"x": np.arange(4)})
    parts["generalisation"] = Findings({"c": {"d": [np.int64(1), math.nan]}}, {"y": np.ones((2, 2), np.float16)})
    found = evaluate_new_run(context("generalisation", "predictions"), directory)
    assert found.items() >= {**RESULT, "a": 0.5, "b": [0, 1, 2], "evaluation_error": None}.items()
    assert found["c"]["d"][0] == 1
    assert found["evaluated"] == ["predictions", "generalisation"]
    assert found["evaluation_seconds"].keys() == {"predictions", "generalisation"}
    arrays = directory.arrays()
    np.testing.assert_array_equal(arrays["x"], np.arange(4))
    assert arrays["y"].dtype == np.float16
    assert sorted(path.name for path in directory.path.iterdir()) == ["arrays.npz"]  # the caller writes the rest


def test_without_parts_the_record_says_so(directory, parts):
    found = evaluate_new_run(context(), directory)
    assert found == {**RESULT, "evaluated": [], "evaluation_error": None}


@pytest.mark.parametrize("error", [UserError("no such; folder"), RuntimeError("out of\nchalk")])
def test_a_part_that_fails_is_stated_and_loses_nothing_else(directory, parts, caplog, error):
    parts |= {"predictions": error, "generalisation": Findings({"c": 1}), "flatness": error}
    found = evaluate_new_run(context("predictions", "generalisation", "flatness"), directory)
    assert (found["evaluated"], found["c"], found["method"]) == (["generalisation"], 1, "ekd")
    line = "no such, folder" if isinstance(error, UserError) else "RuntimeError: out of chalk"
    assert found["evaluation_error"] == f"predictions: {line}; flatness: {line}"
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert ("Traceback" in caplog.text) is not isinstance(error, UserError)

    directory.write_result(found)
    parts |= {"predictions": Findings({"a": 1}), "flatness": Findings({"f": 1})}
    evaluate_finished_run(context(result=found), directory, ["predictions"])
    assert read(directory)["evaluation_error"] == f"flatness: {line}"
    evaluate_finished_run(context(result=read(directory)), directory, ["flatness"])
    assert read(directory)["evaluation_error"] is None


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), SystemExit(1)])
def test_who_stops_a_run_stops_its_evaluation(directory, parts, stop):
    parts["predictions"] = stop
    with pytest.raises(type(stop)):
        evaluate_new_run(context("predictions"), directory)


def test_parts_are_added_to_a_finished_run_once(finished, parts):
    parts["efficiency"] = Findings({"ms": 2.0}, {"x": np.zeros(1)})
    parts["predictions"] = Findings({"a": 1}, {"y": np.zeros(2)})
    first = evaluate_finished_run(context(), finished, ["efficiency"])
    assert (first.done, first.skipped, first.errors) == (["efficiency"], [], {})
    second = evaluate_finished_run(context(result=read(finished)), finished, ["efficiency", "predictions"])
    assert (second.done, second.skipped) == (["predictions"], ["efficiency"])
    assert parts.calls == ["efficiency", "predictions"]
    found = read(finished)
    assert found == second.result
    assert found.items() >= {**RESULT, "ms": 2.0, "a": 1}.items()
    assert found["evaluated"] == ["predictions", "efficiency"]
    assert finished.arrays().keys() == {"x", "y"}


def test_the_time_left_is_that_of_parts_to_be_run_by_their_usual_times(finished, monkeypatch):
    names, shares = list(EVALUATION_PARTS), {}

    def looked_at(name):
        shares[name] = shown.at_work.share
        return Findings({})

    made = {name: lambda _, name=name: looked_at(name) for name in names}
    monkeypatch.setattr(evaluation, "PARTS", made)
    with session() as shown:
        evaluate_finished_run(context(), finished, names[:2])
        shares.clear()
        shown.renew()
        evaluate_finished_run(context(result=read(finished)), finished, names)
        assert shown.phases["evaluation"].share == 1
    assert list(shares) == names[2:]  # flatness, corruptions and efficiency: nothing is done, then 70 and 200 of 204
    assert list(shares.values()) == [0, 70 / 204, 200 / 204]


def test_by_force_a_part_replaces_what_it_wrote_and_nothing_else(finished, parts):
    parts |= {"predictions": Findings({"a": 1}, {"x": np.zeros(1)}), "efficiency": Findings({"ms": 2.0})}
    evaluate_finished_run(context(), finished, ["predictions", "efficiency"])
    parts["predictions"] = Findings({"a": 7, "new": None}, {"x": np.ones(1)})
    evaluate_finished_run(context(result=read(finished)), finished, ["predictions"], force=True)
    found = read(finished)
    assert (found["a"], found["new"], found["ms"]) == (7, None, 2.0)
    assert finished.arrays()["x"] == 1


def test_a_failure_leaves_the_record_of_a_finished_run_as_it_was(finished, parts):
    parts["predictions"] = RuntimeError("broken")
    before = (finished.path / "result.json").read_bytes()
    outcome = evaluate_finished_run(context(), finished, ["predictions"])
    assert outcome.errors == {"predictions": "predictions: RuntimeError: broken"}
    assert (finished.path / "result.json").read_bytes() == before


def test_two_evaluations_at_once_keep_each_others_findings(finished, parts):
    """Both opened the run when nothing was there yet."""
    parts |= {
        "predictions": Findings({"a": 1}, {"x": np.zeros(1)}),
        "efficiency": Findings({"ms": 2.0}, {"y": np.zeros(1)}),
    }
    first, second = context(), context()
    evaluate_finished_run(first, finished, ["predictions"])
    evaluate_finished_run(second, finished, ["efficiency"])
    assert read(finished).items() >= {"a": 1, "ms": 2.0}.items()
    assert read(finished)["evaluated"] == ["predictions", "efficiency"]
    assert finished.arrays().keys() == {"x", "y"}


def test_a_run_at_work_is_not_written_into(finished, parts):
    parts["predictions"] = Findings({"a": 1}, {"x": np.zeros(1)})
    with DirectoryLock(finished.path):
        outcome = evaluate_finished_run(context(), finished, ["predictions"])
    assert "in use by" in outcome.errors["predictions"]
    assert (read(finished), finished.arrays()) == (RESULT, {})


@pytest.mark.parametrize("differs", ["started", "seed", "steps", "subset_sha256"])
def test_findings_are_not_written_to_another_run(finished, parts, differs):
    parts["predictions"] = Findings({"a": 1}, {"x": np.zeros(1)})
    opened, other = context(), RESULT
    if differs == "started":
        (finished.path / "provenance.json").write_text('{"started": "2026-01-01T00:00:00+00:00"}')
    else:
        other = RESULT.having(**{differs: "0" * 64 if differs == "subset_sha256" else 7})
        finished.write_result(other)
    outcome = evaluate_finished_run(opened, finished, ["predictions"])
    assert "holds another run now" in outcome.errors["predictions"]
    assert (read(finished), finished.arrays()) == (other, {})
    opened.result, opened.started = other, finished.started()
    assert evaluate_finished_run(opened, finished, ["predictions"]).done == ["predictions"]


@pytest.mark.parametrize("taken", ["test_accuracy", "a", "evaluated"])
def test_names_of_others_are_not_taken(taken):
    result = merge(RESULT, Findings({"a": 1}), "predictions", 0.1)
    with pytest.raises(ValueError, match=taken):
        merge(result, Findings({taken: 0}), "efficiency", 0.1)


def test_arrays_of_others_are_not_taken(directory, parts):
    parts |= {"predictions": Findings({}, {"x": np.zeros(1)}), "flatness": Findings({}, {"x": np.ones(1)})}
    found = evaluate_new_run(context("predictions", "flatness"), directory)
    assert "same arrays" in found["evaluation_error"]
    assert directory.arrays()["x"] == 0


def test_a_killed_evaluation_can_be_repeated(finished, parts, monkeypatch):
    """Killed between the two files: the arrays are there, the result is the old one."""
    parts["predictions"] = Findings({"a": 1}, {"x": np.zeros(1)})
    with monkeypatch.context() as patch:
        patch.setattr(RunWriter, "write_result", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            evaluate_finished_run(context(), finished, ["predictions"])
    assert read(finished) == RESULT
    assert evaluate_finished_run(context(), finished, ["predictions"]).done == ["predictions"]


def test_damaged_arrays_are_named(finished, parts):
    (finished.path / "arrays.npz").write_bytes(b"PK\x03\x04 half a file")
    parts["predictions"] = Findings({"a": 1}, {"x": np.zeros(1)})
    outcome = evaluate_finished_run(context(), finished, ["predictions"])
    assert "arrays.npz: damaged" in outcome.errors["predictions"]
    np.savez(finished.path / "arrays.npz", x=np.array([object()]))  # would be unpickled
    with pytest.raises(UserError, match="damaged"):
        finished.arrays()


def test_the_parts_are_those_that_settings_may_name_in_their_order():
    assert {name: part.__name__ for name, part in PARTS.items()} == {name: name for name in EVALUATION_PARTS}
    assert tuple(PARTS) == EVALUATION_PARTS
