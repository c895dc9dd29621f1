"""What a run refuses under its lock, before anything is written, and how it leaves a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from made_runs import result, write_run

from ekd_lightning.errors import UserError
from ekd_lightning.pipeline.run import run
from ekd_lightning.runs.directory import RunDirectory
from ekd_lightning.settings import Settings


def test_a_run_that_another_process_has_ended_meanwhile_is_not_resumed(tmp_path):
    directory = write_run(tmp_path / "run", result(epochs_done=2))
    (directory / "arrays.npz").write_bytes(b"of the evaluation")
    before = {path: path.read_bytes() for path in directory.iterdir()}
    settings = Settings(resume=str(directory))
    settings = replace(settings, recipe=replace(settings.recipe, epochs=2))
    with pytest.raises(UserError, match="nothing to continue"):
        run(settings, directory)
    assert {path: path.read_bytes() for path in directory.iterdir()} == before
    assert RunDirectory(directory).record().result is not None


@pytest.mark.parametrize("fault", [False, True])
def test_a_run_that_ends_early_waits_for_its_gpu(tmp_path, monkeypatch, fault):
    """Kernels of a process that ends can fail other processes under NVIDIA's multi-process service."""
    calls = []

    def synchronize():
        calls.append("synchronize")
        if fault:
            raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: calls.append(name))
    monkeypatch.setattr("ekd_lightning.pipeline.run._run", _interrupted)
    with pytest.raises(KeyboardInterrupt, match="Ctrl-C"):
        run(Settings(), tmp_path / "run")
    assert calls == (["synchronize"] if fault else ["synchronize", "empty_cache", "reset_peak_memory_stats"])


def _interrupted(*_):
    raise KeyboardInterrupt("Ctrl-C")
