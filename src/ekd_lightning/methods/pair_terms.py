"""Pair terms, which compare a branch with a teacher: pairs by the assignment, features, adapters by pair.

Shape letters: B batch, M teachers, K branches, D features; in maps [B, C, H, W] the C is channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ekd_lightning.errors import UserError
from ekd_lightning.methods.context import StageShape, StepContext, TermContext
from ekd_lightning.methods.terms import Term, branch_factor

POOLED = "pooled"


class PairTerm(Term):
    """mean_k Σ_m A[k, m] · compare(branch k, teacher m), over the pairs that the assignment ever uses.

    With one teacher and a plain student that is the plain loss of the single-teacher literature; with the
    assignment `mean`, a plain student gets the mean of its losses against all teachers.

    Args:
        weight: Factor in the total, >= 0.
        context: The networks' sizes and the assignment.
        reduction: `mean` or `sum` over the K branches.
    """

    needs_teachers = True
    uses_assignment = True

    def __init__(self, weight: float, context: TermContext, *, reduction: str = "mean") -> None:
        super().__init__(weight)
        assert context.assignment is not None
        self.num_branches = context.num_branches
        self.factor = branch_factor(reduction, context.num_branches)
        self.pairs = tuple(context.assignment.pairs())

    def forward(self, context: StepContext) -> Tensor:
        """Returns the mean or sum over the branches of what `compare` says of their teachers."""
        assert context.assignment_KM is not None
        # All pairs, even those that a random assignment gives no weight in this step: DDP wants a gradient
        # for every parameter, and choosing pairs by value would have to wait for the device.
        values = torch.stack([self.compare(context, k, m) for k, m in self.pairs])
        weights = torch.stack([context.assignment_KM[k, m] for k, m in self.pairs]).to(values)
        return self.factor * (weights * values).sum() / self.num_branches

    def compare(self, context: StepContext, k: int, m: int) -> Tensor:
        """Returns the loss of branch k against teacher m, a scalar; nothing flows into the teacher's side."""
        raise NotImplementedError


class FeatureSite:
    """A place in the networks where a pair term reads features: `pooled`, `last`, or a stage.

    Attributes:
        name: As the user wrote it.
        student_stages: The stages that the term must list as its own `student_stages`.
        teacher_stages: Likewise.
    """

    def __init__(self, name: str, context: TermContext, pairs: Sequence[tuple[int, int]]) -> None:
        """Resolves the place in the student and in the teachers of all pairs.

        Raises:
            UserError: A network has no such stage, or `last` has different names in different teachers.
        """
        self.name = name
        self._context = context
        self._student: str | None = None
        self._teacher: dict[int, str] = {}
        if name != POOLED:
            self._student = context.student_stage(name)
            self._teacher = {m: context.teacher_stage(m, name) for m in sorted({m for _, m in pairs})}
        self.student_stages = () if self._student is None else (self._student,)
        self.teacher_stages = tuple(dict.fromkeys(self._teacher.values()))
        for m in self._teacher:
            for stage in self.teacher_stages:  # all teachers are asked for all of them
                context.teacher_stage(m, stage)

    @property
    def is_pooled(self) -> bool:
        """Whether features are vectors [B, D]; otherwise maps [B, C, H, W]."""
        return self._student is None

    def student_shape(self) -> StageShape | tuple[int]:
        """Shape of a branch's features: (D,) or (channels, height, width)."""
        if self._student is None:
            return (self._context.student_features,)
        return self._context.student_stage_shapes[self._student]

    def teacher_shape(self, m: int) -> StageShape | tuple[int]:
        """Shape of the features of teacher m."""
        if self._student is None:
            return (self._context.teacher_features[m],)
        return self._context.teacher_stage_shapes[m][self._teacher[m]]

    def require_equal_channels(self, m: int, reason: str) -> None:
        """Refuses a pair of networks with different channel counts, for losses that cannot adapt them.

        Args:
            m: The teacher.
            reason: Why, and what to do: the end of the message.

        Raises:
            UserError: With both shapes.
        """
        student, teacher = self.student_shape(), self.teacher_shape(m)
        if student[0] != teacher[0]:
            raise UserError(
                f"{reason}: the student {self._context.student_name!r} has shape {list(student)},"
                f" the teacher {self._context.teacher_label(m)} {list(teacher)} (feature {self.name!r})"
            )

    def features(self, context: StepContext, k: int, m: int) -> tuple[Tensor, Tensor]:
        """Features of branch k (with gradients) and of teacher m (detached), as they are."""
        assert context.teachers is not None
        if self._student is None:
            return context.student.pooled[k], context.teachers.pooled[m].detach()
        return (
            context.student.stages[k][self._student],
            context.teachers.stages[m][self._teacher[m]].detach(),
        )


def map_sites(
    stages: object, context: TermContext, pairs: Sequence[tuple[int, int]], least: int = 1
) -> list[FeatureSite]:
    """The places of a term that compares maps at several stages.

    Args:
        stages: The option `stages` as the user gave it: a list of stage names, each once.
        context: The networks' sizes.
        pairs: The term's (branch, teacher) pairs.
        least: How many stages there must be.

    Returns:
        One place for each stage, in the given order.

    Raises:
        UserError: For anything else than such a list, or a stage that a network lacks.
    """
    names = list(stages) if isinstance(stages, (list, tuple)) else []
    wrong = len(names) < least or len(set(map(str, names))) < len(names) or POOLED in names
    if wrong or not all(isinstance(name, str) for name in names):
        raise UserError(f"stages={stages!r} is not allowed; give a list of {least} or more different stages")
    return [FeatureSite(name, context, pairs) for name in names]


def read_sites(term: Term, *sites: FeatureSite) -> None:
    """Declares what a term reads at its places."""
    term.needs_pooled = any(site.is_pooled for site in sites)
    term.student_stages = tuple(name for site in sites for name in site.student_stages)
    term.teacher_stages = tuple(dict.fromkeys(name for site in sites for name in site.teacher_stages))


def pair_key(k: int, m: int) -> str:
    """Names the adapters of branch k and teacher m in a ModuleDict."""
    return f"branch{k}_teacher{m}"
