"""Assignment of teachers to branches: a row-stochastic matrix [K branches, M teachers].

Every branch distils from Σ_m A[k, m] · teacher m. The paper's abstract says that branches learn from
"different teachers" but not how they are matched; one-to-one is the project's reading, the other kinds are
its controls.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ekd_lightning.errors import UserError, unknown_name
from ekd_lightning.methods.options import number

AssignmentSpec = str | Sequence[Sequence[float]]

FIXED_KINDS = ("one_to_one", "mean", "permuted")
KINDS = (*FIXED_KINDS, "random")
ROW_SUM_TOLERANCE = 1e-6


class Assignment(nn.Module):
    """An assignment that is the same in every step; a module, so that it moves to the method's device.

    Args:
        mean_KM: float32 [K, M], rows summing to 1: the matrix, in the mean over the steps.

    Attributes:
        num_branches: K.
        num_teachers: M.
    """

    mean_KM: Tensor  # noqa: N815  # shape letters

    def __init__(self, mean_KM: Tensor) -> None:
        super().__init__()
        self.num_branches, self.num_teachers = mean_KM.shape
        # Not persistent: it is configuration, and a checkpoint must not override it.
        self.register_buffer("mean_KM", mean_KM, persistent=False)

    def matrix(self, step: int) -> Tensor:
        """Returns the assignment of one optimiser step.

        Args:
            step: Global step, counted from 0.

        Returns:
            float32 [K, M]; rows sum to 1.
        """
        return self.mean_KM

    def pairs(self) -> list[tuple[int, int]]:
        """Returns all pairs (branch, teacher) that have a non-zero weight at some step."""
        return [(k, m) for k, m in self.mean_KM.nonzero().tolist()]


class RandomAssignment(Assignment):
    """A random assignment: every step draws anew, uniformly, which teacher each branch imitates.

    Each branch gets exactly one teacher, and teachers are shared as evenly as K and M allow: with K <= M no
    two branches have the same one, with K > M every teacher has floor(K/M) or ceil(K/M) branches. The draw
    is a pure function of (seed, step), hence the same on all devices and after a resume.

    Args:
        num_branches: K >= 1.
        num_teachers: M >= 1.
        seed: Non-negative.
    """

    def __init__(self, num_branches: int, num_teachers: int, seed: int = 0) -> None:
        super().__init__(torch.full((num_branches, num_teachers), 1.0 / num_teachers))
        if seed < 0:
            raise UserError(f"seed={seed} is not allowed for the random assignment; give an integer >= 0")
        self.seed = seed

    def matrix(self, step: int) -> Tensor:
        """Returns the assignment of one step, float32 [K, M], one 1 in each row (on the CPU)."""
        generator = np.random.default_rng((self.seed, step))
        teacher_of_place = generator.permutation(self.num_teachers)
        place_of_branch = generator.permutation(self.num_branches)
        teachers_K = teacher_of_place[place_of_branch % self.num_teachers]
        return torch.eye(self.num_teachers)[torch.from_numpy(teachers_K)]


def build_assignment(kind: AssignmentSpec, num_branches: int, num_teachers: int, seed: int = 0) -> Assignment:
    """Builds an assignment of any kind.

    Args:
        kind: `one_to_one`, `mean`, `permuted`, `random`, or explicit rows; see `make_assignment`.
        num_branches: K >= 1.
        num_teachers: M >= 1.
        seed: For `random` only.

    Returns:
        The assignment.

    Raises:
        UserError: For an unknown kind, impossible counts or rows that do not fit.
    """
    if isinstance(kind, str) and kind not in KINDS:
        raise unknown_name("assignment", kind, KINDS)
    if kind == "random":
        _check_counts(num_branches, num_teachers)
        return RandomAssignment(num_branches, num_teachers, seed)
    return Assignment(make_assignment(kind, num_branches, num_teachers))


def make_assignment(kind: AssignmentSpec, num_branches: int, num_teachers: int) -> Tensor:
    """Returns the matrix of a fixed assignment.

    Kinds: `one_to_one` sends branch k to teacher k mod M; `mean` gives every branch the mean of all teachers;
    `permuted` is one_to_one shifted by one teacher, branch k to (k + 1) mod M: the null control, since with
    interchangeable branches only the names change. With one teacher `permuted` equals `one_to_one` and warns
    instead of failing, so that a sweep over M runs through.

    Args:
        kind: One of the kinds above, or K explicit rows of M non-negative weights, each summing to 1.
        num_branches: K >= 1.
        num_teachers: M >= 1.

    Returns:
        float32 [K, M], rows summing to 1 within 1e-6.

    Raises:
        UserError: For an unknown kind, impossible counts or rows that do not fit.
    """
    K, M = num_branches, num_teachers
    _check_counts(K, M)
    if not isinstance(kind, str):
        return _explicit(kind, K, M)
    if kind == "mean":
        return torch.full((K, M), 1.0 / M)
    if kind not in FIXED_KINDS:
        raise unknown_name("assignment", kind, FIXED_KINDS)
    shift = int(kind == "permuted")
    if shift and M == 1:
        warnings.warn("assignment=permuted has no effect with one teacher: it equals one_to_one", stacklevel=2)
    teachers_K = (torch.arange(K) + shift) % M
    idle = sorted(set(range(M)) - set(teachers_K.tolist()))
    if idle:
        warnings.warn(
            f"assignment={kind}: {M} teachers for {K} branches, so teachers {idle} (counted from 0)"
            " teach no branch; they still count in the mean of the teachers",
            stacklevel=2,
        )
    return torch.eye(M)[teachers_K]


def _check_counts(num_branches: int, num_teachers: int) -> None:
    if num_branches < 1:
        raise UserError(f"number of branches={num_branches} is not allowed; give an integer >= 1")
    if num_teachers < 1:
        raise UserError(f"number of teachers={num_teachers}: an assignment needs at least 1 teacher")


def _explicit(rows: Sequence[Sequence[float]], K: int, M: int) -> Tensor:
    is_table = isinstance(rows, Sequence) and all(
        isinstance(row, Sequence) and not isinstance(row, str) for row in rows
    )
    if not is_table or len(rows) != K or any(len(row) != M for row in rows):
        raise UserError(
            f"assignment={rows!r} must be one of {', '.join(KINDS)} or {K} rows (branches) of {M} numbers (teachers)"
        )
    for k, row in enumerate(rows):
        values = [number(f"assignment, row {k}, teacher {m}", value, low=0.0) for m, value in enumerate(row)]
        # The slack beyond the tolerance is for the rounding of the sum itself.
        if abs(sum(values) - 1.0) > ROW_SUM_TOLERANCE * (1 + 1e-6):
            raise UserError(f"assignment, row {k}={list(row)} sums to {sum(values):.7g}; each row must sum to 1")
    return torch.tensor([list(row) for row in rows], dtype=torch.float32)
