"""Opens the directory of a finished run again: its settings, result and student."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ekd_lightning.config.build import import_user_modules
from ekd_lightning.config.config import CONFIG_FILE, to_settings
from ekd_lightning.errors import UserError
from ekd_lightning.networks import BranchedStudent, load_student
from ekd_lightning.pipeline.run import STUDENT
from ekd_lightning.settings import Settings


@dataclass(frozen=True)
class FinishedRun:
    """What a run left behind.

    Attributes:
        directory: The run's directory.
        settings: The settings it ran with, but for places that were overridden on opening.
        result: Content of result.json.
        student: The student with the weights after the last epoch, on the CPU, in eval mode.
    """

    directory: Path
    settings: Settings
    result: dict[str, Any]
    student: BranchedStudent


def open_run(directory: Path, overrides: Sequence[str] = ()) -> FinishedRun:
    """Reads a finished run; modules of the user's own that it imported are imported again.

    Args:
        directory: The run's directory.
        overrides: `key=value` for places that are elsewhere by now, e.g. `data.root=/data`.

    Raises:
        UserError: If it is not the directory of a run, the run is not done, or a file is damaged, or a module
            that it imported is not there.
    """
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory")
    settings, result = _read_settings(directory, overrides), read_result(directory)
    import_user_modules(settings.imports)  # its student, data and terms may be the user's own
    return FinishedRun(directory, settings, result, load_student(directory / STUDENT))


def read_result(directory: Path) -> dict[str, Any]:
    """Reads result.json of a run that is done.

    Raises:
        UserError: If the run is not done, or a file is missing, half-written or something else.
    """
    status = _read_json(directory / "status.json")
    state = status.get("state")
    if state != "done":
        error = f" ({status['error']})" if status.get("error") else ""
        raise UserError(f"{directory}: the run is not done, its status is {state!r}{error}")
    return _read_json(directory / "result.json")


def _read_settings(directory: Path, overrides: Sequence[str]) -> Settings:
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"{directory}: not the directory of a run (it has no {CONFIG_FILE})")
    try:
        schema = OmegaConf.structured(Settings)
        merged = OmegaConf.merge(schema, OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides)))
    except Exception as error:  # YAML and OmegaConf raise many kinds
        raise UserError(
            f"{path}: not a configuration of this version ({str(error).splitlines()[0]})"
        ) from None
    assert isinstance(merged, DictConfig)
    return to_settings(merged)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path.parent}: not the directory of a finished run (it has no {path.name})")
    try:
        content = json.loads(path.read_text())
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: damaged or half-written ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a record of this package (a {type(content).__name__})")
    return content
