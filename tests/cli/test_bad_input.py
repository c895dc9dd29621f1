"""A user's mistake: one line, exit code 2, before anything expensive, and nothing left that looks valid."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from whole_runs import TINY, Outcome, call_train

REFUSED = [
    # what is written, and what the line must hold
    (["method=ekdd"], ["method 'ekdd'", "did you mean 'ekd'"]),
    (["student=resnet9"], ["student 'resnet9'", "did you mean"]),
    (["student.network=resnt20"], ["network 'resnt20'", "did you mean 'resnet20'"]),
    (["data=cifar11"], ["data 'cifar11'", "did you mean 'cifar10'"]),
    (["data.name=digit"], ["data set 'digit'", "did you mean 'digits'"]),
    (["teachers.pool=[cifar10_resnet20_akamster]"], ["did you mean 'cifar10_resnet20_akamaster'"]),
    (["teachers.pool=[{train: resnt8}]"], ["network 'resnt8'", "did you mean 'resnet8'"]),
    (["teachers.pool=[{trian: resnet8}]"], ["'trian'", "did you mean 'train'"]),
    (["teachers.pool=[cifar10_resnet20_akamaster]"], ["was trained on cifar10", "data.name=digits"]),
    (["teachers.pool=[]"], ["teachers.pool=[]"]),
    (["recipe.lrr=1"], ["recipe.lrr", "did you mean 'recipe.lr'"]),
    (["+recipe.lrr=1"], ["recipe.lrr", "did you mean 'recipe.lr'"]),
    (["+sed=1"], ["'sed'", "did you mean 'seed'"]),
    (["recipe.lr=abc"], ["recipe.lr=abc", "must be float, positive"]),
    (["recipe.epochs=1.5"], ["recipe.epochs", "1.5"]),
    (["tags=3"], ["tags"]),
    (["trainer.max_epoch=3"], ["trainer.max_epoch", "did you mean 'trainer.max_epochs'"]),
    (["+trainer.max_epoch=3"], ["trainer.max_epoch", "did you mean 'trainer.max_epochs'"]),
    (["+trainer.logger=true"], ["trainer.logger", "logger group"]),
    (["trainer.limit_train_batches=0"], ["trainer.limit_train_batches=0"]),
    (["trainer.precision=17"], ["17"]),
    (["teachers.count=3"], ["teachers.count=3", "only 2 teachers"]),
    (["teachers.count=0"], ["teachers.count=0", "the method 'ekd_pooled' needs teachers"]),
    (["student.branches=0"], ["student.branches=0", "at least 1"]),
    (["student.branches=-1"], ["student.branches=-1"]),
    (["student.split_after=stage9"], ["stage9", "did you mean 'stage3'"]),
    (["student.ensemble=mean_logit"], ["did you mean 'mean_logits'"]),
    (["data.fraction=0"], ["data.fraction=0.0", "(0, 1]"]),
    (["data.fraction=1.5"], ["data.fraction=1.5", "(0, 1]"]),
    (["data.fraction=0.001"], ["data.fraction=0.001", "class 0"]),
    (["data.val_fraction=1"], ["data.val_fraction=1.0"]),
    (["recipe.batch_size=500"], ["recipe.batch_size=500", "134"]),
    (["+method.terms.kd_brnch={weight: 1}"], ["'kd_brnch'", "did you mean 'kd_branch'"]),
    (["method.terms.kd_branch.weight=-1"], ["kd_branch", "weight", "-1"]),
    (["method.temperature=0"], ["method.temperature=0"]),
    (["method.assignment=one_to_on"], ["did you mean 'one_to_one'"]),
    (["seed=-1"], ["seed=-1"]),
    (["evaluation=ful"], ["evaluation 'ful'", "did you mean 'full'"]),
    (["evaluation.parts=[predictions,flatnes]"], ["evaluation.parts 'flatnes'", "did you mean 'flatness'"]),
    (["metric=test_acc"], ["metric 'test_acc'", "did you mean 'test_accuracy'"]),
    (["logger=wandb", "logger.wandb.mode=ofline"], ["logger.wandb.mode", "did you mean 'offline'"]),
    (["+callbacks.x={_target_: os.system, command: 'touch hacked'}"], ["callbacks.x._target_=os.system"]),
    (["+callbacks.x={_target_: pytorch_lightning.callbacks.Nothing}"], ["callbacks.x", "Nothing"]),
    (["foo"], ["'foo'"]),
    (["--seed=0"], ["--seed=0: not an option of this command", "here seed=0"]),
    (["--experiment", "quick"], ["--experiment: not an option of this command"]),
    (["--fraction", "0.1"], ["--fraction: not an option of this command", "here data.fraction=0.1"]),
    (["--max-epochs", "3"], ["--max-epochs: not an option of this command", "here trainer.max_epochs=3"]),
    (["--nonsense"], ["--nonsense: not an option of this command", "e.g. seed=0"]),
    (["data.root=~/d"], ["cannot read the override 'data.root=~/d'", f"data.root={Path.home()}/d"]),
    (["data.root=/home/józef/d"], ["its text must be quoted: \"data.root='/home/józef/d'\""]),
    (["data.root=my data (1)"], ["its text must be quoted: \"data.root='my data (1)'\""]),
    (["method.name=../../../x"], ["method.name=../../../x", "folders are named after it"]),
    (["method.name='a\nb'"], ["method.name=a b", "line breaks"]),
    (["recipe.lr=[1"], ["recipe.lr=[1"]),
]


def assert_refused(outcome: Outcome, *named: str) -> None:
    assert outcome.code == 2, outcome.err
    (line,) = outcome.err.splitlines()
    assert line.startswith("ekd-train: error: ")
    assert [part for part in named if part not in line] == [], line
    assert "training teacher" not in outcome.out
    assert "epoch 1/" not in outcome.out
    assert_nothing_valid(outcome.directory)


def assert_nothing_valid(directory: Path) -> None:
    status = directory / "status.json"
    assert not status.exists() or json.loads(status.read_text())["state"] == "failed"
    for pattern in ("result.json", "*.safetensors", "*.ckpt"):
        assert list(directory.rglob(pattern)) == []


@pytest.fixture
def refuse(tmp_path):
    """Runs the tiny task with an empty store, so that a teacher trained too early would show."""

    def call(*words: str) -> Outcome:
        directory = tmp_path / "run"
        own = (f"teachers.store={tmp_path / 'store'}", f"hydra.run.dir={directory}")
        outcome = call_train(*TINY, *own, *words, directory=directory)
        assert not list((tmp_path / "store").rglob("*.safetensors"))
        return outcome

    return call


@pytest.mark.parametrize(("words", "named"), REFUSED, ids=[words[-1] for words, _ in REFUSED])
def test_one_line(refuse, words, named, tmp_path):
    assert_refused(refuse(*words), *named)
    assert {path.name for path in tmp_path.iterdir()} <= {"store"}  # no directory of the run, nothing hacked


def test_missing_data(refuse, tmp_path):
    words = ("data=cifar10", "teachers=digits", "data.download=false", f"data.root={tmp_path / 'nowhere'}")
    assert_refused(refuse(*words), str(tmp_path / "nowhere"), "cifar-10-batches-bin")


def test_a_truncated_batch_file(refuse, tmp_path):
    folder = tmp_path / "data" / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    for name in [*(f"data_batch_{n}.bin" for n in range(1, 6)), "test_batch.bin"]:
        (folder / name).write_bytes(b"\0" * 3073)
    outcome = refuse("data=cifar10", "teachers=digits", "data.download=false", f"data.root={tmp_path / 'data'}")
    assert_refused(outcome, str(folder))


@pytest.mark.parametrize("parent", ["file", "locked"])
def test_an_output_directory_that_cannot_be_made(tmp_path, parent):
    if parent == "locked" and os.geteuid() == 0:
        pytest.skip("nothing is locked for root")
    (tmp_path / "file").write_text("")
    (tmp_path / "locked").mkdir(mode=0o500)
    outcome = call_train(*TINY, f"hydra.run.dir={tmp_path / parent / 'run'}", directory=tmp_path / "x")
    assert outcome.code == 2
    (line,) = outcome.err.splitlines()
    assert str(tmp_path / parent) in line


def test_a_store_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    words = (*TINY, f"teachers.store={tmp_path / 'file' / 'store'}", f"hydra.run.dir={tmp_path / 'run'}")
    assert_refused(call_train(*words, directory=tmp_path / "run"), str(tmp_path / "file"))


# -- teachers from files --------------------------------------------------------------------------------


def test_a_teacher_file_that_is_missing(refuse, tmp_path):
    outcome = refuse(f"teachers.pool=[{{file: {tmp_path / 'none.safetensors'}}}]")
    assert_refused(outcome, "teachers.pool[0].file", "no such file")


def save_teacher(path: Path, classes: int = 10, network: str = "resnet8") -> None:
    from ekd_lightning.networks import NetworkSpec, build_network, normalization, save_network

    save_network(path, build_network(NetworkSpec(network, classes, normalization("unit"))))


def test_a_teacher_of_another_class_count(refuse, tmp_path):
    save_teacher(tmp_path / "hundred.safetensors", classes=100)
    outcome = refuse(f"teachers.pool=[{{file: {tmp_path / 'hundred.safetensors'}}}]")
    said = ("does not predict the data's 10 classes", "only teach features: remove method.terms.kd_ensemble")
    assert_refused(outcome, "hundred", *said)


def test_a_teacher_of_another_data_set(refuse, tmp_path):
    assert_refused(refuse("teachers.pool=[cifar100_resnet20_chenyaofo]"), "trained on cifar100", "data.name=digits")


def test_a_foreign_checkpoint_needs_a_key_map(refuse, tmp_path):
    torch.save({"x": torch.zeros(1)}, tmp_path / "x.pt")
    outcome = refuse(f"teachers.pool=[{{file: {tmp_path / 'x.pt'}, network: resnet20}}]")
    assert_refused(outcome, "teachers.pool[0].key_map")


@pytest.mark.parametrize("network", ["resnet20", "resnet32"])
def test_a_foreign_checkpoint_of_another_network(refuse, tmp_path, network):
    torch.save({"state_dict": {"conv1.weight": torch.zeros(3, 3)}}, tmp_path / "x.pt")
    entry = f"{{file: {tmp_path / 'x.pt'}, network: {network}, key_map: akamaster_resnet}}"
    assert_refused(refuse(f"teachers.pool=[{entry}]"), str(tmp_path / "x.pt"))


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


@pytest.mark.parametrize("way", ["torch", "pickle"])
def test_a_checkpoint_that_would_run_code_does_not(refuse, tmp_path, way):
    file, target = tmp_path / "evil.pt", tmp_path / "executed"
    content = {"state_dict": {"conv1.weight": Malicious(target)}}
    if way == "torch":
        torch.save(content, file)
    else:
        file.write_bytes(pickle.dumps(content))
    outcome = refuse(f"teachers.pool=[{{file: {file}, network: resnet20, key_map: akamaster_resnet}}]")
    assert_refused(outcome, str(file))
    assert not target.exists()


def test_files_are_read_before_any_teacher_is_trained(refuse, tmp_path):
    (tmp_path / "broken.pt").write_bytes(b"broken")
    file = f"{{file: {tmp_path / 'broken.pt'}, network: resnet20, key_map: akamaster_resnet}}"
    outcome = refuse(f"teachers.pool=[{{train: resnet8}}, {file}]")
    assert_refused(outcome, str(tmp_path / "broken.pt"))


def test_a_damaged_teacher_file(refuse, tmp_path):
    save_teacher(tmp_path / "t.safetensors")
    content = (tmp_path / "t.safetensors").read_bytes()
    (tmp_path / "t.safetensors").write_bytes(content[: len(content) // 2])
    outcome = refuse(f"teachers.pool=[{{file: {tmp_path / 't.safetensors'}}}]")
    assert_refused(outcome, str(tmp_path / "t.safetensors"))


# -- what is only known while training ------------------------------------------------------------------


def test_a_loss_that_is_not_finite_fails_the_run(train, tmp_path):
    outcome = train(tmp_path / "run", "recipe.lr=1e30", "method=branched_ce")
    assert outcome.code == 2
    (line,) = outcome.err.splitlines()
    assert "epoch 1, step 2 of the epoch" in line
    assert "ce_ensemble is nan" in line
    assert "recipe.lr" in line
    assert outcome.status["state"] == "failed"
    assert outcome.status["error"] in line
    assert_nothing_valid(outcome.directory)


@pytest.mark.parametrize("at_once", [True, False])
def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(train, tmp_path, monkeypatch, at_once):
    """Where reading every step would synchronise (accelerators), the epoch's end finds it: as good."""
    from ekd_lightning.methods import Method
    from ekd_lightning.training.steps import StepLog

    forward = Method.forward

    def spoiled(self, *args, **kwargs):
        loss = forward(self, *args, **kwargs)
        return loss._replace(total=loss.total * float("inf")) if kwargs.get("epoch") == 1 else loss

    monkeypatch.setattr(Method, "forward", spoiled)
    if not at_once:
        monkeypatch.setattr(StepLog, "last_is_finite", lambda self: True)
    words = ("method=ce", "recipe.epochs=3", "trainer.limit_train_batches=2")
    outcome = train(tmp_path / "run", *words)
    assert outcome.code == 2
    assert "loss is inf in epoch 2, step 1 of the epoch" in outcome.err
    assert outcome.status["state"] == "failed"
    assert not (outcome.directory / "result.json").exists()
    for name in ("best", "last"):
        checkpoint = torch.load(outcome.directory / "checkpoints" / f"{name}.ckpt", weights_only=True)
        assert (checkpoint["epoch"], checkpoint["global_step"]) == (0, 2)
        assert all(bool(torch.isfinite(value).all()) for value in checkpoint["state_dict"].values())
