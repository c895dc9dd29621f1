"""Checkpoints: the old one or the new one at every instant, written behind the training, and never changed unseen."""

from __future__ import annotations

import io
import multiprocessing
import os
import random
import signal
import subprocess
import tempfile
import threading
import time
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch import nn
from torch.utils.data import DataLoader

from ekd_lightning.errors import UserError
from ekd_lightning.training import checkpoints
from ekd_lightning.training.checkpoints import CheckpointWriter, checkpoint_callbacks, read_checkpoint, write_checkpoint

MEGABYTE = 1 << 18  # numbers in float32


def state(step: int, size: int = MEGABYTE) -> dict[str, Any]:
    return {"global_step": step, "state_dict": OrderedDict(w=torch.full((size,), float(step)))}


def step_of(path: Path) -> int:
    """Step of a checkpoint, all of which must be of one step."""
    found = read_checkpoint(path)
    assert bool((found["state_dict"]["w"] == found["global_step"]).all())
    return int(found["global_step"])


@pytest.fixture
def writer() -> Iterator[CheckpointWriter]:
    made = CheckpointWriter()
    yield made
    made.teardown()


# -- what is in a file ----------------------------------------------------------------------------------------


def test_a_checkpoint_is_what_torch_load_and_any_zip_tool_read(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    write_checkpoint(path, state(3))
    assert torch.load(path, weights_only=True)["global_step"] == 3
    assert torch.load(path, weights_only=True, mmap=True)["global_step"] == 3
    assert zipfile.ZipFile(path).testzip() is None
    assert step_of(path) == 3


def test_a_checkpoint_of_lightning_itself_is_accepted(tmp_path: Path) -> None:
    torch.save(state(4), tmp_path / "last.ckpt")
    assert step_of(tmp_path / "last.ckpt") == 4


class Malicious:
    def __reduce__(self) -> Any:
        return os.system, ("false",)


def test_the_best_score_moves_with_the_runs_directory(tmp_path):
    best, last = checkpoint_callbacks(tmp_path / "old", with_best=True)
    best.best_model_score = torch.tensor(0.5)
    best.best_model_path = best.kth_best_model_path = str(tmp_path / "old" / "best.ckpt")
    best.best_k_models = {best.best_model_path: best.best_model_score}
    moved, moved_last = checkpoint_callbacks(tmp_path / "new", with_best=True)
    moved.load_state_dict(best.state_dict())
    moved_last.load_state_dict(last.state_dict())
    path = str(tmp_path / "new" / "best.ckpt")
    assert (moved.best_model_path, moved.kth_best_model_path, moved.last_model_path) == (path, path, "")
    assert (moved.best_model_score, moved.best_k_models) == (0.5, {path: torch.tensor(0.5)})
    assert moved_last.best_model_path == ""


@pytest.mark.parametrize("content", [b"", b"half", "code", "list", "none"])
def test_what_is_no_checkpoint_is_one_line_with_its_name(tmp_path: Path, content: bytes | str) -> None:
    path = tmp_path / "last.ckpt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content != "none":
        torch.save({"a": Malicious()} if content == "code" else [1], path)
    for read in (read_checkpoint, CheckpointWriter().load_checkpoint):
        with pytest.raises(UserError, match=r"last\.ckpt") as caught:
            read(path)
        assert "\n" not in str(caught.value)


# -- behind the training --------------------------------------------------------------------------------------


def test_what_is_written_is_the_state_at_the_call(
    tmp_path: Path, writer: CheckpointWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_write = threading.Event()
    write = checkpoints.write_checkpoint

    def late(path: Path, checkpoint: dict[str, Any]) -> None:
        assert may_write.wait(60)
        write(path, checkpoint)

    monkeypatch.setattr(checkpoints, "write_checkpoint", late)
    layer = nn.Linear(2, 2)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    content = {"state_dict": layer.state_dict(), "loops": {"steps": [1, (2, {"n": 3})]}}
    writer.save_checkpoint(content, tmp_path / "last.ckpt")
    assert not (tmp_path / "last.ckpt").exists(), "the call waited for the disk"
    with torch.no_grad():
        layer.weight.add_(1)
    content["loops"]["steps"][1][1]["n"] = 4
    may_write.set()
    writer.teardown()
    found = read_checkpoint(tmp_path / "last.ckpt")
    assert all(torch.equal(found["state_dict"][name], value) for name, value in before.items())
    assert found["loops"] == {"steps": [1, (2, {"n": 3})]}
    assert found["state_dict"]._metadata == layer.state_dict()._metadata  # type: ignore[attr-defined]
    layer.load_state_dict(found["state_dict"])


def test_files_are_written_in_the_order_of_the_calls(tmp_path: Path, writer: CheckpointWriter) -> None:
    for step in range(20):
        writer.save_checkpoint(state(step, 10), tmp_path / "best.ckpt")
        writer.save_checkpoint(state(step, 10), tmp_path / "last.ckpt")
    assert step_of(tmp_path / "best.ckpt") >= 18  # the call waited for the one before
    assert writer.load_checkpoint(tmp_path / "last.ckpt")["global_step"] == 19  # waits, too
    writer.save_checkpoint(state(20, 10), tmp_path / "best.ckpt")
    writer.remove_checkpoint(tmp_path / "best.ckpt")
    writer.teardown()
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


class _Model(pl.LightningModule):
    """Logs what `best` looks at; its one weight is the number of steps."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return -self.weight.sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/accuracy", self.weight.sum())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def fit(directory: Path, epochs: int) -> None:
    data = DataLoader(torch.zeros(3, 1))
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        callbacks=checkpoint_callbacks(directory, with_best=True),
        plugins=[CheckpointWriter()],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    last = directory / "last.ckpt"
    trainer.fit(_Model(), data, data, ckpt_path=last if last.is_file() else None, weights_only=True)


def test_the_trainer_ends_with_its_checkpoints_written(tmp_path: Path) -> None:
    for epochs in (1, 3):
        fit(tmp_path, epochs)
        for name in ("best.ckpt", "last.ckpt"):
            found = read_checkpoint(tmp_path / name)
            assert (found["global_step"], float(found["state_dict"]["weight"])) == (3 * epochs, 3.0 * epochs)
    assert {path.name for path in tmp_path.iterdir()} == {"best.ckpt", "last.ckpt"}


def test_no_process_goes_on_before_the_files_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_write, written = threading.Event(), []
    write, teardown = checkpoints.write_checkpoint, CheckpointWriter.teardown

    def late(path: Path, checkpoint: dict[str, Any]) -> None:
        assert may_write.wait(60)
        write(path, checkpoint)

    def end(self: CheckpointWriter) -> None:
        may_write.set()
        teardown(self)

    def barrier(*_: object) -> None:
        written.append((tmp_path / "last.ckpt").is_file())

    monkeypatch.setattr(checkpoints, "write_checkpoint", late)
    monkeypatch.setattr(CheckpointWriter, "teardown", end)
    monkeypatch.setattr(SingleDeviceStrategy, "barrier", barrier)
    fit(tmp_path, 1)
    assert not written[0]
    assert written[-1], "processes of a distributed run meet here and read what the first one wrote"


# -- a full disk ----------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with room for two megabytes: a file system of its own, or a disk that says so."""
    folder = tmp_path / "small"
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if os.name == "posix" and subprocess.run(words, capture_output=True, check=False).returncode == 0:
        yield folder
        subprocess.run(["umount", "-l", str(folder)], check=True)
        return
    fsync = os.fsync

    def full(handle: int) -> None:
        if sum(path.stat().st_size for path in folder.rglob("*")) > 2 << 20:
            raise OSError(28, "No space left on device")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    yield folder


def test_a_full_disk_keeps_the_last_good_checkpoint_and_names_the_file(
    small_disk: Path, writer: CheckpointWriter
) -> None:
    path = small_disk / "last.ckpt"
    writer.save_checkpoint(state(1), path)
    writer.save_checkpoint(state(2, 4 * MEGABYTE), path)
    with pytest.raises(UserError, match=rf"{path}: cannot be written \(No space left"):
        writer.save_checkpoint(state(3), path)
    assert step_of(path) == 1
    assert list(small_disk.iterdir()) == [path]
    writer.save_checkpoint(state(3, 10), path)  # somebody made room
    writer.teardown()
    assert step_of(path) == 3


def test_a_training_ends_with_the_error_of_its_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit(tmp_path, 1)
    write = checkpoints.write_bytes

    def full(path: Path, content: bytes) -> None:
        if path.name == "last.ckpt" and read_checkpoint_of(content)["global_step"] == 6:
            raise UserError(f"{path}: cannot be written (No space left on device)")
        write(path, content)

    monkeypatch.setattr(checkpoints, "write_bytes", full)
    with pytest.raises(UserError, match=r"last\.ckpt: cannot be written"):
        fit(tmp_path, 2)
    assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == 3


def read_checkpoint_of(content: bytes) -> dict[str, Any]:
    return dict(torch.load(io.BytesIO(content), weights_only=True))


# -- kill -9 --------------------------------------------------------------------------------------------------


def write_until_killed(path: Path, elsewhere: str, told: Any) -> None:
    os.environ["TMPDIR"], tempfile.tempdir = elsewhere, None
    torch.set_num_threads(1)
    writer = CheckpointWriter()
    step = step_of(path) if path.exists() else 0
    while True:
        step += 1
        writer.save_checkpoint(state(step, 4 * MEGABYTE), path)
        told.send(step)


@pytest.mark.skipif(os.name != "posix", reason="kills a forked process")
def test_kill_9_while_a_checkpoint_is_written_leaves_a_whole_one(tmp_path: Path) -> None:
    """With TMPDIR on another file system, where one exists: a move from there would not be one step."""
    elsewhere = "/dev/shm" if Path("/dev/shm").is_dir() else str(tmp_path)
    path, chance, reached = tmp_path / "last.ckpt", random.Random(0), 0
    fork = multiprocessing.get_context("fork")
    for _ in range(12):
        ours, theirs = fork.Pipe(duplex=False)
        child = fork.Process(target=write_until_killed, args=(path, elsewhere, theirs), daemon=True)
        child.start()
        assert child.pid
        theirs.close()
        times = []
        for _ in range(4):
            told = ours.recv()
            times.append(time.perf_counter())
        ours.poll(chance.random() * (times[-1] - times[-3]) / 2)  # any moment of the next one
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        assert child.exitcode == -signal.SIGKILL
        # A call returns once the one before is on disk; the child may have gone on before it died.
        assert step_of(path) >= told - 1 > reached
        reached = step_of(path)
    writer = CheckpointWriter()
    writer.save_checkpoint(state(reached, 10), path)
    writer.teardown()
    assert [path] == list(tmp_path.iterdir()), "the next writer removes what the killed ones left"
