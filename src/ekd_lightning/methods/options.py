"""Checks of the options of terms and methods, and weight schedules.

Errors are one line with the key, its value, and the values that are allowed.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from operator import itemgetter

from ekd_lightning.errors import UserError, unknown_name
from ekd_lightning.roles import Range

SHAPES = ("linear", "ramp_up")


def number(
    key: str,
    value: object,
    *,
    above: float | None = None,
    low: float | None = None,
    below: float | None = None,
    high: float | None = None,
) -> float:
    """Returns a finite number within bounds as a float; `key` is the option's name for the `UserError`.

    Bounds `above` and `below` are exclusive, `low` and `high` inclusive; strings and booleans are refused.
    """
    least, most = above if low is None else low, below if high is None else high
    bounds = Range(-math.inf if least is None else least, math.inf if most is None else most, low is None, high is None)
    return bounds.check(key, value)


def temperature_of(key: str, value: object) -> float:
    """Checks a temperature as `number`; outside [0.001, 1000], T² or logits / T approach the limits of float32.

    Raises:
        UserError: If it is not a number in this range; the message begins with `key`.
    """
    return number(key, value, low=1e-3, high=1e3)


def choice(key: str, value: object, allowed: Iterable[str]) -> str:
    """Returns a value that must be one of the allowed names; any other is a `UserError`, which begins with `key`."""
    names = tuple(allowed)
    if not isinstance(value, str) or value not in names:
        raise unknown_name(key, value, names)
    return value


def count(key: str, value: object) -> int:
    """Returns an integer of at least 1; any other value is a `UserError`, which begins with `key`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{key}={value!r} is not allowed; give an integer >= 1")
    return value


@dataclass(frozen=True)
class WeightSchedule:
    """Factor of a term's weight as a function of training progress only, so that resumed runs continue it.

    Attributes:
        points: (share of the training in [0, 1], factor >= 0), ordered by share; the factor is linear between
            neighbours and constant outside. Two points with the same share are a jump: the later factor holds there.
        ramp_until: Share at which exp(-5 (1 - progress / ramp_until)²) reaches 1 (Laine and Aila 2017, used by
            ONE and OKDDip); None without a ramp. The ramp multiplies the factor of the points.
    """

    points: tuple[tuple[float, float], ...] = ((0.0, 1.0),)
    ramp_until: float | None = None

    def __call__(self, progress: float) -> float:
        """Returns the factor at a share of the training in [0, 1]."""
        place = bisect_right(self.points, progress, key=itemgetter(0))
        left, low = self.points[max(place - 1, 0)]
        right, high = self.points[min(place, len(self.points) - 1)]
        factor = low if left == right else low + (high - low) * (progress - left) / (right - left)
        if self.ramp_until is not None and progress < self.ramp_until:
            factor *= math.exp(-5.0 * (1.0 - progress / self.ramp_until) ** 2)
        return factor


CONSTANT = WeightSchedule()


def read_schedule(key: str, spec: object) -> WeightSchedule:
    """Parses the `schedule` of a term in a method's configuration; `key` is its name for errors.

    It is None for a constant weight; or a mapping with `linear` (a list of [share, factor]), `ramp_up` (a share in (0,
    1]), or both.

    Raises:
        UserError: For unknown keys, shares outside [0, 1] or in decreasing order, or negative factors.
    """
    if spec is None:
        return CONSTANT
    if not isinstance(spec, Mapping) or not spec:
        raise UserError(f"{key}={spec!r} is not allowed; give {{linear: [[0, 1], [1, 0]]}} or {{ramp_up: 0.3}}")
    for name in spec:
        if name not in SHAPES:
            raise unknown_name(f"key of {key}", str(name), SHAPES)
    linear, ramp = spec.get("linear"), spec.get("ramp_up")
    until = None if ramp is None else number(f"{key}.ramp_up", ramp, above=0.0, high=1.0)
    return WeightSchedule(CONSTANT.points if linear is None else _points(f"{key}.linear", linear), until)


def _points(key: str, linear: object) -> tuple[tuple[float, float], ...]:
    pairs = list(linear) if isinstance(linear, (list, tuple)) else []
    if not pairs or any(not isinstance(pair, (list, tuple)) or len(pair) != 2 for pair in pairs):
        raise UserError(
            f"{key}={linear!r} is not allowed; give a list of pairs [share of the training, factor], "
            "e.g. [[0, 1], [1, 0]]"
        )
    points = tuple((number(key, share, low=0.0, high=1.0), number(key, factor, low=0.0)) for share, factor in pairs)
    if any(later < earlier for (earlier, _), (later, _) in pairwise(points)):
        raise UserError(f"{key}={linear!r} is not allowed; the shares (first numbers) must not decrease")
    return points
