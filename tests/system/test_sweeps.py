"""Multiruns in one process: every job its own record, teachers trained once, failures contained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from whole_runs import TINY, Outcome, call_train

from ekd_lightning.cli import train as program

SHORT = ("trainer.limit_train_batches=1", "trainer.limit_val_batches=1")


def sweep(folder: Path, store: Path, *words: str) -> Outcome:
    own = (f"teachers.store={store}", f"hydra.sweep.dir={folder}")
    return call_train("-m", *TINY, *SHORT, *own, *words, directory=folder)


@pytest.fixture(scope="module")
def counts(tmp_path_factory):
    """Teachers x branches, with what `train` returned to the sweeper for each job."""
    root, returned = tmp_path_factory.mktemp("counts"), []
    original = program.train

    def noted(cfg, output):
        returned.append(original(cfg, output))
        return returned[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "train", noted)
        words = ("teachers.count=1,2", "student.branches=1,2", "metric=test_nll")
        outcome = sweep(root / "sweep", root / "store", *words)
    assert outcome.code == 0, outcome.err
    return outcome, root / "store", returned


def results(folder: Path) -> list[dict]:
    return [json.loads((folder / str(job) / "result.json").read_text()) for job in range(4)]


def test_each_job_has_its_own_result(counts):
    outcome, _, _ = counts
    found = [(r["num_teachers"], r["num_branches"], len(r["teachers"])) for r in results(outcome.directory)]
    assert found == [(1, 1, 1), (1, 2, 1), (2, 1, 2), (2, 2, 2)]
    assert "4 of 4 runs done, 0 failed" in outcome.out
    assert [len(r["test_branch_accuracy"]) for r in results(outcome.directory)] == [1, 2, 1, 2]


def test_teachers_are_trained_once_for_all_jobs(counts):
    outcome, store, _ = counts
    assert outcome.out.count("training teacher") == 2
    assert len(list((store / "teachers").glob("*/teacher.safetensors"))) == 2
    hashes = [[t["sha256"] for t in r["teachers"]] for r in results(outcome.directory)]
    assert hashes[0] == hashes[1] == hashes[2][:1] == hashes[3][:1]
    assert hashes[2] == hashes[3]


def test_a_later_run_does_not_touch_the_store(counts, tmp_path):
    _, store, _ = counts
    before = {path: path.stat().st_mtime_ns for path in (store / "teachers").rglob("*.safetensors")}
    words = (*TINY, *SHORT, f"teachers.store={store}", f"hydra.run.dir={tmp_path / 'run'}")
    outcome = call_train(*words, directory=tmp_path / "run")
    assert outcome.code == 0, outcome.err
    assert "training teacher" not in outcome.out
    assert {path: path.stat().st_mtime_ns for path in (store / "teachers").rglob("*.safetensors")} == before
    assert outcome.result["teacher_table_hit_rate"] == 1.0  # the same rows as the sweep's


def test_a_sweeper_gets_the_metric_it_asked_for(counts):
    outcome, _, returned = counts
    assert returned == [r["test_nll"] for r in results(outcome.directory)]


def test_jobs_with_the_same_branches_start_alike_whoever_teaches(counts):
    outcome, _, _ = counts
    sizes = [r["num_parameters"] for r in results(outcome.directory)]
    assert sizes[0] == sizes[2]
    assert sizes[1] == sizes[3]
    assert len({r["subset_sha256"] for r in results(outcome.directory)}) == 1


def test_a_failing_job_neither_stops_nor_poisons_the_others(store, tmp_path):
    outcome = sweep(tmp_path / "sweep", store, "method=branched_ce", "student.branches=2,0,1")
    assert outcome.code == 2
    states = [json.loads((outcome.directory / str(job) / "status.json").read_text()) for job in range(3)]
    assert [status["state"] for status in states] == ["done", "failed", "done"]
    assert states[1]["error"] == "student.branches=0: must be at least 1"
    assert not (outcome.directory / "1" / "result.json").exists()
    assert json.loads((outcome.directory / "2" / "result.json").read_text())["num_branches"] == 1
    assert "2 of 3 runs done, 1 failed" in outcome.out
    assert "failed: 1  student.branches=0" in outcome.out
    assert outcome.err.splitlines()[-1] == "ekd-train: error: student.branches=0: must be at least 1"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["method=ce,ekdd"], "did you mean 'ekd'"),  # Hydra finds it once the sweep is planned
        (["seed=0,1", "data=cifar10", "teachers=digits", "data.download=false", "data.root=nowhere"], "nowhere"),
        (["seed=0,1", "recipe.batch_size=500"], "recipe.batch_size=500"),
        (["seed=0,1", "+callbacks.x._target_=pytorch_lightning.callbacks.Nothing"], "Nothing"),
    ],
)
def test_what_no_job_can_do_stops_a_sweep_before_it_starts(store, tmp_path, words, named):
    outcome = sweep(tmp_path / "sweep", store, *words)
    assert outcome.code == 2
    (line,) = outcome.err.splitlines()
    assert named in line
    assert not (tmp_path / "sweep").exists()
