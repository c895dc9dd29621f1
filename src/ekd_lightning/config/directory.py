"""Output directory of a job: the same for all its ranks, claimed before Hydra writes there.

Hydra would open a job's log and write `.hydra/` before it calls our function. Both are delayed until the checks of the
run have passed (`JobOutput.start`), so a refused job leaves no files. Ranks are the processes of one distributed job,
started by Lightning's launcher, torchrun or SLURM.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import logging
import logging.handlers
import os
import re
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from ekd_lightning.config.config import resolved, to_plain, write_config
from ekd_lightning.config.edge import ending_callback, restored_environment
from ekd_lightning.config.overrides import config_flags, literal, override
from ekd_lightning.errors import UserError, one_line, reason
from ekd_lightning.files import DamagedFileError
from ekd_lightning.roles import check_name
from ekd_lightning.runs.directory import CONFIG, HYDRA, OVERRIDES, RunDirectory
from ekd_lightning.runs.lock import (
    DirectoryLock,
    LockedError,
    holder,
    lock_ahead,
    make_directory,
    release_ahead,
    remove_empty,
)
from ekd_lightning.runs.writer import RunWriter, given_rank, is_rank_zero

_PATIENCE = timedelta(minutes=5)  # machines of one job start at different times
_PORTS_AWAY = 10_000
DIRECTORY = "EKD_RUN_DIRECTORY"
"""Environment variable that passes the run's directory to the ranks that a process starts."""

_LAUNCH_ENV = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", DIRECTORY)
_made: list[Path] = []
"""Output directories that this process made, outermost first."""


class ClaimDirectory(Callback):
    """Checks and claims the directory of a single run before Hydra writes there."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Ends the program if the directory cannot be claimed."""
        with ending_callback(str(config.hydra.help.app_name)):
            claim_output(config, "run")


def claim_output(config: DictConfig, kind: str, claim: Callable[[Path], object] = lock_ahead) -> Path:
    """Chooses the directory of a run or a sweep (`kind`), absolute and the same for all processes of the job; makes it.

    A directory that is named after the time gets a number if it exists. A directory that the user named must not be in
    use and must not hold a finished run, unless the run may be overwritten. The node `hydra` of the configuration
    receives it. `claim` is called with it on global rank 0, before it is sent to the others; an error ends all ranks.

    Raises:
        UserError: If the directory is in use or holds a finished run.
        OSError: If it cannot be made.
    """
    key = f"hydra.{kind}.dir"
    if is_started_rank():
        directory = Path(os.environ[DIRECTORY])
    else:
        check_name("method.name", OmegaConf.select(config, "method.name", default="none"))
        data = OmegaConf.select(config, "data.name", default="none")
        of_hub = isinstance(data, str) and OmegaConf.select(config, "data.source", default=None) == "huggingface"
        for part in data.split("/", 1) if of_hub else [data]:  # USER/SET names two folders
            check_name("data.name", part)
        wanted = Path(resolved(config, key)).absolute()
        by_time = "${now:" in str(OmegaConf.to_container(config.hydra[kind], resolve=False))

        def decide() -> Path:
            if kind == "run" and not by_time:
                refuse_taken(wanted, config)
            directory = new_directory(wanted, numbered=by_time)
            claim(directory)
            return directory

        nodes = config.get("trainer", {}).get("num_nodes") or 1
        if not str(nodes).isdecimal():
            raise UserError(f"trainer.num_nodes={nodes}: must be a whole number")
        directory = agree(key, decide, nodes=int(nodes), known=None if by_time else wanted)
    _set_in_hydra(config, kind, directory)
    return directory


def refuse_taken(directory: Path, config: DictConfig) -> None:
    """Refuses a directory that is in use, or holds a run or files that a new run would replace, before any other check.

    The `UserError` names the process, or the setting with which an earlier run is replaced.
    """
    if (other := holder(directory)) is not None:
        raise LockedError(f"{directory}: in use by {other}")
    if config.get("resume") is None:
        RunWriter(directory).refuse_used(overwrite=bool(config.get("overwrite")))


def new_directory(wanted: Path, *, numbered: bool) -> Path:
    """Makes a directory; if `numbered`, always a new one, with a number after its name if that exists."""
    _made.extend(make_directory(wanted.parent if numbered else wanted))
    if not numbered:
        return wanted
    path = wanted
    for number in itertools.count(2):
        with contextlib.suppress(FileExistsError):
            path.mkdir()
            break
        path = wanted.with_name(f"{wanted.name}-{number}")
    _made.append(path)
    return path


def _set_in_hydra(config: DictConfig, kind: str, directory: Path) -> None:
    with read_write(config.hydra), open_dict(config.hydra):
        if kind == "run":
            config.hydra.job.env_set[DIRECTORY] = literal(str(directory))
            # Hydra makes this directory and would resolve `${` in its name, so it gets an existing parent instead.
            config.hydra.run.dir = re.sub(r"(?s)/[^/]*\$\{.*", "/", str(directory))
        else:
            config.hydra.sweep.dir = literal(str(directory))
            config.hydra.overrides.hydra.append(override("hydra.sweep.dir", directory))  # for the jobs


def remove_unused() -> None:
    """Releases the directories that this process has claimed, and removes the empty ones among those it has made."""
    release_ahead()
    remove_empty(_made)
    _made.clear()


def agree(key: str, decide: Callable[[], Path], *, nodes: int = 1, known: Path | None = None) -> Path:
    """One directory for all processes of a job: global rank 0 chooses it and sends it to the others.

    Args:
        key: Hydra's key of the directory, e.g. "hydra.run.dir".
        decide: Chooses the directory; called on global rank 0 only.
        nodes: Number of machines.
        known: The directory for processes that cannot communicate; None if its name depends on the time.

    Raises:
        UserError: If the processes cannot communicate and `known` is None, or if global rank 0 was refused.
    """
    store, world, rank = _meeting_place()
    if store is None and known is not None:
        return decide() if is_rank_zero() else known
    if store is None:
        if nodes > 1 or not is_rank_zero():
            raise UserError(
                f"{key}: the default directory contains the time, which differs between processes; "
                f"give {key}=..., the same for all of them"
            )
        return decide()
    word = f"ekd-lightning/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{key}"
    if is_rank_zero():
        decided = ""
        try:
            decided = str(decide())
        finally:  # a refusal ends all processes; rank 0 waits until they have received it
            store.set(word, os.fsencode(decided))
            store.wait([f"{word}/{other}" for other in range(1, world)], _PATIENCE)
    else:
        decided = os.fsdecode(store.get(word))
        store.set(f"{word}/{rank}", "")
    if not decided:
        raise UserError(f"{key}: the first process of this job was refused the directory; see its own error")
    return Path(decided)


def _meeting_place() -> tuple[Any, int, int]:
    """The store by which processes of torchrun or SLURM communicate (None without), their number, and this rank."""
    if "TORCHELASTIC_RUN_ID" not in os.environ and given_rank() is None:
        return None, 1, 0
    from torch.distributed import TCPStore  # noqa: PLC0415 (slow)

    if "TORCHELASTIC_RUN_ID" in os.environ:
        world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
        if world == 1 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            return None, world, rank
        place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return TCPStore(*place, is_master=False, timeout=_PATIENCE), world, rank
    from ekd_lightning.training.processes import slurm_environment  # noqa: PLC0415 (slow)

    slurm = slurm_environment()
    if slurm is None or (world := slurm.world_size()) < 2:
        return None, 1, 0
    # Lightning opens its own port right after this; the next one may be that of the next job of an array.
    port, rank = slurm.main_port, slurm.global_rank()
    port += _PORTS_AWAY if port + _PORTS_AWAY < 2**16 else -_PORTS_AWAY
    try:
        return TCPStore(slurm.main_address, port, world, is_master=rank == 0, timeout=_PATIENCE), world, rank
    except RuntimeError as error:
        raise UserError(
            f"SLURM: the {world} tasks of this job did not all reach {slurm.main_address}:{port} within "
            f"{_PATIENCE.seconds // 60} minutes; start the command with srun ({one_line(error)})"
        ) from None


def is_started_rank() -> bool:
    """Whether Lightning, in another process of this package, has started this one as a further rank of its run."""
    return DIRECTORY in os.environ and int(os.environ.get("LOCAL_RANK", "0")) > 0


def started_by_others() -> bool:
    """Whether Lightning, torchrun or SLURM has started this process as a rank."""
    return given_rank() is not None or bool({"LOCAL_RANK", "TORCHELASTIC_RUN_ID"} & os.environ.keys())


@contextlib.contextmanager
def passed_to_ranks(directory: Path) -> Iterator[None]:
    """Passes a run's directory to the ranks that Lightning starts, and clears what its launcher leaves behind.

    It leaves LOCAL_RANK and the process group, with which the next run would take itself for a rank of this one.
    """
    if started_by_others():
        yield
        return
    with restored_environment(*_LAUNCH_ENV):
        os.environ[DIRECTORY] = str(directory)
        try:
            yield
        finally:
            dist = sys.modules.get("torch.distributed")  # a job that was refused early has not imported it
            if dist is not None and dist.is_available() and dist.is_initialized():
                dist.destroy_process_group()


@contextlib.contextmanager
def ddp_reruns_this_job(directory: Path, program: str | None = None) -> Iterator[None]:
    """Makes Lightning start the other ranks with this job and its directory, not with the whole sweep.

    Lightning's script launcher repeats `sys.argv`, which in a multirun holds `-m` and all swept values. It also quotes
    the directory without escaping quotes in it. `program` is a module that runs one job; None for that of this command.
    """
    if started_by_others():
        yield
        return
    main, argv = sys.modules["__main__"], sys.argv
    spec = main.__spec__
    hydra: Any = HydraConfig.get()  # typed as a dataclass, but a DictConfig
    # A sweep may be stored in an experiment (hydra.mode), and a search path may hold the user's own files.
    paths = [word for word in hydra.overrides.hydra if word.lstrip("+").startswith("hydra.searchpath=")]
    words = cast("list[str]", OmegaConf.to_container(hydra.overrides.task, resolve=False))  # as they were typed
    flags = config_flags(argv)
    if program is not None:
        main.__spec__ = importlib.util.find_spec(program)  # by which Lightning finds it
        sources = [source.path for source in hydra.runtime.config_sources if source.provider == "command-line"]
        # A launcher's process has not the command line of the sweep.
        flags = [f"--config-name={hydra.job.config_name or 'train'}", *(f"--config-dir={path}" for path in sources)]
    sys.argv = [argv[0], *flags, *words, *paths, "hydra.mode=RUN"]
    with read_write(hydra), open_dict(hydra):
        run_dir, hydra.run.dir = hydra.run.dir, "."  # not used: the ranks get the directory from the environment
    try:
        with passed_to_ranks(directory):
            yield
    finally:
        sys.argv, main.__spec__ = argv, spec
        with read_write(hydra), open_dict(hydra):
            hydra.run.dir = run_dir


class HeldLog(logging.handlers.MemoryHandler):
    """Handler for a job's log file, which keeps the lines in memory until `open_in` names the directory.

    Of the file's name, parent folders are ignored.
    """

    def __init__(self, filename: str) -> None:
        super().__init__(capacity=1)  # once there is a file, each line is written at once
        self._filename = Path(filename).name
        self.addFilter(lambda record: not getattr(record, "heartbeat", False))

    def open_in(self, directory: Path, prefix: str = "") -> None:
        """Writes the kept lines, and from now on each new one, to a file in a directory, named with a prefix."""
        file = logging.FileHandler(directory / f"{prefix}{self._filename}", delay=True)
        file.setFormatter(self.formatter)
        self.setTarget(file)
        self.flush()


class JobOutput:
    """Output of the current job.

    Attributes:
        directory: The job's directory, absolute.
        started: Whether anything may have been written there.
        original: Directory in which the command was called.
    """

    def __init__(self, cfg: DictConfig) -> None:
        self.cfg = cfg
        self.started = False
        self._hydra = cast("Any", HydraConfig.instance().cfg)  # typed as a dataclass, but a DictConfig
        raw = OmegaConf.to_container(self._hydra.hydra.runtime, resolve=False)  # a path may hold `${`
        assert isinstance(raw, dict)
        self.directory = Path(self._hydra.hydra.job.env_set.get(DIRECTORY) or raw["output_dir"])
        self.original = Path(raw["cwd"])

    def start(self) -> None:
        """Writes `.hydra/` and config.yaml and opens the log; called when all checks have passed.

        `.hydra/` of a resumed run stays: it records how the run was first started.
        """
        self.started = True
        rank = given_rank() or 0
        for handler in logging.getLogger().handlers:
            if isinstance(handler, HeldLog):
                # Ranks that Lightning starts have a name of their own.
                handler.open_in(self.directory, "" if rank == 0 else f"rank{rank}_")
        if not is_rank_zero():
            return
        if self.cfg.get("resume") is None:
            run = RunWriter(self.directory)
            run.write_yaml(f"{HYDRA}/{CONFIG}", OmegaConf.to_yaml(self.cfg))
            run.write_yaml(f"{HYDRA}/hydra.yaml", OmegaConf.to_yaml(self._hydra))
            run.write_yaml(OVERRIDES, OmegaConf.to_yaml(self._hydra.hydra.overrides.task))
        write_config(to_plain(self.cfg), self.directory)

    def record_refusal(self, error: Exception) -> None:
        """Records that a job was refused before it started, for the summary of its sweep.

        Writes nothing into a directory that is in use or holds a run, because that run has its own record.
        """
        if self.started or not is_rank_zero() or self.cfg.get("resume") is not None:
            return
        with contextlib.suppress(UserError, OmegaConfBaseException), DirectoryLock(self.directory):
            run = RunWriter(self.directory)
            if run.holds_run():
                return
            run.fail(reason(error))
            self.start()

    @contextlib.contextmanager
    def anchored(self) -> Iterator[None]:
        """Works in the directory in which the run was first started, whatever hydra.job.chdir says."""
        before, place = Path.cwd(), self.original
        if self.cfg.get("resume") is not None:
            with contextlib.suppress(DamagedFileError):
                recorded = RunDirectory(self.directory).provenance().get("working_directory")
                if isinstance(recorded, str) and os.path.isdir(recorded):
                    place = Path(recorded)
        os.chdir(place)
        try:
            yield
        finally:
            os.chdir(before)
