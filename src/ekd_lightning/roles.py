"""Role of a setting: where things lie, how a run is carried out, what makes runs comparable; and the values it takes.

Each field of the settings says both in its metadata; whoever asks whether a setting may change, or have a value, reads
it there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

from ekd_lightning.errors import UserError, unknown_name


class Role(Enum):
    """What a setting is."""

    LOCATION = "location"
    """Where things are, or whether they may be fetched; what lies there is known by its hash."""
    FREE = "free"
    """How a run is carried out and reported, without effect on its results."""
    PROTOCOL = "protocol"
    """What runs must share to be compared."""
    COMPUTED = "computed"
    """Everything else that affects the results."""


@dataclass(frozen=True)
class Purpose:
    """What a setting is for.

    Attributes:
        role: Its role.
        exact: Of a free one: whether the numbers stay the same to the last bit (others change them by rounding).
        between_parts: Whether it may change when a stopped run continues, whatever its role.
    """

    role: Role
    exact: bool = True
    between_parts: bool = False


PURPOSE = "purpose"
"""What a field's metadata hold."""
WORDS = "words"
"""What a field's metadata hold where a value is one of these words, or else the path of a place."""
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


def paths(settings: type[Any], prefix: str = "") -> Iterator[tuple[str, tuple[str, ...]]]:
    """Dotted key of each setting that can be the path of a place, and its values that are words instead."""
    hints = get_type_hints(settings)
    for one in fields(settings):
        key, purpose = f"{prefix}{one.name}", one.metadata.get(PURPOSE)
        if WORDS in one.metadata or (hints[one.name] is str and purpose and purpose.role is Role.LOCATION):
            yield key, one.metadata.get(WORDS, ())
        elif is_dataclass(hints[one.name]):
            yield from paths(hints[one.name], f"{key}.")


# -- values ---------------------------------------------------------------------------------------------

ALLOWED = "allowed"
"""What a field's metadata hold where not every value of its type will do: a `Range`, or a tuple of names."""


@dataclass(frozen=True)
class Range:
    """Finite numbers between two bounds.

    Attributes:
        low: The smallest, or with `above` what all are larger than.
        high: The largest, or with `below` what all are smaller than.
    """

    low: float
    high: float = math.inf
    above: bool = False
    below: bool = False

    def check(self, key: str, value: object) -> None:
        """Refuses what lies outside.

        Raises:
            UserError: Naming the key, the value and what is allowed.
        """
        if not is_of(value, float) or not math.isfinite(value):  # type: ignore[arg-type]
            raise UserError(f"{key}={value}: must be a finite number")
        inside = value > self.low if self.above else value >= self.low  # type: ignore[operator]
        if not inside or value > self.high or (self.below and value == self.high):  # type: ignore[operator]
            raise UserError(f"{key}={value}: must be {self._allowed(value)}")

    def _allowed(self, value: object) -> str:
        if isinstance(value, float) and self.high < math.inf:
            return f"in {'[('[self.above]}{self.low:g}, {self.high:g}{'])'[self.below]}"
        if value > self.high:  # type: ignore[operator]
            return f"at most {self.high}"
        return "positive" if self.above and not self.low else f"{'above' if self.above else 'at least'} {self.low}"


LARGEST = 2**31 - 1
COUNT = {ALLOWED: Range(1, LARGEST)}
COUNT_OR_NONE = {ALLOWED: Range(0, LARGEST)}
NOT_NEGATIVE = {ALLOWED: Range(0)}
POSITIVE = {ALLOWED: Range(0, above=True)}
SHARE = {ALLOWED: Range(0, 1, above=True)}
SEED = {ALLOWED: Range(0, 2**64 - 1)}
TEMPERATURE = {ALLOWED: Range(0.01, 1e4)}
"""T² and logits / T stay far from the ends of float32."""


def one_of(*names: str) -> dict[str, Any]:
    """Metadata of a setting that takes one of a few names."""
    return {ALLOWED: names}


def check_values(settings: Any, prefix: str = "") -> None:
    """Refuses values that the metadata of a group of settings, or of one below it, do not allow; None always is.

    Args:
        settings: A dataclass.
        prefix: Its dotted key and a dot, for messages.

    Raises:
        UserError: At the first such value, naming its key and what is allowed.
    """
    for one in fields(settings):
        key, value = f"{prefix}{one.name}", getattr(settings, one.name)
        check_value(key, value, one.metadata)
        for name, metadata in one.metadata.get(KEYS, {}).items():
            check_value(f"{key}.{name}", value.get(name), metadata)
        if is_dataclass(value):
            check_values(value, f"{key}.")


def check_value(key: str, value: object, metadata: Mapping[str, Any]) -> None:
    """Refuses a value that metadata do not allow; None always is.

    Raises:
        UserError: Naming the key, the value and what is allowed.
    """
    allowed = metadata.get(ALLOWED)
    if value is None or allowed is None:
        return
    if isinstance(allowed, Range):
        allowed.check(key, value)
    elif value not in allowed:
        raise unknown_name(key, value, allowed)


# -- effect ---------------------------------------------------------------------------------------------

BESIDE = "beside"
"""Metadata of a field that counts only with some values of another setting."""
Condition = tuple[str, str, Callable[[Any], object]]
"""Dotted key of a setting, that of another one, and for which values of that the first counts."""


def beside(key: str, counts: Callable[[Any], object] = bool) -> dict[str, Any]:
    """Metadata of a setting that counts only beside some values of another one.

    Args:
        key: The other one: its name in the same group, or with dots its whole key.
        counts: For which of its values; by default for any but null, false and what is empty.
    """
    return {BESIDE: (key, counts)}


def conditions(settings: type[Any], prefix: str = "") -> Iterator[Condition]:
    """All settings that count only beside some values of others."""
    hints = get_type_hints(settings)
    for one in fields(settings):
        key = f"{prefix}{one.name}"
        parts = {key: one.metadata} | {f"{key}.{name}": part for name, part in one.metadata.get(KEYS, {}).items()}
        for name, metadata in parts.items():
            if BESIDE in metadata:
                other, counts = metadata[BESIDE]
                yield name, other if "." in other else f"{name.rpartition('.')[0]}.{other}", counts
        if is_dataclass(hints[one.name]):
            yield from conditions(hints[one.name], f"{key}.")


def is_of(value: Any, hint: Any) -> bool:
    """Whether a plain value, as YAML gives it, is of an annotated type.

    A whole number will do for a float; true and false are no numbers.
    """
    kind, inner = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        return any(is_of(value, one) for one in inner)
    if kind is Literal:
        return any(value == one and type(value) is type(one) for one in inner)
    if kind in (list, dict):
        values = value.values() if isinstance(value, dict) else value
        fits = isinstance(value, (list, tuple) if kind is list else dict)
        return fits and all(is_of(one, inner[-1]) for one in values)
    if is_typeddict(hint):
        return isinstance(value, Mapping) and all(is_of(value.get(k), one) for k, one in get_type_hints(hint).items())
    if hint in (int, float):
        return isinstance(value, (int, float) if hint is float else int) and not isinstance(value, bool)
    known = kind or hint
    return hint is Any or not isinstance(known, type) or isinstance(value, known)


def name_of_type(hint: Any) -> str:
    """An annotated type in words, e.g. `int, float or null`."""
    inner = get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        *names, last = dict.fromkeys(name_of_type(one) for one in inner)
        return f"{', '.join(names)} or {last}" if names else last
    if get_origin(hint) is Literal:
        return ", ".join(map(str, inner))
    return "null" if hint is type(None) else str(getattr(get_origin(hint) or hint, "__name__", hint))
