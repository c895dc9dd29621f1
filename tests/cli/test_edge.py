"""The edge itself: what becomes one line, what keeps its traceback, what `_target_` may name."""

from __future__ import annotations

import os
import sys

import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from ekd_lightning.cli import ddp
from ekd_lightning.cli.build import build
from ekd_lightning.cli.edge import run_program
from ekd_lightning.cli.sweep import SweepSummary, tell_sweep
from ekd_lightning.errors import UserError


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    for name in ("HYDRA_FULL_ERROR", *ddp._LAUNCH_ENV, "RANK", "SLURM_PROCID", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "")  # so that it is restored whatever happens to it
        monkeypatch.delenv(name)


def fail(error: BaseException):
    def body():
        raise error

    return body


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("x=1: too\n  much"), "ekd-x: error: x=1: too much"),
        (PermissionError(13, "Permission denied", "/a"), "ekd-x: error: /a: Permission denied"),
        (FileExistsError(17, "File exists", "/a"), "ekd-x: error: /a: File exists"),
    ],
)
def test_a_mistake_is_one_line(capsys, error, line):
    with pytest.raises(SystemExit) as stop:
        run_program("ekd-x", fail(error))
    assert stop.value.code == 2
    assert capsys.readouterr().err == line + "\n"


@pytest.mark.parametrize("error", [ValueError("ours"), KeyError("ours"), KeyboardInterrupt(), SystemExit(3)])
def test_our_own_mistakes_keep_their_traceback(capsys, error):
    with pytest.raises(type(error)) as caught:
        run_program("ekd-x", fail(error))
    assert caught.value is error
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("target", ["os.system", "ekd_lightningx.run", "builtins.eval", "", "torch.load"])
def test_only_known_packages_may_be_built(target):
    with pytest.raises(UserError, match=r"callbacks\.x\._target_"):
        build({"_target_": target}, "callbacks.x")


def test_what_refuses_its_arguments_is_named():
    with pytest.raises(UserError, match=r"^callbacks\.x: .*patients") as caught:
        build(
            {"_target_": "pytorch_lightning.callbacks.EarlyStopping", "monitor": "a", "patients": 3},
            "callbacks.x",
        )
    assert "\n" not in str(caught.value)


@pytest.fixture
def sweep_job(tmp_path, monkeypatch):
    """A job of a multirun, as Hydra would tell it."""
    hydra = {
        "overrides": {
            "task": ["seed=1", "recipe.lr=0.1"],
            "hydra": ["hydra.sweep.dir=x", "+hydra.searchpath=[file://own]", "hydra.mode=MULTIRUN"],
        },
        "run": {"dir": "elsewhere"},
        "runtime": {"output_dir": str(tmp_path / "1")},
    }
    cfg = OmegaConf.create(hydra)
    OmegaConf.set_struct(cfg, True)
    monkeypatch.setattr(HydraConfig, "get", staticmethod(lambda: cfg))
    monkeypatch.setattr(sys, "argv", ["ekd-train", "-m", "-cn", "teach", "seed=1,2", "recipe.lr=0.1"])
    return cfg


def test_other_ranks_repeat_this_job_and_nothing_is_left_behind(sweep_job, tmp_path):
    before = list(sys.argv)
    with ddp.ddp_reruns_this_job():
        job = ["seed=1", "recipe.lr=0.1", "+hydra.searchpath=[file://own]", "hydra.mode=RUN"]
        assert sys.argv == ["ekd-train", "-cn", "teach", *job]
        assert sweep_job.run.dir == str(tmp_path / "1")
        os.environ.update(LOCAL_RANK="0", NODE_RANK="0", WORLD_SIZE="2", MASTER_ADDR="x", MASTER_PORT="1")
    assert sys.argv == before
    assert sweep_job.run.dir == "elsewhere"
    assert not any(name in os.environ for name in ddp._LAUNCH_ENV)


def test_also_after_a_failure(sweep_job):
    before = list(sys.argv)

    def fails() -> None:
        with ddp.ddp_reruns_this_job():
            os.environ["LOCAL_RANK"] = "0"
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    assert sys.argv == before
    assert "LOCAL_RANK" not in os.environ


@pytest.mark.parametrize("name", ["LOCAL_RANK", "RANK", "SLURM_PROCID", "TORCHELASTIC_RUN_ID"])
def test_a_rank_that_others_started_is_left_alone(sweep_job, monkeypatch, name):
    monkeypatch.setenv(name, "1")
    before = list(sys.argv)
    with ddp.ddp_reruns_this_job():
        assert sys.argv == before
    assert os.environ[name] == "1"


def test_a_sweep_tells_its_failures_once(tmp_path, capsys):
    for job, status in enumerate(
        ['{"state": "done"}', '{"state": "failed", "error": "x=1: no"}', '{"state": "running"}']
    ):
        (tmp_path / str(job)).mkdir()
        (tmp_path / str(job) / "status.json").write_text(status)
    SweepSummary().on_multirun_start(OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}}))
    tell_sweep()
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}: 1 of 3 runs done, 1 failed",
        "  failed: 1  x=1: no",
    ]
    tell_sweep()
    assert capsys.readouterr().out == ""
