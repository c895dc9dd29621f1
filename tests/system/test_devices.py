"""Devices: whole runs on a GPU resume bit for bit, train as one process of DDP, and are exported for a processor."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from whole_runs import TINY, Outcome

from ekd_lightning import load
from ekd_lightning.cli import export as export_command
from ekd_lightning.data import load_dataset
from ekd_lightning.networks import load_student

GPUS = torch.cuda.device_count()
on_gpu = (pytest.mark.gpu, pytest.mark.skipif(not GPUS, reason="needs a CUDA device"))
# The same bodies run on a processor, where other tests look closer.
PLACES = [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("gpu", marks=on_gpu)]


@pytest.fixture(autouse=True)
def _determinism_ends():
    yield
    torch.use_deterministic_algorithms(False)


def words_for(place: str, *words: str) -> tuple[str, ...]:
    """Overrides of a run of four epochs there."""
    precision = "bf16-mixed" if place == "gpu" else "32-true"
    return ("recipe.epochs=4", f"trainer.accelerator={place}", f"trainer.precision={precision}", *words)


def weights(outcome: Outcome) -> dict[str, torch.Tensor]:
    assert outcome.code == 0, outcome.err
    return load_file(outcome.directory / "student.safetensors")


def checkpoint(outcome: Outcome) -> dict[str, torch.Tensor]:
    path = outcome.directory / "checkpoints" / "last.ckpt"
    return torch.load(path, weights_only=True, map_location="cpu")["state_dict"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("method", ["ekd", "camkd"])
@pytest.mark.parametrize("capture", ["never", "auto"])
def test_a_resumed_run_is_the_run_that_was_not_stopped(train, resume, tmp_path, place, method, capture):
    words = words_for(place, f"method={method}", f"capture={capture}", "trainer.deterministic=true")
    whole = train(tmp_path / "whole", *words)
    assert "cannot be recorded" not in whole.out + whole.err
    assert train(tmp_path / "halves", *words, "trainer.max_epochs=2").code == 0
    halves = resume(tmp_path / "halves", "trainer.max_epochs=4")
    for ours, theirs in ((weights(halves), weights(whole)), (checkpoint(halves), checkpoint(whole))):
        assert ours.keys() == theirs.keys()
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert halves.result["test_accuracy"] == whole.result["test_accuracy"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("devices", [1, 2])
def test_processes_of_ddp_train_the_student(train, store, tmp_path, place, devices):
    """On GPUs through NCCL; a single process must train as no process group does, step by step."""
    if place == "gpu" and devices > GPUS:
        pytest.skip(f"needs {devices} CUDA devices")
    directory = tmp_path / "ddp"
    words = words_for(place, "capture=never", "trainer.precision=32-true", "teachers.precision=float32")
    words += ("trainer.deterministic=true",)
    own = (f"trainer.devices={devices}", "trainer.strategy=ddp", f"teachers.store={store}")
    done = subprocess.run(
        [*(sys.executable, "-m", "ekd_lightning.cli.train", *TINY, *words, *own), f"hydra.run.dir={directory}"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((directory / "result.json").read_text())
    assert (result["num_devices"], result["steps"]) == (devices, 16)
    if devices == 1:
        alone = train(tmp_path / "alone", *words)
        ours, theirs = load_file(directory / "student.safetensors"), weights(alone)
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("place", PLACES)
def test_a_run_is_exported_for_a_processor(train, tmp_path, place):
    outcome = train(tmp_path / "run", *words_for(place))
    assert outcome.code == 0, outcome.err
    export_command.main([str(outcome.directory), "--format", "safetensors,onnx"])
    images = load_dataset("digits", "unused").test.images[:64].float() / 255
    student = load_student(outcome.directory / "student.safetensors").eval()
    with torch.no_grad():
        wanted = student.outputs(images).logits.softmax(-1)
    for name in ("student.safetensors", "student.onnx"):
        deployed = load(outcome.directory / "export" / name)
        torch.testing.assert_close(deployed.probabilities(images), wanted, rtol=1e-3, atol=1e-4, msg=name)
