"""Folders that version 0.1 left are read as ever: runs, a sweep, a comparison, a search."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from hydra import compose, initialize_config_module
from omegaconf import DictConfig
from whole_runs import _call

from ekd_lightning.cli import report as report_command
from ekd_lightning.cli import tune
from ekd_lightning.config.config import recorded_settings, register_schema, to_plain
from ekd_lightning.config.overrides import check_unchanged, expand_resume, key_of
from ekd_lightning.errors import UserError
from ekd_lightning.files import read_json
from ekd_lightning.keys import is_free
from ekd_lightning.pipeline.context import open_context
from ekd_lightning.pipeline.evaluation import evaluate_finished_run
from ekd_lightning.runs.collection import collect
from ekd_lightning.runs.directory import RunDirectory
from ekd_lightning.runs.writer import RunWriter
from ekd_lightning.studies.comparison import report
from ekd_lightning.studies.planning import plan
from ekd_lightning.studies.rows import read_tuned, with_tuned
from ekd_lightning.studies.study import RowPlan, every_run, read_runs, read_study
from ekd_lightning.studies.sweep import job_state, read_sweep, show_summary
from ekd_lightning.training.checkpoints import read_checkpoint

SEARCHED = (
    "method=ce",
    "student.branch_gradients=mean",
    "data.val_fraction=0.3",
    "data.fraction=0.1",
    "data.eval_batch_size=120",
    "recipe.epochs=1",
    "recipe.batch_size=32",
    "+student.options={width: 0.25}",
    "teachers.pool=[{train: resnet8, options: {width: 0.25}, seed: 0}]",
    "teachers.recipe.epochs=1",
    "teachers.recipe.batch_size=32",
    "trainer=cpu",
    "trainer.precision=32-true",
    "student.branches=2",
    "evaluation=none",
)
FOLDER = Path(__file__).parents[1] / "fixtures" / "runs_0_1"


@pytest.fixture
def folder(tmp_path):
    """A copy, as readers may write."""
    return Path(shutil.copytree(FOLDER, tmp_path / "runs"))


def test_all_are_found_with_their_states_and_numbers(folder):
    found = collect([folder])
    assert found.problems == ()
    assert {run.name: run.state.value for run in found.runs} == {
        "compare/runs/ce-f0.1-s0": "done",
        "compare/runs/ce-f0.1-s1": "done",
        "compare/runs/kd_mean-f0.1-s0": "done",
        "compare/runs/kd_mean-f0.1-s1": "done",
        "done": "done",
        "failed": "failed",
        "interrupted": "stopped",
        "killed": "stopped",
        "multirun/0": "done",
        "multirun/1": "done",
    }
    by_name = {run.name: run for run in found.runs}
    assert "ce_ensemble is nan in epoch 0" in by_name["failed"].error
    for name, run in by_name.items():
        if run.result is None:
            continue
        recorded = json.loads((FOLDER / name / "result.json").read_text())
        assert run.result.fraction == 0.1  # recorded as what the rounded number of images came to
        without = dict.fromkeys(("unlabelled_sha256", "unlabelled_share", "unlabelled_from", "epoch_over"))
        assert run.result == {**recorded, "fraction": 0.1, "num_unlabelled_images": 0, **without}


def test_a_report_of_all(folder, tmp_path, capsys):
    report_command.main([str(folder), "-o", str(tmp_path / "out"), "--no-page", "--no-figures"])
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["runs"] == {"done": 7, "failed": 1, "partial": 0, "stopped": 2, "running": 0}
    assert "1 failed" in capsys.readouterr().out


def test_a_comparison_has_the_same_rows_and_nothing_left_to_run(folder, capsys):
    place = folder / "compare"
    before = json.loads((place / "comparison.json").read_text())
    study = read_study(place)
    states = {run.state for run in every_run(read_runs(study, place))}
    assert {state.value for state in states} == {"done"}
    assert report(study, place)
    assert f"{sum(row['n'] for row in before)} done" in capsys.readouterr().out
    after = json.loads((place / "comparison.json").read_text())
    for ours, theirs in zip(after, before, strict=True):
        assert ours["n"] < 3
        for name, value in theirs.items():
            if name.endswith(("_half_width", "_p", "_p_holm")):  # too few runs for an interval or a test
                assert ours[name] is None, name
            else:
                assert ours[name] == (pytest.approx(value) if isinstance(value, float) else value), name
    register_schema()
    with initialize_config_module("ekd_lightning.conf", version_base="1.3"):
        jobs = plan(study, place, lambda overrides: compose("train", overrides=overrides), retry_failed=True)
    assert jobs == []


def test_a_sweep_is_complete(folder, capsys):
    sweep = read_sweep(folder / "multirun")
    found = [job_state(job, sweep.started).run for job in sweep.jobs]
    assert [run.state.value for run in found] == ["done", "done"]
    assert all(run.seconds is not None for run in found)
    show_summary(sweep)
    assert "2 of 2 runs done, 0 failed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "renamed"),
    [("interrupted", ()), ("killed", ("method=ekd_pooled", "method.name=ekd", "student.branch_gradients=mean"))],
)
def test_a_stopped_run_can_go_on(folder, name, renamed):
    """The `ekd` of version 0.1 is `ekd_pooled` today."""
    run = RunDirectory(folder / name)
    words = expand_resume(["ekd-train", f"resume={folder / name}", *renamed])
    given = [word for word in words[1:] if not word.startswith("hydra.")]
    assert set(run.overrides()) <= set(given)
    register_schema()
    with initialize_config_module("ekd_lightning.conf", version_base="1.3"):
        cfg = compose("train", overrides=[word for word in given if not is_free(key_of(word))])
    settings = recorded_settings(run)
    assert settings.recipe.epochs == cfg.recipe.epochs == 3000
    check_unchanged(folder / name, {**to_plain(cfg), "resume": str(folder / name)})


def test_the_former_ekd_is_refused_with_the_words_to_go_on(folder):
    register_schema()
    with initialize_config_module("ekd_lightning.conf", version_base="1.3"):
        cfg = compose("train", overrides=list(RunDirectory(folder / "killed").overrides()))
    with pytest.raises(UserError, match=r"goes on with method=ekd_pooled method\.name=ekd"):
        check_unchanged(folder / "killed", {**to_plain(cfg), "resume": str(folder / "killed")})


def test_an_old_checkpoint_is_read(folder):
    assert read_checkpoint(RunDirectory(folder / "interrupted").last_checkpoint)["epoch"] >= 0


def test_a_finished_run_opens_and_its_students_accuracy_is_the_recorded_one(folder, tmp_path):
    run = RunWriter(folder / "done")
    settings = recorded_settings(run, [f"teachers.store={tmp_path / 'store'}"])
    context = open_context(run, settings, torch.device("cpu"))
    predicted = context.test_predictions.logits.argmax(-1)
    accuracy = float((predicted == context.dataset.test.labels).double().mean())
    assert accuracy == pytest.approx(context.result.test_accuracy, abs=1e-6)
    recorded = read_json(FOLDER / "done" / "result.json")
    found = evaluate_finished_run(context, run, ["generalisation"], force=True).result
    for name in ("train_accuracy", "train_nll", "gap_accuracy", "gap_nll"):
        assert found[name] == pytest.approx(recorded[name], abs=1e-4)
    assert set(run.read_result()) >= set(recorded)  # written back, and nothing is lost


def test_what_a_search_found(folder):
    path = folder / "tuned" / "ce.yaml"
    recorded = yaml.safe_load(path.read_text())
    assert {name: read_tuned(path)[name] for name in recorded} == recorded
    spec = RowPlan("ce", ("method=ce",))
    assert with_tuned([spec], folder / "tuned", DictConfig, "digits", [0.1]) == [spec]
    elsewhere = f"data.root={folder}"  # was no part of the search
    words = ["ekd-tune", "--output", str(folder / "tuned"), "--trials", "1", *SEARCHED, elsewhere]
    call = _call(tune.main, words, folder / "tuned")
    assert call.code == 0, call.err  # it goes on with the same search, and nothing is left to try
    assert {name: read_tuned(path)[name] for name in ("value", "trials")} == {"value": 0.1, "trials": 1}
