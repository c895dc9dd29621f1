"""`ekd-train`: teachers as needed, then the student, then the evaluation; `-m` sweeps."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from ekd_lightning import progress
from ekd_lightning.config.commands import compare_command, print_next, report_command, search_path, typed, typed_resume
from ekd_lightning.config.config import (
    build_callbacks,
    register_schema,
    to_plain,
    to_settings,
    warn_of_idle_terms,
    warn_without_effect,
)
from ekd_lightning.config.directory import JobOutput, ddp_reruns_this_job, remove_unused
from ekd_lightning.config.edge import OFF_SCREEN, is_interrupt, one_line, quiet_libraries, run_program
from ekd_lightning.config.output import print_table
from ekd_lightning.config.overrides import (
    check_place,
    check_typed,
    check_unchanged,
    config_flags,
    expand_resume,
    key_of,
    literal,
    named_sweep,
    override,
    shell_word,
)
from ekd_lightning.errors import UserError, users_line
from ekd_lightning.progress_lines import Lines
from ekd_lightning.runs.directory import RunDirectory, RunState
from ekd_lightning.runs.lock import LockedError, lock_ahead, release_ahead
from ekd_lightning.runs.result import Result
from ekd_lightning.runs.words import code_of
from ekd_lightning.runs.writer import is_rank_zero
from ekd_lightning.studies.launching import is_watched
from ekd_lightning.studies.multirun import discard_plan, finish_sweep, interrupted_sweep, lost_job, resume_sweep

log = logging.getLogger(__name__)

PROGRAM = "ekd-train"


def main() -> None:
    """Entry point of `ekd-train`."""
    register_schema()

    def body() -> None:
        check_typed(sys.argv[1:])
        if (sweep := named_sweep(sys.argv)) is not None:
            sys.exit(0 if resume_sweep(sweep, sys.argv, run_job) else 1)
        sys.argv = expand_resume(sys.argv)
        try:
            _hydra_main()
        except (KeyboardInterrupt, SystemExit) as stop:
            if is_interrupt(stop):
                raise KeyboardInterrupt(interrupted_sweep() or "") from None
            raise
        except (UserError, HydraException, OmegaConfBaseException):
            discard_plan()
            raise
        except Exception as error:
            if (lost := lost_job(error)) is None:
                raise
            print(f"{PROGRAM}: error: {lost}", file=sys.stderr)
            sys.exit(1)
        finally:
            finish_sweep()
            remove_unused()

    run_program(PROGRAM, body)


@hydra.main(version_base="1.3", config_path="pkg://ekd_lightning.conf", config_name="train")
def _hydra_main(cfg: DictConfig) -> float | None:
    return run_job(cfg)


def run_job(cfg: DictConfig) -> float | None:
    """Runs the job that Hydra has set up, single or of a sweep, with output in its own directory."""
    output = JobOutput(cfg)
    single = HydraConfig.get().mode != RunMode.MULTIRUN
    if "SUBMITIT_EXECUTOR" in os.environ and not cfg.overwrite:  # submitit starts a job anew after a preemption
        _resume_left(cfg, output.directory)
    # The process of a sweep's job may have been started by another command, or by its launcher.
    with output.anchored(), ddp_reruns_this_job(output.directory, None if single else "ekd_lightning.cli.train"):
        if single:
            with one_line(PROGRAM):  # already here: Hydra would print a line of its own before ours
                return train_alone(cfg, output)
        return train_in_sweep(cfg, output)


def run_shared_job(cfg: DictConfig, since: str = "") -> float | None:
    """Runs one job of a study on which other processes may work; skips jobs that they are running or have finished.

    A run that another process started and left is continued from its last checkpoint. `since` is the time of the plan,
    ISO 8601: a job that failed later failed in another process and is skipped, too.
    """
    directory = JobOutput(cfg).directory
    if not is_rank_zero():
        return run_job(cfg)
    try:
        lock_ahead(directory)
    except LockedError:
        log.info("%s: another process is working on it", directory.name)
        return None
    try:
        found = RunDirectory(directory).recorded()
        failed = found.state is RunState.FAILED and found.time is not None and found.time >= since
        if failed or found.result is not None:
            return None
        _resume_left(cfg, directory)
        return run_job(cfg)
    finally:
        release_ahead()


def _resume_left(cfg: DictConfig, directory: Path) -> None:
    """Makes a job, and the ranks that it starts, continue the run that another process has left in its directory."""
    run = RunDirectory(directory)
    if not run.can_resume() or cfg.resume is not None or run.recorded().state is not RunState.STOPPED:
        return
    log.info("%s: started by another process, continued from its last checkpoint", directory.name)
    hydra_config: Any = HydraConfig.get()  # typed as a dataclass, but a DictConfig
    with read_write(cfg), read_write(hydra_config), open_dict(hydra_config):
        cfg.resume = literal(str(directory))
        hydra_config.overrides.task.append(override("resume", directory))


def train_alone(cfg: DictConfig, output: JobOutput) -> float | None:
    """Runs a single job; if it is interrupted, the command that continues it is printed."""
    try:
        return train(cfg, output)
    except (KeyboardInterrupt, SystemExit) as stop:
        if not is_interrupt(stop):
            raise
        words, flags = HydraConfig.get().overrides.task, config_flags(sys.argv)
        again = f"to continue: {typed_resume(output.directory, words, flags)}"
        raise KeyboardInterrupt(again if output.started else "") from None


def train_in_sweep(cfg: DictConfig, output: JobOutput) -> float | None:
    """Runs one job of a sweep like `train`, but logs a failure at once; Hydra would report it at the sweep's end."""
    try:
        return train(cfg, output)
    except Exception as error:
        if (line := users_line(error)) is not None:
            log.error("%s", line)
        else:
            log.exception("this run failed")
        output.record_refusal(error)
        # Hydra keeps the error until the sweep ends; its frames would keep the run's tensors on the device.
        traceback.clear_frames(error.__traceback__)
        raise


def train(cfg: DictConfig, output: JobOutput) -> float | None:
    """Runs one job.

    Reads these keys of the configuration: all fields of `Settings`. The run's directory and whether it is part
    of a sweep come from Hydra.

    Returns:
        The field of result.json that `metric` names, for sweepers.

    Raises:
        UserError: For a user's mistake, before anything is written; or for a loss that is not finite.
    """
    quiet_libraries()
    directory = output.directory
    settings, plain = to_settings(cfg), to_plain(cfg)
    if settings.resume is not None:
        check_place(settings.resume, directory)
        check_unchanged(directory, plain)
    sweep = sweep_name()
    named = [str(node.get("_target_")) for node in settings.callbacks.values() if isinstance(node, dict)]
    own_bar = any("Progress" in name for name in named)
    live = settings.trainer.get("enable_progress_bar") is None and not own_bar
    # A process that a launcher started has no reporter yet.
    shown = contextlib.nullcontext() if progress.is_reported() else progress.reported_by(Lines())
    with shown, progress.session(*progress.RUN_PHASES, live=live, keep=sweep is None):
        with progress.phase("data"), progress.importing("PyTorch and Lightning"):
            from ekd_lightning.pipeline.run import run  # noqa: PLC0415 (slow; --help and --cfg need none)

            callbacks = build_callbacks(settings)
            if sweep is None:  # a setting without effect here may have one in other jobs of the sweep
                words = HydraConfig.get().overrides.task
                warn_without_effect([key_of(word) for word in words], [settings])
                name = str(HydraConfig.get().job.config_name)
                warn_of_idle_terms([words], lambda others: compose(name, overrides=[*search_path(), *others]))
        result = run(settings, directory, config=plain, sweep=sweep, callbacks=callbacks, on_start=output.start)
    if is_rank_zero():
        log.info("%s", summary_line(result, directory), extra=OFF_SCREEN if sweep is None or is_watched() else None)
        if sweep is None:
            show_result(result, directory, code_of(settings))
    value = result.get(settings.metric)
    return None if value is None else float(value)


def sweep_name() -> str | None:
    """The last two parts of the sweep's directory, e.g. `2026-11-22/10-33-12`; None in a single run."""
    config = HydraConfig.get()
    if config.mode != RunMode.MULTIRUN:
        return None
    return "/".join(Path(config.sweep.dir).parts[-2:])


def show_result(result: Result, directory: Path, code: Sequence[str]) -> None:
    """Prints accuracies and costs of the student and its teachers, and the next commands.

    These repeat the overrides `code` that name the run's own code, which the user has trusted by starting the run.
    """
    rows: list[tuple[str, float | None, Mapping[str, Any]]] = [
        ("student: the ensemble" if result.num_branches != 1 else "student", result.test_accuracy, result)
    ]
    if (branch := result.chosen_branch) is not None and len(found := result.test_branch_accuracy or []) > branch:
        rows.append((f"student: branch {branch} alone, chosen by validation", found[branch], result.branch_alone or {}))
    rows += [(f"teacher: {teacher['id']}", teacher["test_accuracy"], teacher) for teacher in result.teachers or []]
    cells = (
        (
            name,
            "" if accuracy is None else f"{100 * accuracy:.2f}",
            f"{record['num_parameters']:,}" if record.get("num_parameters") else "",
            f"{record['macs'] / 1e6:.1f} M" if record.get("macs") else "",
            f"{record['train_seconds']:.0f}" if record.get("train_seconds") else "",
        )
        for name, accuracy, record in rows
    )
    heads = ("", "test accuracy %", "parameters", "MACs", "training s")
    print_table(f"{result.method} on {result.data}", heads, cells, left=("",))
    print(f"in {typed(directory)}")
    run = " ".join([typed(directory), *map(shell_word, code)])
    print_next(
        report_command([directory], directory / "report"),
        f"ekd-evaluate {run} --parts all",
        f"ekd-export {run}",
        *_comparison(result),
    )


def _comparison(result: Result) -> list[str]:
    """The command that compares the run's method with others in the run's setup; none if a study cannot have it."""
    if config_flags(sys.argv):
        return []
    methods = result.method if result.method.startswith("ekd") else f"{result.method},ekd"
    fractions = [] if result.fraction == 1 else ["--fractions", f"{result.fraction:g}"]
    return compare_command(
        methods, f"compare/{result.data}", [*search_path(), *HydraConfig.get().overrides.task], *fractions
    )


def summary_line(result: Result, directory: Path) -> str:
    """Accuracies and costs of a run in one line."""
    branches = ", ".join(f"{100 * value:.2f}" for value in result.test_branch_accuracy or [])
    scored = [(one["id"], one["test_accuracy"]) for one in result.teachers or []]
    teachers = ", ".join(name if share is None else f"{name} {100 * share:.2f}" for name, share in scored)
    return (
        f"{result.method}: test accuracy {100 * result.test_accuracy:.2f} %"
        f" (branches {branches}; {f'teachers {teachers}' if teachers else 'no teachers'})"
        f"  {result.num_parameters or 0:,} parameters, {(result.macs or 0) / 1e6:.1f} M MACs"
        f"  {result.train_seconds or 0:.0f} s  -> {directory}"
    )


if __name__ == "__main__":
    main()
