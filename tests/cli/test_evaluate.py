"""`ekd-evaluate` on finished runs: what it adds, what it skips, and what it says in one line."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from whole_runs import TINY, Outcome, _call

from ekd_lightning.cli.evaluate import PARTS, is_override, main
from ekd_lightning.config.edge import parse_names
from ekd_lightning.errors import UserError
from ekd_lightning.files import write_json
from ekd_lightning.pipeline import evaluation
from ekd_lightning.runs.directory import RunDirectory
from ekd_lightning.settings import EVALUATION_PARTS


@pytest.fixture(scope="module")
def trained(train, tmp_path_factory):
    """A run with its evaluation."""
    outcome = train(tmp_path_factory.mktemp("evaluate") / "run", "evaluation=standard")
    assert outcome.code == 0, outcome.err
    return outcome.directory


@pytest.fixture
def run(trained, tmp_path):
    """A copy of it."""
    return shutil.copytree(trained, tmp_path / "runs" / "a")


@pytest.fixture(scope="module")
def fields(train, tmp_path_factory):
    """Names in the record of a run without evaluation."""
    return train(tmp_path_factory.mktemp("plain") / "run").result.keys() - {"evaluated"}


@pytest.fixture
def bare(run, fields):
    """A copy as from a run without evaluation."""
    write_json(run / "result.json", {name: value for name, value in read(run).items() if name in fields})
    (run / "arrays.npz").unlink()
    return run


def evaluate(*words, directory) -> Outcome:
    return _call(main, ["ekd-evaluate", *map(str, words)], directory)


def read(directory):
    return dict(RunDirectory(directory).read_result())


def test_a_run_that_was_not_evaluated_becomes_one_that_was(bare, trained):
    outcome = evaluate(bare, "--device", "cpu", directory=bare)
    assert outcome.code == 0, outcome.err
    found, expected = read(bare), read(trained)
    assert found.keys() == expected.keys()
    assert {n: v for n, v in found.items() if n != "evaluation_seconds"} == {
        n: v for n, v in expected.items() if n != "evaluation_seconds"
    }
    with np.load(bare / "arrays.npz") as ours, np.load(trained / "arrays.npz") as theirs:
        assert sorted(ours.files) == sorted(theirs.files)
        for name in ours.files:
            np.testing.assert_array_equal(ours[name], theirs[name])
    assert "predictions, generalisation" in outcome.out
    assert f"{100 * expected['test_accuracy']:.2f}" in outcome.out


def test_parts_that_are_there_are_skipped_unless_forced(run):
    before = (run / "result.json").read_bytes()
    outcome = evaluate(run, "--parts", "predictions", directory=run)
    assert outcome.code == 0, outcome.err
    assert "predictions (already done)" in outcome.out
    assert (run / "result.json").read_bytes() == before
    result = read(run)
    write_json(run / "result.json", {**result, "test_gain_over_mean_branch": 7.0})
    assert evaluate(run, "--parts", "predictions", "--force", "--batch-size", "50", directory=run).code == 0
    assert read(run)["test_gain_over_mean_branch"] == pytest.approx(result["test_gain_over_mean_branch"])
    assert read(run)["train_accuracy"] == result["train_accuracy"]


def test_a_folder_means_its_finished_runs(run):
    folder = run.parent
    for name, state in (("failed", "failed"), ("running", "running")):
        write_json(folder / name / "status.json", {"state": state, "error": None})
    partial = shutil.copytree(run, folder / "partial")
    write_json(partial / "result.json", {**read(run), "partial": True})
    broken = shutil.copytree(run, folder / "b")
    content = (broken / "student.safetensors").read_bytes()
    (broken / "student.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    outcome = evaluate(folder, "--force", "--parts", "predictions", directory=folder)
    assert outcome.code == 1
    lines = outcome.err.splitlines()
    assert any("left out 3 of 5 runs, which are unfinished or partial" in line for line in lines)
    (said,) = [line for line in lines if line.startswith("ekd-evaluate: error: ")]
    assert "student.safetensors: damaged or changed" in said
    assert "Traceback" not in outcome.err
    assert "predictions" in outcome.out
    assert read(run)["evaluation_seconds"]["predictions"] > 0


def test_what_may_come_next_names_the_run_that_was_found_and_where_things_are(run):
    words = ("data.root=some where", "teachers.store=x", "imports=[json]", "--trust", "--batch-size", "50")
    outcome = evaluate(run.parent, "--parts", "predictions", *words, directory=run.parent)
    assert outcome.code == 0, outcome.err
    assert outcome.out.splitlines()[-3:] == [
        "next:",
        "  ekd-report runs/a -o runs/a/report",
        "  ekd-export runs/a 'data.root=some where' 'imports=[json]' --trust",
    ]
    (run / "export").mkdir()
    shutil.copytree(run, run.parent / "b")
    (run.parent.parent / "report").mkdir()
    outcome = evaluate(run.parent, "--parts", "predictions", directory=run.parent)
    assert outcome.out.splitlines()[-2:] == ["next:", "  ekd-report runs -o report-2"]


def test_a_part_that_fails_is_told_with_its_run(run, monkeypatch):
    def broken(context):
        raise UserError("no corruptions in sight")

    monkeypatch.setattr(evaluation, "PARTS", dict.fromkeys(evaluation.PARTS, broken))
    before = (run / "result.json").read_bytes()
    outcome = evaluate(run, "--parts", "corruptions", directory=run)
    assert outcome.code == 1
    assert outcome.err.splitlines()[1:] == [f"ekd-evaluate: error: {run}: corruptions: no corruptions in sight"]
    assert "corruptions failed" in outcome.out
    assert "next:" not in outcome.out
    assert (run / "result.json").read_bytes() == before


def test_teachers_are_found_again_but_never_trained(run, tmp_path):
    """With another store neither the teachers nor what they said is there."""
    store = tmp_path / "empty"
    outcome = evaluate(run, "--force", "--parts", "predictions", f"teachers.store={store}", directory=run)
    assert outcome.code == 1
    assert "teachers.store" in outcome.err
    assert "name the store that the run used" in outcome.err
    assert not list(store.rglob("*.safetensors"))


def test_teachers_of_another_content_are_refused(run, tmp_path):
    record = json.loads((run / "provenance.json").read_text())
    record["teachers"][0]["sha256"] = "0" * 64
    write_json(run / "provenance.json", record)
    result = read(run)
    result["teachers"][0]["sha256"] = "0" * 64
    write_json(run / "result.json", result)
    outcome = evaluate(run, "--force", "--parts", "predictions", directory=run)
    assert outcome.code == 1
    assert "is not the one that taught this run" in outcome.err


def test_other_images_than_the_runs_are_refused(run):
    record = json.loads((run / "provenance.json").read_text())
    record["data"]["test_sha256"] = "0" * 64
    write_json(run / "provenance.json", record)
    outcome = evaluate(run, "--force", directory=run)
    assert outcome.code == 2
    assert "its test images are not those of the run" in outcome.err


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["nowhere"], ["nowhere: no such directory"]),
        (["."], ["no run found there"]),
        (["runs/a", "--parts", "flatnes"], ["--parts 'flatnes'", "did you mean 'flatness'"]),
        (["runs/a", "--parts", ","], ["--parts", "at least one"]),
        (["runs/a", "--batch-size", "0"], ["--batch-size 0"]),
        (["runs/a", "recipe.lr=1"], ["recipe.lr=1", "keeps its settings", "data.root"]),
        (["runs/a", "evaluation.parts=[flatness]", "--force"], ["evaluation.parts", "--parts"]),
        (["data.root=x"], ["name the directory of a run"]),
    ],
)
def test_a_mistake_is_one_line(run, tmp_path, words, named):
    before = (run / "result.json").read_bytes()
    (tmp_path / "empty").mkdir()
    words = [tmp_path / "empty" if word == "." else tmp_path / word if "runs" in word else word for word in words]
    outcome = evaluate(*words, directory=run)
    assert outcome.code == 2
    lines = [line for line in outcome.err.splitlines() if not line.startswith("[1/1]")]
    assert len(lines) == 1, outcome.err
    assert [text for text in named if text not in lines[0]] == [], lines[0]
    assert (run / "result.json").read_bytes() == before


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("status.json", '{"state": "running", "error": null}', "not done, its status is 'stopped'"),
        ("status.json", '{"state": "failed", "error": "loss is nan"}', "(loss is nan)"),
        ("result.json", '{"method": "ek', "result.json: damaged, not JSON"),
        ("result.json", "[1]", "result.json: damaged, not a mapping"),
        ("result.json", None, "without a result.json"),
        ("config.yaml", "seed: [1", "config.yaml: damaged, not YAML"),
        ("config.yaml", "imports: 3", "config.yaml: not a configuration of this version"),
        ("config.yaml", "imports: [no_such_module_here]", "its record names code (imports=[no_such_module_here])"),
    ],
)
def test_a_run_that_is_not_done_or_damaged(run, file, content, said):
    own = f"# run {RunDirectory(run).identity}\n" if file == "config.yaml" else ""
    (run / file).unlink() if content is None else (run / file).write_text(own + content)
    outcome = evaluate(run, directory=run)
    assert outcome.code == 2
    (line,) = [line for line in outcome.err.splitlines() if not line.startswith("[1/1]")]
    assert said in line


def test_words():
    assert parse_names("--parts", "flatness, predictions", PARTS) == ["flatness", "predictions"]
    assert PARTS.keys() == set(EVALUATION_PARTS)
    assert is_override("teachers.store=/x=y")
    assert not is_override("./data.root=x")
    assert not is_override("runs/a")


def test_a_failing_evaluation_is_no_failed_run(train, tmp_path, monkeypatch):
    def broken(context):
        raise RuntimeError("no memory")

    monkeypatch.setattr(evaluation, "PARTS", dict.fromkeys(evaluation.PARTS, broken))
    outcome = train(tmp_path / "run", "evaluation=standard")
    assert outcome.code == 0, outcome.err
    assert outcome.status["state"] == "done"
    assert outcome.result["test_accuracy"] > 0
    assert outcome.result["evaluated"] == []
    assert outcome.result["evaluation_error"].startswith("predictions: RuntimeError: no memory; generalisation")


def test_a_partial_run_is_not_evaluated(train, tmp_path):
    outcome = train(tmp_path / "run", "evaluation=standard", "trainer.limit_test_batches=1")
    assert "evaluated" not in outcome.result
    outcome = evaluate(tmp_path / "run", directory=tmp_path / "run")
    assert outcome.code == 2
    assert "partial" in outcome.err


def test_the_tiny_task_has_no_evaluation_of_its_own():
    assert "evaluation=none" in TINY
