"""Launching of a list of jobs: one after another, side by side or on a cluster; and what is left of it after Ctrl-C."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from hydra import compose
from hydra.types import TaskFunction
from omegaconf import DictConfig

from ekd_lightning.config import internals
from ekd_lightning.config.edge import is_interrupt
from ekd_lightning.config.overrides import override, typed_override
from ekd_lightning.runs.directory import RunState
from ekd_lightning.studies.progress import watched
from ekd_lightning.studies.sweep import Job, Sweep, look

log = logging.getLogger(__name__)

_GRACE_SECONDS = 30.0  # for interrupted jobs to say so and end
_COUNTED = {
    "done": (RunState.DONE, RunState.PARTIAL),
    "failed": (RunState.FAILED,),
    "stopped": (RunState.STOPPED,),
    "running": (RunState.RUNNING,),
    "not started": (RunState.PLANNED,),
}


def launch(
    jobs: Sequence[Job],
    folder: Path,
    hydra_words: Sequence[str],
    task: TaskFunction,
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
        task: Runs one job; launchers hand it to other processes.
        sweep: The sweep of which these jobs are left, for its progress; None if they are all there is.
        command: What continues the work if it is interrupted, for the user.

    Raises:
        KeyboardInterrupt: If the user interrupts, once everything has ended; says how it stands.
    """
    whole = sweep or Sweep(folder, tuple(jobs))
    own = ["hydra.mode=MULTIRUN", override("hydra.sweep.dir", str(folder))]
    config = compose(whole.config_name, overrides=[*whole.common, *hydra_words, *own], return_hydra_config=True)
    try:
        with watched(whole), working_in(whole.working_directory):
            internals.launch(config, [[*job.overrides, *_placed(job, folder)] for job in jobs], task)
    except (KeyboardInterrupt, SystemExit) as stop:
        if not is_interrupt(stop):
            raise
        stop_local_queue(folder)
        raise KeyboardInterrupt(stopped(whole, command, queued=is_queued(config))) from None
    except Exception as error:  # a job that was killed outright; what is known of it stands in its directory
        wait_for_local_queue(folder)
        first = (str(error).splitlines() or ["no message"])[0]
        log.error("the launcher ended early: %s: %s", type(error).__name__, first)


@contextlib.contextmanager
def working_in(directory: str) -> Iterator[None]:
    """Works where a sweep or study was first started, as its relative places begin there.

    Args:
        directory: The recorded working directory; one that is empty or gone changes nothing.
    """
    before = Path.cwd()
    os.chdir(directory if os.path.isdir(directory) else before)
    try:
        yield
    finally:
        os.chdir(before)


def _placed(job: Job, folder: Path) -> list[str]:
    words = [override("hydra.sweep.subdir", job.directory.relative_to(folder).as_posix())]
    if job.resumed:
        words.append(override("resume", str(job.directory)))
    return words


def is_queued(config: DictConfig) -> bool:
    """Whether jobs are handed to a cluster, where they go on whatever happens to this process."""
    return str(config.hydra.launcher._target_).endswith("SlurmLauncher")


def stopped(sweep: Sweep, command: str | None = None, *, queued: bool = False) -> str:
    """Says in a line how an interrupted sweep stands.

    Args:
        sweep: The sweep.
        command: What continues it; by default `ekd-train resume=FOLDER`.
        queued: Whether its jobs are in a queue elsewhere, where they go on.
    """
    states = [look(job, sweep.started).run.state for job in sweep.jobs]
    counts = {name: sum(state in kinds for state in states) for name, kinds in _COUNTED.items()}
    said = [f"{counts['done']} of {len(states)} runs done"]
    said += [f"{count} {name}" for name, count in counts.items() if count and name != "done"]
    first = "to continue, once the queue is empty:" if queued else "to continue:"
    return f"{', '.join(said)}; {first} {command or 'ekd-train ' + typed_override('resume', sweep.folder)}"


# Jobs of submitit's local executor are processes that outlive the one that started them, unless it sees to it.


def stop_local_queue(folder: Path) -> None:
    """Interrupts the jobs of submitit's local executor, and waits a while for them to end.

    Args:
        folder: Folder of the sweep.
    """
    for pid in (alive := _local_queue(folder)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGINT)
    until = time.monotonic() + _GRACE_SECONDS
    for pid in alive:
        while _is_our_child(pid) and time.monotonic() < until:
            time.sleep(0.05)


def wait_for_local_queue(folder: Path) -> None:
    """Waits until all jobs of submitit's local executor have ended."""
    for pid in _local_queue(folder):
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)


def _local_queue(folder: Path) -> list[int]:
    """Processes that look after a job for submitit, our children; it names its folders by them."""
    found = [int(path.name) for path in (folder / ".submitit").glob("*") if path.name.isdecimal()]
    return [pid for pid in found if _is_our_child(pid)]


def _is_our_child(pid: int) -> bool:
    """Whether a process is a child of this one and still runs."""
    try:
        return os.waitpid(pid, os.WNOHANG) == (0, 0)
    except (ChildProcessError, OverflowError):
        return False
