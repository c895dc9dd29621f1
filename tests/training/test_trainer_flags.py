from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch

from ekd_lightning.errors import UserError
from ekd_lightning.settings import Settings
from ekd_lightning.training.trainer import EpochSeed, _digits, build_trainer, check_trainer, trainer_flags

CPU = {"accelerator": "cpu", "devices": 1, "enable_model_summary": False, "max_epochs": 1}


def build(folder, **flags):
    return build_trainer({**CPU, **flags}, folder, [], [])


def test_every_flag_of_lightning_but_ours_may_be_set():
    flags = inspect.signature(pl.Trainer).parameters
    assert flags.keys() - trainer_flags() == {"logger", "callbacks", "default_root_dir"}
    check_trainer({name: flags[name].default for name in flags.keys() & trainer_flags()} | {"threads": None})


@pytest.mark.parametrize("name", ["logger", "callbacks", "default_root_dir"])
def test_flags_that_other_groups_decide_are_refused(name):
    with pytest.raises(UserError, match=rf"^trainer\.{name}: "):
        check_trainer({name: True})


def test_a_run_without_a_record_is_refused():
    with pytest.raises(UserError, match=r"^trainer\.barebones=true: .* ekd-bench"):
        check_trainer({"barebones": True})


def test_an_unknown_flag_is_refused_with_the_nearest():
    with pytest.raises(UserError, match=r"'trainer\.max_epoch'; did you mean 'trainer\.max_epochs'"):
        check_trainer({"max_epoch": 3})


@pytest.mark.parametrize("nothing", [0, 0.0])
def test_training_on_nothing_is_refused(nothing):
    with pytest.raises(UserError, match=r"trainer\.limit_train_batches=0"):
        Settings(trainer={"limit_train_batches": nothing}).check()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"precision": "17"}, "17"),
        ({"devices": 0}, "devices"),
        ({"strategy": "dpp"}, "dpp"),
        ({"accelerator": "abacus"}, "abacus"),
        ({"limit_train_batches": 1.5}, "limit_train_batches"),
    ],
)
def test_what_lightning_refuses_is_one_line(tmp_path, flags, named):
    with pytest.raises(UserError, match=named) as caught:
        build(tmp_path, **flags)
    assert str(caught.value).startswith("trainer: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["gpu", "cuda", "mps"])
def test_a_gpu_that_is_not_there_is_refused_by_name(tmp_path, monkeypatch, name):
    monkeypatch.setattr(pl.accelerators.CUDAAccelerator, "is_available", lambda: False)
    monkeypatch.setattr(pl.accelerators.MPSAccelerator, "is_available", lambda: False)
    with pytest.raises(UserError, match=rf"^trainer\.accelerator={name}: PyTorch finds no such GPU here; trainer=cpu"):
        build(tmp_path, accelerator=name)


@pytest.mark.parametrize("flag", [None, True, False])
def test_lightnings_progress_bar_is_there_only_where_it_is_asked_for(tmp_path, flag):
    assert (build(tmp_path, enable_progress_bar=flag).progress_bar_callback is not None) is (flag is True)


def test_a_progress_bar_that_was_chosen_is_shown(tmp_path):
    bar = pl.callbacks.RichProgressBar()
    trainer = build_trainer({**CPU, "enable_progress_bar": None}, tmp_path, [], [bar])
    assert trainer.progress_bar_callback is bar


@pytest.mark.parametrize("precision", ["16-true", "bf16-true"])
def test_precision_that_would_cast_the_teachers_is_refused(precision):
    with pytest.raises(UserError, match="bf16-mixed"):
        check_trainer({"precision": precision})


def test_flags_are_not_changed(tmp_path):
    flags = {**CPU, "precision": "auto", "enable_progress_bar": None}
    build_trainer(flags, tmp_path, [], [])
    assert flags == {**CPU, "precision": "auto", "enable_progress_bar": None}


def test_gradients_can_be_clipped_in_mixed_precision(train, tmp_path):
    """Lightning refuses that for fused optimisers."""
    outcome = train(tmp_path / "run", "trainer.gradient_clip_val=1.0", "trainer.precision=bf16-mixed")
    assert outcome.code == 0, outcome.err


on_gpu = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_gpu)])
def test_an_epoch_is_seeded_as_by_torch(device):
    trainer = SimpleNamespace(global_rank=1, current_epoch=3)
    drawn = []
    for kind in (device, "meta"):  # any other kind is left to torch.manual_seed
        torch.rand(1), torch.rand(1, device=device)
        EpochSeed(7).on_train_epoch_start(trainer, SimpleNamespace(device=torch.device(kind)))
        drawn += [torch.stack([torch.rand(4), torch.rand(4, device=device).cpu()])]
    assert torch.equal(*drawn)


def test_a_large_loss_has_as_many_digits_as_a_small_one():
    assert [_digits(x) for x in (0.01234, 1.23456, 97.4549, 161.1641, float("nan"))] == [
        "0.0123",
        "1.2346",
        "97.455",
        "161.16",
        "nan",
    ]
