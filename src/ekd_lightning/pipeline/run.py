"""One run: prepare, gather teachers, train, test once, and leave the record."""

from __future__ import annotations

import contextlib
import gc
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, ProgressBar
from pytorch_lightning.loggers import Logger
from pytorch_lightning.loggers.logger import DummyLogger

from ekd_lightning import progress
from ekd_lightning.errors import UserError, quiet, reason, unknown_name
from ekd_lightning.evaluation.scores import ClassificationScores
from ekd_lightning.networks import TeacherEnsemble, load_student, save_student, state_sha256
from ekd_lightning.pipeline.context import EvaluationContext, refuse_other_images, refuse_other_teachers
from ekd_lightning.pipeline.evaluation import evaluate_new_run
from ekd_lightning.pipeline.prepare import Prepared, check_settings, describe_run, describe_teacher, origin, prepare
from ekd_lightning.pipeline.teachers import choose_teacher, describe_chain, keep_chain_cost, score_teachers
from ekd_lightning.runs.directory import CHECKPOINTS, CURVES, RunDirectory
from ekd_lightning.runs.lock import DirectoryLock
from ekd_lightning.runs.result import Result
from ekd_lightning.runs.writer import RunWriter, is_rank_zero
from ekd_lightning.settings import Settings
from ekd_lightning.teachers.hardware import device_type_of, keep_freed_memory, set_threads, threads_as_before
from ekd_lightning.tracking.dashboards import log_evaluation
from ekd_lightning.tracking.loggers import (
    MetricsCsv,
    TeacherCurves,
    describe_metrics,
    finish_loggers,
    flat_columns,
    make_loggers,
)
from ekd_lightning.training.checkpoints import checkpoint_callbacks, read_checkpoint
from ekd_lightning.training.distiller import Distiller
from ekd_lightning.training.pool import check_teachers, gather_teachers
from ekd_lightning.training.processes import end_processes
from ekd_lightning.training.trainer import EpochReport, EpochSeed, build_trainer, cost, final_scores

log = logging.getLogger(__name__)


def run(
    settings: Settings,
    directory: Path,
    *,
    config: dict[str, Any] | None = None,
    sweep: str | None = None,
    callbacks: Sequence[Callback] = (),
    test: bool = True,
    on_start: Callable[[], None] | None = None,
) -> Result:
    """Runs one distillation and leaves its record in `directory`, whose lock it holds.

    Every process of a distributed run calls this; only global rank 0 writes the record. Before all checks have passed,
    nothing is written, and files of an earlier run are unchanged.

    Args:
        settings: Settings of the run.
        directory: The run's directory.
        config: The resolved configuration as plain containers, for loggers; None to make it from the settings.
        sweep: Name of the sweep that this run belongs to; None for a single run.
        callbacks: Further Lightning callbacks.
        test: Whether the test set is read after training. If not, the result holds only validation scores and is
            marked `partial`, so that no report counts it; for choosing settings.
        on_start: Called once all checks have passed and the record says that the run has started.

    Returns:
        The content of result.json; on other ranks, without the evaluation.

    Raises:
        UserError: If settings do not fit, or the directory is in use or holds an earlier run, before anything is
            written; or if a loss is not finite.
    """
    record = RunWriter(directory) if is_rank_zero() else None
    loggers: list[Logger] = []
    result, started = None, False
    config = asdict(settings) if config is None else config
    keep_freed_memory()

    def start() -> None:
        nonlocal started
        if record:
            record.start(resumed=settings.resume is not None)
        started = True
        if on_start:
            on_start()

    bar = settings.trainer.get("enable_progress_bar")
    alone = bar is None and not any(isinstance(callback, ProgressBar) for callback in callbacks)
    with (
        threads_as_before(),
        DirectoryLock(directory) if record else contextlib.nullcontext(),
        progress.session(*progress.RUN_PHASES, live=alone, keep=sweep is None),
    ):
        try:
            result = _run(settings, directory, record, loggers, config, sweep, callbacks, test, start)
            if record:
                record.finish(result)
            return result
        except BaseException as error:
            if record and started:
                # Lightning turns an interruption into an exit.
                if isinstance(error, (KeyboardInterrupt, SystemExit)):
                    record.stop()
                else:
                    record.fail(reason(error))
            raise
        finally:
            finish_loggers(loggers, result=result)
            _free_memory()


def _run(
    settings: Settings,
    directory: Path,
    record: RunWriter | None,
    loggers: list[Logger],
    config: dict[str, Any],
    sweep: str | None,
    callbacks: Sequence[Callback],
    test: bool,
    start: Callable[[], None],
) -> Result:
    if record and settings.resume is not None:
        record.refuse_complete(settings.recipe.epochs)  # another process may have completed it meanwhile
    elif record:
        key = "hydra.run.dir" if sweep is None else "hydra.sweep.dir"
        record.refuse_used(overwrite=settings.overwrite, key=key)
    with progress.phase("data"):
        prepared, trainer, report, threads = check_run(settings, directory, sweep, callbacks)
        checkpoint, step = _resume_point(settings, directory)
        if settings.resume is not None:
            refuse_other_images(RunDirectory(directory), settings, prepared.dataset, prepared.datamodule.unlabelled)
        facts = describe_run(settings, prepared)
    _check_teachers(settings, directory, prepared)
    _expect(settings, prepared)
    start()
    if record:
        record.add_provenance(threads=threads)
    loggers += make_loggers(settings.logger, directory, name=run_name(facts), sweep=sweep, config=config)
    trainer.loggers = [DummyLogger()] if settings.trainer.get("fast_dev_run") else loggers
    with progress.phase("teachers"):
        if prepared.candidates:
            prepared = choose_teacher(settings, prepared, trainer.strategy.root_device)
        facts |= describe_teacher(settings, prepared)
        teachers = gather_teachers(prepared.teachers) if prepared.teachers else None
    if settings.resume is not None and teachers:
        if checkpoint is None:  # a checkpoint knows its teachers itself
            refuse_other_teachers(RunDirectory(directory), [(one.id, one.sha256) for one in teachers.identities])
        keep_chain_cost(RunDirectory(directory), teachers.identities[0])
    if record:
        record.add_provenance(**origin(prepared, teachers))
    module = make_distiller(settings, prepared, teachers)
    describe_metrics(loggers, flat_columns(facts, config))
    finished = False
    try:
        for logger in loggers:
            if isinstance(logger, MetricsCsv):
                logger.forget_from(step)
        with progress.phase("training") as report.task:
            trainer.fit(module, datamodule=prepared.datamodule, ckpt_path=checkpoint, weights_only=True)
        with progress.phase("test", _passes(settings, prepared), None):
            scores = final_scores(trainer, module, prepared.datamodule, test=test)
        facts["partial"] |= not test
        result = Result.of({**facts, **scores, **cost(report, trainer, module)})
        finished = True
    finally:
        end_processes(trainer, wait=finished)
    if test and record:
        result = _evaluate(settings, prepared, result, record, teachers, trainer.strategy.root_device)
        log_evaluation(loggers, result, record.arrays, prepared.dataset)
    return result


def _check_teachers(settings: Settings, directory: Path, prepared: Prepared) -> None:
    """Makes the checks of the teachers that need no training; a resumed run needs those that it had."""
    with progress.phase("teachers"):
        hashes = check_teachers(prepared.candidates or prepared.teachers)
    if settings.resume is not None and not prepared.candidates:
        ids = [plan.id for plan in prepared.teachers]
        refuse_other_teachers(RunDirectory(directory), zip(ids, hashes, strict=True))


def _evaluate(
    settings: Settings,
    prepared: Prepared,
    result: Result,
    record: RunWriter,
    teachers: TeacherEnsemble | None,
    device: torch.device,
) -> Result:
    """Tests the teachers, saves the student and evaluates it; returns the result with the findings."""
    with progress.phase("test", _passes(settings, prepared), None):
        result = result.having(
            teachers=[] if teachers is None else score_teachers(settings, prepared.dataset, teachers, device)
        )
        if prepared.chain and teachers:
            result = result.having(**describe_chain(settings, prepared.dataset, teachers.identities[0], device))
    metadata = {"data": prepared.dataset.name, "subset_sha256": prepared.subset.sha256, "run": record.identity or ""}
    save_student(record.student, prepared.student, metadata)
    result = result.having(student_sha256=state_sha256(prepared.student))
    if result.partial:
        return result
    student = load_student(record.student).to(device)  # from the file, as later evaluations do
    gather = None if teachers is None else lambda: teachers
    context = EvaluationContext(settings, result, student, prepared.dataset, prepared.subset, device, gather)
    return evaluate_new_run(context, record)


def _passes(settings: Settings, prepared: Prepared) -> int:
    """Returns the number of passes over the test set: one for each of the student's weights, and one per teacher."""
    averaged = settings.recipe.ema > 0
    return 1 + (prepared.datamodule.num_val_images > 0) + averaged + len(prepared.teachers)


def _expect(settings: Settings, prepared: Prepared) -> None:
    """Announces the work of the phases, in images through a network; in a training step each counts three times."""
    data, tested = prepared.datamodule, len(prepared.dataset.test)
    corrupted = 75 * min(2000, tested) if "corruptions" in settings.evaluation.parts else 0
    moved = 7 * min(5000, data.num_train_images) + 100 * min(1000, data.num_train_images)  # for sharpness and curves
    moved = moved if "flatness" in settings.evaluation.parts else 0
    trained = data.num_train_images if "generalisation" in settings.evaluation.parts else 0
    predicted = tested + data.num_val_images if settings.evaluation.parts else 0
    progress.expect(
        training=settings.recipe.epochs * (3 * data.num_train_images + data.num_val_images),
        test=_passes(settings, prepared) * tested,
        evaluation=predicted + trained + moved + corrupted,
    )


def check_run(
    settings: Settings, directory: Path, sweep: str | None, callbacks: Sequence[Callback]
) -> tuple[Prepared, pl.Trainer, EpochReport, int]:
    """Makes all checks before anything is written; returns parts, trainer, epoch report and number of threads."""
    check_settings(settings)
    accelerator = str(settings.trainer.get("accelerator", "auto"))
    devices = settings.trainer.get("devices", 1)
    threads = set_threads(
        settings.trainer.get("threads"),
        None if settings.resume is None else RunDirectory(directory).provenance().get("threads"),  # as before
        device_type=device_type_of(accelerator),
        num_devices=devices if isinstance(devices, int) else 1,
    )
    if settings.teachers.fill != "none":
        log.warning("teachers.fill=%s has no effect in a run: ekd-teach fills tables", settings.teachers.fill)
    flags = {**settings.trainer, "max_epochs": settings.trainer.get("max_epochs") or settings.recipe.epochs}
    with quiet("pytorch_lightning.utilities.rank_zero"):  # Lightning's own checks, before images are read
        build_trainer(flags, directory, [], [])
    prepared = prepare(settings, accelerator, TeacherCurves(settings.logger, directory, sweep))
    _check_monitors(settings, prepared)
    report = EpochReport(settings.recipe.batch_size)
    own: list[Callback] = [EpochSeed(settings.seed), report]
    if settings.trainer.get("enable_checkpointing") is not False and not settings.trainer.get("fast_dev_run"):
        with_best = prepared.datamodule.num_val_images > 0
        own += checkpoint_callbacks(directory.absolute() / CHECKPOINTS, with_best=with_best)
    trainer = build_trainer(flags, directory, [], [*own, *callbacks])
    prepared.datamodule.check_processes(trainer.world_size)
    _check_limits(trainer, prepared)
    return prepared, trainer, report, threads


def _check_monitors(settings: Settings, prepared: Prepared) -> None:
    """Refuses callbacks that monitor a curve that will not exist; with the user's own code, any curve may exist."""
    if settings.imports:
        return
    student = prepared.student
    scores = ClassificationScores(student.num_classes, student.num_branches).names()
    curves = ["lr", *(f"train/{name}" for name in ("loss", *prepared.method.terms, "accuracy"))]
    curves += [f"val/{name}" for name in scores if prepared.datamodule.num_val_images]
    for name, node in settings.callbacks.items():
        if node and "monitor" in node and node["monitor"] not in (None, *curves):
            raise unknown_name(f"callbacks.{name}.monitor", node["monitor"], curves)


def _check_limits(trainer: pl.Trainer, prepared: Prepared) -> None:
    """Refuses limits that leave no batch of an epoch; Lightning would do so only after teachers were trained."""
    for part in ("train", "val", "test"):
        limit = getattr(trainer, f"limit_{part}_batches")
        if part == "test" and limit == 1.0 and isinstance(limit, float):
            continue  # a search never touches the test set
        count = len(getattr(prepared.datamodule, f"{part}_dataloader")())
        left = int(count * limit) if isinstance(limit, float) else min(count, limit)
        if count and not left:
            raise UserError(f"trainer.limit_{part}_batches={limit}: must leave at least one of the {count} batches")
        interval = trainer.val_check_interval
        if part == "train" and trainer.check_val_every_n_epoch and isinstance(interval, int) and interval > left:
            raise UserError(f"trainer.val_check_interval={interval}: must be at most {left}, the batches of an epoch")


def make_distiller(settings: Settings, prepared: Prepared, teachers: TeacherEnsemble | None) -> Distiller:
    """Builds the Lightning module of a run from its checked parts."""
    return Distiller(
        prepared.student,
        prepared.method,
        settings.recipe,
        teachers=teachers,
        make_source=prepared.source.open,
        channels_last=settings.channels_last,
        fold_teachers=settings.teachers.fold,
        compile_student=settings.student.compile,
        capture=settings.capture,
    )


def run_name(facts: dict[str, Any]) -> str:
    """Returns a readable name: method, teachers, branches, percentage of the data, seed."""
    share = f"{100 * facts['fraction']:g}"
    return f"{facts['method']}-T{facts['num_teachers']}-B{facts['num_branches']}-f{share}-s{facts['seed']}"


def _resume_point(settings: Settings, directory: Path) -> tuple[Path | None, int]:
    """Returns the checkpoint to resume from, None to start anew, and its step; refuses damaged files."""
    if settings.resume is None:
        return None, 0
    last = RunDirectory(directory).last_checkpoint
    MetricsCsv(directory / CURVES)  # raises if it is damaged
    if not last.is_file():
        log.info("%s has no checkpoint yet: starting from the beginning", directory)
        return None, 0
    step = int(read_checkpoint(last, RunDirectory(directory).identity)["global_step"])
    log.info("resuming from %s at step %d", last, step)
    return last, step


def _free_memory() -> None:
    """Frees the memory of a run, for the next job of a sweep in the same process.

    Waits for the GPU first: if a process ends while its kernels run, as an interrupted one may, others that share the
    GPU through NVIDIA's multi-process service can fail (its documentation, "Client Early Termination").
    """
    gc.collect()
    if "torch._dynamo" in sys.modules:  # compiled teachers keep their weights
        torch.compiler.reset()
    if torch.cuda.is_initialized():
        with contextlib.suppress(RuntimeError):  # after a fault of the GPU, which must not hide what the run raised
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
