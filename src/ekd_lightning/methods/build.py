"""How a method is built from plain settings, and what can be said of it before any network is there.

Shape letters: B batch, C classes, M teachers, K branches.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from ekd_lightning.errors import UserError
from ekd_lightning.methods.assignment import AssignmentSpec, build_assignment
from ekd_lightning.methods.method import Method
from ekd_lightning.methods.options import number
from ekd_lightning.methods.schedule import WeightSchedule, read_schedule
from ekd_lightning.methods.terms import (
    StageShape,
    Term,
    TermContext,
    build_term,
    check_option_names,
    term_class,
)

DEFAULT_TEMPERATURE = 4.0
DEFAULT_ASSIGNMENT = "one_to_one"


def build_method(
    name: str,
    terms: Mapping[str, Mapping[str, Any]],
    *,
    num_classes: int,
    num_branches: int,
    num_teachers: int,
    temperature: float | None = None,
    assignment: AssignmentSpec | None = None,
    seed: int = 0,
    student_features: int = 0,
    teacher_features: tuple[int, ...] = (),
    student_stage_shapes: Mapping[str, StageShape] | None = None,
    teacher_stage_shapes: tuple[Mapping[str, StageShape], ...] = (),
    student_name: str = "student",
    teacher_names: tuple[str, ...] = (),
    train_index: Tensor | None = None,
    train_labels: Tensor | None = None,
) -> Method:
    """Builds a method from plain settings.

    Args:
        name: The method's name in records.
        terms: Term name -> {weight: w >= 0, type: registered name (default: the term name), schedule: see
            `schedule.read_schedule` (default: constant), further options of the term}. A term of weight 0 is
            checked for typing errors but not built.
        num_classes: C.
        num_branches: K >= 1.
        num_teachers: M, 0 for none.
        temperature: T > 0 for all terms that do not set their own; None for 4.
        assignment: A kind or explicit rows (see `make_assignment`); None for one_to_one.
        seed: Of the random assignment, and of whatever a term draws.
        student_features: D of a branch's pooled features.
        teacher_features: D_m of every teacher.
        student_stage_shapes: Stage name -> (channels, height, width) of a branch, from input to output.
        teacher_stage_shapes: The same for every teacher.
        student_name: For error messages.
        teacher_names: For error messages.
        train_index: int64 [n], the images trained on, as positions in the whole set; some terms need them.
        train_labels: int64 [n], their labels.

    Returns:
        The method.

    Raises:
        UserError: For an unknown term, option or stage, a weight that is negative or not finite, a
            temperature that is not positive, an assignment that does not fit, or when no term has a positive
            weight.
    """
    if num_branches < 1:
        raise UserError(f"number of branches={num_branches} is not allowed; give an integer >= 1")
    specs = {key: _TermSpec.read(key, spec) for key, spec in terms.items()}
    active = {key: spec for key, spec in specs.items() if spec.weight > 0}
    uses_assignment = num_teachers > 0 and any(
        term_class(spec.type).uses_assignment for spec in active.values()
    )
    context = TermContext(
        num_classes=num_classes,
        num_branches=num_branches,
        num_teachers=num_teachers,
        temperature=_or_default(temperature),
        assignment=(
            build_assignment(_or_one_to_one(assignment), num_branches, num_teachers, seed)
            if uses_assignment
            else None
        ),
        student_features=student_features,
        teacher_features=tuple(teacher_features),
        student_stage_shapes=student_stage_shapes or {},
        teacher_stage_shapes=tuple(teacher_stage_shapes),
        student_name=student_name,
        teacher_names=tuple(teacher_names),
        seed=seed,
        train_index=train_index,
        train_labels=train_labels,
    )
    method = Method(name, {key: spec.build(key, context) for key, spec in active.items()}, context.assignment)
    _warn_without_effect(method, temperature, assignment)
    if num_branches == 1:
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


def _or_default(temperature: float | None) -> float:
    if temperature is None:
        return DEFAULT_TEMPERATURE
    return number("method.temperature", temperature, above=0.0)


def _or_one_to_one(assignment: AssignmentSpec | None) -> AssignmentSpec:
    return DEFAULT_ASSIGNMENT if assignment is None else assignment


def _warn_of_one_branch(method: Method) -> None:
    kinds = {type(term): key for key, term in method.named_terms()}
    branch, ensemble = kinds.get(term_class("ce_branch")), kinds.get(term_class("ce_ensemble"))
    if branch and ensemble:
        warnings.warn(
            f"the student of {method.name!r} has one branch: {branch} repeats {ensemble}, so the cross-entropy "
            "counts twice",
            stacklevel=3,
        )


def _warn_without_effect(
    method: Method, temperature: float | None, assignment: AssignmentSpec | None
) -> None:
    used = [term for _, term in method.named_terms()]
    if temperature is not None and not any(term.uses_temperature for term in used):
        warnings.warn(
            f"method.temperature={temperature} has no effect: no term of {method.name!r} uses it",
            stacklevel=3,
        )
    if assignment is not None and not any(term.uses_assignment for term in used):
        warnings.warn(
            f"method.assignment={assignment} has no effect: no term of {method.name!r} uses it", stacklevel=3
        )
