"""Directory of a job: claimed before Hydra writes there, and one for all its ranks, whoever started them.

Ranks are the processes of one distributed job: those of Lightning's launcher, of torchrun and of SLURM.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from ekd_lightning.config.config import DIRECTORY, resolved
from ekd_lightning.config.edge import ending_callback
from ekd_lightning.config.overrides import config_flags, literal, override
from ekd_lightning.errors import UserError
from ekd_lightning.runs.directory import RunDirectory
from ekd_lightning.runs.lock import LockedError, holder, lock_ahead, make_directory, release_ahead, remove_empty
from ekd_lightning.runs.provenance import is_rank_zero

_LAUNCH_ENV = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", DIRECTORY)
_OUTSIDE_LAUNCHERS = ("LOCAL_RANK", "RANK", "SLURM_PROCID", "TORCHELASTIC_RUN_ID")
_PATIENCE = timedelta(minutes=5)  # ranks of several machines do not start at once
_made: list[Path] = []
"""Directories that this process made for output, outermost first."""


class ClaimDirectory(Callback):
    """Checks and claims the directory of a single run before Hydra writes there."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Ends the program where the directory cannot be claimed."""
        with ending_callback(str(config.hydra.help.app_name)):
            claim_output(config, "run")


def claim_output(config: DictConfig, kind: str, take: Callable[[Path], object] = lock_ahead) -> Path:
    """Decides the directory of a run or a sweep, the same for all processes of the job, and makes it.

    One that is named by the time gets a number behind its name if it is taken. Any other one is what the user asked
    for: it must be free, and hold no finished run that nobody said may be overwritten.

    Args:
        config: Composed configuration with the node `hydra`, which is told.
        kind: "run" or "sweep": `hydra.run.dir` or `hydra.sweep.dir` is meant.
        take: Called with it on global rank 0 alone, before the others hear of it; what it refuses, all refuse.

    Returns:
        The directory, absolute.

    Raises:
        UserError: If the directory is in use or holds a finished run.
        OSError: If it cannot be made.
    """
    key = f"hydra.{kind}.dir"
    if (directory := handed_directory()) is None:
        wanted = Path(resolved(config, key)).absolute()
        by_time = "${now:" in str(OmegaConf.to_container(config.hydra[kind], resolve=False))

        def decide() -> Path:
            if kind == "run" and not by_time:
                refuse_taken(wanted, config)
            directory = _new_directory(wanted) if by_time else _made_directory(wanted)
            take(directory)
            return directory

        directory = agree(key, decide, nodes=_nodes(config), known=None if by_time else wanted)
    _tell_hydra(config, kind, directory)
    return directory


def _nodes(config: DictConfig) -> int:
    given = config.get("trainer", {}).get("num_nodes") or 1
    if not str(given).isdecimal():
        raise UserError(f"trainer.num_nodes={given}: must be a whole number")
    return int(given)


def refuse_taken(directory: Path, config: DictConfig) -> None:
    """Refuses a directory that is in use or holds a finished run; what is refused here is refused before all else.

    Raises:
        UserError: Naming the other process, or the setting that would replace the finished run.
    """
    if (other := holder(directory)) is not None:
        raise LockedError(f"{directory}: in use by {other}")
    if config.get("resume") is None and not config.get("overwrite"):
        RunDirectory(directory).refuse_finished()


def _made_directory(wanted: Path) -> Path:
    _made.extend(make_directory(wanted))
    return wanted


def _new_directory(wanted: Path) -> Path:
    """Makes a directory that nobody else has made, with a number behind its name if need be."""
    _made.extend(make_directory(wanted.parent))
    for number in itertools.count(1):
        path = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
        with contextlib.suppress(FileExistsError):
            path.mkdir()
            _made.append(path)
            return path
    raise AssertionError("unreachable")


def _tell_hydra(config: DictConfig, kind: str, directory: Path) -> None:
    with read_write(config.hydra), open_dict(config.hydra):
        if kind == "run":
            config.hydra.job.env_set[DIRECTORY] = literal(str(directory))
            # Hydra would read `${` in a name as an interpolation; it makes what it is told, which is then no loss.
            config.hydra.run.dir = re.sub(r"(?s)/[^/]*\$\{.*", "/", str(directory))
        else:
            config.hydra.sweep.dir = literal(str(directory))
            config.hydra.overrides.hydra.append(override("hydra.sweep.dir", directory))  # for the jobs


def remove_unused() -> None:
    """Frees what this process claimed for output, and removes the directories it made that hold nothing."""
    release_ahead()
    remove_empty(_made)
    _made.clear()


def launched_by_others() -> bool:
    """Whether this process is a rank that Lightning, torchrun or SLURM started."""
    return any(name in os.environ for name in _OUTSIDE_LAUNCHERS)


def handed_directory() -> Path | None:
    """The directory of the run that another process started this one for, as its rank; None otherwise."""
    started = DIRECTORY in os.environ and int(os.environ.get("LOCAL_RANK", "0")) > 0
    return Path(os.environ[DIRECTORY]) if started else None


def agree(key: str, decide: Callable[[], Path], *, nodes: int = 1, known: Path | None = None) -> Path:
    """One directory for all processes of a job: global rank 0 decides, the others are told.

    Args:
        key: What the directory is to Hydra, e.g. "hydra.run.dir".
        decide: Called on global rank 0 alone.
        nodes: Number of machines.
        known: What the others take if they cannot be told; None if they cannot know.

    Raises:
        UserError: If the processes have no way to tell each other, or global rank 0 was refused.
    """
    with contextlib.closing(_Meeting()) as meeting:
        if meeting.store is None:
            if known is not None:
                return decide() if is_rank_zero() else known
            if nodes > 1 or not is_rank_zero():
                raise UserError(
                    f"{key}: the usual directory holds the time of day, which each process reads for itself; "
                    f"give {key}=..., the same for all of them"
                )
            return decide()
        word = f"ekd-lightning/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{key}"
        if is_rank_zero():
            try:
                path = str(decide())
            except BaseException:
                meeting.tell(word, "")
                raise
            meeting.tell(word, path)
            return Path(path)
        if not (told := meeting.hear(word)):
            raise UserError(f"{key}: refused to the first process of this job")
        return Path(told)


class _Meeting:
    """Where the processes of torchrun or SLURM meet before they train; its store is None if there is no such place."""

    def __init__(self) -> None:
        self.store: Any = None
        self.world = self.rank = 0
        if "TORCHELASTIC_RUN_ID" in os.environ:
            self.world, self.rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
            if self.world > 1 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
                place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
                self.store = dist.TCPStore(*place, is_master=False, timeout=_PATIENCE)
        elif "SLURM_PROCID" in os.environ:
            from pytorch_lightning.plugins.environments import SLURMEnvironment  # noqa: PLC0415 (slow)

            try:
                slurm = SLURMEnvironment()
            except RuntimeError as error:  # a task count that Lightning does not support
                raise UserError(f"SLURM: {' '.join(str(error).split())}") from None
            if not slurm.detect() or (world := slurm.world_size()) < 2:
                return
            self.world, self.rank = world, slurm.global_rank()
            # Not Lightning's own port: it is opened again right after this.
            place = slurm.main_address, slurm.main_port + 1
            self.store = dist.TCPStore(*place, world, is_master=self.rank == 0, timeout=_PATIENCE)

    def tell(self, key: str, value: str) -> None:
        """Tells all other processes, and waits until they have heard."""
        self.store.set(key, os.fsencode(value))
        self.store.wait([f"{key}/{rank}" for rank in range(1, self.world)], _PATIENCE)

    def hear(self, key: str) -> str:
        """Waits for what global rank 0 tells."""
        value = os.fsdecode(self.store.get(key))
        self.store.set(f"{key}/{self.rank}", "")
        return value

    def close(self) -> None:
        """Leaves."""
        self.store = None


@contextlib.contextmanager
def ddp_reruns_this_job(directory: Path, program: str | None = None) -> Iterator[None]:
    """Makes Lightning start the other ranks with *this job* and its directory, rather than with the whole sweep.

    Lightning's script launcher repeats `sys.argv`, which in a multirun holds `-m` and all swept values, names the
    directory in quotes that a quote in it would end, and leaves LOCAL_RANK behind, which the next job of the sweep
    would take for its own.

    Args:
        directory: The job's.
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
    os.environ[DIRECTORY] = str(directory)
    with read_write(hydra), open_dict(hydra):
        run_dir, hydra.run.dir = hydra.run.dir, "."  # not used: the ranks are handed the directory
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
