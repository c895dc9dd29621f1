"""From Hydra's composed configuration to typed settings, and back to plain containers for the record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from ekd_lightning.errors import UserError
from ekd_lightning.training.record import write_text
from ekd_lightning.training.settings import Settings

CONFIG_FILE = "config.yaml"


def register_schema() -> None:
    """Makes the typed schema known to Hydra as `ekd_schema`; conf/train.yaml starts from it."""
    ConfigStore.instance().store(name="ekd_schema", node=Settings)


def to_settings(cfg: DictConfig) -> Settings:
    """Resolves a composed configuration into typed settings.

    Raises:
        UserError: If a mandatory value (`???`) is missing.
    """
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise UserError(f"{missing[0]}: must be given on the command line")
    settings = OmegaConf.to_object(cfg)
    assert isinstance(settings, Settings)  # the schema is the root of the defaults list
    return settings


def to_plain(cfg: DictConfig) -> dict[str, Any]:
    """The resolved configuration as nested plain containers, as loggers and files want it."""
    plain = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def write_config(plain: dict[str, Any], directory: Path) -> None:
    """Writes the resolved configuration into the run's directory."""
    write_text(directory / CONFIG_FILE, OmegaConf.to_yaml(OmegaConf.create(plain)))


def read_config(directory: Path) -> dict[str, Any]:
    """Reads what `write_config` wrote.

    Raises:
        UserError: If the directory is not that of a run.
    """
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"resume={directory}: not the directory of a run (it has no {CONFIG_FILE})")
    plain = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def changed_keys(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Dotted keys whose values differ between two plain configurations."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = list(dict.fromkeys([*old, *new]))
        return [
            key
            for name in names
            for key in changed_keys(old.get(name), new.get(name), f"{prefix}.{name}".lstrip("."))
        ]
    return [] if old == new else [prefix]
