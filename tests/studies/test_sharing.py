"""NVIDIA's multi-process service runs for the jobs of `hydra/launcher=shared_gpu` alone, and never outlives them."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module

from ekd_lightning.config.config import register_schema
from ekd_lightning.studies import sharing

VARIABLES = ("CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY")
CONTROL = """#!{python}
import os, sys
with open({calls!r}, "a") as file:
    words = sys.argv[1:] or [sys.stdin.read().strip()]
    folders = [os.path.isdir(os.environ[name]) for name in {names!r}]
    print(*words, *folders, file=file)
sys.exit("no device supports MPS" if {fails} else 0)
"""


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """`calls(fails=...)` installs a control program and returns the file of its calls."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sharing, "_DEFAULT_PIPE", tmp_path / "none")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))

    def install(*, fails: bool = False) -> Path:
        file, program = tmp_path / "calls.txt", tmp_path / "bin" / "nvidia-cuda-mps-control"
        file.touch()
        program.parent.mkdir()
        text = CONTROL.format(python=sys.executable, calls=str(file), names=VARIABLES, fails=fails)
        program.write_text(text)
        program.chmod(0o755)
        return file

    return install


def own() -> list[str]:
    return [name for name in VARIABLES if name in os.environ]


def test_jobs_find_the_service_until_they_are_done(calls):
    file = calls()
    with contextlib.suppress(KeyError), sharing.mps_service() as problem:
        assert problem is None
        assert own() == list(VARIABLES)
        folders = [Path(os.environ[name]) for name in VARIABLES]
        raise KeyError
    assert file.read_text().splitlines() == ["-d True True", "quit -t 5 True True"]
    assert own() == []
    assert not any(folder.exists() for folder in folders)


def test_a_service_that_does_not_start_is_said(calls):
    file = calls(fails=True)
    with sharing.mps_service() as problem:
        assert problem == "nvidia-cuda-mps-control failed (no device supports MPS)"
    assert file.read_text().splitlines() == ["-d True True"]
    assert own() == []


def test_a_machine_without_it_is_said(calls):
    with sharing.mps_service() as problem:
        assert problem == "nvidia-cuda-mps-control is not installed"


@pytest.mark.parametrize("where", ["environment", "machine"])
def test_a_service_that_is_there_is_used(calls, monkeypatch, tmp_path, where):
    file = calls()
    if where == "machine":
        monkeypatch.setattr(sharing, "_DEFAULT_PIPE", tmp_path)
    else:
        monkeypatch.setenv(VARIABLES[0], "/somewhere")
    before = dict(os.environ)
    with sharing.mps_service() as problem:
        assert problem is None
        assert dict(os.environ) == before
    assert file.read_text() == ""


@pytest.mark.parametrize("launcher", ["basic", "shared_gpu"])
def test_only_its_own_launcher_starts_it(calls, caplog, launcher):
    if launcher == "shared_gpu":
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    file = calls(fails=True)
    register_schema()
    with initialize_config_module("ekd_lightning.conf", version_base="1.3"):
        config = compose("train", overrides=[f"hydra/launcher={launcher}"], return_hydra_config=True)
    with sharing.shared_gpus(config):
        assert own() == []
    assert (file.read_text() != "") == (launcher == "shared_gpu")
    said = [record.getMessage() for record in caplog.records]
    why = "hydra/launcher=shared_gpu: nvidia-cuda-mps-control failed (no device supports MPS)"
    assert said == ([f"{why}, so the jobs take turns on the GPU"] if launcher == "shared_gpu" else [])
