"""Whole runs with pools of views and with mixed images."""

from __future__ import annotations

import csv
import logging

import pytest
import pytorch_lightning as pl
import torch

from ekd_lightning.data.loader import Batch
from ekd_lightning.data.views import Pool
from ekd_lightning.errors import UserError
from ekd_lightning.networks import NetworkSpec, normalization
from ekd_lightning.pipeline.prepare import prepare
from ekd_lightning.pipeline.run import run
from ekd_lightning.settings import RecipeSettings
from ekd_lightning.training.distiller import Distiller
from ekd_lightning.training.teacher_training import TeacherData, train_teacher

POOL = (
    "data.augmentation=[crop_flip,cutout]",
    "+data.augmentation_options.cutout.size=8",
    "data.pool_size=2",
    "method=ekd_pooled",
    "method.assignment=mean",
)


class Batches(pl.Callback):
    def __init__(self) -> None:
        self.seen: list[Batch] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append(batch)


def test_a_run_with_a_pool_remembers_its_teachers(train, tmp_path):
    words = (*POOL, "recipe.epochs=2", "teachers.table=require")
    first = train(tmp_path / "first", *words)
    assert (first.code, first.status["state"]) == (0, "done"), first.err
    assert first.result["views"].startswith("pool2-seed0-crop_flip-padding2-noflip+cutout")
    rate = first.result["teacher_table_hit_rate"]
    assert 0 < rate < 1  # two views of an image, two epochs
    again = train(tmp_path / "again", *words)
    assert again.result["teacher_table_hit_rate"] == 1
    assert again.result["test_accuracy"] == first.result["test_accuracy"]
    other = train(tmp_path / "other", *words, "data.pool_seed=1")
    assert other.result["teacher_table_hit_rate"] < 1


def test_a_run_with_mixup_lets_its_teachers_run_live(train, tmp_path):
    outcome = train(tmp_path / "run", "recipe.mixup=0.2")
    assert (outcome.code, outcome.status["state"]) == (0, "done"), outcome.err
    assert outcome.result["teacher_table_hit_rate"] is None
    assert (outcome.result["mixup"], outcome.result["cutmix"]) == (0.2, 0)
    assert outcome.result["views"] == "crop_flip-padding2-noflip"
    with (outcome.directory / "metrics.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert float(rows[0]["train/ce_ensemble"]) > 0


def test_thin_branches_match_their_teachers_on_mixed_crops_without_labels(train, tmp_path):
    """Function matching, of maps too; four branches of two teachers, some of which change."""
    words = ["method=ekd", "student.split_after=stage2", "student.branches=4", "student.branch_width=0.5"]
    words += [f"method.terms.ce_{part}.weight=0" for part in ("ensemble", "branch")]
    words += ["data.augmentation=[resized_crop,crop_flip]", "recipe.mixup=1", "method.terms.maps1.confidence=entropy"]
    change = "method.assignment={schedule: [[0, one_to_one], [0.5, [1, 1, 0, 0]]]}"
    outcome = train(tmp_path / "run", *words, change)
    assert (outcome.code, outcome.status["state"]) == (0, "done"), outcome.err
    assert outcome.result["teacher_table_hit_rate"] is None
    assert (outcome.result["num_branches"], outcome.result["num_teachers"]) == (4, 2)
    assert outcome.result["assignment"] == {"schedule": [[0, "one_to_one"], [0.5, [1, 1, 0, 0]]]}
    with (outcome.directory / "metrics.csv").open(newline="") as stream:
        names = set(next(csv.reader(stream)))
    assert {"train/kd_branch", "train/maps1", "train/maps3"} <= names
    assert "train/ce_branch" not in names


def test_batches_of_a_mixed_run(tiny_settings, tmp_path):
    spy = Batches()
    words = ("recipe.mixup=0.4", "recipe.cutmix=1.0", "method=branched_ce", "recipe.epochs=2")
    run(tiny_settings(*words), tmp_path / "run", config={}, callbacks=[spy])
    assert len(spy.seen) == 8
    for batch in spy.seen:
        assert batch.soft_labels.shape == (32, 10)
        torch.testing.assert_close(batch.soft_labels.sum(1), torch.ones(32))


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_a_required_table_and_mixed_images_exclude_each_other(train, tmp_path, name):
    outcome = train(tmp_path / "run", f"recipe.{name}=0.2", "teachers.table=require", "method=ekd_pooled")
    assert outcome.code == 2
    (line,) = outcome.err.splitlines()
    assert "teachers.table=require" in line
    assert f"recipe.{name}=0.2" in line


def test_an_automatic_table_and_mixed_images_are_reported_once(tiny_settings, caplog):
    with caplog.at_level(logging.INFO, logger="ekd_lightning"):
        mixed = prepare(tiny_settings("recipe.cutmix=1", "method=ekd_pooled"), "cpu")
        assert not mixed.source.tables
        (record,) = [entry for entry in caplog.records if "no image occurs twice" in entry.message]
        assert record.levelno == logging.INFO
        assert "recipe.cutmix=1.0" in record.message
        caplog.clear()
        assert prepare(tiny_settings("method=ekd_pooled"), "cpu").source.tables
        assert not prepare(tiny_settings("method=ekd_pooled", "teachers.table=off"), "cpu").source.tables
        assert not any("no image occurs twice" in entry.message for entry in caplog.records)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.augmentation=cutuot"], r"data\.augmentation 'cutuot'; did you mean 'cutout'"),
        (["data.augmentation=GausianBlur"], r"data\.augmentation 'GausianBlur'; did you mean 'GaussianBlur'"),
        (["data.augmentation=cutout", "data.pool_size=0"], r"data\.pool_size=0"),
        (["data.augmentation=cutout", "+data.augmentation_options={cutout: {sise: 3}}"], "did you mean 'size'"),
        (["recipe.mixup=-1"], r"recipe\.mixup=-1\.0: must be at least 0"),
    ],
)
def test_mistakes_are_refused_at_start(tiny_settings, words, message):
    with pytest.raises(UserError, match=message):
        prepare(tiny_settings(*words), "cpu")


def test_teachers_on_demand_are_mixed_by_their_own_recipe(tiny_settings, tmp_path, monkeypatch):
    prepared = prepare(tiny_settings("data.augmentation=[crop_flip,randaugment]"), "cpu")
    assert isinstance(prepared.views, Pool)
    seen: list[Batch] = []
    losses = Distiller.losses
    monkeypatch.setattr(
        Distiller, "losses", lambda self, batch, *rest: seen.append(batch) or losses(self, batch, *rest)
    )
    data = TeacherData(prepared.dataset, prepared.subset, prepared.views, "subset")
    spec = NetworkSpec("resnet8", 10, normalization("unit"), {"width": 0.5})
    train_teacher(spec, data, RecipeSettings(epochs=1, batch_size=32, cutmix=1.0), 0, tmp_path, "cpu")
    assert len(seen) == 4
    assert all(batch.soft_labels is not None for batch in seen)
