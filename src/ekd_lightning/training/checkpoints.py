"""Checkpoints of a training: when to save them, and how to write and read them."""

from __future__ import annotations

import copy
import io
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.plugins.io import CheckpointIO
from torch import Tensor

from ekd_lightning.errors import UserError
from ekd_lightning.files import (
    SEAL,
    UNSEALED,
    BackgroundWriter,
    read_bytes,
    remove_parts,
    require_intact,
    seal,
    write_bytes,
)
from ekd_lightning.runs.directory import BEST, LAST

log = logging.getLogger(__name__)

BEST_METRIC = "val/accuracy"
_OWNER = "ekd_owner"
_SEAL_COMMENT = f"{SEAL}:{UNSEALED}".encode()


class CheckpointWriter(CheckpointIO):
    """Writes checkpoints in the background; each file is the old or the new one, whatever stops the process.

    `save_checkpoint` copies the state to host memory and returns; a thread seals and writes the copies in the order of
    the calls. A call waits for earlier writes of the same file; `teardown`, which the Trainer calls at the end of every
    training, waits for all. The next call raises the error of an earlier write. `owner` returns the id of the run or
    training; checkpoints hold it, and those of another one are refused.

    Each Trainer needs its own: `pl.Trainer(plugins=[CheckpointWriter()], ...)`.
    """

    def __init__(self, owner: Callable[[], str | None] = lambda: None) -> None:
        self._owner = owner
        self._writer = BackgroundWriter()
        self._seen: set[Path] = set()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Copies the state (containers, tensors, numbers and strings) and queues its writing.

        If an earlier checkpoint could not be written, it raises a `UserError` that names it.
        """
        path = Path(path)
        self._writer.wait(path)
        if path not in self._seen:
            self._seen.add(path)
            remove_parts(path.parent, path.name)
        copied_from: set[torch.device] = set()
        state = _on_host({**checkpoint, _OWNER: self._owner()}, copied_from)
        for device in copied_from:
            torch.cuda.current_stream(device).synchronize()  # one wait for all copies
        self._writer.submit(path, lambda: write_checkpoint(path, state))

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Reads a checkpoint onto the CPU, whatever `map_location` says, as `read_checkpoint`.

        Raises:
            UserError: If it is missing or damaged.
        """
        self._writer.wait(Path(path))
        return read_checkpoint(Path(path), self._owner())

    def remove_checkpoint(self, path: str | Path) -> None:
        """Removes a checkpoint."""
        self._writer.wait(Path(path))
        Path(path).unlink(missing_ok=True)

    def teardown(self) -> None:
        """Waits until all checkpoints are written; raises a `UserError` that names one whose writing failed."""
        self._writer.close()


def write_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    """Writes a file for `torch.load` with its checksum in its zip comment; see `files.write_bytes`.

    Raises:
        UserError: If the disk refuses, naming the file, which is then unchanged.
    """
    stream = io.BytesIO()
    torch.save(checkpoint, stream)
    stream.seek(-2, io.SEEK_END)  # a zip file ends with the length of its comment, here 0
    stream.write(len(_SEAL_COMMENT).to_bytes(2, "little") + _SEAL_COMMENT)
    write_bytes(path, seal(stream.getvalue()))


def read_checkpoint(path: Path, owner: str | None = None) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU, without unpickling code, and checks its checksum if it has one.

    Raises:
        UserError: If it cannot be read, is damaged, or is of another owner.
    """
    try:
        content = read_bytes(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    require_intact(path, content)
    try:
        found = dict(torch.load(io.BytesIO(content), weights_only=True, map_location="cpu"))
    except Exception as error:  # torch raises many kinds for damaged files
        raise UserError(f"{path}: not a PyTorch checkpoint, or damaged ({type(error).__name__})") from None
    if owner and owner != (found.get(_OWNER) or owner):
        raise UserError(f"{path}: a checkpoint of another run or teacher")
    return found


def checkpoint_callbacks(directory: Path, *, with_best: bool) -> list[ModelCheckpoint]:
    """Returns callbacks for `last.ckpt` and, with a validation split, `best.ckpt` by validation accuracy.

    The order matters: `last` is written after `best`, so that it holds the newest best score.
    """
    common: dict[str, Any] = {"dirpath": directory, "auto_insert_metric_name": False, "enable_version_counter": False}
    callbacks: list[ModelCheckpoint] = []
    if with_best:
        callbacks.append(
            BestCheckpoint(filename=Path(BEST).stem, monitor=BEST_METRIC, mode="max", save_top_k=1, **common)
        )
    callbacks.append(EndOfEpochCheckpoint(filename=Path(LAST).stem, monitor=None, save_top_k=1, **common))
    return callbacks


class RunCheckpoint(ModelCheckpoint):
    """A checkpoint in a run's directory, which may have moved when the run is resumed."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores best score and paths; Lightning would drop the score if the directory has another name."""

        def here(path: str) -> str:
            return str(Path(self.dirpath or "") / Path(path).name) if path else ""

        paths = {name: here(path) for name, path in state_dict.items() if name.endswith("_model_path")}
        scores = {here(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict({**state_dict, **paths, "best_k_models": scores, "dirpath": self.dirpath})


class BestCheckpoint(RunCheckpoint):
    """Keeps the best weights, except those with which a callback or `max_time` stops the training inside an epoch.

    Lightning validates these, but a resumed run repeats the epoch and would not.
    """

    state_key: str = ""  # a constant, as Lightning asks for it in every step

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        # That of Lightning's class, so that checkpoints of earlier versions keep their best score.
        own = ModelCheckpoint.state_key.__get__(self)
        self.state_key = own.replace(type(self).__qualname__, ModelCheckpoint.__qualname__, 1)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves after a validation of the schedule."""
        if _is_due(trainer):
            super().on_validation_end(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves, unless the training was stopped inside the epoch."""
        if _is_due(trainer):
            super().on_train_epoch_end(trainer, pl_module)


def _is_due(trainer: pl.Trainer) -> bool:
    """Whether the schedule asks for a validation after this batch, and not only the end of a stopped training."""
    loop, interval = trainer.fit_loop.epoch_loop, trainer.val_check_batch
    batch = loop.total_batch_idx if trainer.check_val_every_n_epoch is None else loop.batch_idx
    at_interval = interval is not None and interval > 0 and (batch + 1) % interval == 0
    return not trainer.should_stop or loop.batch_progress.is_last_batch or at_interval


class EndOfEpochCheckpoint(RunCheckpoint):
    """Saves only after whole epochs, so that a resumed run repeats an unfinished epoch from its start."""

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves, unless the training was stopped inside the epoch."""
        if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            super().on_train_epoch_end(trainer, pl_module)
            # Lightning takes it for the best of one, and W&B would give its artifact the alias `best`, too.
            self.last_model_path, self.best_model_path = self.best_model_path or self.last_model_path, ""

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Does nothing, as a validation may come inside an epoch."""

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Makes all processes wait for the one that writes, as any of them may read a checkpoint next."""
        trainer.strategy.barrier("checkpoints")

    def _should_save_on_train_epoch_end(self, trainer: pl.Trainer) -> bool:
        return True


def _on_host(value: Any, copied_from: set[torch.device]) -> Any:
    """Copies a state to host memory, out of reach of later steps; containers keep their type.

    Copies from CUDA devices, which are added to `copied_from`, end only when their current streams are synchronised.
    """
    if isinstance(value, Tensor):
        found = value.detach()
        if found.device.type == "cuda":
            copied_from.add(found.device)
            return torch.empty_like(found, device="cpu", pin_memory=True).copy_(found, non_blocking=True)
        return found.clone() if found.device.type == "cpu" else found.cpu()
    if isinstance(value, Mapping):
        new = copy.copy(value)  # with the attributes that a state dict carries
        for key, item in value.items():
            new[key] = _on_host(item, copied_from)  # type: ignore[index]
        return new
    if type(value) in (list, tuple):
        return type(value)(_on_host(item, copied_from) for item in value)
    return value if isinstance(value, (str, int, float, type(None))) else copy.deepcopy(value)
