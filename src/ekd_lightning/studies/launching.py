"""Launches a given list of runs through Hydra's launchers: one after another, joblib, submitit."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import compose
from hydra._internal.callbacks import (
    Callbacks,
)  # what every sweeper's context is made of; there is no public name
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from ekd_lightning.cli import train
from ekd_lightning.config.edge import is_interrupt
from ekd_lightning.studies.ddp import ddp_reruns_this_job
from ekd_lightning.studies.local_queue import stop_local_queue, wait_for_local_queue
from ekd_lightning.studies.study_runs import Job
from ekd_lightning.studies.sweep import is_queued, stopped
from ekd_lightning.studies.sweep_jobs import Sweep, SweepJob
from ekd_lightning.studies.sweep_progress import watched

log = logging.getLogger(__name__)


class ListSweeper(Sweeper):
    """Hands a list of jobs to the configured launcher; each runs in a directory of its own.

    All at once, or `hydra.sweeper.max_batch_size` at a time.
    """

    def __init__(self, jobs: Sequence[Job], folder: Path) -> None:
        self.jobs = jobs
        self.folder = folder
        self.launcher: Launcher | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Makes the launcher that the configuration names."""
        self.hydra_context = hydra_context
        self.config = config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Launches the jobs and waits for them; whether one failed stands in its directory.

        Args:
            arguments: Overrides of all jobs.
        """
        assert self.launcher is not None
        assert self.config is not None
        batch = [[*arguments, *job.words, *_placed(job, self.folder)] for job in self.jobs]
        most = self.config.hydra.sweeper.get("max_batch_size") or len(batch)
        done: list[Any] = []
        for start in range(0, len(batch), most):
            done += self.launcher.launch(batch[start : start + most], initial_job_idx=start)
        return done


def _placed(job: Job, folder: Path) -> list[str]:
    words = [f"hydra.sweep.subdir='{job.directory.relative_to(folder).as_posix()}'"]
    if job.resumed:  # what the run was first started with stays on record
        words += [f"resume='{job.directory}'", "hydra.output_subdir=null"]
    return words


def run_listed_job(cfg: DictConfig) -> float | None:
    """Runs one job of the list; other ranks repeat it as `ekd-train`, whatever command made the list."""
    with ddp_reruns_this_job(program=train.__file__):
        return train.train_in_sweep(cfg)


def launch(
    jobs: Sequence[Job],
    folder: Path,
    hydra_words: Sequence[str],
    *,
    sweep: Sweep | None = None,
    command: str | None = None,
) -> None:
    """Runs jobs as `ekd-train -m` would; a job that fails does not stop the others.

    Hydra must be initialised with the package's configuration.

    Args:
        jobs: The runs.
        folder: Folder of the runs' directories.
        hydra_words: Overrides of Hydra, e.g. the launcher.
        sweep: The sweep of which these jobs are left, for its progress; None if they are all there is.
        command: What continues the work if it is interrupted, for the user.

    Raises:
        KeyboardInterrupt: If the user interrupts, once everything has ended; says how it stands.
    """
    own = ["hydra.mode=MULTIRUN", f"hydra.sweep.dir='{folder}'"]
    whole = sweep or Sweep(folder, tuple(SweepJob(job.directory, job.words) for job in jobs))
    words = [*whole.common, *hydra_words, *own]
    config = compose(whole.config_name, overrides=words, return_hydra_config=True)
    context = HydraContext(config_loader=GlobalHydra.instance().config_loader(), callbacks=Callbacks(config))
    sweeper = ListSweeper(jobs, folder)
    sweeper.setup(hydra_context=context, task_function=run_listed_job, config=config)
    try:
        with watched(whole):
            sweeper.sweep([])
    except (KeyboardInterrupt, SystemExit) as stop:
        if not is_interrupt(stop):
            raise
        stop_local_queue(folder)
        raise KeyboardInterrupt(stopped(whole, command, queued=is_queued(config))) from None
    except Exception as error:  # a job that was killed outright; what is known of it stands in its directory
        wait_for_local_queue(folder)
        first = (str(error).splitlines() or ["no message"])[0]
        log.error("the launcher ended early: %s: %s", type(error).__name__, first)
