"""Checks of the options of terms and methods: one line that names key, value and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Real

from ekd_lightning.errors import UserError, unknown_name


def number(key: str, value: object, *, above: float | None = None, low: float | None = None) -> float:
    """Checks a finite number.

    Args:
        key: The option's name, for the error.
        value: What was given; strings and booleans are refused, not converted.
        above: Exclusive lower bound, or None.
        low: Inclusive lower bound, or None.

    Returns:
        The value as a float.

    Raises:
        UserError: If it is not a finite number or lies outside the bounds.
    """
    bound = f" > {above:g}" if above is not None else f" >= {low:g}" if low is not None else ""
    # bool is a Real in Python, and `weight: yes` in YAML is a slip, not a 1.
    fits = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    result = float(value) if fits else math.nan  # type: ignore[arg-type]
    if not fits or (above is not None and result <= above) or (low is not None and result < low):
        raise UserError(f"{key}={value!r} is not allowed; give a finite number{bound}")
    return result


def choice(key: str, value: object, allowed: Iterable[str]) -> str:
    """Checks that a value is one of the allowed names.

    Args:
        key: The option's name, for the error.
        value: What was given.
        allowed: The names that exist.

    Returns:
        The value.

    Raises:
        UserError: If it is none of them; offers the nearest one.
    """
    names = tuple(allowed)
    if not isinstance(value, str) or value not in names:
        raise unknown_name(key, value, names)
    return value
