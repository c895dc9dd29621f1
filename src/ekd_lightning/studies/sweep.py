"""A multirun from start to end: its plan on disk, its progress, its summary, and what Ctrl-C leaves."""

from __future__ import annotations

import contextlib
import logging
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from hydra._internal.core_plugins.basic_sweeper import (
    BasicSweeper,
)  # how it expands a sweep has no public name
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict
from rich.console import Console

from ekd_lightning.config.edge import EXIT_USER_ERROR
from ekd_lightning.runs.record import now
from ekd_lightning.studies.ddp import launched_by_others
from ekd_lightning.studies.local_queue import stop_local_queue, wait_for_local_queue
from ekd_lightning.studies.sweep_jobs import (
    LOCK_FILE,
    Sweep,
    SweepJob,
    found_sweep,
    look,
    mark_interrupted,
    settled,
    varied_keys,
    varied_values,
    write_sweep,
)
from ekd_lightning.studies.sweep_progress import look_now, watched

log = logging.getLogger(__name__)

_WIDTH = 160  # where there is no terminal
_open: list[tuple[Path, contextlib.ExitStack, bool]] = []
"""The sweep that runs in this process, if one does, what ends with it, and whether its jobs are in a queue elsewhere.
Hydra tells callbacks of the end only if no job failed."""


class SweepSummary(Callback):
    """Writes down what a multirun is going to do, and follows it; `tell_sweep` ends it."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Plans the jobs, before the first one starts."""
        folder = Path(str(config.hydra.sweep.dir)).absolute()
        stack = contextlib.ExitStack()
        folder.mkdir(parents=True, exist_ok=True)
        try:
            stack.enter_context(locked(folder))
        except Timeout:
            if not launched_by_others():  # else the other ranks of torchrun are in the same folder
                _refuse(folder)
        _open.append((folder, stack, is_queued(config)))
        jobs = plan_jobs(config, folder)
        if jobs is not None:
            sweep = describe_sweep(config, folder, jobs)
            write_sweep(sweep)
            stack.enter_context(watched(sweep))

    def on_job_end(self, config: DictConfig, job_return: Any, **kwargs: Any) -> None:
        """Tells of it at once where the job ran in the sweep's own process."""
        look_now()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The lock of a sweep's folder; none where the file system has no locks, as some shared ones.

    Raises:
        Timeout: If another process has it.
    """
    lock = FileLock(folder / LOCK_FILE, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise
    except (OSError, NotImplementedError):
        log.warning("%s: no lock on this file system, so take care that no other sweep uses it", folder)
    try:
        yield
    finally:
        lock.release()


def _refuse(folder: Path) -> None:
    """Ends the program: Hydra makes warnings of a callback's errors, but lets an exit pass."""
    print(
        f"ekd-train: error: {as_typed(folder)}: another sweep is running in this folder; give this one its own with "
        "hydra.sweep.dir=...",
        file=sys.stderr,
    )
    sys.exit(EXIT_USER_ERROR)


def plan_jobs(config: DictConfig, folder: Path) -> tuple[SweepJob, ...] | None:
    """The jobs that Hydra's own sweeper is going to start.

    Args:
        config: Composed configuration of the multirun, with the node `hydra`.
        folder: Folder of the sweep.

    Returns:
        The jobs in their order; None for another sweeper, which decides as it goes.
    """
    hydra = config.hydra
    if not str(hydra.sweeper._target_).endswith(".BasicSweeper"):
        return None
    words = [f"{key}={value}" for key, value in (hydra.sweeper.params or {}).items()] + list(
        hydra.overrides.task
    )
    loader = GlobalHydra.instance().config_loader()
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(words)
    (every,) = BasicSweeper.split_arguments(parsed, None)
    plain = OmegaConf.to_container(hydra.sweep, resolve=False)
    assert isinstance(plain, dict)
    by_number = plain["subdir"] == "${hydra.job.num}"
    return tuple(
        SweepJob(
            folder / (str(number) if by_number else subdirectory(config, overrides, number)), tuple(overrides)
        )
        for number, overrides in enumerate(every)
    )


def subdirectory(config: DictConfig, overrides: Sequence[str], number: int) -> str:
    """The directory of a job below its sweep's, as the launcher will resolve it.

    Args:
        config: Composed configuration of the multirun.
        overrides: Those of the job.
        number: Its number, from 0 on.
    """
    job = GlobalHydra.instance().config_loader().load_sweep_config(config, list(overrides))
    with open_dict(job):
        job.hydra.job.num = number
        job.hydra.job.id = str(number)
    instance = HydraConfig.instance()
    before = instance.cfg
    try:
        instance.set_config(job)
        return str(OmegaConf.select(job, "hydra.sweep.subdir"))
    finally:
        instance.cfg = before


def describe_sweep(config: DictConfig, folder: Path, jobs: Sequence[SweepJob]) -> Sweep:
    """The sweep with all that is needed to start jobs of it again."""
    hydra = config.hydra
    folders = [source.path for source in hydra.runtime.config_sources if source.provider == "command-line"]
    common = set(jobs[0].overrides).intersection(*(job.overrides for job in jobs)) if jobs else set()
    return Sweep(
        folder,
        tuple(jobs),
        tuple(hydra.overrides.hydra),
        tuple(word for word in (jobs[0].overrides if jobs else ()) if word in common),
        str(hydra.job.config_name or "train"),
        str(folders[0]) if folders else None,
        now(),
    )


def tell_sweep() -> None:
    """Ends the sweep that ran in this process, if one did, and prints its summary."""
    while _open:
        folder, stack, _ = _open.pop()
        stack.close()
        tell(folder)


def tell(folder: Path) -> None:
    """Prints what the runs of a sweep found, which failed and why, and where everything is."""
    from ekd_lightning.studies.sweep_table import SweepRow, sweep_tables  # noqa: PLC0415 (slow; --help needs none)

    sweep = found_sweep(folder)
    states = settled(look(job, sweep.started) for job in sweep.jobs)
    if not any(state.state != "waiting" for state in states):
        return  # it was refused before its first job
    keys = varied_keys(sweep.jobs)
    rows = [
        SweepRow(
            s.job.directory.relative_to(folder).as_posix(),
            varied_values(s.job, keys),
            "not started" if s.state == "waiting" else s.state,
            s.result,
        )
        for s in states
    ]
    console = Console(file=sys.stdout, highlight=False)
    if not console.is_terminal:
        console = Console(file=sys.stdout, width=_WIDTH, highlight=False)
    for table in sweep_tables(rows, keys):
        console.print(table)
    done = sum(state.state in ("done", "partial") for state in states)
    failed = [state for state in states if state.state == "failed"]
    print(f"{folder}: {done} of {len(states)} runs done, {len(failed)} failed")
    for state in failed:
        print(f"  failed: {state.job.directory.relative_to(folder)}  {state.error}")
    place = as_typed(folder)
    if done < len(states):
        print(f"continue:  ekd-train resume={place}")
    if done:
        print(f"report:    ekd-report {place} -o {as_typed(folder / 'report')}")


def interrupted_sweep() -> str | None:
    """Ends what an interrupted sweep has left running, and says how it stands.

    Returns:
        One line; None if no sweep ran in this process.
    """
    if not _open:
        return None
    folder, stack, queued = _open.pop()
    sweep = found_sweep(folder)
    stop_local_queue(folder)
    stack.close()
    return stopped(sweep, queued=queued)


def is_queued(config: DictConfig) -> bool:
    """Whether jobs are handed to a cluster, where they go on whatever happens to this process."""
    return str(config.hydra.launcher._target_).endswith("SlurmLauncher")


def stopped(sweep: Sweep, command: str | None = None, *, queued: bool = False) -> str:
    """Marks the runs of a sweep whose processes have ended as interrupted, and says in a line how it stands.

    Args:
        sweep: The sweep.
        command: What continues it; by default `ekd-train resume=FOLDER`.
        queued: Whether its jobs are in a queue elsewhere; then they have not ended, and none is marked.
    """
    if not queued:
        mark_interrupted(sweep.jobs)
    states = [look(job, sweep.started) for job in sweep.jobs]
    counts = {name: sum(state.state in kinds for state in states) for name, kinds in _COUNTED.items()}
    said = [f"{counts['done']} of {len(states)} runs done"]
    said += [f"{count} {name}" for name, count in counts.items() if count and name != "done"]
    first = "to continue, once the queue is empty:" if queued else "to continue:"
    return f"{', '.join(said)}; {first} {command or f'ekd-train resume={as_typed(sweep.folder)}'}"


_COUNTED = {
    "done": ("done", "partial"),
    "failed": ("failed",),
    "stopped": ("stopped",),
    "running": ("running",),
    "not started": ("waiting",),
}


def lost_job(error: BaseException) -> str | None:
    """What a launcher says of a job whose process was killed, in one line; None if that is not what happened.

    Jobs of submitit's local executor that are still at work are waited for: they lack nothing.
    """
    if not type(error).__module__.startswith(("joblib", "submitit")):
        return None
    for folder, *_ in _open:
        wait_for_local_queue(folder)
    return (
        f"a job was killed: {' '.join((str(error).strip() or type(error).__name__).splitlines()[0].split())}"
    )


def as_typed(path: Path) -> str:
    """A path as one would type it here, in a shell."""
    here = Path.cwd()
    return shlex.quote(path.relative_to(here).as_posix() if path.is_relative_to(here) else str(path))
