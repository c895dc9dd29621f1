"""Multirun from plan to summary, and its continuation with `resume=<its folder>`."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from hydra.experimental.callback import Callback
from hydra.types import TaskFunction
from omegaconf import DictConfig, OmegaConf

from ekd_lightning.config import internals
from ekd_lightning.config.commands import typed
from ekd_lightning.config.config import warn_of_idle_terms, warn_without_effect
from ekd_lightning.config.directory import claim_output
from ekd_lightning.config.edge import ConsoleLines, ending_callback
from ekd_lightning.config.overrides import (
    OF_ONE_START,
    SWEEP_FILE,
    anchored,
    anchored_search,
    computing,
    is_hydras,
    is_under,
    key_of,
    names_place,
    split_config_dir,
)
from ekd_lightning.errors import UserError
from ekd_lightning.keys import may_change_between_parts
from ekd_lightning.progress import phase, session
from ekd_lightning.runs.collection import RunEntry
from ekd_lightning.runs.directory import RunDirectory, RunState
from ekd_lightning.runs.lock import DirectoryLock, LockedError
from ekd_lightning.runs.words import check_words, require_named_code
from ekd_lightning.runs.writer import now
from ekd_lightning.studies.checking import JobChecks, refuse_mistakes, refuse_used, without_mistakes
from ekd_lightning.studies.kept_settings import may_be_added, refuse_changed, settings_are_kept, with_extra
from ekd_lightning.studies.launching import (
    is_queued,
    launch,
    refuse_absent_cluster,
    stop_local_queue,
    stopped,
    update_progress,
    wait_for_local_queue,
    watched,
    working_in,
)
from ekd_lightning.studies.sharing import shared_gpus
from ekd_lightning.studies.sweep import (
    Job,
    Sweep,
    found_sweep,
    job_states,
    read_sweep,
    show_summary,
    varied_keys,
    write_sweep,
)

_LAUNCHER = ("hydra/launcher", "hydra.launcher")
_open: list[tuple[Path, contextlib.ExitStack, bool]] = []
"""The sweep that runs in this process: its folder, the contexts to leave at its end, and whether its jobs are in a
cluster's queue. Empty without a sweep. Hydra's callback for the end is not called if a job failed."""


class SweepSummary(Callback):
    """Records the plan of a multirun and follows its jobs until `finish_sweep`."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Plans the jobs, before the first one starts."""
        with ending_callback("ekd-train"):
            claim_output(config, "sweep", lambda folder: self._take(config, folder))

    def _take(self, config: DictConfig, folder: Path) -> None:
        stack = contextlib.ExitStack()
        try:
            stack.enter_context(DirectoryLock(folder))
        except LockedError as error:
            raise LockedError(
                f"another sweep is running in this folder: {error}; give this one its own with hydra.sweep.dir=..."
            ) from None
        try:
            with session("plan", keep=False), phase("plan"):
                sweep = planned_sweep(config, folder)
                if sweep is not None:
                    refuse_used(sweep, config)
                    _check(config, sweep)
        except BaseException:
            stack.close()
            raise
        _open.append((folder, stack, is_queued(config)))
        if sweep is not None:
            write_sweep(sweep)
            stack.enter_context(watched(sweep))
            stack.enter_context(internals.composed_before())
        stack.enter_context(shared_gpus(config))

    def on_job_end(self, config: DictConfig, job_return: Any, **kwargs: Any) -> None:
        """Reports the job at once if it ran in the sweep's own process."""
        update_progress()


def _check(config: DictConfig, sweep: Sweep) -> None:
    """Checks all jobs of a new sweep before the first one starts, and warns of common settings without effect."""
    checks = JobChecks(config)
    refuse_mistakes(checks.mistakes(sweep.jobs), sweep.jobs, sweep)
    refuse_absent_cluster(config)
    warn_without_effect([key_of(word) for word in sweep.common], checks.settings)
    warn_of_idle_terms((job.overrides for job in sweep.jobs), lambda words: internals.job_config(config, words, 0))


def planned_sweep(config: DictConfig, folder: Path) -> Sweep | None:
    """Builds the sweep that Hydra's sweeper is about to start, with everything that its continuation needs.

    Returns:
        The sweep; None for another sweeper, which chooses its jobs while it runs.
    """
    found = internals.sweep_jobs(config)
    if found is None:
        return None
    hydra = config.hydra
    folders = [source.path for source in hydra.runtime.config_sources if source.provider == "command-line"]
    every = [own for _, own in found]
    words = cast("list[str]", OmegaConf.to_container(hydra.overrides.hydra, resolve=False))
    return Sweep(
        folder,
        tuple(Job(folder / name, tuple(words)) for name, words in found),
        tuple(anchored_search(str(word)) for word in words),
        tuple(word for word in every[0] if all(word in own for own in every)),
        str(hydra.job.config_name or "train"),
        str(folders[0]) if folders else None,
        now(),
        str(Path.cwd()),
    )


def finish_sweep() -> None:
    """Ends the sweep of this process, if there is one, and prints its summary."""
    while _open:
        folder, stack, _ = _open.pop()
        stack.close()
        show_summary(found_sweep(folder))


def discard_plan() -> None:
    """Removes the plan of a sweep that was refused before any of its jobs started."""
    for folder, *_ in _open:
        if all(state.run.state is RunState.PLANNED for state in job_states(found_sweep(folder))):
            for name in (SWEEP_FILE, "multirun.yaml"):
                (folder / name).unlink(missing_ok=True)


def interrupted_sweep() -> str | None:
    """Ends the jobs that an interrupted sweep left running.

    Returns:
        The sweep's state in one line, from `stopped`; None if no sweep ran in this process.
    """
    if not _open:
        return None
    folder, stack, queued = _open.pop()
    sweep = found_sweep(folder)
    try:
        stop_local_queue(folder)
    finally:  # of a second interrupt, too
        stack.close()
    return stopped(sweep, queued=queued)


def lost_job(error: BaseException) -> str | None:
    """The launcher's error for a job whose process was killed, in one line; None for other errors.

    Waits for the other jobs of submitit's local executor to finish.
    """
    if not type(error).__module__.startswith(("joblib", "submitit")):
        return None
    for folder, *_ in _open:
        wait_for_local_queue(folder)
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"a job was killed: {' '.join(first.split())}"


def resume_sweep(folder: Path, argv: Sequence[str], task: TaskFunction) -> bool:
    """Runs the remaining jobs of a sweep and prints its summary.

    Finished runs and runs of other processes are skipped. Stopped and failed runs continue from their last checkpoint,
    or start again without one.

    Args:
        folder: Folder of the sweep, with sweep.json.
        argv: Program name and command line; besides `resume` it may hold overrides of Hydra, e.g. another launcher,
            and of settings that do not change the results.
        task: Runs one job.

    Returns:
        Whether all runs are done.

    Raises:
        UserError: For an override that would change the results.
        LockedError: If the sweep is still running.
        KeyboardInterrupt: If the user interrupts, after all jobs have ended; its text is the sweep's state.
    """
    sweep = read_sweep(folder)
    assert sweep is not None
    config_dir, words = split_config_dir(argv)
    if sweep.config_dir is not None and config_dir is None:
        raise UserError(
            f"resume={folder}: the sweep was started with --config-dir {sweep.config_dir}; as such a folder can name "
            "code to run, it is not taken from the record: if you trust it, give --config-dir again"
        )
    hydra_words, extra = split_words(sweep, words)
    with DirectoryLock(folder), internals.initialized(config_dir):
        states = job_states(sweep)
        running = sum(state.run.state is RunState.RUNNING for state in states)
        left = [state for state in states if not state.run.is_over and state.run.state is not RunState.RUNNING]
        jobs = [_job(*state, extra) for state in left]
        logging.basicConfig(level=logging.INFO, handlers=[ConsoleLines(sys.stdout)])
        done, again = len(states) - len(jobs) - running, sum(job.resumed for job in jobs)
        print(f"{typed(folder)}: {done} of {len(states)} runs are done; ", end="")
        print(f"{running} running in other processes; " if running else "", end="")
        print(f"{len(jobs)} to be run, {again} of them from their last checkpoint", flush=True)
        compared = jobs or not all(may_be_added(word) or names_place(word) for word in extra)
        with working_in(sweep.working_directory) if compared else contextlib.nullcontext():
            if compared:
                refuse_changed(sweep, states, hydra_words, extra)
            if jobs := without_mistakes(jobs, left, sweep, hydra_words):
                launch(jobs, sweep, hydra_words, task)
        show_summary(sweep)
    return all(state.run.is_over for state in job_states(sweep))


def split_words(sweep: Sweep, words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits the words of a command that resumes a sweep.

    Returns:
        The overrides of Hydra to launch with, those of the sweep included, and the further overrides of the runs.

    Raises:
        UserError: For an option, an override of what varies, or a recorded override that names code.
    """
    given = [word for word in words if not word.startswith("resume=") and word not in ("-m", "--multirun")]
    hydra = [anchored_search(word) for word in given if is_hydras(word)]
    extra = [anchored(word) for word in given if not is_hydras(word)]
    moved = {key_of(word) for word in sweep.common if names_place(word)}
    varied = varied_keys(sweep.jobs)
    for word in extra:
        fits = key_of(word) in moved if names_place(word) else not is_under(key_of(word), varied)
        if "=" not in word or not (fits or may_be_added(word)):
            raise settings_are_kept(word)
    dropped = (*OF_ONE_START, *_LAUNCHER) if any(key_of(word) == "hydra/launcher" for word in hydra) else OF_ONE_START
    again = {key_of(word) for word in hydra}
    kept = [word for word in sweep.hydra if not is_under(key_of(word), dropped) and key_of(word) not in again]
    path = sweep.folder / SWEEP_FILE
    require_named_code((word for job in sweep.jobs for word in (*sweep.common, *job.overrides)), words, path)
    kept = check_words(kept, path, launching=True)
    return [*kept, *(word for word in hydra if not is_under(key_of(word), OF_ONE_START))], extra


def _job(job: Job, run: RunEntry, extra: Sequence[str]) -> Job:
    """The job to launch; it resumes the run in its directory only if that run has the job's settings."""
    directory = RunDirectory(job.directory)
    recorded = [] if run.state is RunState.PLANNED else directory.overrides()
    may_be = [_computing(words) for words in (job.overrides, with_extra(job.overrides, extra))]
    same = bool(recorded) and _computing(recorded) in may_be
    resumed = same and directory.last_checkpoint.is_file()
    return Job(job.directory, with_extra(recorded if resumed else job.overrides, extra), resumed)


def _computing(words: Sequence[str]) -> list[str]:
    """The overrides that may not change while a run is stopped."""
    return computing([word for word in words if not is_hydras(word)], may_change_between_parts)
