"""Methods from plain settings: checks of the terms' entries, and building, or building again, of a method.

Shape letters: K branches, M teachers.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from ekd_lightning.errors import UserError, quiet, unknown_name
from ekd_lightning.methods.assignment import AssignmentSpec, build_assignment
from ekd_lightning.methods.context import DEFAULT_TEMPERATURE, TermContext
from ekd_lightning.methods.method import Method
from ekd_lightning.methods.options import WeightSchedule, number, read_schedule, temperature_of
from ekd_lightning.methods.terms import TERMS, Term, build_term, options_of
from ekd_lightning.roles import check_keywords

_OWN_KEYS = ("type", "weight", "schedule")


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
        context: The networks and the images; see `TermContext.of`. `build_method` fills in temperature and assignment.
        temperature: T, in [0.001, 1000], of all terms that do not set their own; None for 4.
        assignment: A kind, one teacher number per branch, rows of weights, or a schedule of these (see
            `build_assignment`); None for one_to_one.

    Returns:
        The method.

    Raises:
        UserError: For an unknown term, option or stage; a weight that is negative or not finite; a temperature out of
            range; an assignment that does not fit K and M; if no term has a positive weight; or if a term compares
            classes that a teacher does not know.
    """
    K, M = context.num_branches, context.num_teachers
    entries = _entries(terms)
    T = DEFAULT_TEMPERATURE if temperature is None else temperature_of("method.temperature", temperature)
    built = None
    if M > 0 and _use_assignment(entries, context):
        kind = "one_to_one" if assignment is None else assignment
        built = build_assignment(kind, K, M, context.seed)
    context = replace(context, temperature=T, assignment=built)
    method = Method(name, {key: _build(key, entry, context) for key, entry in entries.items()}, built)
    method.check_classes(context.unknown_classes, [context.teacher_label(m) for m in range(M)], context.num_classes)
    for setting, value in (("temperature", temperature), ("assignment", assignment)):
        if value is not None and not any(getattr(term, f"uses_{setting}") for _, term in method.named_terms()):
            warnings.warn(f"method.{setting}={value} has no effect: no term of {name!r} uses it", stacklevel=2)
    keys = {entry.kind: key for key, entry in entries.items()}
    if K == 1 and "ce_branch" in keys and "ce_ensemble" in keys:
        branch, ensemble = keys["ce_branch"], keys["ce_ensemble"]
        warnings.warn(
            f"the student of {name!r} has one branch, so {branch} equals {ensemble} and the cross-entropy counts "
            f"twice; method.terms.{branch}.weight=0 removes one",
            stacklevel=2,
        )
    given = {"name": name, "terms": terms, "temperature": temperature, "assignment": assignment}
    with contextlib.suppress(TypeError):  # options of user-defined terms need not be JSON-able
        method.origin = json.loads(json.dumps({**given, "context": context.to_dict()}))
        if any(term.knows_images for _, term in method.named_terms()):
            method.origin["images"] = {"train_index": context.train_index, "train_labels": context.train_labels}
    return method


def rebuild_method(origin: Mapping[str, Any]) -> Method:
    """Builds a method again from its record, `Method.origin`; the adapters are newly initialised.

    Raises:
        UserError: As `build_method`; e.g. for a term that is not registered in this process.
        KeyError, TypeError, ValueError: If `origin` is damaged or empty.
    """
    context = TermContext.from_dict(origin["context"], origin.get("images") or {})
    with quiet(), torch.random.fork_rng(devices=[]):
        return build_method(
            origin["name"], origin["terms"], context, temperature=origin["temperature"], assignment=origin["assignment"]
        )


def needs_teachers(terms: Mapping[str, Mapping[str, Any]]) -> bool:
    """Returns whether a method with these settings needs teachers; no network is built. It raises as `build_method`."""
    return any(entry.cls.needs_teachers for entry in _entries(terms).values())


def terms_with_labels(terms: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], bool]:
    """Returns the names of the terms that use only labelled images, and whether these are all terms.

    It raises as `build_method`.
    """
    entries = _entries(terms)
    found = [key for key, entry in entries.items() if entry.cls.needs_labels_with(entry.options)]
    return found, len(found) == len(entries)


def uses_assignment(terms: Mapping[str, Mapping[str, Any]], context: TermContext) -> bool:
    """Returns whether a method with these settings uses the assignment; raises as `build_method`.

    Of the context, only the student counts.
    """
    return _use_assignment(_entries(terms), context)


class _Entry(NamedTuple):
    """The settings of one term; type, weight, schedule and option names are checked."""

    kind: str
    weight: float
    schedule: WeightSchedule
    options: dict[str, Any]

    @property
    def cls(self) -> type[Term]:
        return TERMS[self.kind]


def _entries(terms: Mapping[str, Mapping[str, Any]]) -> dict[str, _Entry]:
    """Checks the settings of all terms; returns those with a positive weight, by name."""
    entries = {}
    for key, spec in terms.items():
        where = f"method.terms.{key}"
        if isinstance(spec, Mapping) and "weight" not in spec and key not in TERMS.names():
            raise unknown_name("term", where, (f"method.terms.{own}" for own in terms if own != key))
        if not isinstance(spec, Mapping) or "weight" not in spec:
            shown = "null" if spec is None else repr(spec)
            raise UserError(f"{where}={shown} is not allowed; give at least a weight, e.g. {{weight: 1.0}}")
        options = {str(name): value for name, value in spec.items() if name not in _OWN_KEYS}
        kind = str(spec.get("type") or key)
        with _errors_at(where):
            check_keywords(f"term {kind!r}", options, options_of(kind))
        weight = number(f"{where}.weight", spec["weight"], low=0.0)
        entries[key] = _Entry(kind, weight, read_schedule(f"{where}.schedule", spec.get("schedule")), options)
    return {key: entry for key, entry in entries.items() if entry.weight > 0}


def _use_assignment(entries: Mapping[str, _Entry], context: TermContext) -> bool:
    for key, entry in entries.items():
        with _errors_at(f"method.terms.{key}"):
            if entry.cls.uses_assignment_with(entry.options, context):
                return True
    return False


def _build(key: str, entry: _Entry, context: TermContext) -> Term:
    with _errors_at(f"method.terms.{key}"):
        term = build_term(entry.kind, entry.weight, context, **entry.options)
    term.schedule = entry.schedule
    return term


@contextlib.contextmanager
def _errors_at(where: str) -> Iterator[None]:
    """Prefixes the messages of user errors with the setting they concern."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
