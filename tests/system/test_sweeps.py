"""Multiruns in one process: every job its own record, teachers trained once, failures contained."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from pytorch_lightning import Callback
from whole_runs import TINY, Outcome, call_train

from ekd_lightning.cli import train as program
from ekd_lightning.config import internals
from ekd_lightning.studies import checking
from ekd_lightning.studies.sweep import Job, Sweep, write_sweep

SHORT = ("trainer.limit_train_batches=1", "trainer.limit_val_batches=1")


def sweep(folder: Path, store: Path, *words: str) -> Outcome:
    own = (f"teachers.store={store}", f"hydra.sweep.dir={folder}")
    return call_train("-m", *TINY, *SHORT, *own, *words, directory=folder)


class Killer(Callback):
    """Ends the process in an epoch, as submitit's handler of its signal does."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch == self.epoch:
            sys.exit(-1)


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
    words = ("method=branched_ce,kd_mean", "student.branches=1", "seed=0,1", "imports=[whole_runs]")
    outcome = sweep(tmp_path / "sweep", store, *words, "+callbacks.x._target_=whole_runs.FailsIfTaught")
    assert outcome.code == 1
    states = [json.loads((outcome.directory / str(job) / "status.json").read_text()) for job in range(4)]
    assert [status["state"] for status in states] == ["done", "done", "failed", "failed"]
    assert states[2]["error"] == "RuntimeError: out of chalk"
    assert not (outcome.directory / "2" / "result.json").exists()
    assert json.loads((outcome.directory / "1" / "result.json").read_text())["num_branches"] == 1
    assert "2 of 4 runs done, 2 failed" in outcome.out
    assert "failed: 2  RuntimeError: out of chalk" in outcome.out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["method=ce,ekdd"], "job 1 (method=ekdd): unknown method 'ekdd'; did you mean 'ekd'?"),
        (["method=ce,3"], "job 1 (method=3): method=3: a configuration group takes the name of one of its options"),
        (["recipe.epochs=1,x"], "job 1 (recipe.epochs=x): recipe.epochs=x: must be int, at least 1"),
        (
            ["seed=0,1", "student.branches=2,0"],
            "job 1 (seed=0 student.branches=0) and 1 more: student.branches=0: must be at least 1",
        ),
        (
            ["data.fraction=0.1,7,0", "hydra.sweep.subdir=f${data.fraction}"],
            "job f7.0 (data.fraction=7): data.fraction=7.0: must be in (0, 1]; 1 more with other mistakes",
        ),
        (
            ["method=ce,ekd", "teachers.pool=[{file: damaged}]", "hydra.launcher.n_jobs=2", "hydra/launcher=parallel"],
            "job 1 (method=ekd): damaged: ",
        ),
        (["seed=0,1", "data=cifar10", "teachers=digits", "data.download=false", "data.root=nowhere"], "nowhere"),
        (["seed=0,1", "recipe.batch_size=500"], "recipe.batch_size=500"),
        (["seed=0,1", "+callbacks.x._target_=pytorch_lightning.callbacks.Nothing"], "callbacks.x._target_="),
        (["method=ce,nope", "hydra/launcher=slurm"], "job 1 (method=nope): unknown method 'nope'"),
        (["method=ce", "student.branches=1", "hydra/launcher=slurm"], "hydra/launcher=slurm: finds no srun here"),
    ],
)
def test_a_sweep_with_a_bad_job_is_refused_before_it_starts(store, tmp_path, words, told):
    if launcher := next((word for word in words if word.startswith("hydra/launcher=")), None):
        pytest.importorskip({"slurm": "submitit", "parallel": "joblib"}[launcher.partition("=")[2]])
    (tmp_path / "damaged").write_bytes(b"no weights")
    outcome = sweep(tmp_path / "sweep", store, *words)
    assert outcome.code == 2
    (line,) = outcome.err.splitlines()
    assert told in line
    assert "sweep 1/" not in outcome.out
    assert not (tmp_path / "sweep").exists()


def test_files_that_are_named_after_the_seed_are_checked_for_every_seed(store, tmp_path):
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_text("# @package _global_\nimports: ['part${seed}']")
    (tmp_path / "part0.py").touch()
    words = ("method=ce", "student.branches=1", "seed=0,1", "recipe=mine", f"hydra.searchpath=[file://{tmp_path}]")
    outcome = sweep(tmp_path / "sweep", store, *words)
    assert outcome.code == 2
    assert outcome.err.startswith("ekd-train: error: job 1 (seed=1): imports: no module 'part1' in ")


def test_jobs_are_checked_once_each_whatever_their_seeds(store, tmp_path, monkeypatch):
    composed, checked = [], []
    compose, check = internals.job_config, checking.check_job
    monkeypatch.setattr(internals, "job_config", lambda *args: composed.append(args[1]) or compose(*args))
    monkeypatch.setattr(checking, "check_job", lambda settings: checked.append(settings) or check(settings))
    monkeypatch.setattr(program, "train", lambda cfg, output: None)
    words = ("method=ce", "student.branches=1", "recipe.lr=0.1,0.2", "recipe.batch_size=32,16", "seed=range(5)")
    outcome = sweep(tmp_path / "sweep", store, *words)
    assert outcome.code == 0, outcome.err
    assert len(composed) == 2 * 2  # nor does Hydra's sweeper compose them again
    assert [settings.recipe.batch_size for settings in checked] == [32, 16]


@pytest.mark.parametrize("missing", [None, "1", "sweep.json"])
def test_a_used_folder_is_refused_with_advice_for_sweeps(counts, store, tmp_path, missing):
    folder = tmp_path / "sweep"
    shutil.copytree(counts[0].directory, folder)
    if missing == "sweep.json":
        (folder / missing).unlink()
        shutil.rmtree(folder / "0")
        told = f"{folder}/1: holds a finished run; give another hydra.sweep.dir, or overwrite=true to replace it"
    else:
        shutil.rmtree(folder / (missing or "nothing"), ignore_errors=True)
        again = f"resume={folder} continues it; " if missing else ""
        told = (
            f"{folder}: holds an earlier sweep, {3 if missing else 4} of 4 runs done; {again}give another "
            "hydra.sweep.dir, or overwrite=true to replace its runs"
        )
    before = sorted(path.name for path in folder.rglob("*"))
    outcome = sweep(folder, store, "method=ce", "student.branches=1", "seed=0,1")
    assert (outcome.code, outcome.out, outcome.err) == (2, "", f"ekd-train: error: {told}\n")
    assert sorted(path.name for path in folder.rglob("*")) == before


def test_a_directory_for_two_jobs_is_refused(store, tmp_path):
    words = ("method=ce", "seed=0,1", "hydra.sweep.subdir=${method.name}")
    outcome = sweep(tmp_path / "sweep", store, *words)
    told = f"hydra.sweep.subdir: 2 jobs would share the directory {tmp_path}/sweep/ce; name all that varies in it"
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith(f"ekd-train: error: {told}")


def test_a_resumed_sweep_is_checked_and_goes_on_without_a_job_that_can_never_run(store, tmp_path, caplog):
    """Its plan may be of another version, with fewer checks."""
    folder = tmp_path / "sweep"
    common = ("method=branched_ce", *TINY, *SHORT, f"teachers.store={store}")
    jobs = tuple(
        Job(folder / name, (*common, f"student.branches={count}")) for name, count in (("0", 1), ("1", 0), ("2", 2))
    )
    folder.mkdir()
    write_sweep(Sweep(folder, jobs, common=common))

    def resume(*words: str) -> Outcome:
        return call_train(f"resume={folder}", *words, directory=folder)

    outcome = resume("trainer.max_epochs=9")
    assert outcome.code == 2
    assert "error: job 0 (student.branches=1) and 1 more: trainer.max_epochs=9: must be from 1 to" in outcome.err
    assert not (folder / "1").exists()
    outcome = resume()
    told = "ekd-train: error: job 1 (student.branches=0): student.branches=0: must be at least 1; "
    assert (outcome.code, outcome.err) == (2, f"{told}the same command runs the other jobs\n")
    assert not (folder / "0").exists()
    outcome = resume()
    assert outcome.code == 1
    assert "job 1 failed before and is left out: student.branches=0: must be at least 1" in caplog.messages
    assert "2 of 3 runs done, 1 failed" in outcome.out


def test_a_job_that_submitit_starts_again_continues(tmp_path, store, monkeypatch):
    """After a preemption it calls the job once more, with the same overrides."""
    killers, run_job = [Killer(1), None], program.run_job

    def preempted(cfg):
        with pytest.raises(SystemExit):
            run_job(cfg)
        return run_job(cfg)

    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    monkeypatch.setattr(program, "build_callbacks", lambda _: [one for one in [killers.pop(0)] if one])
    monkeypatch.setattr(program, "run_job", preempted)
    outcome = sweep(tmp_path / "sweep", store, "method=branched_ce", "recipe.epochs=3", "seed=0")
    assert outcome.code == 0, outcome.err
    result, first = (json.loads((tmp_path / "sweep/0" / f"{n}.json").read_text()) for n in ("result", "provenance"))
    assert (result["epochs_done"], result["steps"], len(first["resumed"])) == (3, 3, 1)
