"""Storage of a search's trials: a journal in its folder, or a database that several machines share.

Both keep a description of the search, and refuse a search with another description.
"""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections.abc import Callable, Generator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from ekd_lightning.config.config import changes
from ekd_lightning.errors import UserError, one_line
from ekd_lightning.files import DamagedFileError, UnwritableFileError, read_json, write_json
from ekd_lightning.keys import is_free

DESCRIPTION = "search.json"
_EARLIER_DESCRIPTION = "study.json"  # of versions up to 0.1
JOURNAL = "trials.journal"
_CHECK = "check"
HEARTBEAT_SECONDS = 60
"""Seconds between a trial's signs of life in a database; after twice as long without one it counts as dead."""
_PRUNE_AFTER = 5  # complete trials before the median prunes


def open_study(folder: Path, description: dict[str, Any], *, warmup_steps: int | None, url: str | None) -> optuna.Study:
    """Opens Optuna's study in a folder, or the study in a database that is named after the folder's last two parts.

    Arguments are those of `trials.Search`.

    Raises:
        UserError: If there is a search with another description, or a damaged one; or if the database cannot be opened.
    """
    pruner: optuna.pruners.BasePruner = optuna.pruners.NopPruner()
    if warmup_steps is not None:
        pruner = optuna.pruners.MedianPruner(n_startup_trials=_PRUNE_AFTER, n_warmup_steps=warmup_steps)
    create = partial(optuna.create_study, direction="maximize", pruner=pruner, load_if_exists=True)
    plain = json.loads(json.dumps(description))
    if url is None:
        _check_description(folder, plain)
        return _open_journal(folder / JOURNAL, create)
    _check_description(folder, {**plain, "storage": without_password(url)})
    name = "/".join(folder.absolute().parts[-2:])
    try:
        storage = RDBStorage(url, heartbeat_interval=HEARTBEAT_SECONDS)
        study = create(storage=storage, study_name=name)
        known = study.user_attrs.get("description")
        if known is None:
            study.set_user_attr("description", plain)
    except (SQLAlchemyError, optuna.exceptions.OptunaError, ImportError, ValueError, RuntimeError) as error:
        raise UserError(f"--storage {without_password(url)}: cannot be opened ({one_line(error)})") from None
    _refuse_another(f"--storage {without_password(url)}: its study {name}", known or plain, plain)
    return study


def _check_description(folder: Path, description: dict[str, Any]) -> None:
    """Writes the description of a new search; refuses one that differs from an existing one."""
    places = (folder / name for name in (DESCRIPTION, _EARLIER_DESCRIPTION))
    path = next((place for place in places if place.is_file()), folder / DESCRIPTION)
    if path.is_file():
        _refuse_another(f"{folder}:", read_json(path), description)
    elif (folder / JOURNAL).exists():
        raise UserError(f"{folder}: holds trials but no {DESCRIPTION}; choose another --output")
    else:
        write_json(path, description)


def _refuse_another(where: str, known: dict[str, Any], here: dict[str, Any]) -> None:
    """Refuses another description; seeds of runs, places and the like may differ between processes."""
    known, here = dict(known), dict(here)
    settings = changes(known.pop("config", {}), here.pop("config", {}))
    changed = [f"config.{key}" for key in settings if key != "seed" and not is_free(key, exact=False)]
    if changed := [*changed, *changes(known, here)]:
        raise UserError(
            f"{where} holds a search of another configuration ({', '.join(changed[:5])} differ); "
            "choose another --output, or repeat its settings"
        )


class _Journal(JournalFileBackend):
    """Journal of the trials, one line per event; a last line that a kill or a full disk has cut off is ignored."""

    def __init__(self, path: Path) -> None:
        self._path, self._held = path, JournalFileSymlinkLock(str(path))
        super().__init__(str(path), self._held)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Writes events, all of them or none."""
        checked = ({**log, _CHECK: _checksum(log)} for log in logs)
        text = "".join(f"{json.dumps(log, separators=(',', ':'))}\n" for log in checked).encode()
        self._held.acquire()
        try:
            with self._path.open("r+b") as file:
                whole = file.read()
                end = file.truncate(whole.rfind(b"\n") + 1)
                file.seek(end)
                try:
                    file.write(text)
                    file.flush()
                    os.fsync(file.fileno())
                except OSError:
                    file.truncate(end)
                    raise
        except OSError as error:
            raise UnwritableFileError(f"{self._path}: cannot be written ({error.strerror or error})") from error
        finally:
            self._held.release()

    def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
        """The events from number `log_number_from` on."""
        for log in super().read_logs(log_number_from):
            check = log.pop(_CHECK, None) if isinstance(log, dict) else None
            if check not in (None, _checksum(log)):
                raise DamagedFileError(f"{self._path}: damaged, one of its events was changed")
            yield log


def _checksum(log: Any) -> int:
    return zlib.crc32(json.dumps(log, sort_keys=True).encode())


def _open_journal(path: Path, create: Callable[..., optuna.Study]) -> optuna.Study:
    if os.path.lexists(path) and not path.is_file():
        raise DamagedFileError(f"{path}: damaged, not a regular file")
    try:
        return create(storage=JournalStorage(_Journal(path)), study_name="tune")
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a journal of trials, or damaged ({type(error).__name__})") from None


@contextlib.contextmanager
def named_database(url: str | None) -> Iterator[None]:
    """Turns errors of the database within the block into one line with its URL.

    Raises:
        UserError: If the database is damaged or its server cannot be reached.
    """
    try:
        yield
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        if url is None:
            raise
        cause = error.__cause__ if isinstance(error.__cause__, SQLAlchemyError) else error
        raise UserError(f"--storage {without_password(url)}: cannot be used ({one_line(cause)})") from error


def without_password(url: str) -> str:
    """A database's URL without its password.

    Raises:
        UserError: If it is not a URL of a database.
    """
    try:
        return make_url(url).render_as_string(hide_password=True)
    except ArgumentError:
        raise UserError(f"--storage {url}: not the URL of a database, e.g. sqlite:///tuned.db") from None
