"""What a study searches: ranges and choices by configuration key, given by the user or derived from a method."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from ekd_lightning.config.overrides import Scalar
from ekd_lightning.errors import UserError, unknown_name
from ekd_lightning.methods import DEFAULT_TEMPERATURE, Method
from ekd_lightning.methods.logit_terms import CrossEntropyBranch, CrossEntropyEnsemble
from ekd_lightning.methods.options import number

WEIGHT_FACTOR = 8.0
"""Weights are searched from a default's eighth to its eightfold."""
TEMPERATURES = (1.0, 20.0)

# What would make trials incomparable: other images, or another cost.
_NOT_SEARCHED = (
    "data",
    "data.name",
    "data.fraction",
    "data.per_class",
    "data.subset_seed",
    "data.val_fraction",
    "experiment",
    "method",
    "method.name",
    "recipe.epochs",
    "seed",
    "trainer.max_epochs",
)


@dataclass(frozen=True)
class Interval:
    """A range of numbers, both ends included.

    Attributes:
        low: Smallest value.
        high: Largest value, > low.
        log: Whether the logarithm is uniform, not the value; needs low > 0.
        integer: Whether only whole numbers are tried.
    """

    low: float
    high: float
    log: bool = False
    integer: bool = False

    def contains(self, value: object) -> bool:
        """Whether a value can be a point of this range."""
        whole = isinstance(value, int) and not isinstance(value, bool)
        return (whole or (isinstance(value, float) and not self.integer)) and self.low <= value <= self.high  # type: ignore[operator]

    def probes(self) -> tuple[Scalar, ...]:
        """The values to try a configuration with: the ends."""
        return (self.low, self.high)

    def tidy(self, value: Any) -> Scalar:
        """The value in four significant digits: what is trained with is what the record says."""
        return value if self.integer else min(max(float(f"{value:.4g}"), self.low), self.high)


@dataclass(frozen=True)
class Choices:
    """A few values without an order."""

    values: tuple[Scalar, ...]

    def contains(self, value: object) -> bool:
        """Whether a value is one of them."""
        return any(value == own and isinstance(value, bool) == isinstance(own, bool) for own in self.values)

    def probes(self) -> tuple[Scalar, ...]:
        """The values to try a configuration with: all."""
        return self.values

    def tidy(self, value: Any) -> Scalar:
        """The value itself."""
        return value


SearchSpace: TypeAlias = "dict[str, Interval | Choices]"
"""Key on the command line, possibly with Hydra's + or ++ -> its values."""


def derive_space(method: Method, temperature: float | None, fixed: Collection[str] = ()) -> SearchSpace:
    """The default search space of a method: its weights but one, and its temperature.

    Only ratios of weights matter to first order, as a common factor is a factor of the learning rate; so one term is
    the reference and keeps its weight: the first cross-entropy, or the first term where there is none. (Weight
    decay, which no weight multiplies, makes the common factor matter a little.)

    Args:
        method: The method with its default weights; terms of weight 0 are not in it.
        temperature: The method's T; None for the default.
        fixed: Keys that keep their value.

    Returns:
        `method.terms.<name>.weight` in [default / 8, default · 8] and `method.temperature` in [1, 20], both
        uniform in the logarithm; the temperature only if a term uses it, and its range widened to the default.
    """
    terms = list(method.named_terms())
    labels = [key for key, term in terms if isinstance(term, (CrossEntropyEnsemble, CrossEntropyBranch))]
    reference = labels[0] if labels else terms[0][0]
    space: SearchSpace = {
        f"method.terms.{key}.weight": Interval(term.weight / WEIGHT_FACTOR, term.weight * WEIGHT_FACTOR, True)
        for key, term in terms
        if key != reference
    }
    if any(term.uses_temperature for _, term in terms):
        default = DEFAULT_TEMPERATURE if temperature is None else temperature
        low, high = TEMPERATURES
        space["method.temperature"] = Interval(min(low, default), max(high, default), True)
    return {key: values for key, values in space.items() if key not in fixed}


def read_space(path: Path) -> SearchSpace:
    """Reads a search space from YAML: key -> {low: , high: , log: } or {choices: [...]}.

    Bounds that are both written as whole numbers make an integer range.

    Raises:
        UserError: If the file is missing or not such a mapping; names the key.
    """
    where = f"--space {path}"
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where}: cannot be read ({getattr(error, 'strerror', 'not text')})") from None
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, Mapping) or not content:
        raise UserError(f"{where}: must map keys to {{low: , high: }} or {{choices: [...]}}")
    return {str(key): _values(f"{where}: {key}", str(key), spec) for key, spec in content.items()}


def _values(where: str, key: str, spec: object) -> Interval | Choices:
    if key.lstrip("+") in _NOT_SEARCHED:
        raise UserError(f"{where}: cannot be searched, as trials must see the same images for as many epochs")
    if not isinstance(spec, Mapping):
        raise UserError(f"{where}={spec!r} is not allowed; give {{low: , high: }} or {{choices: [...]}}")
    allowed = ("choices",) if "choices" in spec else ("low", "high", "log")
    for name in spec:
        if name not in allowed:
            raise unknown_name(f"key of {where}:", name, allowed)
    return _choices(where, spec["choices"]) if "choices" in spec else _interval(where, spec)


def _choices(where: str, values: object) -> Choices:
    if not isinstance(values, list) or not values:
        raise UserError(f"{where}.choices={values!r} is not allowed; give a list of values")
    for value in values:
        if value is not None and not isinstance(value, (bool, int, float, str)):
            raise UserError(f"{where}.choices: {value!r} is not a number, a text, true, false or null")
    return Choices(tuple(values))


def _interval(where: str, spec: Mapping[str, Any]) -> Interval:
    for name in ("low", "high"):
        if name not in spec:
            raise UserError(f"{where}: has no {name}")
    low, high = (number(f"{where}.{name}", spec[name]) for name in ("low", "high"))
    log = spec.get("log", False)
    if not isinstance(log, bool):
        raise UserError(f"{where}.log={log!r} is not allowed; give true or false")
    if low >= high:
        raise UserError(f"{where}: low={spec['low']!r} must be below high={spec['high']!r}")
    if log and low <= 0:
        raise UserError(f"{where}.low={spec['low']!r} is not allowed with log; give a number > 0")
    if isinstance(spec["low"], int) and isinstance(spec["high"], int):
        return Interval(spec["low"], spec["high"], log, integer=True)
    return Interval(low, high, log)


def describe_space(space: SearchSpace) -> dict[str, Any]:
    """The space as plain containers, for records and comparisons."""
    return {
        key: asdict(values) if isinstance(values, Interval) else {"choices": list(values.values)}
        for key, values in space.items()
    }


def default_values(space: SearchSpace, config: Mapping[str, Any]) -> dict[str, Scalar]:
    """What a resolved configuration says about the searched keys.

    Args:
        space: What is searched.
        config: Nested plain containers.

    Returns:
        Key -> value, without keys that the configuration lacks or whose value the space does not contain.
    """
    found: dict[str, Scalar] = {}
    for key, values in space.items():
        value: Any = config
        for part in key.lstrip("+").split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if key.lstrip("+") == "method.temperature" and value is None:
            value = DEFAULT_TEMPERATURE
        if values.contains(value):
            found[key] = value
    return found
