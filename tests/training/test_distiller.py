"""One short fit of EKD, looked at from all sides."""

from __future__ import annotations

import copy
import csv
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
from torch import nn

from ekd_lightning.data.loader import Batch
from ekd_lightning.errors import UserError
from ekd_lightning.methods import TermContext, build_method
from ekd_lightning.networks import BranchedStudent, NetworkSpec, load_student, normalization
from ekd_lightning.pipeline.prepare import prepare
from ekd_lightning.pipeline.run import make_distiller, run
from ekd_lightning.settings import RecipeSettings
from ekd_lightning.training.distiller import Distiller
from ekd_lightning.training.pool import gather_teachers
from ekd_lightning.training.steps import has_fragile_convolution

EPOCHS, STEPS = 3, 4
WEIGHTS = {"ce_ensemble": 0.1, "ce_branch": 0.3, "kd_ensemble": 0.9, "kd_branch": 0.7, "feature_branch": 2.0}


class Spy(pl.Callback):
    """Notes what the module looks like before, in and after the fit."""

    def __init__(self) -> None:
        self.gradients: dict[str, float] = {}
        self.modes: set[bool] = set()
        self.seen: list[list[int]] = []

    def on_fit_start(self, trainer, pl_module):
        self.teachers_before = copy.deepcopy([member.state_dict() for member in pl_module.teachers.members])

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.modes |= {module.training for member in pl_module.teachers.members for module in member.modules()}
        self.seen.append(batch.index.tolist())

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.module, self.optimizer = pl_module, optimizer
        for name, parameter in pl_module.named_parameters():
            if parameter.grad is not None:
                size = float(parameter.grad.abs().sum())
                self.gradients[name] = self.gradients.get(name, 0.0) + size


@dataclass
class Fit:
    directory: Path
    spy: Spy
    result: dict[str, Any]
    rows: list[dict[str, str]] = field(default_factory=list)

    @property
    def module(self) -> Distiller:
        return self.spy.module


@pytest.fixture(scope="module")
def fit(tiny_settings, tmp_path_factory) -> Fit:
    directory = tmp_path_factory.mktemp("fit")
    weights = [f"method.terms.{name}.weight={weight}" for name, weight in WEIGHTS.items()]
    spy = Spy()
    settings = tiny_settings(f"recipe.epochs={EPOCHS}", *weights)
    result = run(settings, directory, config={}, callbacks=[spy])
    with (directory / "metrics.csv").open(newline="") as stream:
        return Fit(directory, spy, result, list(csv.DictReader(stream)))


def trained(module: Distiller) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if not name.startswith("teachers.")}


def test_every_parameter_of_student_and_adapters_gets_a_gradient(fit):
    assert set(fit.spy.gradients) == set(trained(fit.module))
    assert [name for name, size in fit.spy.gradients.items() if size == 0.0] == []
    assert any(name.startswith("method.") for name in fit.spy.gradients)


def test_the_optimiser_holds_student_and_adapters_and_nothing_else(fit):
    held = [id(p) for group in fit.spy.optimizer.param_groups for p in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {id(p) for p in trained(fit.module).values()}


def test_teachers_are_bit_identical_after_the_fit(fit):
    for member, before in zip(fit.module.teachers.members, fit.spy.teachers_before, strict=True):
        assert all(torch.equal(value, before[name]) for name, value in member.state_dict().items())
    fit.module.teachers.verify()
    assert not any(p.requires_grad for member in fit.module.teachers.members for p in member.parameters())


def test_teachers_stay_in_eval_mode(fit):
    assert fit.spy.modes == {False}
    fit.module.train()
    assert not any(module.training for member in fit.module.teachers.members for module in member.modules())


@pytest.mark.parametrize("name", ["best", "last"])
def test_a_checkpoint_holds_no_teacher_but_their_hashes(fit, name):
    checkpoint = torch.load(fit.directory / "checkpoints" / f"{name}.ckpt", weights_only=True)
    state = checkpoint["state_dict"]
    assert {key.split(".")[0] for key in state} == {"student", "method"}
    assert checkpoint["teachers"] == [t["sha256"] for t in fit.result["teachers"]]
    teachers = {tuple(p.shape) for member in fit.module.teachers.members for p in member.parameters()}
    size = sum(value.numel() for value in state.values())
    assert teachers
    assert size == sum(
        value.numel() for key, value in fit.module.state_dict().items() if key.startswith(("student.", "method."))
    )


def test_a_checkpoint_loads_strictly_into_a_new_module(fit, tiny_settings):
    settings = tiny_settings(f"recipe.epochs={EPOCHS}", "seed=5")
    prepared = prepare(settings, "cpu")
    teachers = gather_teachers(prepared.teachers)
    module = Distiller(prepared.student, prepared.method, settings.recipe, teachers=teachers)
    state = torch.load(fit.directory / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    module.load_state_dict(state, strict=True)
    assert all(torch.equal(module.state_dict()[name], value) for name, value in state.items())
    with pytest.raises(RuntimeError, match=r"student\."):
        module.load_state_dict({k: v for k, v in state.items() if "head" not in k}, strict=True)


def test_the_student_file_holds_the_last_weights(fit):
    student = load_student(fit.directory / "student.safetensors")
    last = torch.load(fit.directory / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    for name, value in student.state_dict().items():
        assert torch.equal(value, last[f"student.{name}"])


@pytest.mark.parametrize("hashes", [[], ["0" * 64], None])
def test_a_checkpoint_of_other_teachers_is_refused(fit, hashes):
    with pytest.raises(UserError, match="needs the teachers that it was trained with"):
        fit.module.on_load_checkpoint({} if hashes is None else {"teachers": hashes})


def test_the_order_of_teachers_counts(fit):
    own = [t["sha256"] for t in fit.result["teachers"]]
    fit.module.on_load_checkpoint({"teachers": own})
    with pytest.raises(UserError, match="needs the teachers that it was trained with"):
        fit.module.on_load_checkpoint({"teachers": own[::-1]})


def test_a_checkpoint_gives_the_runs_predictions_without_teachers(fit):
    loaded = Distiller.load_from_checkpoint(fit.directory / "checkpoints" / "last.ckpt").eval()
    images = torch.rand(5, 3, 32, 32)
    student = load_student(fit.directory / "student.safetensors")
    assert torch.equal(loaded.predict_step(images, 0), student(images))
    assert loaded.recipe == fit.module.recipe
    assert [t["sha256"] for t in loaded.hparams["teachers"]] == [t["sha256"] for t in fit.result["teachers"]]


def test_banks_of_training_images_come_back_with_their_images(tiny_settings, tmp_path):
    terms = "method.terms={ce_ensemble: {weight: 1.0}, crd: {weight: 0.1, negatives: 8, features: 4}}"
    result = run(tiny_settings(terms), tmp_path, config={})
    loaded = Distiller.load_from_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    assert len(loaded.method.terms["crd"].images) == result["num_train_images"]


def test_whether_compiling_pays_is_judged_at_the_size_of_the_images():
    spec = NetworkSpec("timm:vit_tiny_patch16_224", 10, normalization("unit"), {"depth": 1})
    student = BranchedStudent(spec, branches=1, split_after="none")
    method = build_method("plain", {"ce_ensemble": {"weight": 1.0}}, TermContext(10, num_branches=1, num_teachers=0))
    module = Distiller(student, method, RecipeSettings(epochs=1))
    # On a processor it is asked with half precision alone.
    trainer: Any = SimpleNamespace(
        precision="bf16-mixed", num_training_batches=1, accumulate_grad_batches=1, current_epoch=0, global_step=0
    )
    module._trainer = trainer
    index = torch.arange(2)
    batch = Batch(torch.rand(2, 3, 224, 224), index, index, index, index >= 0)
    loss, _, logits = module.losses(batch)
    torch.testing.assert_close(loss, nn.functional.cross_entropy(logits, index))


def test_a_student_of_a_fixed_size_is_given_it(tiny_settings):
    settings = tiny_settings("method=kd", "student.split_after=none", "student.branches=1")

    def student(**options):
        own = replace(settings.student, network="timm:vit_tiny_patch16_224", options={"depth": 1, **options})
        return prepare(replace(settings, student=own), "cpu").student

    assert student().spec.image_size == 224
    assert student()(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    assert student(img_size=32, patch_size=4).spec.image_size is None  # the images' own
    assert student(dynamic_img_size=True).spec.image_size is None


def epochs_of(fit: Fit) -> list[dict[str, str]]:
    return [row for row in fit.rows if row["train/loss"]]


def test_curves_have_one_row_per_epoch(fit):
    rows = epochs_of(fit)
    expected = {"step", "epoch", "lr", "train/loss", "train/accuracy"}
    expected |= {f"train/{name}" for name in WEIGHTS}
    expected |= {f"val/{name}" for name in ("accuracy", "nll", "ece", "brier", "disagreement", "ambiguity")}
    expected |= {f"val/branch_accuracy_{k}" for k in range(3)}
    for epoch, row in enumerate(rows):
        assert {name for name, value in row.items() if value} == expected
        assert int(row["step"]) == (epoch + 1) * STEPS - 1
        assert float(row["epoch"]) == epoch
    assert len(rows) == EPOCHS
    (test,) = [row for row in fit.rows if row not in rows]  # the test set, once, at the end
    assert {name.split("/")[0] for name, value in test.items() if value} == {"step", "epoch", "test", "test_best"}


def test_the_total_is_the_weighted_sum_of_the_terms(fit):
    for row in epochs_of(fit):
        total = sum(weight * float(row[f"train/{name}"]) for name, weight in WEIGHTS.items())
        assert float(row["train/loss"]) == pytest.approx(total, rel=1e-5)


def test_the_learning_rate_as_logged_is_the_cosine_of_the_step(fit):
    expected = [0.05 * (1 + math.cos(math.pi * epoch * STEPS / (EPOCHS * STEPS))) for epoch in range(EPOCHS)]
    assert [float(row["lr"]) for row in epochs_of(fit)] == pytest.approx(expected, rel=1e-6)


def test_training_sees_the_order_of_seed_and_epoch_alone(fit, tiny_settings):
    from ekd_lightning.data.order import epoch_order

    index = prepare(tiny_settings(), "cpu").subset.train_index
    expected = [batch.tolist() for e in range(EPOCHS) for batch in epoch_order(0, e, index).split(32)[:STEPS]]
    assert fit.spy.seen == expected


def test_cost_counts_only_images_that_were_trained_on(fit):
    seconds, speed = fit.result["train_seconds"], fit.result["images_per_second"]
    assert speed * seconds == pytest.approx(EPOCHS * STEPS * 32)
    assert fit.result["steps"] == EPOCHS * STEPS


def test_cost_knows_of_limited_epochs(tiny_settings, tmp_path):
    settings = tiny_settings("method=ce", "trainer.limit_train_batches=2", "trainer.limit_val_batches=1")
    result = run(settings, tmp_path, config={})
    assert result["images_per_second"] * result["train_seconds"] == pytest.approx(2 * 32)


def start(settings) -> tuple[dict[str, torch.Tensor], list[list[int]]]:
    prepared = prepare(settings, "cpu")
    loader = prepared.datamodule.train_dataloader()
    return prepared.student.state_dict(), [rows.index.tolist() for rows in loader]


def test_initial_weights_and_order_do_not_depend_on_method_or_teachers(tiny_settings):
    same = "student.split_after=stage2"
    first, order = start(tiny_settings(same))
    others = [
        ["method=branched_ce"],
        ["method=ekd_mean"],
        ["method=ekd_permuted"],
        ["teachers.count=1"],
        ["teachers.pool=[{train: vgg8}]"],
        ["recipe.lr=0.01", "data.augmentation=none"],
    ]
    for changes in others:
        state, same_order = start(tiny_settings(*changes, same))
        assert same_order == order
        assert all(torch.equal(value, first[name]) for name, value in state.items()), changes
    state, other_order = start(tiny_settings("seed=1", same))
    assert other_order != order
    assert any(not torch.equal(value, first[name]) for name, value in state.items())


def test_plain_students_of_two_methods_start_alike(tiny_settings):
    (first, order), (second, same) = start(tiny_settings("method=ce")), start(tiny_settings("method=kd_mean"))
    assert order == same
    assert all(torch.equal(first[name], value) for name, value in second.items())


def test_convolutions_that_torch_fails_on_are_kept_out_of_channels_last():
    for channels in (4, 15):  # from 8 on, torch fails only with some numbers of threads
        shortcut = torch.nn.Conv2d(channels, 16, 1, stride=2)
        assert has_fragile_convolution(torch.nn.Sequential(shortcut))
    for fine in (torch.nn.Conv2d(16, 32, 1, stride=2), torch.nn.Conv2d(4, 8, 1), torch.nn.Conv2d(4, 8, 3, 2)):
        assert not has_fragile_convolution(torch.nn.Sequential(fine))


@pytest.mark.parametrize(("strategy", "place"), [(SingleDeviceStrategy("cpu"), "cpu"), (DDPStrategy(), "meta")])
def test_only_a_process_that_trains_alone_logs_from_the_host(tiny_settings, monkeypatch, strategy, place):
    """A process group, even of one process, reduces tensors where they are; that of NCCL has none for the host."""
    prepared = prepare(tiny_settings("method=ce"), "cpu")
    module = make_distiller(tiny_settings("method=ce"), prepared, None)
    monkeypatch.setattr(module, "_trainer", SimpleNamespace(strategy=strategy))
    logged = {}
    monkeypatch.setattr(module, "log", lambda name, value, sync_dist: logged.update({name: (value, sync_dist)}))
    module._log("loss", torch.zeros((), dtype=torch.float64, device=place))
    value, synchronised = logged["loss"]
    assert (value.device.type, value.dtype == torch.float32, synchronised) == (place, place == "cpu", True)
