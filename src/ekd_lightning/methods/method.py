"""Methods: named lists of weighted terms.

Shape letters: B batch, C classes, M teachers, K branches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from ekd_lightning.data.loader import Batch
from ekd_lightning.errors import UserError
from ekd_lightning.methods.assignment import Assignment, RandomAssignment
from ekd_lightning.methods.context import LiveNetworks, StepContext
from ekd_lightning.methods.terms import Term
from ekd_lightning.networks.staged import StudentOutput, TeacherOutput

_PARTS = 240  # how finely schedules are looked through


class MethodLoss(NamedTuple):
    """The loss of one step.

    Attributes:
        total: Scalar with gradient, Σ weight · value.
        terms: Term name -> unweighted value, a detached scalar on the loss's device (reading it
            synchronises); 0 for terms that were not computed because their weight was 0 in this step.
    """

    total: Tensor
    terms: dict[str, Tensor]


class Method(nn.Module):
    """A named list of weighted terms. Its parameters are the terms' adapters and nothing else.

    Args:
        name: The method's name in records.
        terms: Name -> term. Terms of weight 0 are left out, so they cost nothing.
        assignment: Needed when a term uses it.

    Raises:
        UserError: If no term has a positive weight, or a name cannot name a module.
    """

    def __init__(self, name: str, terms: Mapping[str, Term], assignment: Assignment | None = None) -> None:
        super().__init__()
        self.name = name
        active = {key: term for key, term in terms.items() if term.weight > 0}
        if not active:
            raise UserError(f"method {name!r} has no term with a positive weight (terms: {_listed(terms)})")
        for key in active:
            _check_key(key)
        self.terms = nn.ModuleDict(active)
        self._constant = {key for key, term in active.items() if term.has_constant_weight}
        if assignment is None and any(term.uses_assignment for term in active.values()):
            raise ValueError(f"method {name!r} has a term that uses the assignment, but none was given")
        self.assignment = assignment

    def named_terms(self) -> Iterator[tuple[str, Term]]:
        """Yields the names and terms that are evaluated, in order."""
        yield from ((key, cast(Term, term)) for key, term in self.terms.items())

    @property
    def needs_teachers(self) -> bool:
        """Whether `forward` must be given teacher outputs."""
        return any(term.needs_teachers for _, term in self.named_terms())

    @property
    def needs_pooled(self) -> bool:
        """Whether the teachers' pooled features are read; otherwise nobody needs to keep them."""
        return any(term.needs_pooled for _, term in self.named_terms())

    @property
    def needs_networks(self) -> bool:
        """Whether `forward` must be given the networks themselves."""
        return any(term.needs_networks for _, term in self.named_terms())

    @property
    def teacher_stages(self) -> tuple[str, ...]:
        """Names of the stage outputs that the teachers must return."""
        return tuple(dict.fromkeys(stage for _, term in self.named_terms() for stage in term.teacher_stages))

    def counting_terms(self, progress: float) -> dict[str, Term]:
        """The terms that are computed at a share of the training in [0, 1].

        Those whose schedule gives them weight 0 are not; if that leaves none, all are.
        """
        everything = dict(self.named_terms())
        return {key: term for key, term in everything.items() if self._weight(key, term, progress)} or everything

    def _weight(self, key: str, term: Term, progress: float) -> float:
        return term.weight if key in self._constant else term.weight_at(progress)

    def asks_teachers(self, progress: float) -> tuple[bool, tuple[str, ...]]:
        """Whether teachers must answer at a share of the training, and the stages they must return then."""
        terms = self.counting_terms(progress).values()
        stages = dict.fromkeys(stage for term in terms for stage in term.teacher_stages)
        return any(term.needs_teachers for term in terms), tuple(stages)

    def weights_at(self, progress: float) -> dict[str, float]:
        """The factor in the total of each of the `counting_terms` at a share of the training in [0, 1]."""
        return {key: self._weight(key, term, progress) for key, term in self.counting_terms(progress).items()}

    def assignment_at(self, step: int) -> Tensor | None:
        """The matrix [K, M] that is drawn for a step, on the CPU; None where it is the same in all steps."""
        drawn = isinstance(self.assignment, RandomAssignment)
        return self.assignment.matrix(step) if drawn and self.assignment is not None else None

    @property
    def stages_asked(self) -> set[tuple[str, ...]]:
        """The sets of stages that the teachers are asked for in some part of the training; () for none but logits."""
        asked = (self.asks_teachers(part / _PARTS) for part in range(_PARTS))
        return {stages for needed, stages in asked if needed}

    @property
    def student_stages(self) -> tuple[str, ...]:
        """Names of the student's stage outputs that some term reads."""
        return tuple(dict.fromkeys(stage for _, term in self.named_terms() for stage in term.student_stages))

    def forward(  # plain loops may pass the time by position
        self,
        student: StudentOutput,
        teachers: TeacherOutput | None,
        batch: Batch,
        epoch: int = 0,
        step: int = 0,
        progress: float = 0.0,
        networks: LiveNetworks | None = None,
        *,
        weights: Mapping[str, Tensor] | None = None,
        assignment_KM: Tensor | None = None,
        step_t: Tensor | None = None,
    ) -> MethodLoss:
        """Computes the loss of one step.

        All rows of the batch count: `batch.valid` is always True in training.

        `weights`, `assignment_KM` and `step_t` give as tensors on the device what else follows from `step` and
        `progress`, so that the forward pass can be recorded as a CUDA graph and replayed in later steps: for the same
        `counting_terms`, all of which must have `captures`.

        Args:
            student: Outputs for the batch, logits [B, C], branch logits [K, B, C].
            teachers: Outputs for the same images, logits [M, B, C]; None if the method needs none then, see
                `asks_teachers`.
            batch: The batch.
            epoch: Counted from 0.
            step: Optimiser steps so far, counted from 0.
            progress: Share of the training that is done, in [0, 1].
            networks: The networks themselves; needed by methods with `needs_networks`.
            weights: Term name -> float32 scalar, for each of the `counting_terms`; see `weights_at`.
            assignment_KM: float32 [K, M]; see `assignment_at`.
            step_t: int64 scalar.

        Returns:
            The total and every term's unweighted value.

        Raises:
            ValueError: If the outputs do not fit the method (teachers missing, other K or M than it was
                built for).
        """
        counting = self.counting_terms(progress)
        if teachers is None and any(term.needs_teachers for term in counting.values()):
            raise ValueError(f"method {self.name!r} needs the teachers' outputs")
        if networks is None and any(term.needs_networks for term in counting.values()):
            raise ValueError(f"method {self.name!r} asks the networks themselves, and was not given them")
        matrix_KM = self._assignment_for(student, teachers, step, assignment_KM)
        context = StepContext(student, teachers, batch, matrix_KM, epoch, step, progress, networks, weights, step_t)
        values = {key: term(context) for key, term in counting.items()}
        factors = self.weights_at(progress) if weights is None else weights
        weighted = [factors[key] * values[key] for key in counting]
        if len(self._constant) < len(self.terms):
            weighted.append(self._nothing(student, counting))
        zero = student.logits.new_zeros(())
        terms = {key: values[key].detach() if key in values else zero for key in self.terms}
        return MethodLoss(torch.stack(weighted).sum(), terms)

    def _nothing(self, student: StudentOutput, counting: Mapping[str, Term]) -> Tensor:
        """0, with a gradient of 0 for all that only idle terms reach now or later.

        Without it such parameters would have no gradient: distributed training would wait for it, and weight decay
        would pass them by.
        """
        idle = [parameter for key, term in self.named_terms() if key not in counting for parameter in term.parameters()]
        reached = [student.logits, student.branch_logits, *idle]
        return torch.stack([(values.float() * 0.0).sum() for values in reached]).sum()

    def _assignment_for(
        self, student: StudentOutput, teachers: TeacherOutput | None, step: int, assignment_KM: Tensor | None
    ) -> Tensor | None:
        if self.assignment is None or teachers is None:
            return None
        built = (self.assignment.num_branches, self.assignment.num_teachers)
        given = (len(student.branch_logits), len(teachers.logits))
        if built != given:
            raise ValueError(f"method {self.name!r} was built for (K, M) = {built} but was given {given}")
        if assignment_KM is not None:
            return assignment_KM
        fixed = self.assignment.fixed_KM
        return (self.assignment.matrix(step) if fixed is None else fixed).to(student.logits.device)


def _check_key(key: str) -> None:
    # nn.ModuleDict refuses such names too, but says neither which setting nor what is allowed.
    if not key.isidentifier() or hasattr(nn.ModuleDict, key) or key in ("loss", "accuracy"):
        raise UserError(f"method.terms.{key}: not a usable name for a term; choose another and set its `type`")


def _listed(terms: Mapping[str, Term]) -> str:
    return ", ".join(terms) or "none"
