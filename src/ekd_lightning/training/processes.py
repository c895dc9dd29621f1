"""Processes of a distributed run: who started them, whether their number is right, and their end."""

from __future__ import annotations

import contextlib
import os
import subprocess

import pytorch_lightning as pl
from pytorch_lightning.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

from ekd_lightning.errors import UserError

_CHILD_SECONDS = 60  # time for other ranks to end after the last collective operation


def slurm_environment() -> ClusterEnvironment | None:
    """Returns what a Trainer has to know of a task of SLURM; None in any other process, which Lightning knows itself.

    A single task may start the other processes of its machine. Lightning's own requeueing is off: it saves a checkpoint
    inside an epoch, which no resumed run would read.

    Raises:
        UserError: For a number of tasks that Lightning does not support.
    """
    if TorchElasticEnvironment.detect() or not SLURMEnvironment.detect():  # torchrun may run inside of SLURM
        return None
    if os.environ["SLURM_NTASKS"] == "1":
        return LightningEnvironment()
    try:
        return SLURMEnvironment(auto_requeue=False)
    except RuntimeError as error:
        raise UserError(f"SLURM: {' '.join(str(error).split())}") from None


def check_processes(trainer: pl.Trainer) -> None:
    """Refuses another number of processes than the flags ask for; Lightning would train on fewer devices.

    Raises:
        UserError: If torchrun or SLURM has started fewer or more.
    """
    environment = trainer._accelerator_connector.cluster_environment
    commands = {
        SLURMEnvironment: ("SLURM", "srun --nodes={} --ntasks-per-node={}"),
        TorchElasticEnvironment: ("torchrun", "torchrun --nnodes={} --nproc-per-node={}"),
    }
    if type(environment) not in commands:
        return
    nodes, devices, started = trainer.num_nodes, trainer.num_devices, environment.world_size()
    if started != nodes * devices:
        name, command = commands[type(environment)]
        raise UserError(
            f"trainer.num_nodes={nodes}, trainer.devices={devices}: the number of processes must be their product, but "
            f"{name} has started {started}; start the command with {command.format(nodes, devices)}"
        )


def end_processes(trainer: pl.Trainer, *, wait: bool) -> None:
    """Ends the ranks that Lightning's launcher started, and its thread that watches them.

    That thread kills this process if any rank ended with an error, even if this process has gone on to the next job of
    a sweep. It reads the launcher's list of ranks; an empty list ends it. With `wait` the ranks may finish by
    themselves first; after a failure they are killed.
    """
    started = getattr(trainer.strategy.launcher, "procs", None)
    if not started or not all(isinstance(process, subprocess.Popen) for process in started):
        return
    processes = list(started)
    started.clear()
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_CHILD_SECONDS if wait else 0)
        process.kill()  # no effect if it has ended
        process.wait()
