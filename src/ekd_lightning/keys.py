"""What may be done with a setting, by its dotted key: change it, leave it out of a comparison, take it for a path."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from ekd_lightning.roles import COMPUTED, PURPOSE, Purpose, Role, conditions, paths, purposes
from ekd_lightning.settings import Settings

_PURPOSES = dict(purposes(Settings))
_CONDITIONS = tuple(conditions(Settings))
_PATHS: dict[str, tuple[str, ...]] = dict(paths(Settings))


def purpose_of(key: str) -> Purpose:
    """The purpose of a setting by its dotted key; an unknown setting counts as changing the results."""
    known = key
    while known not in _PURPOSES:
        if not known:
            return COMPUTED[PURPOSE]
        known = known.rpartition(".")[0]
    return _PURPOSES[known]


def without_effect(settings: Settings, given: Collection[str], facts: Mapping[str, object]) -> dict[str, str]:
    """Finds given settings that have no effect, because they depend on another setting with a certain value.

    Given keys with their default value are ignored. `facts` are, by key of the other setting, facts that decide instead
    of its value. Returns one line for each setting without effect, by its key.
    """
    found = {}
    for key, other, counts in _CONDITIONS:
        words = [word for word in given if f"{word}.".startswith(f"{key}.")]
        changed = words and _value(settings, key) != _value(Settings(), key)
        if changed and not counts(facts.get(other, _value(settings, other))):
            for word in words:
                value, beside_value = (f"{_value(settings, name)!s:.60}" for name in (word, other))
                found[word] = f"{word}={value} has no effect with {other}={beside_value}"
    return found


def _value(settings: object, key: str) -> Any:
    """A setting by its dotted key; None where a mapping lacks it."""
    for name in key.split("."):
        settings = settings.get(name) if isinstance(settings, dict) else getattr(settings, name, None)
    return settings


def keys_where(holds: Callable[[str], bool]) -> tuple[str, ...]:
    """The dotted keys that fulfil a condition, in the order of the settings."""
    return tuple(key for key in _PURPOSES if holds(key))


def is_location(key: str) -> bool:
    """Whether a setting is a location."""
    return purpose_of(key).role is Role.LOCATION


def is_path(key: str) -> bool:
    """Whether a setting can be a path: all locations except `download`, and `data.unlabelled`."""
    return key in _PATHS


def is_place(key: str, value: object) -> bool:
    """Whether a value of a setting is a path, whose content a run records by its hash."""
    return isinstance(value, str) and key in _PATHS and value not in _PATHS[key]


def is_free(key: str, *, exact: bool = True) -> bool:
    """Whether a setting may change without changing the results: a location or a free setting.

    The results are to be equal bit for bit; `exact=False` allows rounding.
    """
    purpose = purpose_of(key)
    return is_location(key) or (purpose.role is Role.FREE and (purpose.exact or not exact))


def may_change_between_parts(key: str) -> bool:
    """Whether a setting may change when a stopped run is resumed."""
    return is_free(key) or purpose_of(key).between_parts
