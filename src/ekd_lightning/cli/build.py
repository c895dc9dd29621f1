"""The one place where configuration names code."""

from __future__ import annotations

from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate

from ekd_lightning.errors import UserError

ALLOWED = ("ekd_lightning.", "pytorch_lightning.callbacks.")


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
