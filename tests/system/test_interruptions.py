"""Runs that are stopped at awkward moments, and trouble that must not cost a result."""

from __future__ import annotations

import os
import signal

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from safetensors.torch import load_file

from ekd_lightning.runs.directory import RunDirectory
from ekd_lightning.tracking import loggers

THREE = ("recipe.epochs=3", "trainer.limit_train_batches=4")


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory):
    outcome = train(tmp_path_factory.mktemp("whole") / "run", *THREE)
    assert outcome.code == 0, outcome.err
    return outcome


def test_a_run_stopped_inside_an_epoch_replays_it(train, resume, tmp_path, whole):
    directory = tmp_path / "run"
    stopped = train(directory, *THREE, "trainer.max_steps=6")
    assert stopped.result["steps"] == 6
    last = torch.load(directory / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 4  # the end of the first epoch, not the middle of the second
    ended = resume(directory, "trainer.max_steps=-1")
    assert (ended.result["steps"], ended.result["epochs_done"]) == (12, 3)
    ours, theirs = (load_file(d / "student.safetensors") for d in (directory, whole.directory))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_run_killed_after_its_last_epoch_still_has_validation_scores(train, resume, tmp_path, whole, monkeypatch):
    directory = tmp_path / "run"

    def killed(*args, **kwargs):
        raise SystemError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(pl.Trainer, "test", killed)
        assert train(directory, *THREE).code == 1
    ended = resume(directory)
    assert ended.code == 0, ended.err
    for name in ("val_accuracy", "val_nll", "val_accuracy_best", "test_accuracy", "test_accuracy_best"):
        assert ended.result[name] == whole.result[name]


def test_a_terminated_run_ends_as_an_interrupted_one(train, resume, tmp_path, monkeypatch):
    class Terminated(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                os.kill(os.getpid(), signal.SIGTERM)  # Lightning has a handler of its own by now

    with monkeypatch.context() as patch:
        patch.setattr("ekd_lightning.cli.train.build_callbacks", lambda *_: [Terminated()])
        stopped = train(tmp_path / "run", "recipe.epochs=2")
    assert stopped.code == 143
    assert "ekd-train: interrupted: to continue: ekd-train resume=run\n" in stopped.err
    assert stopped.status["state"] == "stopped"
    assert resume(tmp_path / "run").code == 0


def test_a_damaged_checkpoint_is_one_line(train, resume, tmp_path):
    directory = tmp_path / "run"
    train(directory, "recipe.epochs=2", "trainer.max_epochs=1")
    checkpoint = directory / "checkpoints" / "last.ckpt"
    content = checkpoint.read_bytes()
    middle = len(content) // 2
    for damaged in (content[:1000], content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]):
        checkpoint.write_bytes(damaged)
        refused = resume(directory, "trainer.max_epochs=2")
        assert refused.code == 2
        assert "last.ckpt" in refused.err
        assert "Traceback" not in refused.err
        assert RunDirectory(directory).record().result is not None  # of the epoch that was trained


def test_a_logger_in_trouble_does_not_cost_the_result(tmp_path, caplog):
    class Broken(CSVLogger):
        def finalize(self, status: str) -> None:
            raise ConnectionError("no server")

    csv = loggers.MetricsCsv(tmp_path / "metrics.csv")
    csv.log_metrics({"x": 1.0}, step=0)
    loggers.finish_loggers([Broken(tmp_path), csv], result={})
    assert "no server" in caplog.text
    assert csv.path.is_file()  # those after it are ended all the same


def test_overfitting_sees_the_same_batches_again_and_again(train, tmp_path, monkeypatch):
    seen: dict[int, list[list[int]]] = {}

    class Spy(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.setdefault(trainer.current_epoch, []).append([*batch.index.tolist(), *batch.view.tolist()])

    monkeypatch.setattr("ekd_lightning.cli.train.build_callbacks", lambda *_: [Spy()])
    words = ("debug=overfit", "recipe.epochs=2", "+callbacks.spy._target_=ekd_lightning.Spy")
    assert train(tmp_path / "run", *words).code == 0
    assert len(seen[0]) == 3
    assert seen[0] == seen[1]


def test_results_of_a_part_of_the_data_say_so(train, tmp_path, whole):
    assert whole.result["partial"] is True  # TINY looks at a part of the test set
    full = train(tmp_path / "run", "trainer.limit_test_batches=null")
    assert full.result["partial"] is False


@pytest.mark.parametrize("table", ["auto", "require"])
def test_tables_that_do_not_fit(train, tmp_path, table):
    outcome = train(tmp_path / "run", f"teachers.table={table}", "teachers.table_budget_gb=0.0000001")
    if table == "auto":
        assert outcome.code == 0, outcome.err
        assert outcome.result["teacher_table_hit_rate"] is None
    else:
        assert outcome.code == 2
        assert "teachers.table_budget_gb" in outcome.err
