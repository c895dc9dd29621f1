"""The one place where configuration names code: callbacks by `_target_`, and modules to import."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate

from ekd_lightning.errors import UserError

ALLOWED = ("ekd_lightning.", "pytorch_lightning.callbacks.")


def import_user_modules(names: list[str]) -> None:
    """Imports modules that register networks, terms or data sets; the working directory is searched first.

    Raises:
        UserError: For a module that is not there. An error inside the module keeps its traceback.
    """
    if names and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not name.startswith(error.name):
                raise  # it is there, but lacks something itself
            raise UserError(f"imports: no module {name!r} in {os.getcwd()} or the environment") from None


def build(node: dict[str, Any], key: str, modules: Sequence[str] = ()) -> Any:
    """Instantiates a node with a `_target_`.

    Args:
        node: Plain mapping with `_target_` and its arguments.
        key: Where the node stands, for error messages.
        modules: Imported modules of the user's own, allowed beside this package and Lightning's callbacks.

    Returns:
        The object.

    Raises:
        UserError: If a target is missing or outside the allowed packages, or refuses its arguments.
    """
    allowed = (*ALLOWED, *(f"{name}." for name in modules))
    if "_target_" not in node:
        raise UserError(f"{key}: has no _target_")
    for target in _targets(node):
        if not target.startswith(allowed):
            raise UserError(f"{key}._target_={target}: must begin with one of {', '.join(allowed)}")
    try:
        return instantiate(node)
    except InstantiationException as error:
        cause = error.__cause__ or error
        raise UserError(f"{key}: {' '.join(str(cause).split())}") from None


def _targets(node: Any) -> Iterator[str]:
    """Every `_target_` in a node, nested ones included."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield str(node["_target_"])
        node = list(node.values())
    if isinstance(node, list):
        for item in node:
            yield from _targets(item)
