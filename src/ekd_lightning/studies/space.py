"""Search space: ranges and choices by configuration key, given by the user or derived from a method."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from ekd_lightning.config.overrides import Scalar
from ekd_lightning.errors import UserError, unknown_name
from ekd_lightning.files import DamagedFileError, read_yaml
from ekd_lightning.methods import DEFAULT_TEMPERATURE, Method
from ekd_lightning.methods.logit_terms import CrossEntropyBranch, CrossEntropyEnsemble
from ekd_lightning.methods.options import number

WEIGHT_FACTOR = 8.0
"""Weights are searched from the default divided by this to the default times this."""
TEMPERATURES = (1.0, 20.0)

# Settings that would make trials incomparable: other images, or another cost.
_NOT_SEARCHED = (
    *("data", "data.name", "data.fraction", "data.per_class", "data.subset_seed", "data.val_fraction"),
    *("experiment", "method", "method.name", "recipe.epochs", "seed", "trainer.max_epochs"),
)


SearchSpace: TypeAlias = "dict[str, FloatDistribution | IntDistribution | CategoricalDistribution]"
"""Key on the command line, possibly with Hydra's + or ++ -> its values."""


def derive_space(method: Method, temperature: float | None, fixed: Collection[str] = ()) -> SearchSpace:
    """The default search space of a method: all weights except one, and the temperature.

    One term is the reference and keeps its weight: the first cross-entropy, or the first term of a method without.
    Only ratios of weights matter to first order, because a common factor is a factor of the learning rate; weight
    decay, which it does not multiply, makes it matter a little.

    Args:
        method: The method with its default weights, without terms of weight 0.
        temperature: The method's T; None for the default.
        fixed: Keys that are not searched.

    Returns:
        `method.terms.<name>.weight` in [default / 8, default · 8] and `method.temperature` in [1, 20], both
        uniform in the logarithm; the temperature only if a term uses it, and its range widened to the default.
    """
    terms = list(method.named_terms())
    labels = [key for key, term in terms if isinstance(term, (CrossEntropyEnsemble, CrossEntropyBranch))]
    reference = labels[0] if labels else terms[0][0]
    space: SearchSpace = {
        f"method.terms.{key}.weight": FloatDistribution(term.weight / WEIGHT_FACTOR, term.weight * WEIGHT_FACTOR, True)
        for key, term in terms
        if key != reference
    }
    if any(term.uses_temperature for _, term in terms):
        default = DEFAULT_TEMPERATURE if temperature is None else temperature
        low, high = TEMPERATURES
        space["method.temperature"] = FloatDistribution(min(low, default), max(high, default), True)
    return {key: values for key, values in space.items() if key not in fixed}


def read_space(path: Path) -> SearchSpace:
    """Reads a search space from YAML: key -> {low: , high: , log: } or {choices: [...]}.

    Bounds that are both written as whole numbers make an integer range.

    Raises:
        UserError: If the file is missing or not such a mapping; names the key.
    """
    where = f"--space {path}"
    try:
        content = read_yaml(path)
    except FileNotFoundError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror})") from None
    except DamagedFileError as error:
        raise UserError(f"--space {error}") from None
    if not isinstance(content, Mapping) or not content:
        raise UserError(f"{where}: must map keys to {{low: , high: }} or {{choices: [...]}}")
    return {str(key): _values(f"{where}: {key}", str(key), spec) for key, spec in content.items()}


def _values(where: str, key: str, spec: object) -> FloatDistribution | IntDistribution | CategoricalDistribution:
    if key.lstrip("+") in _NOT_SEARCHED:
        raise UserError(f"{where}: cannot be searched, because all trials must use the same images and epochs")
    if not isinstance(spec, Mapping):
        raise UserError(f"{where}={spec!r} is not allowed; give {{low: , high: }} or {{choices: [...]}}")
    allowed = ("choices",) if "choices" in spec else ("low", "high", "log")
    for name in spec:
        if name not in allowed:
            raise unknown_name(f"key of {where}:", name, allowed)
    return _choices(where, spec["choices"]) if "choices" in spec else _interval(where, spec)


def _choices(where: str, values: object) -> CategoricalDistribution:
    if not isinstance(values, list) or not values:
        raise UserError(f"{where}.choices={values!r} is not allowed; give a list of values")
    for value in values:
        if value is not None and not isinstance(value, (bool, int, float, str)):
            raise UserError(f"{where}.choices: {value!r} is not a number, a text, true, false or null")
    return CategoricalDistribution(values)


def _interval(where: str, spec: Mapping[str, Any]) -> FloatDistribution | IntDistribution:
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
        return IntDistribution(spec["low"], spec["high"], log)
    return FloatDistribution(low, high, log)


def describe_space(space: SearchSpace) -> dict[str, Any]:
    """The space as plain containers, for records and comparisons."""
    return {
        key: {"choices": list(values.choices)}
        if isinstance(values, CategoricalDistribution)
        else {"low": values.low, "high": values.high, "log": values.log, "integer": isinstance(values, IntDistribution)}
        for key, values in space.items()
    }


def rounded_values(space: SearchSpace, found: Mapping[str, Any]) -> dict[str, Scalar]:
    """Values rounded to four significant digits, so that the training uses what the record shows."""
    return {
        key: min(max(float(f"{found[key]:.4g}"), values.low), values.high)
        if isinstance(values, FloatDistribution)
        else found[key]
        for key, values in space.items()
    }


def default_values(space: SearchSpace, config: Mapping[str, Any]) -> dict[str, Scalar]:
    """Values of the searched keys in a resolved configuration.

    Returns:
        Value by key, without keys that the configuration lacks or whose value lies outside the space.
    """
    found: dict[str, Scalar] = {}
    for key, values in space.items():
        value: Any = config
        for part in key.lstrip("+").split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if key.lstrip("+") == "method.temperature" and value is None:
            value = DEFAULT_TEMPERATURE
        if isinstance(values, CategoricalDistribution):
            fits = any(value == own and isinstance(value, bool) == isinstance(own, bool) for own in values.choices)
        else:
            allowed = (int,) if isinstance(values, IntDistribution) else (int, float)
            fits = type(value) in allowed and values.low <= value <= values.high
        if fits:
            found[key] = value
    return found
