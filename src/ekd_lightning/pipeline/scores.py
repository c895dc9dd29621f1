"""Scores of a run once its training is over, what it cost, and the end of its other processes."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ModelCheckpoint

from ekd_lightning.data.datamodule import ImageDataModule
from ekd_lightning.training.checkpoints import read_checkpoint
from ekd_lightning.training.distiller import Distiller
from ekd_lightning.training.trainer import EpochReport

_CHILD_SECONDS = 60  # what another rank may need to leave after the last collective operation


def final_scores(trainer: pl.Trainer, module: Distiller, data: ImageDataModule, *, test: bool = True) -> dict[str, Any]:
    """Scores on the test set, read here for the first time: with the best weights, then with the last ones.

    They are logged as `test_best/<score>` and `test/<score>`. Without `test` only the validation scores of the last
    epoch.
    """
    metrics: dict[str, Any] = dict(trainer.callback_metrics)
    if data.num_val_images and "val/accuracy" not in metrics:  # resumed after the last epoch: nothing was trained
        metrics = dict(trainer.validate(module, datamodule=data, verbose=False)[0])
    scores = named_scores("val", metrics)
    if not test:
        return scores
    best = next((c for c in trainer.checkpoint_callbacks if getattr(c, "monitor", None)), None)
    if isinstance(best, ModelCheckpoint) and best.best_model_path and best.best_model_score is not None:
        last_weights = {name: value.clone() for name, value in module.state_dict().items()}
        state = read_checkpoint(Path(best.best_model_path))
        module.load_state_dict(state["state_dict"])
        scores |= named_scores("test", _test(trainer, module, data, "test_best"), "_best")
        scores["val_accuracy_best"] = float(best.best_model_score)
        scores["best_epoch"] = int(state["epoch"]) + 1
        module.load_state_dict(last_weights)
    last = named_scores("test", _test(trainer, module, data))
    return scores | last | {"test_accuracy_last": last["test_accuracy"]}


def _test(trainer: pl.Trainer, module: Distiller, data: ImageDataModule, section: str = "test") -> dict[str, float]:
    """Test scores as `test/<score>`, logged under `section`."""
    module.test_section = section
    found = trainer.test(module, datamodule=data, verbose=False, weights_only=True)[0]
    return {name.replace(f"{section}/", "test/", 1): value for name, value in found.items()}


def named_scores(prefix: str, metrics: Mapping[str, Any], suffix: str = "") -> dict[str, Any]:
    """Renames Lightning's `test/nll`, `test/branch_accuracy_0`, ... to flat fields.

    Args:
        prefix: "test" or "val".
        metrics: What Lightning returned or logged.
        suffix: Appended to every field, e.g. "_best".

    Returns:
        `test_nll<suffix>`, ..., and `test_branch_accuracy<suffix>` as a list in branch order.
    """
    fields: dict[str, Any] = {}
    branches: dict[int, float] = {}
    start = f"{prefix}/branch_accuracy_"
    for name, value in metrics.items():
        if name.startswith(start):
            branches[int(name[len(start) :])] = float(value)
        elif name.startswith(f"{prefix}/"):
            fields[f"{prefix}_{name[len(prefix) + 1 :]}{suffix}"] = float(value)
    if branches:
        fields[f"{prefix}_branch_accuracy{suffix}"] = [branches[k] for k in sorted(branches)]
    return fields


def cost(report: EpochReport, trainer: pl.Trainer, module: Distiller) -> dict[str, Any]:
    """What the training took, as this process saw it."""
    seconds = report.train_seconds
    source = module.teacher_source
    return {
        "train_seconds": seconds,
        "images_per_second": report.images_seen / seconds if seconds > 0 else None,
        "teacher_table_hit_rate": source.hit_rate if source is not None else None,
        "epochs_done": trainer.current_epoch,
        "steps": trainer.global_step,
        "num_devices": trainer.world_size,
        "precision": str(trainer.precision),
    }


def end_processes(trainer: pl.Trainer, *, wait: bool) -> None:
    """Ends the ranks that Lightning's launcher started, and its watch over them.

    The watch kills *this* process when any of them ever ended with an error, also when it has long gone on to the
    next job of a sweep. It looks at the launcher's own list, so emptying that ends it.

    Args:
        trainer: The run's trainer.
        wait: Whether they may finish by themselves first; after a failure they are killed.
    """
    started = getattr(trainer.strategy.launcher, "procs", None)
    if not started or not all(isinstance(process, subprocess.Popen) for process in started):
        return
    processes = list(started)
    started.clear()
    for process in processes:
        if wait:
            try:
                process.wait(_CHILD_SECONDS)
                continue
            except subprocess.TimeoutExpired:
                pass
        process.kill()
        process.wait()
