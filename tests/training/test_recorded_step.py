"""Steps over static buffers train as steps that Lightning takes apart; on a GPU they are replayed as one graph."""

from __future__ import annotations

import contextlib
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, GradientAccumulationScheduler, LambdaCallback
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ekd_lightning.errors import UserError
from ekd_lightning.pipeline.prepare import prepare
from ekd_lightning.pipeline.run import make_distiller
from ekd_lightning.settings import Settings
from ekd_lightning.teachers.source import LiveTeachers
from ekd_lightning.training.distiller import Distiller
from ekd_lightning.training.module import NonFiniteLossError
from ekd_lightning.training.pool import gather_teachers
from ekd_lightning.training.recorded_step import EpochRows, RecordedStep

CONF = Path(__file__).resolve().parents[2] / "conf" / "method"
METHODS = sorted(path.stem for path in CONF.glob("*.yaml"))
NOT_RECORDED = {"bss"}
"""Methods with a term that waits for the host in every step."""
NOT_DETERMINISTIC = {"fsp"}
"""Methods with a term whose backward pass has no deterministic form on CUDA: adaptive_max_pool2d (fsp)."""


OWN_WORDS = dict.fromkeys(("fsp", "simkd"), ("teachers.count=1",))  # the two teachers differ in width


class Watch(Callback):
    """Notes what a fit counted, and every learning rate."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.rates: list[float] = []
        self.losses: list[float] = []
        self.recorded = False
        self.graphs = 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.steps.append(trainer.global_step)
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        self.losses.append(float(outputs["loss"]))
        self.recorded = pl_module._recorded is not None
        self.graphs = pl_module._recorded.num_graphs if self.recorded else 0


def plain_trainer(folder: Path, *callbacks: Callback, **flags: object) -> pl.Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    own = {"max_epochs": 1, "accelerator": "cpu", "devices": 1, **quiet, **flags}
    return pl.Trainer(**own, default_root_dir=folder, callbacks=list(callbacks))


def fit(settings: Settings, folder: Path, *callbacks: Callback, accelerator: str = "cpu", **flags: object):
    """Trains for two epochs; returns the module, what a callback saw, and the epochs' means."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepared = prepare(settings, accelerator)
        teachers = gather_teachers(prepared.teachers) if prepared.teachers else None
        module = make_distiller(settings, prepared, teachers)
        watch = Watch()
        own = {"max_epochs": settings.recipe.epochs, "accelerator": accelerator, **flags}
        trainer = plain_trainer(folder, watch, *callbacks, **own)
        trainer.fit(module, datamodule=prepared.datamodule)
    means = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return module, watch, means


def state(module: Distiller) -> dict[str, torch.Tensor]:
    return {name: value.cpu() for name, value in module.state_dict().items()}


def settings_of(tiny_settings, method: str, *words: str) -> Settings:
    own = (f"method={method}", "recipe.epochs=2", "student.compile=never", "teachers.compile=never")
    return tiny_settings(*own, *OWN_WORDS.get(method, ()), *words)


def both(what, folder: Path, *callbacks):
    """The same fit step by step, then over static buffers, which is said to be recorded."""
    compose, method, *words = what
    eager = fit(settings_of(compose, method, *words, "capture=never"), folder, *callbacks)
    static = fit(settings_of(compose, method, *words, "capture=always"), folder, *callbacks)
    assert (eager[1].recorded, static[1].recorded) == (False, method not in NOT_RECORDED)
    same_training(static, eager)
    return eager, static


def same_training(ours, theirs) -> None:
    """Requires two fits to be equal bit for bit."""
    assert (ours[1].steps, ours[1].rates) == (theirs[1].steps, theirs[1].rates)
    assert ours[1].losses == theirs[1].losses
    assert ours[2] == theirs[2]
    wanted = state(theirs[0])
    assert all(torch.equal(value, wanted[name]) for name, value in state(ours[0]).items())


@pytest.mark.parametrize("method", METHODS)
def test_static_steps_train_bit_for_bit_as_eager_steps(tiny_settings, tmp_path, method):
    both((tiny_settings, method), tmp_path)


SCHEDULES = {
    "terms that come and go": (
        "+method.terms.kd_branch.schedule={linear: [[0, 0], [0.4, 0], [0.4, 1], [1, 2]]}",
        "+method.terms.ce_branch.schedule={linear: [[0, 1], [0.7, 1], [0.7, 0]]}",
    ),
    "a ramp": ("+method.terms.kd_ensemble.schedule={ramp_up: 0.5}",),
    "a drawn assignment": ("method.assignment=random",),
    "teachers weighted by image": (
        "+method.terms.maps2.grid=2",
        "+method.terms.maps2.confidence=entropy",
        "+method.terms.maps3.confidence=label",
    ),
    "a teacher that changes": ("method.assignment={schedule: [[0, one_to_one], [0.4, [1, 0, 1]], [0.7, mean]]}",),
    "warm-up and steps": ("recipe.schedule=step", "recipe.warmup_epochs=0.5", "recipe.milestones=[0.6]"),
}


@pytest.mark.parametrize("words", SCHEDULES.values(), ids=SCHEDULES)
def test_schedules_reach_static_steps(tiny_settings, tmp_path, words):
    both((tiny_settings, "ekd", *words), tmp_path)


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_other_fused_optimisers_take_static_steps(tiny_settings, tmp_path, name):
    words = (f"recipe.optimizer={name}", "recipe.lr=0.003", "recipe.optimizer_options={betas: [0.8, 0.99]}")
    _, static = both((tiny_settings, "ekd", *words), tmp_path)
    (group,) = static[0].trainer.optimizers[0].param_groups
    assert (group["betas"], group["fused"]) == ((0.8, 0.99), True)


class Averages(Callback):
    """Averages the student as torch does, after every step of the optimiser."""

    def on_train_start(self, trainer, pl_module):
        self.average = AveragedModel(pl_module.student, multi_avg_fn=get_ema_multi_avg_fn(0.8), use_buffers=True)
        self.steps = 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step > self.steps:
            self.steps = trainer.global_step
            self.average.update_parameters(pl_module.student)


@pytest.mark.parametrize("flags", [{}, {"accumulate_grad_batches": 3}])
@pytest.mark.parametrize("capture", ["never", "always"])
def test_the_moving_average_is_that_of_torch(tiny_settings, tmp_path, capture, flags):
    settings = settings_of(tiny_settings, "ekd", f"capture={capture}", "recipe.ema=0.8")
    module, watch, _ = fit(settings, tmp_path, averages := Averages(), **flags)
    assert averages.steps == watch.steps[-1] == (4 if flags else 8)
    expected = dict(averages.average.module.state_dict())
    for name, value in module.ema.module.state_dict().items():
        if value.is_floating_point():
            assert torch.equal(value, expected[name]), name
        else:
            assert torch.equal(value, module.student.state_dict()[name])
    assert not any(p.requires_grad for p in module.ema.parameters())
    held = {id(p) for group in module.trainer.optimizers[0].param_groups for p in group["params"]}
    assert not held & {id(p) for p in module.ema.parameters()}


def test_rows_of_an_epoch_are_copied():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    step = RecordedStep(device=torch.device("cpu"), optimizer=optimizer, gather=None, loss=None, weight_names=())
    first, second = (EpochRows(*(torch.full((2, 3), number) for _ in range(4))) for number in (1, 2))
    step.start_epoch(first, 1)
    step.start_epoch(second, 1)
    assert all((values == 1).all() for values in first.tensors().values())


def test_a_run_that_ends_inside_an_epoch_counts_its_steps(tiny_settings, tmp_path):
    words = ("capture=always", "recipe.epochs=3")
    _, watch, means = fit(settings_of(tiny_settings, "ekd", *words), tmp_path, max_steps=6)
    assert watch.steps == [1, 2, 3, 4, 5, 6]
    assert means["train/loss"] == pytest.approx(sum(watch.losses[4:]) / 2, rel=1e-6)


def test_a_module_trains_again_after_a_recorded_fit(tiny_settings, tmp_path):
    settings = settings_of(tiny_settings, "ekd", "capture=always")
    module, watch, _ = fit(settings, tmp_path)
    assert watch.recorded
    assert not module.gathers_images  # the graphs are given back
    data = module.trainer.datamodule
    again = Watch()
    trainer = plain_trainer(tmp_path, again, gradient_clip_val=1.0)
    trainer.fit(module, datamodule=data)
    assert not again.recorded
    assert len(again.steps) == 4


def test_a_fit_that_fails_leaves_the_data_as_they_were(tiny_settings, tmp_path):
    class Fails(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.data = trainer.datamodule
            raise RuntimeError("over")

    fails = Fails()
    with pytest.raises(RuntimeError, match="over"):
        fit(settings_of(tiny_settings, "ekd", "capture=always"), tmp_path, fails)
    module, _, _ = fit(settings_of(tiny_settings, "ekd", "capture=never"), tmp_path)
    trainer = plain_trainer(tmp_path)
    trainer.fit(module, datamodule=fails.data)
    assert module.trainer.global_step == 4


def test_accumulation_that_begins_later_ends_the_recording(tiny_settings, tmp_path):
    words = ("recipe.epochs=3",)
    schedule = {"scheduling": {1: 2}}
    eager = fit(settings_of(tiny_settings, "ekd", *words), tmp_path, GradientAccumulationScheduler(**schedule))
    static = fit(
        settings_of(tiny_settings, "ekd", "capture=always", *words), tmp_path, GradientAccumulationScheduler(**schedule)
    )
    assert static[1].steps == eager[1].steps == [1, 2, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8]
    wanted = state(eager[0])
    assert all(torch.equal(value, wanted[name]) for name, value in state(static[0]).items())


class ChangesTheOptimiser(Callback):
    """Sets weight decay and freezes a parameter in the middle of the training."""

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 2:
            trainer.optimizers[0].param_groups[0]["weight_decay"] = 0.1
            next(pl_module.student.parameters()).requires_grad_(False)


def test_what_a_callback_changes_in_the_optimiser_reaches_static_steps(tiny_settings, tmp_path):
    both((tiny_settings, "ekd", "recipe.epochs=4"), tmp_path, ChangesTheOptimiser())


def test_parameters_that_get_gradients_later_are_trained_from_then_on(tiny_settings, tmp_path):
    """A fused optimiser refuses momentum for some parameters only."""
    off = [f"method.terms.{name}.weight=0" for name in ("ce_ensemble", "kd_ensemble", "feature_branch")]
    words = ("student.ensemble=gate", *off, "+method.terms.kd_branch.schedule={linear: [[0, 1], [0.5, 1], [0.5, 0]]}")
    for capture in ("never", "always"):
        _, watch, _ = fit(settings_of(tiny_settings, "ekd", f"capture={capture}", *words), tmp_path)
        assert len(watch.steps) == 8


class LooksAtGradients(Callback):
    def on_after_backward(self, trainer, pl_module):
        self.seen = [p.grad is not None for p in pl_module.student.parameters()]


@pytest.mark.parametrize(
    ("flags", "words", "reason"),
    [
        ({"accumulate_grad_batches": 2}, (), "accumulate_grad_batches"),
        ({"gradient_clip_val": 1.0}, (), "gradient_clip_val"),
        ({"detect_anomaly": True}, (), "detect_anomaly"),
        ({}, ("recipe.optimizer=rmsprop", "recipe.lr=0.001"), "RMSprop is not a fused"),
        ({}, ("recipe.mixup=0.2",), "mixed"),
        ({}, ("data.augmentation=[randaugment]",), "augmentation"),
        ({"callbacks": "class"}, (), "LooksAtGradients"),
        ({"callbacks": "instance"}, (), "LambdaCallback"),
    ],
)
def test_what_cannot_be_recorded_is_said_and_trains_step_by_step(tiny_settings, tmp_path, caplog, flags, words, reason):
    looks, seen = LooksAtGradients(), []
    watching: dict[str, list[Any]] = {
        "class": [looks],
        "instance": [LambdaCallback(on_after_backward=lambda trainer, module: seen.append(trainer.global_step))],
    }
    flags = dict(flags)
    kind = flags.pop("callbacks", None)
    callbacks = watching.get(kind, [])
    settings = settings_of(tiny_settings, "ekd", "capture=always", *words)
    with caplog.at_level("INFO"):
        _, watch, _ = fit(settings, tmp_path, *callbacks, **flags)
    assert not watch.recorded
    said = [record.message for record in caplog.records if "not recorded" in record.message]
    assert said  # teachers that had to be trained say it, too
    assert all(reason in line for line in said)
    if kind == "class":
        assert looks.seen
        assert all(looks.seen)
    assert bool(seen) == (kind == "instance")


@pytest.mark.parametrize("capture", ["never", "always"])
def test_a_full_device_names_batch_size_and_what_is_large(tiny_settings, tmp_path, monkeypatch, capture):
    def full(self, batch, values=None):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(Distiller, "losses", full)
    with pytest.raises(UserError, match=r"recipe\.batch_size=32 .*weights, gradients and momentum.* 2\.00 GiB"):
        fit(settings_of(tiny_settings, "ekd", f"capture={capture}"), tmp_path)


@pytest.mark.parametrize("capture", ["never", "always"])
@pytest.mark.parametrize(
    ("value", "name", "why"),
    [
        (math.nan, "kd_ensemble", "nan; use another teacher"),
        (-math.inf, "kd_standardized", "-inf; it masks classes"),
        (-math.inf, "kd_ensemble", None),
    ],
)
def test_a_teacher_whose_answers_are_no_numbers_is_named(
    tiny_settings, tmp_path, monkeypatch, value, name, why, capture
):
    ask = LiveTeachers.outputs

    def spoilt(self, batch, stages=()):
        output = ask(self, batch, stages)
        logits = output.logits.clone()
        logits[1, batch.index == seen[0], 3] = value
        return output._replace(logits=logits)

    monkeypatch.setattr(LiveTeachers, "outputs", spoilt)
    words = (f"+method.terms={{spoilt: {{type: {name}, weight: 1.0}}}}", "teachers.table=off", f"capture={capture}")
    settings = settings_of(tiny_settings, "ce", "method.assignment=mean", *words)
    seen = [int(prepare(settings, "cpu").subset.train_index[7])]
    if why is None:
        fit(settings, tmp_path)
        return
    with pytest.raises(
        NonFiniteLossError, match=rf"^spoilt is nan .* teacher 'resnet8-s1' .* image {seen[0]} are {why}"
    ):
        fit(settings, tmp_path)


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


SAME = {"bss": 2, "fsp": 2, "rkd": 2}
"""Methods whose losses magnify the last bit of a weight, and the number of their steps that are compared."""
ON_GPU = ("recipe.epochs=4", "trainer.precision=32-true", "teachers.precision=float32")


@pytest.fixture
def on_gpu(tiny_settings, tmp_path, monkeypatch):
    """`on_gpu(method, *words)` trains in eager steps, in static steps and as graphs, and compares the three.

    Graphs repeat the static steps bit for bit. Eager steps round otherwise, e.g. learning rates, and differences grow
    from step to step, so that only their first losses are compared.
    """

    def compare(method: str, *words: str, callbacks=()) -> None:
        def trained(*own: str):
            settings = settings_of(tiny_settings, method, *ON_GPU, *words, *own)
            exact = method not in NOT_DETERMINISTIC
            return fit(settings, tmp_path, *callbacks, accelerator="gpu", deterministic=exact)

        graph = trained("capture=auto")
        assert (graph[1].recorded, graph[1].graphs > 0) == (method not in NOT_RECORDED,) * 2
        eager = trained("capture=never")
        assert graph[1].losses[: SAME.get(method, 4)] == pytest.approx(eager[1].losses[: SAME.get(method, 4)], rel=1e-3)
        assert (graph[1].steps, graph[1].rates) == (eager[1].steps, eager[1].rates)
        if method in NOT_RECORDED | NOT_DETERMINISTIC:
            return
        with monkeypatch.context() as patch:
            patch.setattr(RecordedStep, "_record", lambda self, kind: False)
            static = trained("capture=auto")
        assert (static[1].recorded, static[1].graphs) == (True, 0)
        same_training(graph, static)

    yield compare
    torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("method", METHODS)
def test_graphs_train_as_static_and_eager_steps(on_gpu, method):
    on_gpu(method)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("words", SCHEDULES.values(), ids=SCHEDULES)
def test_schedules_reach_graphs(on_gpu, words):
    on_gpu("ekd", *words)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_other_fused_optimisers_are_part_of_graphs(on_gpu, name):
    on_gpu("ekd", f"recipe.optimizer={name}", "recipe.lr=0.003")


@pytest.mark.gpu
@gpu
def test_what_a_callback_changes_in_the_optimiser_reaches_graphs(on_gpu):
    on_gpu("ekd", callbacks=[ChangesTheOptimiser()])


@pytest.mark.gpu
@gpu
def test_a_loss_that_is_not_finite_inside_a_graph_ends_the_epoch(tiny_settings, tmp_path):
    settings = settings_of(tiny_settings, "ekd", "recipe.lr=1e12", "recipe.epochs=4", "recipe.warmup_epochs=1")
    with pytest.raises(NonFiniteLossError, match="epoch"):
        fit(settings, tmp_path, accelerator="gpu")


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("method", METHODS)
def test_which_methods_train_deterministically_on_the_device(tiny_settings, tmp_path, method):
    settings = settings_of(tiny_settings, method, "recipe.epochs=1", "capture=never")
    refused = pytest.raises(RuntimeError, match="deterministic")
    try:
        with refused if method in NOT_DETERMINISTIC else contextlib.nullcontext():
            fit(settings, tmp_path, accelerator="gpu", deterministic=True, max_steps=2)
    finally:
        torch.use_deterministic_algorithms(False)
