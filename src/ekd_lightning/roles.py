"""Roles of settings (location, free, protocol, computed), and the values that settings accept.

The metadata of each settings field hold both; every check of whether a setting may change, or may have a value, reads
them there.
"""

from __future__ import annotations

import inspect
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from numbers import Real
from types import NoneType, UnionType
from typing import Any, Literal, TypeGuard, Union, get_args, get_origin, get_type_hints, is_typeddict

from ekd_lightning.errors import UserError, unknown_name


class Role(Enum):
    """Role of a setting."""

    LOCATION = "location"
    """A path, or whether files may be downloaded; the files themselves are identified by hashes."""
    FREE = "free"
    """How a run is carried out and reported, without effect on its results."""
    PROTOCOL = "protocol"
    """Runs must share it to be compared."""
    COMPUTED = "computed"
    """Everything else that affects the results."""


@dataclass(frozen=True)
class Purpose:
    """Role of a setting, and how freely it may change.

    Attributes:
        exact: For a free setting, whether all numbers stay the same to the last bit; False if it changes rounding.
        between_parts: Whether it may change when a stopped run continues, whatever its role.
    """

    role: Role
    exact: bool = True
    between_parts: bool = False


PURPOSE = "purpose"
"""Metadata key of a field: its `Purpose`."""
WORDS = "words"
"""Metadata key of a field that holds a path: the words that it accepts in place of one."""
KEYS = "keys"
"""Metadata key of a mapping: the metadata of those of its keys that differ from the whole."""
LOCATION = {PURPOSE: Purpose(Role.LOCATION)}
FREE = {PURPOSE: Purpose(Role.FREE)}
ROUNDING = {PURPOSE: Purpose(Role.FREE, exact=False)}
PROTOCOL = {PURPOSE: Purpose(Role.PROTOCOL)}
COMPUTED = {PURPOSE: Purpose(Role.COMPUTED)}
PART = {PURPOSE: Purpose(Role.COMPUTED, between_parts=True)}


def purposes(settings: type[Any], prefix: str = "") -> Iterator[tuple[str, Purpose]]:
    """Yields dotted key and purpose of each setting; a group whose field has a purpose counts as one setting.

    Raises:
        TypeError: If a field has no purpose and is no group.
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
            raise TypeError(f"{settings.__name__}.{one.name} has no {PURPOSE!r} in its metadata")


def paths(settings: type[Any], prefix: str = "") -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yields the dotted key of each setting that can hold a path, with the words that it accepts in place of one."""
    hints = get_type_hints(settings)
    for one in fields(settings):
        key, purpose = f"{prefix}{one.name}", one.metadata.get(PURPOSE)
        if WORDS in one.metadata or (hints[one.name] is str and purpose and purpose.role is Role.LOCATION):
            yield key, one.metadata.get(WORDS, ())
        elif is_dataclass(hints[one.name]):
            yield from paths(hints[one.name], f"{key}.")


# -- values ---------------------------------------------------------------------------------------------

ALLOWED = "allowed"
"""Metadata key of a field that does not accept every value of its type: a `Range`, or a tuple of names."""


@dataclass(frozen=True)
class Range:
    """Finite numbers between two bounds; `above` and `below` exclude the lower and the upper one."""

    low: float
    high: float = math.inf
    above: bool = False
    below: bool = False

    def check(self, key: str, value: object) -> float:
        """Returns a value as a float; refuses one outside the range, strings and booleans by a `UserError`."""
        if not is_finite(value):
            raise UserError(f"{key}={value!r}: must be a finite number")
        inside = value > self.low if self.above else value >= self.low
        if not inside or value > self.high or (self.below and value == self.high):
            raise UserError(f"{key}={value!r}: must be {self.words(value)}")
        return float(value)

    def words(self, value: object) -> str:
        """Returns the range in words, as they are said of a value: an interval of a float, a bound of an int."""
        if isinstance(value, float) and self.high < math.inf:
            return f"in {'[('[self.above]}{self.low:g}, {self.high:g}{'])'[self.below]}"
        if value > self.high or (self.below and value == self.high):  # type: ignore[operator]
            return f"{'below' if self.below else 'at most'} {self.high}"
        return "positive" if self.above and not self.low else f"{'above' if self.above else 'at least'} {self.low:g}"


LARGEST = 2**31 - 1
COUNT = {ALLOWED: Range(1, LARGEST)}
COUNT_OR_NONE = {ALLOWED: Range(0, LARGEST)}
NOT_NEGATIVE = {ALLOWED: Range(0)}
POSITIVE = {ALLOWED: Range(0, above=True)}
SHARE = {ALLOWED: Range(0, 1, above=True)}
SEED = {ALLOWED: Range(0, 2**64 - 1)}
TEMPERATURE = {ALLOWED: Range(1e-3, 1e3)}
"""Keeps T² and logits / T far from the limits of float32."""


def one_of(*names: str) -> dict[str, Any]:
    """Returns metadata of a setting that accepts a few names."""
    return {ALLOWED: names}


WHEN = one_of("auto", "always", "never")


def check_that(condition: bool, key: str, value: object, allowed: str) -> None:
    """Refuses a value of a setting by a `UserError`, which says what is allowed, unless a condition holds."""
    if not condition:
        raise UserError(f"{key}={'null' if value is None else value}: {allowed}")


def check_name(key: str, value: object) -> None:
    """Refuses a name for a folder that has path separators, control characters or a leading dot, or is empty."""
    fits = isinstance(value, str) and value.isprintable() and not re.search(r"[/\\]|^\.|^\s*$", value)
    allowed = "folders are named after it: it must not be empty, begin with a dot, or contain slashes or line breaks"
    check_that(fits, key, value, allowed)


def check_fields(key: str, given: Mapping[str, Any], kind: type[Any]) -> None:
    """Refuses names that are no fields of a dataclass, and values of other types, by a `UserError`."""
    hints = get_type_hints(kind)
    for name, value in given.items():
        if name not in hints:
            raise unknown_name(f"key of {key}", name, hints)
        check_that(is_of(value, hints[name]), f"{key}.{name}", value, f"must be {name_of_type(hints[name])}")


def parameters_of(make: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """Returns the parameters of a function or class of the user; annotations that cannot be evaluated are strings."""
    try:
        return inspect.signature(make, eval_str=True).parameters
    except Exception:  # e.g. names that are imported for type checkers only
        return inspect.signature(make).parameters


def check_keywords(
    owner: str, options: Mapping[str, Any], known: Mapping[str, inspect.Parameter], *, key: str | None = None
) -> None:
    """Checks options by the parameters that take them.

    For messages, `owner` says whose they are, and `key` is their dotted key in the configuration, if they have one.

    Raises:
        UserError: If one does not exist, a required one is missing, or one is annotated as a number, a truth value or
            text and is not.
    """
    for name, value in options.items():
        if name not in known:
            raise unknown_name(f"option of {owner}:", name, known)
        hint, is_default = known[name].annotation, value is None and known[name].default is None
        if not is_default and _is_plain(hint) and not is_of(value, hint):
            shown = "null" if value is None else repr(value)
            named = f"{key}.{name}={shown}" if key else f"option {name}={shown} of {owner}"
            raise UserError(f"{named}: must be {name_of_type(hint)}")
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    required = [name for name, one in known.items() if one.default is one.empty and one.kind not in several]
    missing = [name for name in required if name not in options]
    if missing:
        raise UserError(f"{owner} needs the option {missing[0]!r}, which has no default; set it")


def _is_plain(hint: Any) -> bool:
    kinds = get_args(hint) if get_origin(hint) in _UNIONS else (hint,)
    return all(kind in (bool, int, float, str, NoneType) for kind in kinds)


def check_values(settings: Any, prefix: str = "") -> None:
    """Refuses values that the metadata of settings, nested groups included, do not accept; see `check_value`.

    `prefix` is the dotted key of the dataclass and a dot, for messages.
    """
    for one in fields(settings):
        key, value = f"{prefix}{one.name}", getattr(settings, one.name)
        check_value(key, value, one.metadata)
        for name, metadata in one.metadata.get(KEYS, {}).items():
            check_value(f"{key}.{name}", value.get(name), metadata)
        if is_dataclass(value):
            check_values(value, f"{key}.")


def check_value(key: str, value: object, metadata: Mapping[str, Any]) -> None:
    """Refuses a value that metadata do not accept by a `UserError`, which names what is accepted; None passes."""
    allowed = metadata.get(ALLOWED)
    if value is None or allowed is None:
        return
    if isinstance(allowed, Range):
        allowed.check(key, value)
    elif value not in allowed:
        raise unknown_name(key, value, allowed)


# -- effect ---------------------------------------------------------------------------------------------

BESIDE = "beside"
"""Metadata key of a field that has an effect only for some values of another setting: that key, and a test of it."""
Condition = tuple[str, str, Callable[[Any], object]]
"""Dotted key of a setting, dotted key of the one it depends on, and a test of the latter's value that says whether the
former has an effect."""


def beside(key: str, counts: Callable[[Any], object] = bool) -> dict[str, Any]:
    """Returns metadata of a setting that has an effect only for some values of another one.

    That is named within the same group, or by its dotted key. `counts` tells whether one of its values gives the
    setting an effect; by default all do but null, false and empty ones.
    """
    return {BESIDE: (key, counts)}


def conditions(settings: type[Any], prefix: str = "") -> Iterator[Condition]:
    """Yields the conditions of all settings that have an effect only for some values of another one."""
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


_UNIONS = (Union, UnionType)


def is_of(value: Any, hint: Any) -> bool:
    """Whether a plain value, as read from YAML, fits an annotated type.

    An int fits float; a bool fits neither int nor float.
    """
    kind, inner = get_origin(hint), get_args(hint)
    if kind in _UNIONS:
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


def is_finite(value: object) -> TypeGuard[float]:
    """Whether a value is a finite number that a float can hold; a bool is none."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    return abs(value) <= sys.float_info.max  # type: ignore[operator]


def name_of_type(hint: Any) -> str:
    """Returns an annotated type in words, e.g. `int, float or null`."""
    inner = get_args(hint)
    if get_origin(hint) in _UNIONS:
        *names, last = dict.fromkeys(name_of_type(one) for one in inner)
        return f"{', '.join(names)} or {last}" if names else last
    if get_origin(hint) is Literal:
        return ", ".join(map(str, inner))
    if inner and Any not in inner and get_origin(hint) in (list, tuple, dict):
        kinds = dict.fromkeys(name_of_type(one) for one in inner if one is not Ellipsis)
        return f"{get_origin(hint).__name__} of {' to '.join(kinds)}"
    return "null" if hint is type(None) else str(getattr(get_origin(hint) or hint, "__name__", hint))


def what_is_allowed(hint: Any, metadata: Mapping[str, Any]) -> str:
    """Returns in words which values a setting of an annotated type accepts, e.g. `int, at least 1, or null`."""
    kinds = [kind for kind in get_args(hint) if kind is not type(None)] if get_origin(hint) in _UNIONS else [hint]
    optional, allowed = kinds != [hint] and type(None) in get_args(hint), metadata.get(ALLOWED)
    words = " or ".join(dict.fromkeys(_kind_in_words(kind) for kind in kinds))
    if isinstance(allowed, Range):
        whole = int in kinds
        bounded = whole and allowed.high < LARGEST
        words += f" from {allowed.low} to {allowed.high}" if bounded else f", {allowed.words(0 if whole else 0.0)}"
    elif allowed:
        words = f"one of {', '.join(allowed)}"
    return words + (", or null" if optional and "," in words else " or null" if optional else "")


def _kind_in_words(kind: Any) -> str:
    if is_dataclass(kind):
        return f"a mapping with keys of {', '.join(one.name for one in fields(kind))}"
    known, inner = get_origin(kind) or kind, get_args(kind)
    if known is list and inner and inner != (Any,):
        return f"a list of {_kind_in_words(inner[0])}"
    return {bool: "true or false", str: "text", dict: "a mapping", list: "a list"}.get(known) or name_of_type(kind)
