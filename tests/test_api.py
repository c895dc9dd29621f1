"""The package from Python: one call that does what the command does, and pieces for other loops."""

from __future__ import annotations

import json
import logging
import os
import re
import runpy
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import pytorch_lightning as pl
import safetensors.torch
import timm
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset
from whole_runs import TINY

import ekd_lightning as ekd
from ekd_lightning.cli import evaluate, export
from ekd_lightning.data import load_dataset
from ekd_lightning.data.views import to_unit
from ekd_lightning.errors import UserError
from ekd_lightning.files import read_json, write_json
from ekd_lightning.networks import NetworkSpec, TeacherIdentity, build_network, normalization, state_sha256
from ekd_lightning.settings import RecipeSettings
from ekd_lightning.teachers.source import LiveTeachers, TeacherFormat

EXAMPLES = Path(__file__).parents[1] / "examples"
SPEC = NetworkSpec("resnet8", 10, normalization("centered"), {"width": 0.25})
TEACHERS = [{"train": "resnet8", "options": {"width": 0.5}, "seed": 0}, {"train": "resnet8", "seed": 1}]
WORDS = [word for word in TINY if not word.startswith(("method=", "teachers.pool="))]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


NOISE = "litlogger|LeafSpec|across ranks is zero|in both|logging interval|channels_last"


def test_one_call_does_what_the_command_does(here, train, recwarn, caplog):
    words = ["method=ekd", "student.branches=2", "seed=3", "trainer.threads=1"]
    # The shared store may have teachers that an earlier test trained with another number of threads.
    outcome = train(here / "command", *words, f"teachers.store={here}/own")
    assert outcome.code == 0, outcome.err
    caplog.set_level(logging.INFO)
    quieted = logging.getLogger("pytorch_lightning.utilities.rank_zero")
    quieted.setLevel(logging.INFO)
    recwarn.clear()
    caplog.clear()
    run = ekd.distill(
        "digits",
        TEACHERS,
        "resnet8",
        branches=2,
        method="ekd",
        seed=3,
        overrides=[*WORDS, "trainer.threads=1", f"teachers.store={here}/s"],
    )
    assert [line for line in (*map(str, recwarn), *caplog.messages) if re.search(NOISE, line)] == []
    assert quieted.level == logging.INFO  # only during the call
    theirs = read_json(here / "command" / "result.json")
    assert run.directory.parent == here / "outputs/digits/ekd"
    assert run.result.test_accuracy == theirs["test_accuracy"]
    assert run.result.test_nll == theirs["test_nll"]
    assert run.student.num_branches == 2
    saved = state_sha256(run.student)
    assert saved == state_sha256(ekd.api.load_student(here / "command" / "student.safetensors"))
    assert evaluate.main([str(run.directory), "--parts", "generalisation", "--device", "cpu"]) in (None, 0)
    assert export.main([str(run.directory), "-o", str(here / "out")]) in (None, 0)
    assert ekd.load(here / "out" / "student.safetensors").classify(torch.zeros(1, 3, 32, 32)) is not None
    with pytest.raises(UserError, match="overwrite"):
        ekd.distill("digits", TEACHERS, overrides=[*WORDS, f"teachers.store={here}/s"], directory=run.directory)


def test_mistakes_are_those_of_the_command(here):
    for arguments, said in (
        (
            {"student": "resnet9"},
            r"unknown network 'resnet9'; did you mean .*module is imported \(imports=\[MODULE\]\)",
        ),
        ({"branches": 0}, "student.branches"),
        ({"teachers": ["cifar10_resnet99"]}, "unknown teacher 'cifar10_resnet99'"),
        ({"data": Path("nowhere")}, "data=nowhere: no such folder"),
        ({"data": "digit"}, "digit"),
        ({"method": 3}, "method must be a str or None, not a int"),
        ({"method": "ekdd"}, "unknown method 'ekdd'; did you mean 'ekd'"),
        ({"student": torch.nn.Linear(3, 2)}, "student: must be the name .* not a Linear; .*register_network"),
        ({"teachers": [torch.nn.Linear(3, 2)]}, "teachers: must be names or mappings .* not a Linear; .*module"),
        ({"teachers": "digits"}, "teachers='digits': must be a list"),
        ({"overrides": "data.fraction=0.1"}, "overrides='data.fraction=0.1': must be a list of str"),
        ({"overrides": [1]}, r"overrides=\[1\]: must be a list of str"),
        ({"callbacks": pl.Callback()}, "callbacks=.*: must be a list of Callback"),
        ({"data": TensorDataset(torch.zeros(1))}, "data: must be the name .* not a TensorDataset: register_dataset"),
        ({"epochs": "three"}, "recipe.epochs"),
        ({"overrides": ["resume=here"]}, "ekd-train resume=DIR"),
    ):
        with pytest.raises(UserError, match=said):
            ekd.distill(**{"data": "digits", "teachers": TEACHERS, "overrides": WORDS, **arguments})
    assert not (here / "outputs").exists()


def test_callbacks_of_the_configuration_are_used(here):
    target = "_target_: pytorch_lightning.callbacks.EarlyStopping"
    stop = f"+callbacks.x={{{target}, monitor: train/loss, stopping_threshold: 1e9}}"
    words = ["data.fraction=0.1", "recipe.batch_size=32", "trainer=cpu", "evaluation=none", stop]
    run = ekd.distill("digits", method="ce", branches=1, epochs=3, overrides=words)
    assert run.result.epochs_done == 1


@pytest.fixture
def launched(monkeypatch):
    """Stands for a run whose launcher has started other ranks."""

    def run(settings, place, *, on_start, **more):
        place.mkdir(exist_ok=True)
        on_start()
        os.environ.setdefault("LOCAL_RANK", "0")

    monkeypatch.setattr("ekd_lightning.api.run", run)
    monkeypatch.setattr("ekd_lightning.api._begun", [])
    for name in ("LOCAL_RANK", "EKD_RUN_DIRECTORY"):
        monkeypatch.delenv(name, raising=False)
    return ["trainer=cpu", "trainer.devices=2", "trainer.strategy=ddp"]


def test_a_run_on_several_devices_must_be_the_first_of_its_process(here, launched):
    before = dict(os.environ)
    ekd.distill("digits", method="ce", overrides=launched)
    assert dict(os.environ) == before
    ekd.distill("digits", method="ce", overrides=["trainer=cpu"])
    made = sorted((here / "outputs").rglob("*"))
    with pytest.raises(UserError, match=r"trainer\.devices=2: .* start one process per run"):
        ekd.distill("digits", method="ce", overrides=launched)
    assert sorted((here / "outputs").rglob("*")) == made


def test_a_started_rank_ends_with_its_run(here, launched, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("EKD_RUN_DIRECTORY", str(here / "run"))
    with pytest.raises(SystemExit) as ended:
        ekd.distill("digits", method="ce", overrides=launched)
    assert not ended.value.code
    assert (here / "run").is_dir()


def test_the_package_is_imported_lazily():
    code = (
        "import sys, ekd_lightning as e; assert 'torch' not in sys.modules; e.Distiller; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert set(ekd.__all__) <= set(dir(ekd))
    with pytest.raises(AttributeError, match="distil"):
        ekd.distil  # noqa: B018


def networks(teachers=2):
    torch.manual_seed(0)
    members = [build_network(SPEC) for _ in range(teachers)]
    names = [TeacherIdentity(f"t{m}", state_sha256(one), "mine", "resnet8") for m, one in enumerate(members)]
    ensemble = ekd.TeacherEnsemble(members, names)
    student = ekd.BranchedStudent(SPEC, branches=2, split_after="stage1")
    return student, ensemble, ekd.method("ekd", student, ensemble)


def test_parts_that_do_not_fit_are_refused_when_they_meet():
    student, ensemble, method = networks()
    members = list(ensemble.members)
    recipe = ekd.RecipeSettings(epochs=1)
    with pytest.raises(UserError, match="teachers must be a TeacherEnsemble or None, not a list"):
        ekd.method("ekd", student, members)
    with pytest.raises(UserError, match="student must be a BranchedStudent, not a StagedNetwork"):
        ekd.method("ekd", members[0], ekd.TeacherEnsemble(members))
    with pytest.raises(UserError, match="name must be a str, not a Method"):
        ekd.method(method, student, ekd.TeacherEnsemble(members))
    with pytest.raises(UserError, match="overrides='a=1': must be a list"):
        ekd.method("ekd", student, ekd.TeacherEnsemble(members), overrides="a=1")
    with pytest.raises(UserError, match="spec must be a NetworkSpec, not a Linear: register_network"):
        ekd.BranchedStudent(torch.nn.Linear(3, 2), branches=2, split_after="stem")
    with pytest.raises(UserError, match=r"normalization='unit' must be a Normalization"):
        NetworkSpec("resnet8", 10, "unit")
    with pytest.raises(UserError, match="method must be a Method, not a str"):
        ekd.Distiller(student, "ekd", recipe)
    with pytest.raises(UserError, match="recipe must be a RecipeSettings, not a dict"):
        ekd.Distiller(student, method, {"epochs": 1})
    for values, message in (({"epochs": "1"}, "recipe.epochs=1: must be int"), ({"schedule": "cosin"}, "'cosine'")):
        with pytest.raises(UserError, match=message):
            ekd.Distiller(student, method, ekd.RecipeSettings(**values))
    images, labels = torch.rand(2, 3, 32, 32), torch.zeros(2, dtype=torch.int64)
    taught, given = ensemble(images, method.teacher_stages), student.outputs(images)
    with pytest.raises(UserError, match=r"student.outputs\(images\), must be a StudentOutput, not a Tensor"):
        method(student(images), taught, (images, labels))
    with pytest.raises(UserError, match=r"teacher_stages\), must be a TeacherOutput, not a Tensor"):
        method(given, taught.logits, (images, labels))
    with pytest.raises(UserError, match="networks normalise them"):
        method(given, taught, (images - 1, labels))
    with pytest.raises(UserError, match="teachers must be a TeacherEnsemble or None, not a list"):
        ekd.Distiller(student, method, recipe, teachers=members)
    with pytest.raises(UserError, match="built for 2 branches and 2 teachers, not for 2 and 1"):
        ekd.Distiller(student, method, recipe, teachers=ekd.TeacherEnsemble(members[:1]))
    flat = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 10))
    with pytest.raises(UserError, match=r"teacher 'Sequential-0': .* fails on images \[2, 3, 32, 32\]: RuntimeError"):
        ekd.method("kd_mean", student, ekd.TeacherEnsemble([flat], normalization="unit"))
    assert ekd.method(
        "kd_mean", student, ekd.TeacherEnsemble([flat], normalization="unit"), image_size=8
    ).needs_teachers


class Halving(pl.LightningDataModule):
    """A data module with a hook of its own that changes the batch."""

    def __init__(self, images, labels):
        super().__init__()
        self.set = TensorDataset(images, labels)

    def train_dataloader(self):
        return DataLoader(self.set, batch_size=32)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        images, labels = batch
        return images / 2, labels


def test_a_data_module_of_the_user_may_change_its_batches():
    images, labels = torch.rand(32, 3, 32, 32), torch.arange(32) % 10
    found = {}
    for name, loader in (
        ("halved", Halving(images, labels)),
        ("plain", Halving(images / 2, labels).train_dataloader()),
    ):
        student, teachers, method = networks()
        recipe = ekd.RecipeSettings(epochs=1, lr=1e-9)
        trainer = fitted(ekd.Distiller(student, method, recipe, teachers=teachers), loader)
        found[name] = trainer.callback_metrics["train/loss"]
    assert torch.equal(found["halved"], found["plain"])


def fitted(module, loader, **flags):
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, **flags
    )
    trainer.fit(module, loader)
    return trainer


def test_any_loader_gives_the_losses_of_the_method():
    digits = load_dataset("digits", "unused").train
    images, labels = to_unit(digits.images[:96]), digits.labels[:96]
    student, teachers, method = networks()
    plain = TeacherFormat(precision="float32", compile="never")
    recipe = ekd.RecipeSettings(epochs=1, lr=1e-9)
    module = ekd.Distiller(
        student, method, recipe, teachers=teachers, make_source=partial(LiveTeachers, how=plain), capture="never"
    )
    trainer = fitted(module, DataLoader(TensorDataset(images, labels), batch_size=32))
    student, teachers, method = networks()
    student.train()
    found = []
    for some, truth in zip(images.split(32), labels.split(32), strict=True):
        found.append(method(student.outputs(some), teachers(some, method.teacher_stages), (some, truth)).terms)
    for name in method.terms:
        expected = torch.stack([terms[name] for terms in found]).mean()
        torch.testing.assert_close(trainer.callback_metrics[f"train/{name}"], expected, rtol=1e-4, atol=1e-5)


def test_a_trainer_longer_than_the_recipe_and_batches_by_name_are_said():
    digits = load_dataset("digits", "unused").train
    images, labels = to_unit(digits.images[:32]), digits.labels[:32]
    student, teachers, method = networks()
    recipe = ekd.RecipeSettings(epochs=1, mixup=0.2)
    module = ekd.Distiller(student, method, recipe, teachers=teachers, capture="never")
    flags = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    named = [{"image": image, "label": label} for image, label in zip(images, labels, strict=True)]
    with (
        pytest.warns(UserWarning, match=r"max_epochs=3 of the Trainer, but the recipe has epochs=1"),
        pytest.warns(UserWarning, match=r"recipe.mixup=0.2 has no effect"),
        pytest.raises(UserError, match=r"must be \(images, labels\), not a dict"),
    ):
        pl.Trainer(**flags, **quiet, max_epochs=3).fit(module, DataLoader(named, batch_size=32))


def test_predictions_are_the_students():
    student, teachers, method = networks()
    module = ekd.Distiller(student, method, ekd.RecipeSettings(epochs=1), teachers=teachers)
    images = torch.rand(6, 3, 32, 32)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    for loader in (
        DataLoader(images, batch_size=3),
        DataLoader(TensorDataset(images, torch.zeros(6, dtype=torch.int64)), batch_size=3),
    ):
        predicted = torch.cat(trainer.predict(module, loader))
        torch.testing.assert_close(predicted, student.eval()(images))


def checkpointed(here, method_name="ekd", epochs=1, **options):
    """A module after some epochs with teachers, its loader, its trainer, and its checkpoint."""
    digits = load_dataset("digits", "unused").train
    loader = DataLoader(TensorDataset(to_unit(digits.images[:64]), digits.labels[:64]), batch_size=32)
    student, teachers, _ = networks()
    method = ekd.method(method_name, student, teachers)
    module = ekd.Distiller(student, method, ekd.RecipeSettings(epochs=2), teachers=teachers, **options)
    trainer = trainer_of(epochs)
    trainer.fit(module, loader)
    trainer.save_checkpoint(here / "a.ckpt")
    return module, loader, trainer, here / "a.ckpt"


def trainer_of(epochs):
    flags = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return pl.Trainer(max_epochs=epochs, accelerator="cpu", **flags)


def test_a_module_comes_back_for_prediction_without_teachers(here):
    module, loader, _, path = checkpointed(here)
    loaded = ekd.Distiller.load_from_checkpoint(path)
    images = torch.rand(6, 3, 32, 32)
    assert torch.equal(loaded.eval().student(images), module.eval().student(images))
    assert torch.equal(loaded.predict_step(images, 0), module.student(images))
    trainer = trainer_of(2)
    assert trainer.validate(loaded, loader, verbose=False) == trainer.validate(module, loader, verbose=False)
    with pytest.raises(UserError, match=r"the method 'ekd' needs teachers to train: pass teachers="):
        trainer.fit(loaded, loader, ckpt_path=path)
    known = torch.load(path, weights_only=True)["hyper_parameters"]
    assert known["teachers"] == [
        {"id": t.id, "network": "resnet8", "sha256": t.sha256} for t in module.teachers.identities
    ]
    assert RecipeSettings(**known["recipe"]) == module.recipe
    assert json.loads(json.dumps(known)) == known


@pytest.mark.parametrize("method_name", ["ekd", "fitnet", "ce"])
def test_a_module_that_comes_back_goes_on_as_if_nothing_had_been(here, method_name):
    _, loader, trainer, path = checkpointed(here, method_name)
    whole, _, one, _ = checkpointed(here / "whole", method_name, epochs=2)
    loaded = ekd.Distiller.load_from_checkpoint(path, teachers=networks()[1])
    two = trainer_of(2)
    two.fit(loaded, loader, ckpt_path=path)
    assert two.global_step == one.global_step == 2 * trainer.global_step
    assert two.callback_metrics == one.callback_metrics
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_what_is_no_such_checkpoint_is_refused(here):
    module, _, _, path = checkpointed(here)
    other = networks(teachers=1)[1]
    with pytest.raises(UserError, match="needs the teachers that it was trained with"):
        ekd.Distiller.load_from_checkpoint(path, teachers=other)
    with pytest.raises(UserError, match="no such file"):
        ekd.Distiller.load_from_checkpoint(here / "b.ckpt")
    good = torch.load(path, weights_only=True)

    def refusal(**changes):
        torch.save({**good, **changes}, here / "b.ckpt")
        with pytest.raises(UserError) as caught:
            ekd.Distiller.load_from_checkpoint(here / "b.ckpt")
        assert len(str(caught.value).splitlines()) == 1
        return str(caught.value)

    known = good["hyper_parameters"]
    assert "not a checkpoint of a Distiller" in refusal(hyper_parameters={})
    assert "not a checkpoint of a Distiller" in refusal(hyper_parameters={**known, "student": 3})
    assert "recipe.epochs" in refusal(hyper_parameters={**known, "recipe": {"epochs": 0}})
    assert "pass method=" in refusal(hyper_parameters={**known, "method": {}})
    spec = {**known["student"]["spec"], "name": "module:os.system"}
    assert "is not among imports" in refusal(hyper_parameters={**known, "student": {**known["student"], "spec": spec}})
    state = {name: value for name, value in good["state_dict"].items() if "head" not in name}
    assert "head" in refusal(state_dict=state)
    mine = ekd.Distiller.load_from_checkpoint(path, method=module.method, capture="never")
    assert mine.method is module.method


@pytest.mark.parametrize("images", [torch.rand(32, 3, 32, 32) * 255, torch.zeros(32, 3, 32, 32, dtype=torch.uint8)])
def test_images_of_another_range_are_refused(images):
    student, teachers, method = networks()
    module = ekd.Distiller(student, method, ekd.RecipeSettings(epochs=1), teachers=teachers)
    with pytest.raises(UserError, match=r"in \[0, 1\]"):
        fitted(module, DataLoader(TensorDataset(images, torch.zeros(32, dtype=torch.int64)), batch_size=32))


@pytest.mark.parametrize("name", ["plain_trainer", "plain_loop"])
def test_examples_of_other_loops_run(name, here, capsys):
    runpy.run_path(str(EXAMPLES / f"{name}.py"))
    assert {"plain_trainer": "test accuracy", "plain_loop": "step 20"}[name] in capsys.readouterr().out


def called(name, *words, monkeypatch):
    monkeypatch.setattr(sys, "argv", [name, *words])
    runpy.run_path(str(EXAMPLES / f"{name}.py"))


def test_the_examples_of_own_images_run(here, monkeypatch, capsys):
    digits = load_dataset("digits", "unused").train
    (here / "found").mkdir()
    for label in (0, 1):
        folder = here / "birds" / ("heron", "owl")[label]
        folder.mkdir(parents=True)
        for number, image in enumerate(digits.images[digits.labels == label][:45]):
            path = folder if number < 30 else here / "found"
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(path / f"{label}{number:03}.png")
    words = (
        "trainer=cpu",
        "teachers.recipe.epochs=1",
        "teachers.recipe.batch_size=8",
        "recipe.batch_size=8",
        "evaluation=none",
    )
    with pytest.raises(SystemExit, match=r"usage: .*own_folder\.py FOLDER"):
        called("own_folder", monkeypatch=monkeypatch)
    called("own_folder", "birds", "1", *words, monkeypatch=monkeypatch)
    assert "test accuracy" in capsys.readouterr().out
    (result,) = (here / "outputs" / "birds" / "ekd").glob("*/result.json")
    assert read_json(result)["data"] == "birds"
    called("unlabelled_images", "birds", "found", *words, "recipe.epochs=1", monkeypatch=monkeypatch)
    assert "and 30 unlabelled images, " in capsys.readouterr().out


def test_the_example_of_timm_runs(here, monkeypatch, capsys):
    torch.manual_seed(0)
    module = timm.create_model("mobilenetv3_small_050", num_classes=10)
    safetensors.torch.save_file(module.state_dict(), here / "w.safetensors")
    words = ("data.fraction=0.1", "teachers.recipe.epochs=1", "recipe.epochs=1")
    called("timm_teachers", "w.safetensors", *words, monkeypatch=monkeypatch)
    assert "student: " in capsys.readouterr().out
    (result,) = (here / "outputs" / "digits" / "ekd").glob("*/result.json")
    assert read_json(result)["evaluation_error"] is None
    assert len(list((here / "store" / "outputs").glob("*.safetensors"))) == 2  # each teacher is asked once


def test_the_example_of_a_hub_runs(here, monkeypatch, capsys):
    torch.manual_seed(0)
    name = "mobilenetv3_small_050"
    (here / "copy").mkdir()
    write_json(here / "copy" / "config.json", {"architecture": name, "pretrained_cfg": {"mean": [0.5] * 3}})
    with pytest.raises(UserError, match=r"hub repository 'copy': lacks model\.safetensors"):
        called("hub_teacher", "copy", monkeypatch=monkeypatch)
    safetensors.torch.save_file(timm.create_model(name).state_dict(), here / "copy" / "model.safetensors")
    words = ("data.fraction=0.1", "teachers.recipe.epochs=1", "recipe.epochs=1", "evaluation=none")
    called("hub_teacher", "copy", *words, monkeypatch=monkeypatch)
    assert f"timm:{name}: " in capsys.readouterr().out
    (provenance,) = (here / "outputs" / "digits" / "ekd").glob("*/provenance.json")
    assert read_json(provenance)["teachers"][0]["network"] == f"timm:{name}"
