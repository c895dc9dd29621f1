"""A stopped run, continued in place, equals the run that was never stopped, bit for bit."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from safetensors.torch import load_file
from whole_runs import Outcome

from ekd_lightning.runs.directory import RunDirectory

FOUR = ("recipe.epochs=4", "trainer.limit_train_batches=3")
DROPOUT = (
    "student.network=wrn_16_1",
    "~student.options.width",
    "+student.options.dropout=0.3",
    "student.branches=2",
    "recipe.epochs=2",
    "trainer.limit_train_batches=2",
)
TIMING = ("train_seconds", "images_per_second", "teacher_table_hit_rate")


class Killer(pl.Callback):
    """Stands for whatever kills a process in the middle of an epoch."""

    def __init__(self, epoch: int, batch: int) -> None:
        self.at = epoch, batch

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == self.at:
            raise SystemError("killed")


def metrics(directory: Path) -> list[dict[str, str]]:
    with (directory / "metrics.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def assert_same_run(directory: Path, reference: Path) -> None:
    ours, theirs = (load_file(d / "student.safetensors") for d in (directory, reference))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for name in ("last", "best"):
        a, b = (torch.load(d / "checkpoints" / f"{name}.ckpt", weights_only=True) for d in (directory, reference))
        assert (a["epoch"], a["global_step"]) == (b["epoch"], b["global_step"])
        assert all(torch.equal(a["state_dict"][key], b["state_dict"][key]) for key in b["state_dict"])
        moments, theirs = (c["optimizer_states"][0]["state"][0] for c in (a, b))
        assert moments.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[name]) for name, value in moments.items() if value is not None)
        assert best_so_far(a) == best_so_far(b)
    ours, theirs = (dict(RunDirectory(d).read_result()) for d in (directory, reference))
    for field in TIMING:
        ours.pop(field), theirs.pop(field)
    assert ours == theirs
    assert metrics(directory) == metrics(reference)


def best_so_far(checkpoint) -> list[float]:
    states = [state for key, state in checkpoint["callbacks"].items() if "val/accuracy" in key]
    return [float(state["best_model_score"]) for state in states]


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory) -> Outcome:
    outcome = train(tmp_path_factory.mktemp("whole") / "run", *FOUR)
    assert outcome.code == 0, outcome.err
    return outcome


@pytest.fixture(scope="module")
def halves(train, resume, tmp_path_factory) -> Outcome:
    directory = tmp_path_factory.mktemp("halves") / "run"
    first = train(directory, *FOUR, "trainer.max_epochs=2")
    assert (first.code, first.result["epochs_done"]) == (0, 2), first.err
    second = resume(directory, "trainer.max_epochs=4")
    assert second.code == 0, second.err
    return second


def test_two_and_two_epochs_are_four(halves, whole):
    assert_same_run(halves.directory, whole.directory)


def test_a_resumed_run_says_so(halves):
    provenance = halves.json("provenance.json")
    assert len(provenance["resumed"]) == 1
    assert provenance["started"] <= provenance["resumed"][0]["started"]
    assert halves.status["state"] == "done"
    assert halves.result["train_seconds"] > 0


def test_a_run_may_move_before_it_is_resumed(train, resume, tmp_path, whole):
    assert train(tmp_path / "old", *FOUR, "trainer.max_epochs=3").code == 0
    shutil.move(tmp_path / "old", tmp_path / "new")
    assert resume(tmp_path / "new", "trainer.max_epochs=4").code == 0
    assert_same_run(tmp_path / "new", whole.directory)


def test_live_teachers_give_a_resumed_run_the_same_targets(train, resume, tmp_path):
    live = (*FOUR, "recipe.epochs=2", "teachers.table=off")
    reference = train(tmp_path / "whole", *live)
    directory = tmp_path / "halves"
    assert train(directory, *live, "trainer.max_epochs=1").code == 0
    assert resume(directory, "trainer.max_epochs=2").code == 0
    assert_same_run(directory, reference.directory)


def test_another_optimiser_and_the_moving_average_are_resumed(train, resume, tmp_path):
    words = (*FOUR, "recipe.epochs=2", "recipe.optimizer=adamw", "recipe.lr=0.003", "recipe.ema=0.8")
    reference = train(tmp_path / "whole", *words)
    assert reference.code == 0, reference.err
    directory = tmp_path / "halves"
    assert train(directory, *words, "trainer.max_epochs=1").code == 0
    assert resume(directory, "trainer.max_epochs=2").code == 0
    assert_same_run(directory, reference.directory)
    (last,) = [row for row in metrics(directory) if row.get("test_ema/accuracy")]
    assert float(last["test_ema/accuracy"]) == pytest.approx(reference.result["test_accuracy_ema"])
    assert len(reference.result["test_branch_accuracy_ema"]) == 3
    state = torch.load(directory / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    student = load_file(directory / "student.safetensors")
    averaged = [name for name in student if not torch.equal(state[f"ema.module.{name}"], student[name])]
    assert any(name.endswith("running_var") for name in averaged)  # the file holds the last weights


def test_a_killed_run_resumes_even_with_dropout(train, resume, tmp_path, monkeypatch):
    reference = train(tmp_path / "whole", *DROPOUT)
    assert reference.code == 0, reference.err
    directory = tmp_path / "killed"
    monkeypatch.setattr("ekd_lightning.cli.train.build_callbacks", lambda *_: [Killer(1, 0)])
    killed = train(directory, *DROPOUT, "+callbacks.killer={_target_: x}")
    assert (killed.code, killed.status["state"]) == (1, "failed")
    assert "killed" in killed.status["error"]
    assert not (directory / "result.json").exists()
    assert len(metrics(directory)) == 1
    monkeypatch.undo()
    again = resume(directory, "callbacks=none", "~callbacks.killer")
    assert again.code == 0, again.err
    assert_same_run(directory, reference.directory)


def test_a_run_killed_before_its_first_checkpoint_starts_again(train, resume, tmp_path, whole):
    directory = tmp_path / "early"
    assert train(directory, *FOUR, "trainer.max_epochs=1").code == 0
    for path in (directory / "checkpoints").iterdir():
        path.unlink()
    (directory / "status.json").write_text('{"state": "running", "error": null}')
    again = resume(directory, "trainer.max_epochs=4")
    assert again.code == 0, again.err
    assert_same_run(directory, whole.directory)


def test_a_complete_run_has_nothing_to_continue(halves, resume):
    before = (halves.directory / "result.json").read_bytes()
    outcome = resume(halves.directory)
    assert outcome.code == 2
    assert len(outcome.err.splitlines()) == 1
    assert "nothing to continue" in outcome.err
    assert (halves.directory / "result.json").read_bytes() == before


def test_a_changed_recipe_is_refused_and_the_record_stays(train, resume, tmp_path):
    directory = tmp_path / "run"
    assert train(directory, *FOUR, "trainer.max_epochs=1").code == 0
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    outcome = resume(directory, "recipe.lr=0.2", "trainer.max_epochs=2")
    assert outcome.code == 2
    assert len(outcome.err.splitlines()) == 1
    assert "recipe.lr" in outcome.err
    changed = [p.name for p, content in before.items() if p.read_bytes() != content]
    assert changed == []


def test_teachers_may_move_but_not_become_others(train, resume, tmp_path):
    from ekd_lightning.networks import NetworkSpec, build_network, normalization, save_network

    file, directory = tmp_path / "tutor.safetensors", tmp_path / "run"
    spec = NetworkSpec("resnet8", 10, normalization("centered"), {"width": 0.5})
    torch.manual_seed(1)
    save_network(file, build_network(spec))
    settings = (f"teachers.pool=[{{file: {file}}}]", "recipe.epochs=2", "trainer.limit_train_batches=1")
    assert train(directory, *settings, "trainer.max_epochs=1").code == 0
    early = shutil.copytree(directory, tmp_path / "early")
    shutil.rmtree(early / "checkpoints")
    torch.manual_seed(2)
    save_network(file, build_network(spec))
    for run in (early, directory):
        refused = resume(run, "trainer.max_epochs=2")
        assert (refused.code, len(refused.err.splitlines())) == (2, 1)
        assert "its weights are not those of the run's teacher tutor" in refused.err
        assert "leave out resume=" in refused.err
        assert refused.status["state"] == "done"
        assert (run / "result.json").exists()
    torch.manual_seed(1)
    save_network(tmp_path / "moved.safetensors", build_network(spec))
    file.unlink()
    moved = f"teachers.pool=[{{file: {tmp_path / 'moved.safetensors'}}}]"
    outcome = resume(directory, "trainer.max_epochs=2", moved.replace("{file", "{normalization: cifar, file"))
    assert (outcome.code, "teachers.pool" in outcome.err) == (2, True), outcome.err
    outcome = resume(directory, "trainer.max_epochs=2", moved)
    assert (outcome.code, outcome.result["epochs_done"]) == (0, 2), outcome.err
    assert outcome.result["teachers"][0]["id"] == "moved"


def test_a_new_run_in_an_old_directory_leaves_nothing_of_the_old_one(train, resume, tmp_path, whole):
    directory = tmp_path / "run"
    assert train(directory, *FOUR, "seed=7", "trainer.max_epochs=3", "logger=tensorboard").code == 0
    assert train(directory, *FOUR, "trainer.max_epochs=1", "overwrite=true").code == 0
    assert {row["step"] for row in metrics(directory)} == {"2", "3"}
    assert resume(directory, "trainer.max_epochs=4").code == 0
    assert_same_run(directory, whole.directory)


@pytest.mark.parametrize("words", [[], ["-m"]])
def test_a_folder_that_is_no_run_is_refused(resume, tmp_path, words):
    (tmp_path / "folder").mkdir()
    outcome = resume(tmp_path / "folder", *words)
    assert outcome.code == 2
    assert len(outcome.err.splitlines()) == 1
    assert "not the directory of a run" in outcome.err
