"""`ekd-teach`: the same teachers that `ekd-train` would take, each with its own test score."""

from __future__ import annotations

import os

import pytest
from made_runs import result, write_run
from whole_runs import TINY, call_teach, call_train

from ekd_lightning.data import load_dataset
from ekd_lightning.evaluation.predict import predict
from ekd_lightning.evaluation.scores import score_logits
from ekd_lightning.networks import load_network
from ekd_lightning.pipeline import teachers
from ekd_lightning.runs.collection import collect
from ekd_lightning.runs.lock import DirectoryLock


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    root = tmp_path_factory.mktemp("teach")
    words = (*TINY, f"teachers.store={root / 'store'}")
    first = call_teach(*words, f"hydra.run.dir={root / 'first'}", directory=root / "first")
    again = call_teach(*words, "teachers.count=1", f"hydra.run.dir={root / 'again'}", directory=root / "again")
    student = call_train(*words, f"hydra.run.dir={root / 'student'}", directory=root / "student")
    assert (first.code, again.code, student.code) == (0, 0, 0), first.err + again.err + student.err
    return root, first, again, student


def test_each_teacher_is_scored_on_the_whole_test_set(taught):
    root, first, _, _ = taught
    images = load_dataset("digits", root, download=False).test
    found = {}
    for path in (root / "store" / "teachers").glob("*/teacher.safetensors"):
        scores = score_logits(predict(load_network(path), images, batch_size=120).logits, images.labels)
        found[scores["accuracy"], scores["nll"]] = path
    rows = first.json("teachers.json")["teachers"]
    assert {(row["test_accuracy"], row["test_nll"]) for row in rows} == set(found)
    for row in rows:
        assert f"{100 * row['test_accuracy']:.2f}" in first.out
        assert row["sha256"][:12] in first.out


def test_a_teacher_is_trained_once_for_both_commands(taught):
    _, first, again, student = taught
    assert first.out.count("training teacher") == 2
    assert "training teacher" not in again.out + student.out
    rows = first.json("teachers.json")["teachers"]
    assert again.json("teachers.json")["teachers"] == rows[:1]
    assert [teacher["sha256"] for teacher in student.result["teachers"]] == [row["sha256"] for row in rows]


def test_a_report_takes_no_directory_of_teachers_for_a_run(taught):
    root, first, _, _ = taught
    assert (first.directory / ".hydra" / "config.yaml").is_file()
    assert {run.name: run.state for run in collect([root]).runs} == {"student": "done"}


@pytest.mark.parametrize(
    ("word", "named"),
    [
        ("teachers.count=3", "the pool has only 2 teachers"),
        ("teachers.pool=[cifar10_resnet20_akamster]", "did you mean 'cifar10_resnet20_akamaster'"),
        ("teachers.train_on=everything", "teachers.train_on"),
    ],
)
def test_one_line(tmp_path, word, named):
    outcome = call_teach(*TINY, word, f"hydra.run.dir={tmp_path / 'run'}", directory=tmp_path / "run")
    assert outcome.code == 2
    (line,) = outcome.err.splitlines()
    assert line.startswith("ekd-teach: error: ")
    assert named in line
    assert not (tmp_path / "run").exists()


def test_a_directory_that_holds_a_run_is_refused(tmp_path):
    directory = write_run(tmp_path / "run", result(), "stopped")
    before = {path: path.read_bytes() for path in directory.iterdir()}
    outcome = call_teach(*TINY, f"hydra.run.dir={directory}", directory=directory)
    assert outcome.code == 2
    assert "holds a run" in outcome.err
    assert {path: path.read_bytes() for path in directory.iterdir()} == before


@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_first_process_of_a_job_takes_the_lock(tmp_path, monkeypatch, rank):
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    monkeypatch.setattr(teachers, "obtain_teachers", lambda *_, **__: [])
    with DirectoryLock(tmp_path / "run"):  # as the first one does
        outcome = call_teach(*TINY, f"hydra.run.dir={tmp_path / 'run'}", directory=tmp_path / "run")
    assert outcome.code == (0 if rank else 2), outcome.err


@pytest.mark.parametrize(
    ("flags", "kept"),
    [
        (["--config-name", "teach", "--config-dir", "my conf"], "--config-dir 'my conf' "),
        (["-cn=teach", "-cd=my conf"], "'-cd=my conf' "),
        ([], ""),
    ],
)
def test_the_students_command_has_the_flags_of_this_one(tmp_path, monkeypatch, flags, kept):
    monkeypatch.setattr(teachers, "obtain_teachers", lambda *_, **__: [])
    (tmp_path / "my conf").mkdir()
    words = ("seed=3", "teachers.fill=none", f"hydra.run.dir={tmp_path / 'run'}")
    outcome = call_teach(*flags, *words, directory=tmp_path / "run")
    assert outcome.code == 0, outcome.err
    assert outcome.out.splitlines()[-2:] == ["next:", f"  ekd-train {kept}seed=3"]


@pytest.mark.parametrize("fill", ["run", "all"])
def test_a_table_filled_ahead_leaves_nothing_to_compute(taught, tmp_path, fill):
    root, _, _, student = taught
    words = (*TINY, f"teachers.store={root / 'store'}", "recipe.epochs=2", f"seed={len(fill)}")
    directory = tmp_path / fill
    filled = call_teach(*words, f"teachers.fill={fill}", f"hydra.run.dir={directory}", directory=directory)
    assert filled.code == 0, filled.err
    table = filled.json("teachers.json")["table"]
    images = student.result["num_train_images"]
    per_teacher = 2 * (images // 32 * 32) if fill == "run" else 25 * images  # crops of padding 2, not mirrored
    assert table["rows_found"] + table["rows_computed"] == 2 * per_teacher
    again = call_train(*words, f"hydra.run.dir={tmp_path / 'student'}", directory=tmp_path / "student")
    assert again.result["teacher_table_hit_rate"] == 1.0


def test_a_table_that_cannot_be_written_is_an_error(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    words = ("teachers.fill=run", f"hydra.run.dir={tmp_path / 'run'}", f"teachers.store={tmp_path / 'store'}")
    with pytest.warns(RuntimeWarning, match="No space left"):
        outcome = call_teach(*TINY, *words, directory=tmp_path / "run")
    assert outcome.code == 2
    assert "cannot be written" in outcome.err


def test_nothing_to_fill_is_refused(tmp_path):
    words = ("teachers.fill=run", "teachers.table=off", f"hydra.run.dir={tmp_path / 'run'}")
    outcome = call_teach(*TINY, *words, directory=tmp_path / "run")
    assert outcome.code == 2
    assert "keeps no teacher tables" in outcome.err
