"""What a user's mistake looks like: one line that says what is wrong and what is allowed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_MOST_SHOWN = 12  # beyond that the nearest match says more than the list


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
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    shown = names if len(names) <= _MOST_SHOWN or not near else [*names[:_MOST_SHOWN], "..."]
    return UserError(f"unknown {kind} {name!r}{hint} (allowed: {', '.join(shown) or 'none'})")
