"""NVIDIA's multi-process service runs for the jobs of `hydra/launcher=shared_gpu` alone, and ends with them."""

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
NONE = "Cannot find MPS control daemon process"
CONTROL = """#!{python}
import os, sys
with open({calls!r}, "a") as file:
    words = sys.argv[1:] or [sys.stdin.read().strip()]
    folders = [os.path.isdir(os.environ.get(name, "")) for name in {names!r}]
    print(*words, *folders, os.environ.get("CUDA_VISIBLE_DEVICES"), file=file)
if words == ["get_server_list"] and not {runs}:
    sys.exit({none!r})
sys.exit("no device supports MPS" if {fails} else 0)
"""


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """`calls(fails=..., runs=...)` installs a control program and returns the file of its calls."""
    for name in (*VARIABLES, "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))

    def install(*, fails: bool = False, runs: bool = False) -> Path:
        file, program = tmp_path / "calls.txt", tmp_path / "bin" / "nvidia-cuda-mps-control"
        file.touch()
        program.parent.mkdir()
        text = CONTROL.format(
            python=sys.executable, calls=str(file), names=VARIABLES, fails=fails, runs=runs, none=NONE
        )
        program.write_text(text)
        program.chmod(0o755)
        return file

    return install


def own() -> list[str]:
    return [name for name in VARIABLES if name in os.environ]


ASKED = "get_server_list False False None"


def test_jobs_find_the_service_until_they_are_done(calls):
    file = calls()
    with contextlib.suppress(KeyError), sharing.mps_service() as problem:
        assert problem is None
        assert own() == list(VARIABLES)
        folders = [Path(os.environ[name]) for name in VARIABLES]
        raise KeyError
    assert file.read_text().splitlines() == [ASKED, "-d True True None", "quit -t 5 True True None"]
    assert own() == []
    assert not any(folder.exists() for folder in folders)


@pytest.mark.parametrize(("given", "of_jobs"), [("1", "0"), ("3,1", "0,1"), ("GPU-8f3a", "GPU-8f3a")])
def test_jobs_count_the_devices_that_the_service_was_given(calls, monkeypatch, given, of_jobs):
    file = calls()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    monkeypatch.setenv(VARIABLES[1], "/mine")
    with sharing.mps_service():
        assert os.environ["CUDA_VISIBLE_DEVICES"] == of_jobs
    assert (os.environ["CUDA_VISIBLE_DEVICES"], os.environ[VARIABLES[1]]) == (given, "/mine")
    assert [line.split()[-1] for line in file.read_text().splitlines()] == [given] * 3


def test_a_service_that_does_not_start_is_reported(calls):
    file = calls(fails=True)
    with sharing.mps_service() as problem:
        assert problem == "nvidia-cuda-mps-control failed (no device supports MPS)"
        assert own() == []
    assert file.read_text().splitlines()[:2] == [ASKED, "-d True True None"]
    assert own() == []


def test_a_machine_without_it_is_reported(calls):
    with sharing.mps_service() as problem:
        assert problem == "nvidia-cuda-mps-control is not installed"


def test_a_service_that_answers_is_used(calls):
    file = calls(runs=True)
    before = dict(os.environ)
    with sharing.mps_service() as problem:
        assert problem is None
        assert dict(os.environ) == before
    assert file.read_text().splitlines() == [ASKED]


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


def test_a_later_sweep_gets_workers_of_its_own(calls, tmp_path):
    joblib = pytest.importorskip("joblib")
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    calls()
    register_schema()
    with initialize_config_module("ekd_lightning.conf", version_base="1.3"):
        config = compose("train", overrides=["hydra/launcher=shared_gpu"], return_hydra_config=True)
    seen = []
    for _ in range(2):
        with sharing.shared_gpus(config):
            found = joblib.Parallel(n_jobs=2)(joblib.delayed(os.environ.get)(VARIABLES[0]) for _ in range(2))
            assert found == [os.environ[VARIABLES[0]]] * 2
            seen.append(found[0])
    assert seen[0] != seen[1]
