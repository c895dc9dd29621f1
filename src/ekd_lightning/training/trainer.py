"""Trainer of a run, built from `trainer.*` flags; the callbacks of every run; the final scores."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

import pytorch_lightning as pl
import torch
from pytorch_lightning.accelerators import CUDAAccelerator, MPSAccelerator
from pytorch_lightning.callbacks import Callback, ModelCheckpoint, ProgressBar, Timer
from pytorch_lightning.loggers import Logger
from pytorch_lightning.plugins.environments import ClusterEnvironment, LightningEnvironment, SLURMEnvironment
from pytorch_lightning.plugins.io import CheckpointIO
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor

from ekd_lightning.data.datamodule import ImageDataModule
from ekd_lightning.data.order import hash_uniform_u64
from ekd_lightning.errors import UserError, one_line, unknown_name
from ekd_lightning.progress import UNSEEN, Task, advance, part
from ekd_lightning.roles import is_of, name_of_type
from ekd_lightning.runs.directory import RunDirectory
from ekd_lightning.teachers.hardware import resolve_precision
from ekd_lightning.training.checkpoints import BEST_METRIC, CheckpointWriter
from ekd_lightning.training.distiller import Distiller
from ekd_lightning.training.module import TrainingModule
from ekd_lightning.training.processes import check_processes, slurm_environment

log = logging.getLogger(__name__)

_RANDOMNESS_STREAM = 7  # a stream of its own, apart from order, views and subsets
_RESERVED = {
    "logger": "not a setting; use the logger group (logger=wandb, logger.tensorboard=true)",
    "callbacks": "not a setting; use the callbacks group",
    "default_root_dir": "not a setting; set the run's directory by hydra.run.dir",
}
_MORE_VALUES = {"precision": ("auto",)}
_GPUS = {"gpu": (CUDAAccelerator, MPSAccelerator), "cuda": (CUDAAccelerator,), "mps": (MPSAccelerator,)}


@cache
def trainer_flags() -> dict[str, Any]:
    """Returns all flags of `trainer.*` with their types."""
    types = get_type_hints(pl.Trainer.__init__) | {"threads": int | None}  # see `hardware.set_threads`
    return {name: hint for name, hint in types.items() if name not in (*_RESERVED, "return")}


def check_trainer(flags: dict[str, Any]) -> None:
    """Refuses unknown flags, values of another type, and flags that other settings replace by a `UserError`."""
    if str(flags.get("precision")) in ("16-true", "bf16-true", "transformer-engine", "transformer-engine-float16"):
        raise UserError(
            f"trainer.precision={flags['precision']}: would cast the teachers, which must stay float32; use bf16-mixed"
        )
    for name, value in flags.items():
        if name in _RESERVED:
            raise UserError(f"trainer.{name}: {_RESERVED[name]}")
        if name not in (known := trainer_flags()):
            raise unknown_name("Lightning trainer flag", f"trainer.{name}", (f"trainer.{other}" for other in known))
        if value not in _MORE_VALUES.get(name, ()) and not is_of(value, known[name]):
            raise UserError(f"trainer.{name}={value}: must be {name_of_type(known[name])}")
    if flags.get("barebones"):
        raise UserError("trainer.barebones=true: a run needs its curves and checkpoints; ekd-bench measures speed")
    if flags.get("val_check_interval") == 0:
        raise UserError("trainer.val_check_interval=0: must be positive, or null to validate after every epoch")
    if (limit := flags.get("max_time")) is not None:
        try:
            seconds = Timer(limit).time_remaining()
        except (MisconfigurationException, ValueError, TypeError) as error:
            raise UserError(f"trainer.max_time={limit}: {one_line(error)}") from None
        if not seconds or seconds <= 0:
            raise UserError(f"trainer.max_time={limit}: must be positive, or null for no limit")


def build_trainer(
    flags: dict[str, Any], directory: Path, loggers: list[Logger], callbacks: list[Callback]
) -> pl.Trainer:
    """Builds the Trainer of a run in its directory, from checked `trainer.*` flags.

    `precision: auto` is resolved here. `enable_progress_bar: null` enables the bar of a callback, if there is one: a
    run has its own display.

    Raises:
        UserError: If Lightning refuses the value of a flag, or if torchrun or SLURM started another number of processes
            than the flags ask for.
    """
    chosen = {name: value for name, value in flags.items() if name != "threads"}
    chosen["precision"] = resolve_precision(flags.get("precision"), str(flags.get("accelerator", "auto")))
    if chosen.get("enable_progress_bar") is None:
        chosen["enable_progress_bar"] = any(isinstance(callback, ProgressBar) for callback in callbacks)
    chosen["plugins"] = _plugins(chosen.get("plugins"), directory)
    wanted = _GPUS.get(str(flags.get("accelerator")), ())
    if wanted and not any(one.is_available() for one in wanted):
        raise UserError(
            f"trainer.accelerator={flags['accelerator']}: PyTorch finds no such GPU here; trainer=cpu runs without one"
        )
    try:
        trainer = pl.Trainer(**chosen, default_root_dir=directory, logger=loggers, callbacks=callbacks)
    except ModuleNotFoundError as error:
        raise UserError(f"trainer.accelerator={flags.get('accelerator')}: {one_line(error)}") from None
    except (MisconfigurationException, ValueError, TypeError) as error:
        raise UserError(f"trainer: {' '.join(str(error).split())}") from None
    if not isinstance(trainer._accelerator_connector.cluster_environment, LightningEnvironment):
        check_processes(trainer)
    return trainer


def _plugins(chosen: Any, directory: Path) -> list[Any]:
    """Returns the user's plugins, and ours of the kinds that are not among them."""
    plugins = list(chosen) if isinstance(chosen, (list, tuple)) else [] if chosen is None else [chosen]
    if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
        plugins.append(CheckpointWriter(lambda: RunDirectory(directory).identity))
    if SLURMEnvironment.detect() and not any(isinstance(plugin, ClusterEnvironment) for plugin in plugins):
        plugins += filter(None, [slurm_environment()])
    return plugins


class EpochSeed(Callback):
    """Seeds the global generators in every epoch from (seed, epoch, rank).

    Checkpoints hold no generator state; with this callback, a resumed epoch draws the same dropout masks etc. as the
    uninterrupted one. Order and views do not depend on generators.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Seeds torch on the CPU and on the device of the training."""
        place = torch.tensor([trainer.global_rank]).numpy()
        seed = int(hash_uniform_u64(_RANDOMNESS_STREAM, self.seed, trainer.current_epoch, place)[0]) % 2**63
        if pl_module.device.type in ("cpu", "cuda"):  # torch.manual_seed takes milliseconds for devices that are absent
            torch.default_generator.manual_seed(seed)
            if pl_module.device.type == "cuda":
                torch.cuda.manual_seed(seed)
        else:
            torch.manual_seed(seed)


class EpochReport(Callback):
    """Measures the time of training epochs of B images per step, and logs a line per epoch, which begins with a name.

    Checkpoints hold the time, so that a resumed run reports the sum.

    Attributes:
        task: Progress of the training, for the display.
        train_seconds: Seconds of all epochs so far, without validation.
        images_seen: Images of all epochs so far.
        extra_epochs: Epochs without training, in which `StochasticWeightAveraging` gathers batch-norm statistics;
            nothing else counts them.
    """

    def __init__(self, images_per_step: int, name: str = "") -> None:
        self.task = Task("training")
        self._name = name
        self._images_per_step = images_per_step
        self._epoch_images = 0
        self.train_seconds = 0.0
        self.images_seen = 0
        self.extra_epochs = 0
        self._since = 0.0
        self._epoch_seconds = 0.0
        self._validated = False

    def state_dict(self) -> dict[str, Any]:
        """Returns time and images so far."""
        return {"train_seconds": self.train_seconds, "images_seen": self.images_seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues counting from a checkpoint."""
        self.train_seconds = state_dict["train_seconds"]
        self.images_seen = state_dict["images_seen"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lets the display read the number of finished batches, so that no step has to report it."""
        batches = trainer.num_training_batches * (trainer.max_epochs or 0)
        self.task.total = batches if 0 < batches < float("inf") else None
        self.task.unit = None
        self.task.count = lambda: trainer.fit_loop.total_batch_idx + 1
        self.task.begun = self.task.share or 0.0  # of a resumed training

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock."""
        self.task.note = self._epoch(trainer)
        self._epoch_seconds = 0.0
        self._validated = False
        self._since = time.perf_counter()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stops the clock during a validation, which is part of the training epoch."""
        self._stop(pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restarts the clock after a validation."""
        self._validated = True
        self._since = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Adds the epoch and logs its line."""
        if trainer.fit_loop._skip_backward:
            self.extra_epochs += 1
            return
        self._stop(pl_module)
        self._epoch_images = self._images_per_step * trainer.fit_loop.epoch_loop.batch_progress.current.completed
        self.train_seconds += self._epoch_seconds
        self.images_seen += self._epoch_images
        means = pl_module.epoch_means() if isinstance(pl_module, TrainingModule) else {}
        if trainer.is_global_zero and not trainer.sanity_checking:
            self.task.scores = self._line(trainer, means)
            line = f"{self._epoch(trainer)}  {self.task.scores}"
            log.info("%s", f"{self._name}: {line}" if self._name else line, extra=UNSEEN)

    def _stop(self, module: pl.LightningModule) -> None:
        if module.device.type == "cuda":
            torch.cuda.synchronize(module.device)
        self._epoch_seconds += time.perf_counter() - self._since

    @staticmethod
    def _epoch(trainer: pl.Trainer) -> str:
        return f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"

    def _line(self, trainer: pl.Trainer, means: Mapping[str, Tensor]) -> str:
        parts = [f"{name} {_digits(float(means[name]))}" for name in ("loss", "accuracy") if name in means]
        if self._validated and BEST_METRIC in trainer.callback_metrics:  # which keep those of an earlier epoch
            parts.append(f"{BEST_METRIC} {float(trainer.callback_metrics[BEST_METRIC]):.4f}")
        parts.append(f"{self._epoch_images / max(self._epoch_seconds, 1e-9):,.0f} images/s")
        return "  ".join(parts)


def _digits(value: float) -> str:
    """Four decimals, or five digits of a large loss: a live display has no room for more."""
    return f"{value:.5g}" if value >= 10 else f"{value:.4f}"


def final_scores(trainer: pl.Trainer, module: Distiller, data: ImageDataModule, *, test: bool = True) -> dict[str, Any]:
    """Reads the test set, for the first time, and returns scores of best weights, moving average and last weights.

    They are logged as `test_best/<score>`, `test_ema/<score>` (with `recipe.ema`) and `test/<score>`. Without `test`,
    returns only the validation scores of the last weights.
    """
    metrics: dict[str, Any] = dict(trainer.callback_metrics)
    if data.num_val_images and not module.is_validated:
        metrics = dict(trainer.validate(module, datamodule=data, verbose=False)[0])
    scores = named_scores("val", metrics)
    if not test:
        return scores
    best = next((c for c in trainer.checkpoint_callbacks if getattr(c, "monitor", None) == BEST_METRIC), None)
    if isinstance(best, ModelCheckpoint) and best.best_model_path and best.best_model_score is not None:
        last_weights = {name: value.clone() for name, value in module.state_dict().items()}
        state = trainer.strategy.checkpoint_io.load_checkpoint(best.best_model_path)
        module.load_state_dict(state["state_dict"])
        scores |= named_scores("test", _test(trainer, module, data, "test_best"), "_best")
        scores["val_accuracy_best"] = float(best.best_model_score)
        scores["best_epoch"] = int(state["epoch"]) + 1
        module.load_state_dict(last_weights)
    if module.ema is not None:
        student = {name: value.clone() for name, value in module.student.state_dict().items()}
        module.student.load_state_dict(module.ema.module.state_dict())
        scores |= named_scores("test", _test(trainer, module, data, "test_ema"), "_ema")
        module.student.load_state_dict(student)
    last = named_scores("test", _test(trainer, module, data))
    return scores | last | {"test_accuracy_last": last["test_accuracy"]}


def _test(trainer: pl.Trainer, module: Distiller, data: ImageDataModule, section: str = "test") -> dict[str, float]:
    """Returns test scores as `test/<score>`, logged under `section`."""
    module.test_section = section
    with part({"test": "last weights", "test_best": "best weights", "test_ema": "averaged weights"}[section]) as task:
        images, batch = len(data.dataset.test), data.eval_batch_size * trainer.world_size
        task.total, task.count = images, lambda: min(images, batch * trainer.test_loop.batch_progress.current.completed)
        found = trainer.test(module, datamodule=data, verbose=False, weights_only=True)[0]
    advance()
    return {name.replace(f"{section}/", "test/", 1): value for name, value in found.items()}


def named_scores(prefix: str, metrics: Mapping[str, Any], suffix: str = "") -> dict[str, Any]:
    """Renames Lightning's `test/nll`, ... (or `val/`) to flat fields `test_nll<suffix>`.

    `test/branch_accuracy_0`, ... become the list `test_branch_accuracy<suffix>`, in branch order.
    """
    start = f"{prefix}/"
    found = {name.removeprefix(start): float(value) for name, value in metrics.items() if name.startswith(start)}
    branches = {int(name.rpartition("_")[2]): name for name in found if name.startswith("branch_accuracy_")}
    by_branch = [found.pop(branches[k]) for k in sorted(branches)]
    fields: dict[str, Any] = {f"{prefix}_{name}{suffix}": value for name, value in found.items()}
    return fields | ({f"{prefix}_branch_accuracy{suffix}": by_branch} if by_branch else {})


def cost(report: EpochReport, trainer: pl.Trainer, module: Distiller) -> dict[str, Any]:
    """Returns the cost of the training in this process, as fields of the result."""
    seconds = report.train_seconds
    source = module.teacher_source
    unfinished = not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch  # its epoch is in `current_epoch`, too
    return {
        "train_seconds": seconds,
        "images_per_second": report.images_seen / seconds if seconds > 0 else None,
        "teacher_table_hit_rate": source.hit_rate if source is not None else None,
        "epochs_done": max(0, trainer.current_epoch - report.extra_epochs - unfinished),
        "steps": trainer.global_step - report.extra_epochs,
        "num_devices": trainer.world_size,
        "precision": str(trainer.precision),
    }
