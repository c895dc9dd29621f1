"""Processes that SLURM or torchrun started, as their environment tells."""

from __future__ import annotations

import pytest
from pytorch_lightning.plugins.environments import LightningEnvironment, SLURMEnvironment

from ekd_lightning.errors import UserError
from ekd_lightning.training.trainer import build_trainer


@pytest.fixture
def started(monkeypatch):
    """`started(NAME=value)` gives this process the environment of a task."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID", "SLURM_NTASKS", "SLURM_NTASKS_PER_NODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    return lambda **values: [monkeypatch.setenv(name, value) for name, value in values.items()]


def task(count: str, name: str = "train") -> dict[str, str]:
    """The environment of a task of SLURM."""
    return {
        "SLURM_NTASKS": count,
        "SLURM_NTASKS_PER_NODE": count,
        "SLURM_JOB_NAME": name,
        **dict.fromkeys(("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"), "0"),
    }


def build(folder, **flags):
    cpu = {"accelerator": "cpu", "enable_model_summary": False, "max_epochs": 1}
    return build_trainer({**cpu, **flags}, folder, [], [])


TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("environment", "flags", "command"),
    [
        (task("2"), {"devices": 4, "strategy": "ddp"}, "SLURM has started 2; .* srun --nodes=1 --ntasks-per-node=4"),
        (task("4"), {"devices": 1}, "SLURM has started 4; .* srun --nodes=1 --ntasks-per-node=1"),
        (TORCHRUN, {"devices": 1}, "torchrun has started 2; .* torchrun --nnodes=1 --nproc-per-node=1"),
    ],
)
def test_another_number_of_processes_is_refused(tmp_path, started, environment, flags, command):
    started(**environment)
    with pytest.raises(UserError, match=rf"trainer\.devices={flags['devices']}: .* {command}"):
        build(tmp_path, **flags)


def test_a_number_of_tasks_that_lightning_does_not_support_is_refused(tmp_path, started, monkeypatch):
    started(**task("2"))
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE")
    with pytest.raises(UserError, match=r"^SLURM: .*--ntasks=2.* Use `--ntasks-per-node=2`"):
        build(tmp_path, devices=2, strategy="ddp")


def test_lightning_does_not_requeue(tmp_path, started):
    """It would save a second checkpoint, inside an epoch, and start a job that cannot have the directory."""
    started(**task("2"))
    environment = build(tmp_path, devices=2, strategy="ddp")._accelerator_connector.cluster_environment
    assert isinstance(environment, SLURMEnvironment)
    assert not environment.auto_requeue


@pytest.mark.parametrize(("count", "name"), [("1", "train"), ("1", "bash"), ("2", "bash"), ("2", "interactive")])
def test_in_a_single_task_and_in_a_shell_lightning_starts_the_processes(tmp_path, started, count, name):
    started(**task(count, name))
    trainer = build(tmp_path, devices=2, strategy="ddp")
    assert isinstance(trainer.strategy.cluster_environment, LightningEnvironment)
