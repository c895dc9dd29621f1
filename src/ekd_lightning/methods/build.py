"""Building of methods from plain settings, and what can be said of them before any network is there.

Shape letters: B batch, C classes, M teachers, K branches.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from ekd_lightning.errors import UserError
from ekd_lightning.methods.assignment import AssignmentSpec, build_assignment
from ekd_lightning.methods.context import DEFAULT_TEMPERATURE, TermContext
from ekd_lightning.methods.method import Method
from ekd_lightning.methods.options import WeightSchedule, number, read_schedule
from ekd_lightning.methods.terms import Term, build_term, check_option_names, term_class

DEFAULT_ASSIGNMENT = "one_to_one"


def build_method(
    name: str,
    terms: Mapping[str, Mapping[str, Any]],
    context: TermContext,
    *,
    temperature: float | None = None,
    assignment: AssignmentSpec | None = None,
) -> Method:
    """Builds a method from plain settings.

    Args:
        name: The method's name in records.
        terms: Term name -> {weight: w >= 0, type: registered name (default: the term name), schedule: see
            `options.read_schedule` (default: constant), further options of the term}. A term of weight 0 is
            checked for typing errors but not built.
        context: The networks and the images; see `TermContext.of`. Its temperature and assignment are filled in here.
        temperature: T > 0 for all terms that do not set their own; None for 4.
        assignment: A kind or explicit rows (see `make_assignment`); None for one_to_one.

    Returns:
        The method.

    Raises:
        UserError: For an unknown term, option or stage, a weight that is negative or not finite, a
            temperature that is not positive, an assignment that does not fit, or when no term has a positive
            weight.
    """
    K, M = context.num_branches, context.num_teachers
    if K < 1:
        raise UserError(f"number of branches={K} is not allowed; give an integer >= 1")
    specs = {key: _TermSpec.read(key, spec) for key, spec in terms.items()}
    active = {key: spec for key, spec in specs.items() if spec.weight > 0}
    T = DEFAULT_TEMPERATURE if temperature is None else number("method.temperature", temperature, above=0.0)
    built = None
    if M > 0 and any(term_class(spec.type).uses_assignment for spec in active.values()):
        kind = DEFAULT_ASSIGNMENT if assignment is None else assignment
        built = build_assignment(kind, K, M, context.seed)
    context = replace(context, temperature=T, assignment=built)
    method = Method(name, {key: spec.build(key, context) for key, spec in active.items()}, built)
    _warn_without_effect(method, temperature, assignment)
    if K == 1:
        _warn_of_one_branch(method)
    return method


def needs_teachers(terms: Mapping[str, Mapping[str, Any]]) -> bool:
    """Says whether a method with these settings needs teachers, before any network is there.

    Raises:
        UserError: As `build_method`, for unknown terms, options and weights.
    """
    return any(term.needs_teachers for term in _classes(terms))


def uses_assignment(terms: Mapping[str, Mapping[str, Any]]) -> bool:
    """Says whether the assignment has an effect on a method with these settings; raises as `needs_teachers`."""
    return any(term.uses_assignment for term in _classes(terms))


def _classes(terms: Mapping[str, Mapping[str, Any]]) -> list[type[Term]]:
    """The classes of the terms that count; all are checked."""
    specs = [_TermSpec.read(key, spec) for key, spec in terms.items()]
    return [term_class(spec.type) for spec in specs if spec.weight > 0]


_OWN_KEYS = ("type", "weight", "schedule")


class _TermSpec(NamedTuple):
    """One entry of the settings of a method, its names and weight checked."""

    type: str
    weight: float
    schedule: WeightSchedule
    options: dict[str, Any]

    @classmethod
    def read(cls, key: str, spec: Mapping[str, Any]) -> _TermSpec:
        where = f"method.terms.{key}"
        if not isinstance(spec, Mapping) or "weight" not in spec:
            raise UserError(f"{where}={spec!r} is not allowed; give at least a weight, e.g. {{weight: 1.0}}")
        options = {str(name): value for name, value in spec.items() if name not in _OWN_KEYS}
        kind = str(spec.get("type") or key)
        check_option_names(kind, options)
        weight = number(f"{where}.weight", spec["weight"], low=0.0)
        return cls(kind, weight, read_schedule(f"{where}.schedule", spec.get("schedule")), options)

    def build(self, key: str, context: TermContext) -> Term:
        try:
            term = build_term(self.type, self.weight, context, **self.options)
        except UserError as error:
            raise UserError(f"method.terms.{key}: {error}") from None
        term.schedule = self.schedule
        return term


def _warn_of_one_branch(method: Method) -> None:
    kinds = {type(term): key for key, term in method.named_terms()}
    branch, ensemble = kinds.get(term_class("ce_branch")), kinds.get(term_class("ce_ensemble"))
    if branch and ensemble:
        warnings.warn(
            f"the student of {method.name!r} has one branch: {branch} repeats {ensemble}, so the cross-entropy "
            "counts twice",
            stacklevel=3,
        )


def _warn_without_effect(method: Method, temperature: float | None, assignment: AssignmentSpec | None) -> None:
    for key, value in (("temperature", temperature), ("assignment", assignment)):
        if value is not None and not any(getattr(term, f"uses_{key}") for _, term in method.named_terms()):
            warnings.warn(f"method.{key}={value} has no effect: no term of {method.name!r} uses it", stacklevel=3)
