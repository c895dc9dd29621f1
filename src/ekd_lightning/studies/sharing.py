"""Jobs of a sweep that share one GPU: NVIDIA's multi-process service (MPS), for as long as they run.

Processes take turns on a GPU, and a small student leaves most of it idle during its turn. With the service their
kernels run side by side; docs/results/speed_gpu.md holds the rates of 1 to 8 runs with and without it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from omegaconf import DictConfig

from ekd_lightning.config.edge import restored_environment

log = logging.getLogger(__name__)

LAUNCHER = "shared_gpu"
"""The launcher whose jobs share GPUs."""
_CONTROL = "nvidia-cuda-mps-control"
_PIPE, _LOG = "CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"
_DEVICES = "CUDA_VISIBLE_DEVICES"
_SECONDS = 20.0  # for the service to start or end


@contextlib.contextmanager
def shared_gpus(config: DictConfig) -> Iterator[None]:
    """Serves the jobs of a multirun that are launched within the block, if its launcher is `shared_gpu`."""
    if config.hydra.runtime.choices.get("hydra/launcher") != LAUNCHER:
        yield
        return
    with mps_service() as problem:
        if problem:
            log.warning("hydra/launcher=%s: %s, so the jobs take turns on the GPU", LAUNCHER, problem)
        try:
            yield
        finally:
            _end_workers()


def _end_workers() -> None:
    """Ends the launcher's idle workers, which would hold the GPU for minutes, and serve a later sweep without MPS."""
    from joblib.externals.loky import get_reusable_executor  # noqa: PLC0415 (an extra)

    get_reusable_executor().shutdown(wait=True)


@contextlib.contextmanager
def mps_service() -> Iterator[str | None]:
    """Runs a service of its own, which processes that are started within the block use.

    A service that answers already is used as it is. No setting of a GPU is changed.

    Yields:
        Why there is no service; None if there is one.
    """
    control = shutil.which(_CONTROL)
    if control is None:
        yield f"{_CONTROL} is not installed"
        return
    if _problem_of(os.environ, control, text="get_server_list\n") is None:
        yield None
        return
    with (
        tempfile.TemporaryDirectory(prefix="ekd-mps-", ignore_cleanup_errors=True) as folder,
        restored_environment(_PIPE, _LOG, _DEVICES),
    ):
        own = {_PIPE: f"{folder}/pipe", _LOG: f"{folder}/log"}
        for path in own.values():
            Path(path).mkdir()
        service = {**os.environ, **own}
        try:
            problem = _problem_of(service, control, "-d")
            if problem is None:
                os.environ.update(own | _devices_of_clients())
            yield problem
        finally:
            _problem_of(service, control, text="quit -t 5\n")


def _devices_of_clients() -> dict[str, str]:
    """Returns the variable that chooses devices as clients need it: they count the devices of the service from 0."""
    chosen = os.environ.get(_DEVICES)
    if not chosen or "GPU-" in chosen:
        return {}
    return {_DEVICES: ",".join(map(str, range(len(chosen.split(",")))))}


def _problem_of(environment: Mapping[str, str], *command: str, text: str | None = None) -> str | None:
    """Runs a command; returns what went wrong, in one line, or None."""
    try:
        done = subprocess.run(
            command, env=environment, input=text, capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{_CONTROL} failed ({' '.join(str(error).split())})"
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
        return f"{_CONTROL} failed ({lines[-1]})"
    return None
