"""Overrides in records, and checks of which of them may be reused.

Overrides of a record may change the settings of a run and, for a sweep, how its jobs are launched. Everything that
could make other code run (flags, Hydra's search path, callbacks and logging, scripts of a launcher, files elsewhere,
modules to import) must come from the user's own command.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import fields, is_dataclass

from ekd_lightning.errors import UserError
from ekd_lightning.settings import Settings

_WORD = re.compile(
    r"(?P<sign>\+{0,2}|~)(?P<key>[A-Za-z_][\w-]*(?:[./][\w-]+)*)(?:@(?P<package>\w+(?:\.[\w-]+)*))?(?:=(?P<value>.*))?",
    re.DOTALL,
)
_GROUPS = {name for name, value in vars(Settings()).items() if is_dataclass(value) or isinstance(value, dict)}
_LAUNCHING = re.compile(
    r"hydra/launcher|hydra\.launcher\.(n_jobs|batch_size|timeout_min|cpus_per_task|gpus_per_node|tasks_per_node|mem_gb"
    r"|nodes|name|partition|qos|account|constraint|exclude|gres|signal_delay_s|max_num_timeout|array_parallelism)"
    r"|hydra\.sweeper\.max_batch_size"
)


def check_words(words: Iterable[object], source: object, *, launching: bool = False) -> list[str]:
    """Checks that a record holds only overrides that may be reused: settings of a run, or of `launching`.

    Raises:
        UserError: At the first word that is no override, or sets anything else.
    """
    checked = [str(word) for word in words]
    for word in checked:
        found = _WORD.fullmatch(word)
        if found is None or not (_launches(found) if launching else _sets(found)):
            what = "how jobs are launched" if launching else "settings of a run"
            raise UserError(
                f"{source}: holds {word!r:.100}, but a record may set only {what}; pass this word in your own command"
            )
    return checked


def launches(word: str) -> bool:
    """Whether an override sets how jobs are launched, and may stand in a record."""
    found = _WORD.fullmatch(word)
    return found is not None and _launches(found)


def _launches(word: re.Match[str]) -> bool:
    plain = re.fullmatch(r"[\w.:@+-]*", word["value"] or "", re.ASCII)  # a newline would end a line of a batch script
    return bool(_LAUNCHING.fullmatch(word["key"]) and plain and not word["package"])


def _sets(word: re.Match[str]) -> bool:
    """Whether an override changes a setting, or selects a file of a configuration group by a plain name."""
    key, value = word["key"], word["value"]
    first = re.split(r"[./]", key)[0]
    if first == "hydra" or (value is None and word["sign"] != "~"):
        return False
    known = {one.name for one in fields(Settings)}
    if word["package"] and word["package"].split(".")[0] not in _GROUPS:  # where the file's content goes
        return False
    if "." in key:
        return first in known
    chooses = first in _GROUPS or first not in known
    return not (chooses and re.search(r"\.\.|://|\$|^\W*/", value or ""))


def require_named_code(recorded: Iterable[str], given: Sequence[str], source: object) -> None:
    """Refuses a record that imports modules unless the user's own command sets `imports`, too."""
    needed = [word for word in recorded if names_code(word)]
    if needed and not any(map(names_code, given)):
        raise UserError(
            f"{source}: was started with {needed[-1]}, but modules are never imported because a record names them; if "
            f"you trust them, add {shlex.quote(needed[-1].lstrip('+'))} to your command"
        )


def names_code(word: str) -> bool:
    """Whether an override names code to import; a new setting that names code belongs here and in `code_of`."""
    found = _WORD.fullmatch(word)
    return found is not None and re.split(r"[./]", found["key"])[0] == "imports" and found["value"] not in (None, "[]")


def code_of(settings: Settings) -> list[str]:
    """Returns the overrides by which settings import code; callbacks are classes of that code or of this package."""
    return [f"imports=[{','.join(settings.imports)}]"] if settings.imports else []
