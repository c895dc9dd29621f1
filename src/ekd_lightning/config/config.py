"""Configuration of a job: from what Hydra composed to typed settings, and back to plain containers for the record.

Hydra would open a job's log and write `.hydra/` before our function runs. Here both are held back until the checks of
the run have passed (`JobOutput.start`): what is refused leaves no trace.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ekd_lightning.config.build import import_user_modules
from ekd_lightning.errors import UserError, unknown_name
from ekd_lightning.files import DamagedFileError, write_yaml
from ekd_lightning.runs.directory import CONFIG, HYDRA, RunDirectory
from ekd_lightning.runs.lock import DirectoryLock
from ekd_lightning.runs.provenance import is_rank_zero
from ekd_lightning.settings import Settings, is_path, keys_where

PLACES = keys_where(is_path)
"""Settings that are paths of folders."""
DIRECTORY = "EKD_RUN_DIRECTORY"
"""Environment variable in which a process hands the run's directory to the ranks that it starts."""


def register_schema() -> None:
    """Makes the typed schema known to Hydra as `ekd_schema`; conf/train.yaml starts from it."""
    ConfigStore.instance().store(name="ekd_schema", node=Settings)


def compose_settings(*overrides: str) -> Settings:
    """Composes settings as `ekd-train` would, for notebooks and scripts.

    Args:
        overrides: As on the command line, e.g. "method=kd_mean", "data.fraction=0.1".

    Returns:
        Typed settings, to be changed or handed to `ekd_lightning.pipeline.run.run`.
    """
    register_schema()
    with initialize_config_module("ekd_lightning.conf", version_base="1.3"):
        return to_settings(compose("train", overrides=list(overrides)))


def to_settings(cfg: DictConfig) -> Settings:
    """Resolves a composed configuration into typed settings.

    Raises:
        UserError: If a mandatory value (`???`) is missing, or a key is unknown.
    """
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise UserError(f"{missing[0]}: must be given on the command line")
    settings = OmegaConf.to_object(cfg)
    assert isinstance(settings, Settings)  # the schema is the root of the defaults list
    _refuse_unknown_keys(settings)
    return settings


def _refuse_unknown_keys(settings: Any, prefix: str = "") -> None:
    """Finds what `+key=value` added: Hydra lets a plus pass the schema."""
    known = [item.name for item in fields(settings)]
    for name, value in vars(settings).items():
        if name not in known:
            raise unknown_name("key", f"{prefix}{name}", (f"{prefix}{other}" for other in known))
        if is_dataclass(value):
            _refuse_unknown_keys(value, f"{prefix}{name}.")


def to_plain(cfg: DictConfig) -> dict[str, Any]:
    """The resolved configuration as nested plain containers, as loggers and files want it."""
    plain = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def write_config(plain: dict[str, Any], directory: Path) -> None:
    """Writes the resolved configuration into the run's directory."""
    RunDirectory(directory).write_config(OmegaConf.to_yaml(OmegaConf.create(plain)))


def read_config(directory: Path) -> dict[str, Any]:
    """Reads what `write_config` wrote.

    Raises:
        UserError: If the directory is not that of a run, or the file is damaged.
    """
    run = RunDirectory(directory)
    if run.file(CONFIG) is None:
        raise UserError(f"resume={directory}: not the directory of a run (it has no {CONFIG})")
    return run.config()


def recorded_settings(run: RunDirectory, overrides: Sequence[str] = ()) -> Settings:
    """The settings of a run that is on disk; modules of the user's own that it imported are imported again.

    Args:
        run: The run.
        overrides: `key=value` for places that are elsewhere by now, e.g. `data.root=/data`.

    Raises:
        UserError: If it is not the directory of a run, the file is damaged or not of this version, or a module that
            the run imported is not there.
    """
    if not run.path.is_dir():
        raise UserError(f"{run.path}: no such directory")
    if (path := run.file(CONFIG)) is None:
        raise UserError(f"{run.path}: not the directory of a run (it has no {CONFIG})")
    schema = OmegaConf.structured(Settings)
    try:
        merged = OmegaConf.merge(schema, _where_it_was_started(run), OmegaConf.from_dotlist(list(overrides)))
    except (ValueError, OmegaConfBaseException) as error:
        raise UserError(f"{path}: not a configuration of this version ({str(error).splitlines()[0]})") from None
    assert isinstance(merged, DictConfig)
    settings = to_settings(merged)
    import_user_modules(settings.imports)  # its student, data and terms may be the user's own
    return settings


def _where_it_was_started(run: RunDirectory) -> dict[str, Any]:
    """A run's configuration, with relative places that are still there as they were meant where it was started."""
    config, start = run.config(), run.provenance().get("working_directory")
    for key in PLACES:
        section, name = key.split(".")
        value = (config.get(section) or {}).get(name)
        if isinstance(value, str) and isinstance(start, str) and Path(start, value).exists():
            config[section][name] = str(Path(start, value))
    return config


def changed_keys(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Dotted keys whose values differ between two plain configurations.

    A setting that the version of the old one did not know had what is its default now.
    """
    return list(_changed(old, new, asdict(Settings()), ""))


def _changed(old: Any, new: Any, default: Any, prefix: str) -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in dict.fromkeys([*old, *new]):
            usual = default.get(name) if isinstance(default, dict) else None
            before = old.get(name, usual if name in new else None)
            yield from _changed(before, new.get(name), usual, f"{prefix}.{name}".lstrip("."))
    elif old != new:
        yield prefix


class HeldLog(logging.FileHandler):
    """Log file of a job: its lines are kept until `open_in` says where they belong.

    Args:
        filename: Name in the job's directory.
    """

    def __init__(self, filename: str) -> None:
        super().__init__(filename, delay=True)
        self.name_in_directory = Path(filename).name
        self._held: list[logging.LogRecord] | None = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keeps a line, or writes it."""
        if self._held is None:
            super().emit(record)
        else:
            self._held.append(record)

    def open_in(self, directory: Path) -> None:
        """Writes all lines into the directory, those to come at once."""
        self.baseFilename = str(directory / self.name_in_directory)
        held, self._held = self._held or [], None
        for record in held:
            self.emit(record)


class JobOutput:
    """Where the job that runs here writes.

    Args:
        cfg: The job's configuration.

    Attributes:
        directory: The job's, absolute.
        started: Whether anything may have been written there.
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
        """Writes what was held back: `.hydra/` and config.yaml, and opens the log; called when all checks have passed.

        `.hydra/` of a resumed run stays: it says what the run was first started with.
        """
        self.started = True
        rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
        for handler in logging.getLogger().handlers:
            if isinstance(handler, HeldLog):
                if rank != "0":  # those that Lightning starts have a name of their own
                    handler.name_in_directory = f"rank{rank}_{handler.name_in_directory}"
                handler.open_in(self.directory)
        if not is_rank_zero():
            return
        if self.cfg.get("resume") is None:
            folder = self.directory / HYDRA
            write_yaml(folder / "config.yaml", OmegaConf.to_yaml(self.cfg))
            write_yaml(folder / "hydra.yaml", OmegaConf.to_yaml(self._hydra))
            write_yaml(folder / "overrides.yaml", OmegaConf.to_yaml(self._hydra.hydra.overrides.task))
        write_config(to_plain(self.cfg), self.directory)

    def record_refusal(self, error: Exception) -> None:
        """Leaves the record of a job of a sweep that was refused before it started, so that the sweep knows of it.

        Nothing is written where another process is at work, or where a run lies: its record says what it goes on with.
        """
        if self.started or not is_rank_zero() or self.cfg.get("resume") is not None:
            return
        with contextlib.suppress(UserError, OmegaConfBaseException), DirectoryLock(self.directory):
            run = RunDirectory(self.directory)
            if run.holds_run():
                return
            run.fail(" ".join(str(error).split()))
            self.start()

    @contextlib.contextmanager
    def anchored(self) -> Iterator[None]:
        """Lets relative places mean what they meant where the run was first started, whatever hydra.job.chdir says."""
        before = Path.cwd()
        os.chdir(self._anchor())
        try:
            yield
        finally:
            os.chdir(before)

    def _anchor(self) -> Path:
        if self.cfg.get("resume") is not None:
            with contextlib.suppress(DamagedFileError):
                recorded = RunDirectory(self.directory).provenance().get("working_directory")
                if isinstance(recorded, str) and os.path.isdir(recorded):
                    return Path(recorded)
        return self.original


def resolved(config: DictConfig, key: str) -> str:
    """A value that may ask for `${hydra:...}`, which Hydra knows only once a job has started."""
    instance = HydraConfig.instance()
    before = instance.cfg
    try:
        instance.set_config(config)
        return str(OmegaConf.select(config, key))
    finally:
        instance.cfg = before
