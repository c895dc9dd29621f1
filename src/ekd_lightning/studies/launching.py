"""Launch of a list of jobs, one after another, in parallel or on a cluster, with their progress."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import statistics
import sys
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path

from hydra import compose
from hydra.types import TaskFunction
from omegaconf import DictConfig
from rich.console import Console
from rich.text import Text

from ekd_lightning.config import internals
from ekd_lightning.config.edge import is_interrupt, restored_environment
from ekd_lightning.config.overrides import override
from ekd_lightning.errors import UserError
from ekd_lightning.progress import readable
from ekd_lightning.runs.collection import RunEntry
from ekd_lightning.runs.directory import RunState
from ekd_lightning.runs.writer import now
from ekd_lightning.studies.sharing import shared_gpus
from ekd_lightning.studies.sweep import (
    STATE_NAMES,
    STYLES,
    Job,
    JobState,
    Sweep,
    job_state,
    job_states,
    varied_keys,
    varied_values,
)

log = logging.getLogger(__name__)

_SAFE_PATH = "PYTHONSAFEPATH"

_POLL_SECONDS = 1.0  # between two readings of the jobs' files
_BAR = 12
_MOST_SHOWN = 100  # characters of an error
_GRACE_SECONDS = 30.0  # for interrupted jobs to say so and end
_NOT_DONE = (RunState.FAILED, RunState.STOPPED, RunState.RUNNING, RunState.PLANNED)


def multirun_config(sweep: Sweep, hydra_words: Sequence[str]) -> DictConfig:
    """The configuration of the multirun that launches jobs of a sweep, with the node `hydra`.

    Hydra must be initialised with the package's configuration.
    """
    own = ["hydra.mode=MULTIRUN", override("hydra.sweep.dir", str(sweep.folder))]
    return compose(sweep.config_name, overrides=[*sweep.common, *hydra_words, *own], return_hydra_config=True)


def launch(
    jobs: Sequence[Job], sweep: Sweep, hydra_words: Sequence[str], task: TaskFunction, command: str | None = None
) -> None:
    """Runs jobs as `ekd-train -m` would; a job that fails does not stop the others.

    Hydra must be initialised with the package's configuration. An interrupt names `command`, which continues the sweep;
    None stands for the sweep's own.

    Raises:
        UserError: If the launcher submits jobs to a cluster that is not here.
        KeyboardInterrupt: If the user interrupts, after all jobs have ended; its text is the sweep's state.
    """
    config = multirun_config(sweep, hydra_words)
    refuse_absent_cluster(config)
    try:
        with shared_gpus(config), watched(sweep):
            internals.launch(config, [_words(job, sweep.folder) for job in jobs], task)
    except (KeyboardInterrupt, SystemExit) as stop:
        if not is_interrupt(stop):
            raise
        stop_local_queue(sweep.folder)
        raise KeyboardInterrupt(stopped(sweep, command, queued=is_queued(config))) from None
    except Exception as error:  # a job's process was killed; its directory tells how far it came
        wait_for_local_queue(sweep.folder)
        first = (str(error).splitlines() or ["no message"])[0]
        log.error("the launcher ended early: %s: %s", type(error).__name__, first)


@contextlib.contextmanager
def working_in(directory: str) -> Iterator[None]:
    """Changes to the directory where a sweep or study was started, to which its relative paths refer.

    An empty or missing directory changes nothing.
    """
    before = Path.cwd()
    with restored_environment(_SAFE_PATH):
        # The directory comes from a record, and `python -m`, which launchers start, would import modules from it.
        os.environ[_SAFE_PATH] = "1"
        if sys.version_info >= (3, 11) and os.path.isdir(directory):
            os.chdir(directory)
        elif os.path.isdir(directory) and not os.path.samefile(directory, before):
            log.warning(
                "%s: relative paths are not resolved from this directory, where the sweep was started, because Python "
                "3.10 would import modules from it; they are resolved from the current directory",
                directory,
            )
        try:
            yield
        finally:
            os.chdir(before)


def _words(job: Job, folder: Path) -> list[str]:
    place = override("hydra.sweep.subdir", job.directory.relative_to(folder).as_posix())
    return [*job.overrides, place, *resume_words(job)]


def resume_words(job: Job) -> list[str]:
    """The override that makes a job continue the run in its directory; none for a new run."""
    return [override("resume", str(job.directory))] if job.resumed else []


def is_queued(config: DictConfig) -> bool:
    """Whether jobs are submitted to a cluster, where they outlive this process."""
    return str(config.hydra.launcher._target_).endswith("SlurmLauncher")


def refuse_absent_cluster(config: DictConfig) -> None:
    """Refuses a multirun whose jobs would be submitted to a cluster that is not here."""
    if is_queued(config) and shutil.which("srun") is None:
        raise UserError("hydra/launcher=slurm: finds no srun here; start it on a machine of the cluster")


def stopped(sweep: Sweep, command: str | None = None, *, queued: bool = False) -> str:
    """The state of an interrupted sweep, and the command that continues it, in one line.

    Jobs that are `queued` on a cluster continue there.
    """
    counts = Counter(state.run.state for state in job_states(sweep))
    parts = [f"{counts[RunState.DONE] + counts[RunState.PARTIAL]} of {counts.total()} runs done"]
    parts += [f"{counts[state]} {STATE_NAMES[state]}" for state in _NOT_DONE if counts[state]]
    first = "to continue, once the queue is empty:" if queued else "to continue:"
    return f"{', '.join(parts)}; {first} {command or sweep.again}"


# Jobs of submitit's local executor are processes that outlive this one, unless they are stopped or waited for.


def stop_local_queue(folder: Path) -> None:
    """Interrupts the jobs that submitit's local executor runs for a sweep's folder; waits up to 30 s for their end."""
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
    """Ids of this process's children that run a job for submitit, which names its folders after them."""
    found = [int(path.name) for path in (folder / ".submitit").glob("*") if path.name.isdecimal()]
    return [pid for pid in found if _is_our_child(pid)]


def _is_our_child(pid: int) -> bool:
    """Whether a process is a child of this one and still runs."""
    try:
        return os.waitpid(pid, os.WNOHANG) == (0, 0)
    except (ChildProcessError, OverflowError):
        return False


def seconds_left(durations: Sequence[float], ages: Sequence[float], waiting: int, workers: int) -> float | None:
    """Estimates the seconds until the last job ends from the mean duration of those that ended; None without any.

    `ages` are the seconds since each running job was started, `waiting` jobs were not started yet, and `workers` run at
    a time.
    """
    if not durations:
        return None
    mean = statistics.fmean(durations)
    to_do = waiting * mean + sum(max(mean - age, 0.0) for age in ages)
    return to_do / max(workers, 1)


class Progress:
    """Watches the files of a sweep's jobs and reports each job that ended.

    The jobs may run in any process of any machine that shares the folder. Those that failed or stopped before `since`,
    the start of this launch in ISO 8601, count as not yet run. `say` prints a line.
    """

    def __init__(self, sweep: Sweep, say: Callable[[Text], None], since: str = "") -> None:
        self._sweep, self._say, self._since = sweep, say, since or sweep.started
        self._keys = varied_keys(sweep.jobs)
        self._durations: list[float] = []
        self._workers = 1
        self._lock = threading.Lock()
        self._ended = {number: state for number, state in enumerate(job_states(sweep)) if state.run.is_over}

    def update(self) -> None:
        """Reports every job that ended since the last call."""
        with self._lock:
            jobs = enumerate(self._sweep.jobs)
            states = [self._ended.get(number) or job_state(job, self._since) for number, job in jobs]
            running = sum(state.run.state is RunState.RUNNING for state in states)
            self._workers = max(self._workers, running)
            for number, state in enumerate(states):
                if number not in self._ended and (state.run.is_over or state.run.state is RunState.FAILED):
                    self._ended[number] = state
                    if state.run.is_over and (seconds := state.run.seconds) is not None:
                        self._durations.append(seconds)
                    self._say(self._line(state, states))

    def _line(self, state: JobState, states: Sequence[JobState]) -> Text:
        total, ended = len(states), len(self._ended)
        done = round(_BAR * ended / max(total, 1))
        values = varied_values(state.job, self._keys)
        name = " ".join(f"{key}={value}" for key, value in values.items()) or state.job.directory.name
        return Text.assemble(
            (f"{'study' if state.job.row else 'sweep'} {ended}/{total}", "bold"),
            *(" ", ("━" * done, "cyan"), ("─" * (_BAR - done) + " ", "dim"), f"{name}: "),
            (_outcome(state.run), STYLES.get(state.run.state, "")),
            (f"  ({self._rest(states)})", "dim"),
        )

    def _rest(self, states: Sequence[JobState]) -> str:
        here = datetime.now(timezone.utc)
        left = [state for number, state in enumerate(states) if number not in self._ended]
        running = [state.run.since for state in left if state.run.state is RunState.RUNNING]
        ages = [(here - since).total_seconds() for since in running if since]
        counts = {
            "failed": sum(state.run.state is RunState.FAILED for state in self._ended.values()),
            "running": len(running),
            "waiting": sum(state.run.state is RunState.PLANNED for state in left),
        }
        parts = [f"{count} {name}" for name, count in counts.items() if count]
        seconds = seconds_left(self._durations, ages, len(left) - len(ages), self._workers) if left else None
        parts += [f"about {readable(seconds)} left"] if seconds is not None else []
        return ", ".join(parts) or "nothing left"


def _outcome(run: RunEntry) -> str:
    if run.state is RunState.FAILED:
        return f"failed: {textwrap.shorten(run.error or '', _MOST_SHOWN, placeholder=' …')}"  # its log has all of it
    parts = [] if run.result is None else [f"test accuracy {100 * run.result.test_accuracy:.2f} %"]
    parts += [] if run.seconds is None else [readable(run.seconds)]
    return ", ".join(parts) or run.state.value


def _say(text: Text) -> None:
    """Prints a line on standard output, without colours unless it is a terminal."""
    Console(file=sys.stdout, soft_wrap=True, highlight=False).print(text, soft_wrap=True)


_watches: list[Progress] = []


@contextlib.contextmanager
def watched(sweep: Sweep) -> Iterator[None]:
    """Reports the sweep's jobs that are not finished yet while the block runs, and once more at its end."""
    progress, stop = Progress(sweep, _say, since=now()), threading.Event()

    def watch() -> None:
        while not stop.wait(_POLL_SECONDS):
            progress.update()

    thread = threading.Thread(target=watch, name="sweep-progress", daemon=True)
    thread.start()
    _watches.append(progress)
    try:
        yield
    finally:
        _watches.remove(progress)
        stop.set()
        thread.join()
        progress.update()


def is_watched() -> bool:
    """Whether `watched` reports the jobs of this process."""
    return bool(_watches)


def update_progress() -> None:
    """Reports a job that has just ended in this process, without waiting for the next poll."""
    for progress in _watches:
        progress.update()
