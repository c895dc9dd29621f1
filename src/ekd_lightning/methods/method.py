"""Methods: named lists of weighted terms.

Shape letters: B batch, C classes, M teachers, K branches.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ekd_lightning.data.batches import as_batch
from ekd_lightning.data.loader import Batch
from ekd_lightning.errors import UserError, require_type
from ekd_lightning.methods.assignment import Assignment
from ekd_lightning.methods.context import LiveNetworks, StepContext
from ekd_lightning.methods.terms import Term
from ekd_lightning.networks.staged import StudentOutput, TeacherOutput

_SCHEDULE_SAMPLES = 240  # points of the training at which schedules are evaluated to find their phases


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

    Attributes:
        needs_teachers: Whether `forward` must be given teacher outputs.
        needs_pooled: Whether some term reads the teachers' pooled features; if not, they need not be kept.
        teacher_stages: Names of the stage outputs that the teachers must return.
        student_stages: Names of the student's stage outputs that some term reads.
        origin: The arguments of `build_method` as JSON-able values, and the training images' positions and labels if a
            term reads them; input of `rebuild_method`. Empty if the method was built from terms directly, or has
            options that are not JSON-able.

    Raises:
        UserError: If no term has a positive weight, or a name cannot name a module.
    """

    def __init__(self, name: str, terms: Mapping[str, Term], assignment: Assignment | None = None) -> None:
        super().__init__()
        self.name = name
        active = {key: term for key, term in terms.items() if term.weight > 0}
        if not active:
            known = ", ".join(terms) or "none"
            raise UserError(
                f"method {name!r} has no term with a positive weight (terms: {known}); give one a weight above 0"
            )
        for key in active:
            # nn.ModuleDict refuses such names too, but its message names neither the setting nor the remedy.
            if not key.isidentifier() or hasattr(nn.ModuleDict, key) or key in ("loss", "accuracy"):
                raise UserError(
                    f"method.terms.{key}: not a usable name for a term; give it another one of letters, digits and _, "
                    f"and name the registered term in its `type`"
                )
        self.terms = nn.ModuleDict(active)
        if assignment is None and any(term.uses_assignment for term in active.values()):
            raise ValueError(f"method {name!r} has a term that uses the assignment; pass assignment=")
        self.assignment = assignment
        self._checked_classes: tuple[frozenset[int], ...] = ()
        self.origin: dict[str, Any] = {}
        self.needs_teachers = any(term.needs_teachers for term in active.values())
        self.needs_pooled = any(term.needs_pooled for term in active.values())
        self.teacher_stages = _stages(active, "teacher_stages")
        self.student_stages = _stages(active, "student_stages")
        # Most weights never change; a step computes only the scheduled ones.
        self._constant = {key: term.weight for key, term in active.items() if term.has_constant_weight}

    def check_classes(self, unknown: Sequence[frozenset[int]], names: Sequence[str], num_classes: int) -> None:
        """Checks that the terms accept teachers that do not know all of the C classes; names are for messages.

        A teacher that knows no class can still teach features. Warns once if a term takes the mean of logits of
        teachers that know different classes, as this mean gives probability 0 to a class that one of them lacks. For
        the unknown classes of each of the M teachers see `cutting.unknown_classes`.

        Raises:
            UserError: If a term reads the logits of a teacher that lacks some classes and does not accept masked ones
                (`Term.accepts_masked`), or reads the logits of a teacher that knows no class.
        """
        if not any(unknown) or tuple(unknown) == self._checked_classes:
            return
        self._checked_classes = tuple(unknown)
        for classes, (m, name) in zip(unknown, enumerate(names), strict=True):
            reading = {key: term for key, term in self.named_terms() if self._reads_logits(term, m)}
            masked = [key for key, term in reading.items() if not term.accepts_masked]
            if reading and len(classes) == num_classes:
                keys = ", ".join(f"method.terms.{key}" for key in reading)
                raise UserError(
                    f"the teacher {name} does not predict the data's {num_classes} classes, so it can only teach "
                    f"features: remove {keys}, or, for a teacher of timm, torchvision, hub or module, map its classes "
                    f"to the data's with classes=[..] or train a new head with finetune=head"
                )
            if masked and classes:
                remedy = "use loss=kl" if hasattr(reading[masked[0]], "loss") else "use kd_branch in its place"
                raise UserError(
                    f"method.terms.{masked[0]} compares the logits of all classes, and the teacher {name} does not "
                    f"know {len(classes)} of them (classes: -1); remove the term, or {remedy}"
                )
        for key, term in self.named_terms():
            lost = self._ruled_out(term, unknown) if term.averages_logits else set()
            if lost:
                warnings.warn(
                    f"method.terms.{key}: classes {sorted(lost)} are known to some teachers only, so the mean of the "
                    f"logits gives them probability 0; combine=probabilities does not",
                    stacklevel=2,
                )

    def _reads_logits(self, term: Term, m: int) -> bool:
        """Whether a term reads the logits of teacher m; weights by confidence compare all teachers."""
        own = term.uses_assignment and not getattr(term, "confidence", None)
        pairs = self.assignment.pairs() if own and self.assignment else None
        return term.needs_teachers and term.reads_logits and (pairs is None or m in {m for _, m in pairs})

    def _ruled_out(self, term: Term, unknown: Sequence[frozenset[int]]) -> set[int]:
        """Returns the classes that only some of the averaged teachers know."""
        rows = [[1.0] * len(unknown)]
        if term.uses_assignment:
            assert self.assignment is not None
            rows = torch.cat(self.assignment.matrices()).tolist()  # random: one teacher per branch in every step
        groups = [[classes for classes, share in zip(unknown, row, strict=True) if share] for row in rows]
        return {c for group in groups for c in frozenset().union(*group).difference(frozenset.intersection(*group))}

    def check_sizes(self, branches: int, teachers: int) -> None:
        """Checks the numbers of branches and teachers, if a term uses the assignment.

        Raises:
            UserError: If they differ from those that the method was built for.
        """
        if self.assignment is None:
            return
        built = (self.assignment.num_branches, self.assignment.num_teachers)
        if built != (branches, teachers):
            raise UserError(
                f"method {self.name!r} was built for {built[0]} branches and {built[1]} teachers, not for "
                f"{branches} and {teachers}; build it for these networks"
            )

    def named_terms(self) -> Iterator[tuple[str, Term]]:
        """Yields name and term of every term with a positive weight, in the method's order."""
        yield from ((key, cast(Term, term)) for key, term in self.terms.items())

    @property
    def changes(self) -> bool:
        """Whether weights, and so the active terms, depend on the share of the training."""
        return len(self._constant) < len(self.terms)

    def weights_at(self, progress: float) -> dict[str, float]:
        """Returns the weights of the active terms at a share of the training in [0, 1].

        Terms with a scheduled weight of 0 are inactive and not computed. If all weights are 0, all terms are active.
        """
        constant = self._constant
        weights = {
            key: constant[key] if key in constant else term.weight_at(progress) for key, term in self.named_terms()
        }
        return {key: weight for key, weight in weights.items() if weight} or weights

    def active_terms(self, progress: float) -> dict[str, Term]:
        """Returns the active terms at a share of the training in [0, 1]; see `weights_at`."""
        return {key: cast(Term, self.terms[key]) for key in self.weights_at(progress)}

    def teacher_needs(self, progress: float) -> tuple[bool, tuple[str, ...]]:
        """Returns whether the active terms at a share of the training need teacher outputs, and of which stages."""
        terms = self.active_terms(progress)
        return any(term.needs_teachers for term in terms.values()), _stages(terms, "teacher_stages")

    @property
    def needed_stage_sets(self) -> set[tuple[str, ...]]:
        """The sets of teacher stages that are needed in some phase of the training; () if logits suffice in a phase."""
        samples = _SCHEDULE_SAMPLES if self.changes else 1
        needs = (self.teacher_needs(sample / samples) for sample in range(samples))
        return {stages for needed, stages in needs if needed}

    def assignment_at(self, step: int, progress: float) -> Tensor | None:
        """Returns the assignment of one step, float32 [K, M] on the CPU; None for a fixed assignment or none."""
        if self.assignment is None or not self.assignment.changes:
            return None
        return self.assignment.matrix(step, progress)

    def forward(  # plain loops may pass the time by position
        self,
        student: StudentOutput,
        teachers: TeacherOutput | None,
        batch: Batch | Sequence[Tensor],
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

        All rows of the batch count: `batch.valid` is always True in training. Terms with `needs_labels` receive only
        the labelled rows.

        `weights`, `assignment_KM` and `step_t` are tensors on the device that replace the values computed from `step`
        and `progress`. With them the forward pass can be recorded as a CUDA graph and replayed in later steps that have
        the same `active_terms`, all of which must have `captures`.

        Args:
            student: Outputs for the batch, logits [B, C], branch logits [K, B, C]: `student.outputs(images)`.
            teachers: Outputs for the same images, logits [M, B, C]; None if no active term needs them, see
                `teacher_needs`.
            batch: The batch, or its (images, labels): images [B, 3, H, W] in [0, 1], labels int [B].
            epoch: Counted from 0.
            step: Optimiser steps so far, counted from 0.
            progress: Completed share of the training, in [0, 1].
            networks: Access to the networks; required if an active term has `needs_networks`.
            weights: Term name -> float32 scalar, for each of the `active_terms`; see `weights_at`.
            assignment_KM: float32 [K, M]; see `assignment_at`.
            step_t: int64 scalar.

        Returns:
            The total and every term's unweighted value.

        Raises:
            UserError: If an active term needs teacher outputs or networks that are missing, if K or M differ from
                those that the method was built for, or if a value is of another kind.
        """
        if not isinstance(student, StudentOutput):
            require_type("student: the outputs of the student, student.outputs(images),", student, StudentOutput)
        if not isinstance(teachers, TeacherOutput | None):
            require_type(
                "teachers: the outputs of the teachers, teachers(images, method.teacher_stages),",
                teachers,
                TeacherOutput,
            )
        if not isinstance(batch, Batch):
            batch = as_batch(batch, student.logits.shape[1])
        active = self.active_terms(progress)
        if teachers is None and any(term.needs_teachers for term in active.values()):
            raise UserError(f"method {self.name!r} needs the teachers' outputs; pass teachers=")
        lacking = set(_stages(active, "teacher_stages")).difference(*(() if teachers is None else teachers.stages[:1]))
        if teachers is not None and lacking:
            raise UserError(
                f"method {self.name!r} needs the teachers' stages {', '.join(sorted(lacking))}; call "
                "teachers(images, method.teacher_stages)"
            )
        if networks is None and any(term.needs_networks for term in active.values()):
            raise UserError(f"method {self.name!r} needs the networks themselves; pass networks=")
        matrix_KM = None
        if self.assignment is not None and teachers is not None:
            self.check_sizes(len(student.branch_logits), len(teachers.logits))
            changed_KM = self.assignment_at(step, progress) if assignment_KM is None else assignment_KM
            matrix_KM = (self.assignment.mean_KM if changed_KM is None else changed_KM).to(student.logits.device)
        context = StepContext(student, teachers, batch, matrix_KM, epoch, step, progress, networks, step_t)
        labelled = context if batch.num_labelled is None else context.labelled
        values = {key: term(labelled if term.needs_labels else context) for key, term in active.items()}
        for key, value in values.items():
            if not isinstance(value, Tensor) or value.dim():
                found = f"values of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
                raise UserError(f"method.terms.{key}: must return a scalar, not {found}")
        factors: Mapping[str, float | Tensor] = self.weights_at(progress) if weights is None else weights
        weighted = [factors[key] * values[key] for key in active]
        if self.changes:
            weighted.append(self._zero_of_inactive(student, active))
        zero = student.logits.new_zeros(())
        terms = {key: values[key].detach() if key in values else zero for key in self.terms}
        return MethodLoss(torch.stack(weighted).sum(), terms)

    def _zero_of_inactive(self, student: StudentOutput, active: Mapping[str, Term]) -> Tensor:
        """Returns 0, with a zero gradient for every parameter that only inactive terms depend on.

        Without it these parameters would have no gradient: distributed training would wait for one, and the optimiser
        would apply no weight decay.
        """
        idle = [parameter for key, term in self.named_terms() if key not in active for parameter in term.parameters()]
        inputs = [student.logits, student.branch_logits, *idle]
        return torch.stack([(values.float() * 0.0).sum() for values in inputs]).sum()


def _stages(terms: Mapping[str, Term], which: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(stage for term in terms.values() for stage in getattr(term, which)))
