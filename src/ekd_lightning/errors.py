"""Errors of users: one line that says what is wrong and what is allowed; registries and checks that raise them.

Registries know what plugins add, too: those are imported when a name is asked for that the package has not.
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
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import distributions
from typing import TypeVar

STARTED_IN = "EKD_STARTED_IN"
"""Environment variable: where the user called the command, whatever a record says of its working directory."""
PLUGINS = "ekd_lightning.plugins"
"""Group of the entry points by which installed packages add networks, data sets, terms and augmentations."""
loaded_plugins: dict[str, str] = {}
"""Modules that were imported as plugins, each with its package's name and version."""
_MOST_SHOWN = 12  # beyond that the nearest match says more than the list


_T = TypeVar("_T")
_NamedT = TypeVar("_NamedT")


class UserError(ValueError):
    """A mistake in what the user asked for or supplied; shown as one line, without a traceback."""


def unknown_name(kind: str, name: object, allowed: Iterable[str]) -> UserError:
    """Builds the error for a name that is not in a registry, with the nearest match.

    Args:
        kind: What the name stands for, e.g. "network".
        name: The name that was given.
        allowed: The names that exist.

    Returns:
        The error, ready to be raised.
    """
    names = sorted(allowed)
    lower = {known.lower(): known for known in names}
    near = difflib.get_close_matches(str(name).lower(), lower, n=1, cutoff=0.5)
    hint = f"; did you mean {lower[near[0]]!r}?" if near else ""
    shown = names if len(names) <= _MOST_SHOWN or not near else [*names[:_MOST_SHOWN], "..."]
    return UserError(f"unknown {kind} {name!r}{hint} (allowed: {', '.join(shown) or 'none'})")


class Registry(dict[str, _T]):
    """Things by name; looking up an unknown name raises a `UserError` that offers the nearest one.

    Args:
        kind: What the names stand for, e.g. "network".
        things: Those that are there from the start.
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
        """Returns all names, those of plugins among them, sorted."""
        load_plugins()
        return sorted(self)

    def register(self, name: str) -> Callable[[_NamedT], _NamedT]:
        """Returns a decorator that registers a class or function under a name.

        Raises:
            ValueError: If another one has the name already (when the decorator is applied). The same one defined anew,
                as in a notebook cell that is run twice, replaces the old one.
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
    """Imports, once, the modules that installed packages offer as entry points of the group `ekd_lightning.plugins`.

    Packages in the working directory, and in that in which the command was called, are not installed: such folders may
    come from anybody.

    Raises:
        UserError: For a module that cannot be imported.
    """
    if _searched:
        return
    _searched.append(True)  # before: plugins look names up while they are imported
    here = {os.path.realpath(place) for place in (os.getcwd(), os.environ.get(STARTED_IN) or ".")}
    installed = distributions(path=[place for place in sys.path if place and os.path.realpath(place) not in here])
    for package in installed:
        for entry in package.entry_points.select(group=PLUGINS):
            try:
                importlib.import_module(entry.module)
            except Exception as error:
                _searched.clear()
                raise UserError(
                    f"plugin {entry.name!r} of the package {package.name} cannot be imported "
                    f"({type(error).__name__}: {one_line(error)}); without that package everything else works"
                ) from error
            loaded_plugins[entry.module] = f"{package.name} {package.version}"


def few(names: Sequence[str], most: int = 3) -> str:
    """Joins the first `most` names, and counts the others."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def require(extra: str, *packages: str) -> None:
    """Refuses what needs a package that is not installed.

    Args:
        extra: The extra of this project that holds them.
        packages: As they are imported.

    Raises:
        UserError: Naming the first that is missing, and how to install it.
    """
    for name in packages:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"{name} is not installed: pip install 'ekd-lightning[{extra}]'")


def one_line(error: Exception, most: int = 160) -> str:
    """What an error says, in one line of at most `most` characters; its type where it says nothing."""
    return textwrap.shorten(str(error), most, placeholder=" …") or type(error).__name__


# A place that cannot be written is the user's to change; other OSErrors may be bugs.
_PLACE_ERRORS = (
    *(errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.EROFS),
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENAMETOOLONG, errno.ELOOP),
)
_NO_MEMORY = re.compile(r"out of memory|not enough memory|can't allocate memory|CUBLAS_STATUS_ALLOC_FAILED")


def users_line(error: BaseException) -> str | None:
    """One line on what the user can change: a mistake, a place, too little memory; None for a bug of ours."""
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return text
    if isinstance(error, OSError) and error.errno in _PLACE_ERRORS:
        return f"{error.filename or 'output'}: {error.strerror}"
    no_memory = isinstance(error, RuntimeError) and _NO_MEMORY.search(text)  # PyTorch's, of the host and of CUDA
    if no_memory or isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        said = text[:160] or type(error).__name__
        return f"out of memory ({said}); smaller batches, or fewer jobs at a time, need less"
    return None


def reason(error: BaseException) -> str:
    """What went wrong, in one line; with the error's type where it is a bug of ours."""
    return users_line(error) or f"{type(error).__name__}: {' '.join(str(error).split())}"


@contextmanager
def quiet(*names: str | None, level: int = logging.ERROR) -> Iterator[None]:
    """Keeps warnings, and what these loggers (None: the root) say below `level`, to itself for a while."""
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
