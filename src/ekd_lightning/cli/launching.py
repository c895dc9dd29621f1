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

from ekd_lightning.cli.study_runs import Job
from ekd_lightning.cli.train import train_in_sweep

log = logging.getLogger(__name__)


class ListSweeper(Sweeper):
    """Hands a list of jobs to the configured launcher, all at once; each runs in a directory of its own."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.jobs = jobs
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
        batch = [[*arguments, *job.words, *_placed(job)] for job in self.jobs]
        return self.launcher.launch(batch, initial_job_idx=0)


def _placed(job: Job) -> list[str]:
    words = [f"hydra.sweep.subdir='{job.directory.name}'"]
    if job.resumed:  # what the run was first started with stays on record
        words += [f"resume='{job.directory}'", "hydra.output_subdir=null"]
    return words


def launch(jobs: Sequence[Job], folder: Path, hydra_words: Sequence[str]) -> None:
    """Runs jobs as `ekd-train -m` would; a job that fails does not stop the others.

    Hydra must be initialised with the package's configuration.

    Args:
        jobs: The runs.
        folder: Folder of the runs' directories.
        hydra_words: Overrides of Hydra, e.g. the launcher.
    """
    own = ["hydra.mode=MULTIRUN", f"hydra.sweep.dir='{folder}'", "~hydra.callbacks.sweep_summary"]
    config = compose("train", overrides=[*hydra_words, *own], return_hydra_config=True)
    context = HydraContext(config_loader=GlobalHydra.instance().config_loader(), callbacks=Callbacks(config))
    sweeper = ListSweeper(jobs)
    sweeper.setup(hydra_context=context, task_function=train_in_sweep, config=config)
    try:
        sweeper.sweep([])
    except Exception as error:  # a job that was killed outright; what is known of it stands in its directory
        log.error("the launcher ended early: %s: %s", type(error).__name__, error)
