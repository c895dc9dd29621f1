"""Role of a setting: where things lie, how a run is carried out, what makes runs comparable, or what is computed.

Each field of the settings says it in its metadata; whoever asks whether a setting may change reads it there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from typing import Any, get_type_hints


class Role(Enum):
    """What a setting is."""

    LOCATION = "location"
    """Where things are, or whether they may be fetched; what lies there is known by its hash."""
    FREE = "free"
    """How a run is carried out and what is told of it, not what it finds."""
    PROTOCOL = "protocol"
    """What runs must share to be compared."""
    COMPUTED = "computed"
    """Everything else that changes what is found."""


@dataclass(frozen=True)
class Purpose:
    """What a setting is for.

    Attributes:
        role: Its role.
        exact: Of a free one: whether the numbers stay the same to the last bit (others change them by rounding).
        between_parts: Whether it may change when a stopped run goes on, whatever its role.
    """

    role: Role
    exact: bool = True
    between_parts: bool = False


PURPOSE = "purpose"
"""What a field's metadata hold."""
KEYS = "keys"
"""Of a mapping: the metadata of keys that differ from it."""
LOCATION = {PURPOSE: Purpose(Role.LOCATION)}
FREE = {PURPOSE: Purpose(Role.FREE)}
ROUNDING = {PURPOSE: Purpose(Role.FREE, exact=False)}
PROTOCOL = {PURPOSE: Purpose(Role.PROTOCOL)}
COMPUTED = {PURPOSE: Purpose(Role.COMPUTED)}
PART = {PURPOSE: Purpose(Role.COMPUTED, between_parts=True)}


def purposes(settings: type[Any], prefix: str = "") -> Iterator[tuple[str, Purpose]]:
    """Dotted key and purpose of each setting; a group whose field has a purpose counts as one.

    Raises:
        TypeError: For a field without a purpose that is no group.
    """
    hints = get_type_hints(settings)
    for one in fields(settings):
        key = f"{prefix}{one.name}"
        if PURPOSE in one.metadata:
            yield key, one.metadata[PURPOSE]
            for name, part in one.metadata.get(KEYS, {}).items():
                yield f"{key}.{name}", part[PURPOSE]
        elif is_dataclass(hints[one.name]):
            yield from purposes(hints[one.name], f"{key}.")
        else:
            raise TypeError(f"{settings.__name__}.{one.name} does not say what it is for")
