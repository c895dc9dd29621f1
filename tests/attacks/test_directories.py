"""Attacks on directories of runs: two runs in one, new runs in finished ones, the same second, strange names."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shlex
from datetime import datetime
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from whole_runs import TINY, Outcome, call_teach, call_train

from ekd_lightning.config.commands import typed_override
from ekd_lightning.config.config import recorded_settings, register_schema
from ekd_lightning.config.directory import claim_output, remove_unused
from ekd_lightning.config.overrides import override
from ekd_lightning.runs.directory import RunDirectory
from ekd_lightning.runs.lock import DirectoryLock

FEW = ("method=branched_ce", "student.branches=2", "trainer.limit_train_batches=2")
FOREIGN = "{file: foreign.pt, network: resnet20, key_map: akamaster_resnet}"
STRANGE = 'it\'s "a", =b {c} $d ${e} [f] (g) é\\'


def tree(directory: Path) -> dict[str, tuple[str, int]]:
    """Content and time of change of every file below a directory."""
    return {
        path.relative_to(directory).as_posix(): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in directory.rglob("*")
        if path.is_file()
    }


def assert_one_line(outcome: Outcome, *named: str) -> None:
    assert outcome.code == 2, outcome.err
    (line,) = outcome.err.splitlines()
    assert [part for part in named if part not in line] == [], line


# -- two at once ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["overwrite=true"], ["resume"], ["resume", "recipe.lr=3"]])
def test_a_second_run_is_refused_and_leaves_every_byte(train, resume, finished, words):
    with DirectoryLock(finished):
        before = tree(finished)
        call, words = (resume, words[1:]) if words[0] == "resume" else (train, [*FEW, *words])
        (finished / "status.json").touch()
        before = tree(finished)
        outcome = call(finished, *words)
        if "resume" not in words:
            assert_one_line(outcome)
        assert tree(finished) == before
    assert json.loads((finished / "status.json").read_text())["state"] == "done"


def test_a_second_run_is_told_who_is_at_work(train, tmp_path):
    with DirectoryLock(tmp_path / "run"):
        before = tree(tmp_path)
        refused = train(tmp_path / "run", *FEW)
        assert_one_line(refused, f"{tmp_path / 'run'}: in use by process {os.getpid()} on ")
        assert tree(tmp_path) == before
    assert list(tmp_path.iterdir()) == []


def test_a_job_of_a_sweep_is_refused_where_a_run_is_at_work(store, tmp_path):
    folder = tmp_path / "sweep"
    with DirectoryLock(folder / "0"):
        before = tree(folder / "0")
        own = (f"teachers.store={store}", f"hydra.sweep.dir={folder}", "seed=0,1")
        outcome = call_train("-m", *TINY, *FEW, *own, directory=folder)
        assert outcome.code == 2
        assert f"{folder / '0'}: in use by process {os.getpid()}" in outcome.err
        assert tree(folder / "0") == before
    assert not (folder / "1").exists()


# -- finished runs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["recipe.lr=nan"],
        ["recipe.lr=nan", "overwrite=true"],
        ["method=ekdd", "overwrite=true"],
        ["teachers.pool=[]", "method=ekd", "overwrite=true"],
        ["trainer.max_epochs=2", "overwrite=true"],
        ["trainer.precision=17", "overwrite=true"],
        ["recipe.batch_size=500", "overwrite=true"],
        ["metric=test_acc", "overwrite=true"],
        ["+callbacks.x={_target_: os.system, command: 'true'}", "overwrite=true"],
        ["imports=[no_such_module]", "overwrite=true"],
        ["data=cifar10", "data.root=nowhere", "data.download=false", "overwrite=true"],
        ["hydra.job.chdir=true", "overwrite=nonsense"],
        ["method=kd_mean", "teachers.store=/dev/null/store", "teachers.table=off", "overwrite=true"],
        ["method=kd_mean", f"teachers.pool=[{FOREIGN}]", "overwrite=true"],
    ],
    ids=" ".join,
)
def test_what_is_refused_leaves_a_finished_run_as_it_is(train, finished, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("foreign.pt").write_bytes(b"no checkpoint")
    before = tree(finished)
    assert_one_line(train(finished, *FEW, *words))
    assert tree(finished) == before


def test_a_sweep_over_finished_runs_is_refused_as_a_whole(store, tmp_path):
    (tmp_path / "sweep" / "1").mkdir(parents=True)
    (tmp_path / "sweep" / "1" / "result.json").write_text("{}")
    before = tree(tmp_path)
    own = (f"teachers.store={store}", f"hydra.sweep.dir={tmp_path / 'sweep'}", "seed=0,1")
    outcome = call_train("-m", *TINY, *FEW, *own, directory=tmp_path / "sweep")
    assert_one_line(outcome, str(tmp_path / "sweep" / "1"), "holds a finished run", "overwrite=true")
    assert {name for name in tree(tmp_path) if tree(tmp_path)[name] != before.get(name)} <= {"sweep/.lock"}


def test_with_overwrite_nothing_of_the_old_run_stays(train, tmp_path):
    directory = tmp_path / "run"
    assert train(directory, *FEW, "seed=7", "recipe.epochs=2").code == 0
    old = json.loads((directory / "result.json").read_text())
    assert train(directory, *FEW, "overwrite=true").code == 0
    new = json.loads((directory / "result.json").read_text())
    assert (old["seed"], old["epochs_done"], new["seed"], new["epochs_done"]) == (7, 2, 0, 1)
    with (directory / "metrics.csv").open() as stream:
        assert "4" not in {row["step"] for row in csv.DictReader(stream)}  # the last one of the old run
    assert "overwrite=true" in (directory / ".hydra" / "overrides.yaml").read_text()


# -- nothing is left of what is refused -----------------------------------------------------------------


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("words", [["recipe.lr=nan"], ["teachers.count=9"], ["+callbacks.x={a: 1}"]])
def test_a_refused_run_leaves_no_directory(store, tmp_path, named, words):
    own = (f"hydra.run.dir={tmp_path / 'a' / 'b'}",) if named else ()
    outcome = call_train(*TINY, f"teachers.store={store}", *own, *words, directory=tmp_path / "x")
    assert_one_line(outcome)
    assert list(tmp_path.iterdir()) == []


def test_refused_teachers_leave_no_directory(tmp_path):
    assert_one_line(call_teach("teachers.count=9", directory=tmp_path / "x"), "teachers.count=9")
    assert list(tmp_path.iterdir()) == []


# -- the same second ------------------------------------------------------------------------------------


@pytest.fixture
def same_second(monkeypatch):
    class Stopped(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2026, 1, 31, 12, 0, 0)

    monkeypatch.setattr("hydra.core.utils.datetime", Stopped)


def test_two_runs_of_one_second_have_two_directories(same_second, store, tmp_path):
    for seed in (0, 1):
        outcome = call_train(*TINY, *FEW, f"teachers.store={store}", f"seed={seed}", directory=tmp_path / "x")
        assert outcome.code == 0, outcome.err
    folder = tmp_path / "outputs" / "digits" / "branched_ce"
    seeds = {path.name: json.loads((path / "result.json").read_text())["seed"] for path in folder.iterdir()}
    assert seeds == {"2026-01-31_12-00-00": 0, "2026-01-31_12-00-00-2": 1}


def test_two_sweeps_of_one_second_have_two_folders(same_second, store, tmp_path):
    for seed in (0, 1):
        words = ("-m", *TINY, *FEW, f"teachers.store={store}", f"seed={seed}")
        assert call_train(*words, directory=tmp_path / "x").code == 0
    folder = tmp_path / "multirun" / "2026-01-31"
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("result.json")) == [
        "12-00-00-2/0/result.json",
        "12-00-00/0/result.json",
    ]


def test_many_processes_claim_different_directories(same_second, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    register_schema()
    with initialize_config_module("ekd_lightning.conf", version_base="1.3"):
        cfg = compose("train", return_hydra_config=True)
    read, write = os.pipe()
    for _ in range(8):
        if os.fork() == 0:
            try:
                os.write(write, f"{claim_output(cfg, 'run')}\n".encode())
            finally:
                os._exit(0)
    for _ in range(8):
        os.wait()
    os.close(write)
    with os.fdopen(read) as stream:
        claimed = stream.read().splitlines()
    assert len(set(claimed)) == 8
    assert all(Path(path).is_dir() for path in claimed)
    remove_unused()


# -- names ----------------------------------------------------------------------------------------------


def test_a_strange_name_serves_for_a_run_and_its_continuation(store, tmp_path):
    directory = tmp_path / STRANGE / "run"
    own = (f"teachers.store={store}", override("hydra.run.dir", directory))
    words = (*TINY, *FEW, "recipe.epochs=2")
    first = call_train(*words, *own, "trainer.max_epochs=1", "hydra.job.chdir=true", directory=directory)
    assert (first.code, first.result["epochs_done"]) == (0, 1), first.err
    assert sorted(path.name for path in tmp_path.iterdir()) == [STRANGE]
    assert "test accuracy" in (directory / "train.log").read_text()
    (word,) = shlex.split(typed_override("resume", directory))
    second = call_train(word, "trainer.max_epochs=2", directory=directory)
    assert (second.code, second.result["epochs_done"]) == (0, 2), second.err
    assert sorted(path.name for path in tmp_path.iterdir()) == [STRANGE]


@pytest.mark.parametrize("text", ["a,b", "{a: 1}", "[a", "a'b", "choice(a,b)", "${no_such_key}"])
def test_a_path_that_hydra_reads_otherwise_is_one_line_that_shows_how_to_quote_it(tmp_path, text):
    outcome = call_train(f"resume={text}", directory=tmp_path / "x")
    assert_one_line(outcome, "resume", "as a path", "quotes")
    assert list(tmp_path.iterdir()) == []


# -- the working directory ------------------------------------------------------------------------------


def test_places_begin_where_the_run_was_started_whatever_chdir_says(tmp_path):
    words = (*TINY, "recipe.epochs=2", "trainer.limit_train_batches=1", "trainer.max_epochs=1")
    own = ("teachers.store=own store", "hydra.run.dir=here/run", "hydra.job.chdir=true")
    directory = tmp_path / "start" / "here" / "run"
    first = call_train(*words, *own, directory=tmp_path / "start" / "x")
    assert first.code == 0, first.err
    assert sorted(path.name for path in (tmp_path / "start").iterdir()) == ["here", "own store"]
    assert recorded_settings(RunDirectory(directory)).teachers.store == str(tmp_path / "start" / "own store")
    assert "store: own store\n" in (directory / "config.yaml").read_text()
    provenance = json.loads((directory / "provenance.json").read_text())
    assert provenance["working_directory"] == str(tmp_path / "start")
    again = call_train(
        f"resume={directory}", "trainer.max_epochs=2", "data.root=data", directory=tmp_path / "elsewhere" / "x"
    )
    assert again.code == 0, again.err
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert "training teacher" not in again.out  # they are in the store of the first start
    assert f"root: {tmp_path / 'elsewhere' / 'data'}\n" in (directory / "config.yaml").read_text()


# -- how long a run is ----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["-1", "0", "2", "10", "abc", "1.5", "true"])
def test_no_second_length_of_a_training(train, tmp_path, value):
    refused = train(tmp_path / "run", *FEW, f"trainer.max_epochs={value}")
    assert_one_line(refused, "trainer.max_epochs", "recipe.epochs=1")
    assert list(tmp_path.iterdir()) == []


def test_no_length_of_its_own_means_that_of_the_recipe(train, tmp_path):
    outcome = train(tmp_path / "run", *FEW, "trainer.max_epochs=null")
    assert outcome.result["epochs_done"] == 1
