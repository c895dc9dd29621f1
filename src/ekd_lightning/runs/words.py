"""Overrides in records, and which of them may be used again.

A record never names code. Its words set settings of a run and, of a sweep, how many jobs run where. All that could
make something else run (flags, Hydra's search path, callbacks and logging, scripts of a launcher, files elsewhere,
modules to import) is taken from the user's own command alone.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import fields, is_dataclass

from ekd_lightning.errors import UserError
from ekd_lightning.settings import Settings

_WORD = re.compile(r"(?P<sign>\+{0,2}|~)(?P<key>[A-Za-z_][\w-]*(?:[./][\w-]+)*)(?:=(?P<value>.*))?", re.DOTALL)
_GROUPS = {name for name, value in vars(Settings()).items() if is_dataclass(value) or isinstance(value, dict)}
_LAUNCHING = re.compile(
    r"hydra/launcher|hydra\.launcher\.(n_jobs|batch_size|timeout_min|cpus_per_task|gpus_per_node|tasks_per_node|mem_gb"
    r"|nodes|name|partition|qos|account|constraint|exclude|gres|signal_delay_s|max_num_timeout|array_parallelism)"
    r"|hydra\.sweeper\.max_batch_size"
)


def check_words(words: Iterable[object], source: object, *, launching: bool = False) -> list[str]:
    """Checks that a record's overrides are ones that a record may hold.

    Args:
        words: Overrides as they are recorded.
        source: Where they stand, for error messages.
        launching: Whether they say how jobs are launched; else they are settings of a run.

    Returns:
        The words.

    Raises:
        UserError: At the first word that is none, or sets something else.
    """
    checked = [str(word) for word in words]
    for word in checked:
        found = _WORD.fullmatch(word)
        if found is None or not (_launches(found) if launching else _sets(found)):
            what = "how jobs are launched" if launching else "settings of a run"
            raise UserError(
                f"{source}: holds {word!r:.100}, but a record may set only {what}; pass all else in your command"
            )
    return checked


def _launches(word: re.Match[str]) -> bool:
    plain = re.fullmatch(r"[\w.:@+-]*", word["value"] or "", re.ASCII)  # a newline would end a line of a batch script
    return bool(_LAUNCHING.fullmatch(word["key"]) and plain)


def _sets(word: re.Match[str]) -> bool:
    """Whether an override sets a setting, or selects a configuration file that the user's command reads."""
    key, value = word["key"], word["value"]
    first = re.split(r"[./]", key)[0]
    if first == "hydra" or (value is None and word["sign"] != "~"):
        return False
    known = {one.name for one in fields(Settings)}
    if "." in key:
        return first in known
    chooses = first in _GROUPS or first not in known
    return not (chooses and re.search(r"\.\.|://|\$|^\W*/", value or ""))


def require_named_code(recorded: Iterable[str], given: Sequence[str], source: object) -> None:
    """Refuses to import modules of a record unless the user's own command names them, too.

    Args:
        recorded: Overrides of the record.
        given: Those of the command.
        source: What holds the record, for error messages.

    Raises:
        UserError: Naming the word that the command lacks.
    """
    needed = [word for word in recorded if names_code(word)]
    if needed and not any(map(names_code, given)):
        raise UserError(
            f"{source}: was started with {needed[-1]}, which imports code, and a record never does: if you trust these "
            f"modules, add {shlex.quote(needed[-1].lstrip('+'))} to your command"
        )


def names_code(word: str) -> bool:
    """Whether an override names code to import; a new setting that does must be added here and in `code_of`."""
    found = _WORD.fullmatch(word)
    return found is not None and re.split(r"[./]", found["key"])[0] == "imports" and found["value"] not in (None, "[]")


def code_of(settings: Settings) -> list[str]:
    """Returns the code that settings name, as overrides; callbacks are classes of that code or of this package."""
    return [f"imports=[{','.join(settings.imports)}]"] if settings.imports else []
