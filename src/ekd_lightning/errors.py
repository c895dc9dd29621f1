"""User errors, each one line with what is wrong and what is accepted, and registries and checks that raise them.

A registry imports the installed plugins when it is asked for a name that the package does not have.
"""

from __future__ import annotations

import difflib
import errno
import importlib.util
import logging
import os
import re
import sys
import textwrap
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import distributions
from typing import TypeVar

STARTED_IN = "EKD_STARTED_IN"
"""Environment variable: the directory in which the user called the command, even if a run works in another one."""
PLUGINS = "ekd_lightning.plugins"
"""Entry point group by which installed packages add networks, data sets, terms and augmentations."""
loaded_plugins: dict[str, str] = {}
"""Imported plugin modules, each with the name and version of its package."""
_MOST_SHOWN = 12  # names in a message; of more the nearest match is enough


_T = TypeVar("_T")
_NamedT = TypeVar("_NamedT")


class UserError(ValueError):
    """A mistake in what the user asked for or supplied; shown as one line, without a traceback."""


def unknown_name(kind: str, name: object, allowed: Iterable[str]) -> UserError:
    """Returns the error for a name of a `kind` (e.g. "network") that is not allowed, with the nearest match."""
    names = sorted(allowed)
    lower = {known.lower(): known for known in names}
    near = difflib.get_close_matches(str(name).lower(), lower, n=1, cutoff=0.5)
    hint = f"; did you mean {lower[near[0]]!r}?" if near else ""
    shown = names if len(names) <= _MOST_SHOWN or not near else [*names[:_MOST_SHOWN], "..."]
    return UserError(f"unknown {kind} {name!r}{hint} (allowed: {', '.join(shown) or 'none'})")


class Registry(dict[str, _T]):
    """Mapping of names to objects; an unknown name raises a `UserError` that offers the nearest one.

    `kind` says in messages what the names stand for, e.g. "network".
    """

    def __init__(self, kind: str, things: Mapping[str, _T] | None = None) -> None:
        super().__init__(things or {})
        self.kind = kind

    def __missing__(self, name: str) -> _T:
        names = self.names()
        if name not in self:
            raise unknown_name(self.kind, name, names)
        return self[name]

    def names(self) -> list[str]:
        """Returns all names, including those of plugins, sorted."""
        load_plugins()
        return sorted(self)

    def register(self, name: str) -> Callable[[_NamedT], _NamedT]:
        """Returns a decorator that registers a class or function under a name.

        Raises:
            ValueError: If another object has the name, when the decorator is applied. A second definition of the same
                object, as in a notebook cell that is run twice, replaces the first.
        """

        def decorate(thing: _NamedT) -> _NamedT:
            if name in self and _origin(self[name]) != _origin(thing):
                raise ValueError(
                    f"{self.kind} {name!r} is registered twice: by {_origin(self[name])} and by {_origin(thing)}"
                )
            self[name] = thing  # type: ignore[assignment]
            return thing

        return decorate


def _origin(thing: object) -> str:
    return f"{getattr(thing, '__module__', '?')}.{getattr(thing, '__qualname__', thing)}"


_searched: list[bool] = []


def load_plugins() -> None:
    """Imports the plugins of installed packages: the modules of the entry point group `ekd_lightning.plugins`.

    Only the first call does. Packages in the working directory, or in the directory in which the command was called,
    are ignored: such folders may come from anybody.

    Raises:
        UserError: If a plugin cannot be imported.
    """
    if _searched:
        return
    _searched.append(True)  # before: plugins look names up while they are imported
    ignored = {os.path.realpath(place) for place in (os.getcwd(), os.environ.get(STARTED_IN) or ".")}
    installed = distributions(path=[place for place in sys.path if place and os.path.realpath(place) not in ignored])
    for package in installed:
        for entry in package.entry_points.select(group=PLUGINS):
            try:
                importlib.import_module(entry.module)
            except Exception as error:
                _searched.clear()
                raise UserError(
                    f"plugin {entry.name!r} of the package {package.name} cannot be imported "
                    f"({type(error).__name__}: {one_line(error)}); update or uninstall that package"
                ) from error
            loaded_plugins[entry.module] = f"{package.name} {package.version}"


def require_type(name: str, value: object, *kinds: type) -> None:
    """Refuses a value that is of none of some classes; `name` is that of the argument, for the `UserError`."""
    if not isinstance(value, kinds):
        wanted = " or ".join(kind.__name__.removesuffix("Type") for kind in kinds)
        raise UserError(f"{name} must be a {wanted}, not a {type(value).__name__}")


def few(names: Sequence[str], most: int = 3) -> str:
    """Joins the first `most` names and counts the others."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def require(extra: str, *packages: str, or_else: str = "") -> None:
    """Checks that optional packages, given by their import names, are installed.

    Raises:
        UserError: Naming the first missing package, the extra of this project that installs it, and how to do without.
    """
    for name in packages:
        if importlib.util.find_spec(name) is None:
            other = f", or {or_else}" if or_else else ""
            raise UserError(f"{name} is not installed: pip install 'ekd-lightning[{extra}]'{other}")


def one_line(error: Exception, most: int = 160) -> str:
    """Returns an error's message in one line of at most `most` characters; its type's name if it has no message."""
    return textwrap.shorten(str(error), most, placeholder=" …") or type(error).__name__


def raised(error: Exception) -> str:
    """Returns an error's type, message and place in one line, for errors in code of the user."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({os.path.basename(frames[-1].filename)}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {one_line(error)}{place}"


# The user can choose another path or make space; other OSErrors may be bugs.
_PATH_ERRORS = (
    *(errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.EROFS),
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENAMETOOLONG, errno.ELOOP),
)
_NO_MEMORY = re.compile(r"out of memory|not enough memory|can't allocate memory|CUBLAS_STATUS_ALLOC_FAILED")


def users_line(error: BaseException) -> str | None:
    """Returns one line on an error that the user can mend (a mistake, a path, too little memory); else None."""
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return text
    if isinstance(error, OSError) and error.errno in _PATH_ERRORS:
        return f"{error.filename or 'output'}: {error.strerror}"
    no_memory = isinstance(error, RuntimeError) and _NO_MEMORY.search(text)  # PyTorch's, of the host and of CUDA
    if no_memory or isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        detail = text[:160] or type(error).__name__
        return f"out of memory ({detail}); use smaller batches, or run fewer jobs at a time"
    return None


def reason(error: BaseException) -> str:
    """Returns what went wrong in one line; with the error's type if the user cannot mend it."""
    return users_line(error) or f"{type(error).__name__}: {' '.join(str(error).split())}"


@contextmanager
def quiet(*names: str | None, level: int = logging.ERROR) -> Iterator[None]:
    """Suppresses warnings, and messages below `level` of the named loggers (None: the root), within the block."""
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(level)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, old in zip(loggers, before, strict=True):
            logger.setLevel(old)
