"""What is recorded of trainings that do not end with a whole last epoch, and how far a training has come."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import StochasticWeightAveraging
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from ekd_lightning.errors import UserError
from ekd_lightning.methods import TermContext, build_method
from ekd_lightning.networks import BranchedStudent, NetworkSpec, load_student, normalization
from ekd_lightning.pipeline.prepare import prepare
from ekd_lightning.pipeline.run import run
from ekd_lightning.runs.writer import RunWriter
from ekd_lightning.settings import RecipeSettings
from ekd_lightning.teachers.tabled import TabledTeachers
from ekd_lightning.training.distiller import Distiller

PLAIN = ("method=ce", "student.branches=1", "student.split_after=none")


def test_a_run_cut_inside_its_last_epoch_counts_what_ran(tiny_settings, tmp_path):
    cut = ("recipe.epochs=2", "trainer.max_steps=7", "trainer.val_check_interval=2")  # of 8; validated after the 6th
    settings = tiny_settings(*PLAIN, *cut)
    result = run(settings, tmp_path, config={})
    assert (result["epochs_done"], result["steps"]) == (1, 7)
    assert result["images_per_second"] * result["train_seconds"] == pytest.approx(7 * 32)
    RunWriter(tmp_path).refuse_complete(2)  # as it can be continued
    student, prepared = load_student(tmp_path / "student.safetensors"), prepare(settings, "cpu")
    index, images = prepared.subset.val_index, prepared.dataset.train
    with torch.no_grad():
        loss = nn.functional.cross_entropy(student(images.images[index] / 255), images.labels[index])
    assert result["val_nll"] == pytest.approx(float(loss), rel=1e-4)


class StopsInside(pl.Callback):
    """Stands for `trainer.max_time` that ends inside the first epoch."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop = batch_idx == 1


@pytest.mark.parametrize(
    ("words", "callbacks"), [(("trainer.max_epochs=1", "trainer.check_val_every_n_epoch=2"), []), ((), [StopsInside()])]
)
def test_where_a_run_is_stopped_does_not_add_to_the_weights_that_may_be_best(tiny_settings, tmp_path, words, callbacks):
    result = run(tiny_settings(*PLAIN, "recipe.epochs=2", *words), tmp_path, config={}, callbacks=callbacks)
    assert result["val_accuracy"] is not None
    assert (result.get("val_accuracy_best"), (tmp_path / "checkpoints/best.ckpt").exists()) == (None, False)


def test_the_extra_epoch_of_weight_averaging_is_not_recorded(tiny_settings, tmp_path):
    settings = tiny_settings(*PLAIN, "recipe.epochs=2", "trainer.limit_train_batches=1")
    result = run(settings, tmp_path, config={}, callbacks=[StochasticWeightAveraging(0.01, swa_epoch_start=1)])
    assert (result["epochs_done"], result["steps"]) == (2, 2)
    assert result["images_per_second"] * result["train_seconds"] == pytest.approx(2 * 32)


def test_whether_teachers_are_compiled_does_not_depend_on_where_a_run_stops(tiny_settings, tmp_path, monkeypatch):
    planned = []
    monkeypatch.setattr(TabledTeachers, "plan", lambda self, rows, repeats=False: planned.append(rows))
    run(tiny_settings("recipe.epochs=2", "trainer.max_steps=6"), tmp_path, config={})  # 4 steps an epoch
    assert planned == [2 * 4 * 32] * 2


@pytest.fixture
def module() -> Distiller:
    spec = NetworkSpec("resnet8", 10, normalization("unit"), {"width": 0.5})
    student = BranchedStudent(spec, branches=1, split_after="none")
    method = build_method("plain", {"ce_ensemble": {"weight": 1.0}}, TermContext(10, num_branches=1, num_teachers=0))
    return Distiller(student, method, RecipeSettings(epochs=5, batch_size=8))


@pytest.mark.parametrize(("batches", "accumulated"), [(5, 4), (5, 1), (6, 3), (3, 8)])
def test_epochs_are_equal_shares_of_a_training(module, batches, accumulated):
    steps = math.ceil(batches / accumulated)
    trainer: Any = SimpleNamespace(num_training_batches=batches, accumulate_grad_batches=accumulated, global_step=0)
    module._trainer = trainer
    foreseen = [module.progress(epoch * batches) for epoch in range(5)]
    found = []
    for epoch in range(5):
        trainer.global_step = epoch * steps
        found.append(module.progress())
    assert found == foreseen == [epoch / 5 for epoch in range(5)]


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield torch.rand(3, 32, 32), 0


def test_a_loader_of_unknown_length_needs_a_limit(module):
    def fit(**flags: Any) -> None:
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = pl.Trainer(max_epochs=1, accelerator="cpu", enable_model_summary=False, **quiet, **flags)
        trainer.fit(module, DataLoader(Endless(), batch_size=8))
        assert trainer.global_step == 2

    with pytest.raises(UserError, match="limit_train_batches"):
        fit()
    fit(limit_train_batches=2)
