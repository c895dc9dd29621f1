"""Lightning's process launcher inside a Hydra multirun."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from hydra.core.hydra_config import HydraConfig
from omegaconf import open_dict, read_write

from ekd_lightning.config.overrides import config_flags

_LAUNCH_ENV = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_OUTSIDE_LAUNCHERS = ("LOCAL_RANK", "RANK", "SLURM_PROCID", "TORCHELASTIC_RUN_ID")


def launched_by_others() -> bool:
    """Whether this process is a rank that Lightning, torchrun or SLURM started."""
    return any(name in os.environ for name in _OUTSIDE_LAUNCHERS)


@contextlib.contextmanager
def ddp_reruns_this_job(program: str | None = None) -> Iterator[None]:
    """Makes Lightning start the other ranks with *this job* rather than with the whole sweep.

    Lightning's script launcher repeats `sys.argv`, which in a multirun holds `-m` and all swept values, and it
    leaves LOCAL_RANK behind, which the next job of the sweep would take for its own.

    Args:
        program: The file that runs one job, where this command does something else; None if this command does.
    """
    if launched_by_others():
        yield
        return
    argv = sys.argv
    hydra: Any = HydraConfig.get()  # typed as a dataclass, but a DictConfig
    # A sweep may be stored in an experiment (hydra.mode), and a search path may hold the user's own files.
    kept = [word for word in hydra.overrides.hydra if word.lstrip("+").startswith("hydra.searchpath=")]
    sys.argv = [program or argv[0], *config_flags(argv), *hydra.overrides.task, *kept, "hydra.mode=RUN"]
    environment = {key: os.environ.get(key) for key in _LAUNCH_ENV}
    with read_write(hydra), open_dict(hydra):
        run_dir, hydra.run.dir = hydra.run.dir, hydra.runtime.output_dir
    try:
        yield
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
        for key, value in environment.items():
            os.environ.pop(key, None)
            if value is not None:
                os.environ[key] = value
        sys.argv = argv
        with read_write(hydra), open_dict(hydra):
            hydra.run.dir = run_dir
