"""The one place where configuration names code: callbacks by `_target_`, and modules to import."""

from __future__ import annotations

import importlib
import os
import sys
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


def build(node: dict[str, Any], key: str) -> Any:
    """Instantiates a node with a `_target_`.

    Args:
        node: Plain mapping with `_target_` and its arguments.
        key: Where the node stands, for error messages.

    Returns:
        The object.

    Raises:
        UserError: If the target is missing, outside the allowed packages, or refuses its arguments.
    """
    target = str(node.get("_target_", ""))
    if not target.startswith(ALLOWED):
        raise UserError(f"{key}._target_={target or None}: must begin with one of {', '.join(ALLOWED)}")
    try:
        return instantiate(node)
    except InstantiationException as error:
        cause = error.__cause__ or error
        raise UserError(f"{key}: {' '.join(str(cause).split())}") from None
