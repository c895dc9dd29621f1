"""Assignment of teachers to branches: a row-stochastic matrix [K branches, M teachers].

Every branch distils from Σ_m A[k, m] · teacher m. The paper's abstract says that branches learn from
"different teachers" but not how they are matched; one-to-one is the project's reading, the other kinds are
its controls.
"""

from __future__ import annotations

import re
import warnings
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ekd_lightning.errors import UserError, unknown_name
from ekd_lightning.methods.options import number

AssignmentSpec = str | Sequence[int] | Sequence[Sequence[float]] | Mapping[str, Any]

FIXED_KINDS = ("one_to_one", "mean", "permuted")
KINDS = (*FIXED_KINDS, "random")
ROW_SUM_TOLERANCE = 1e-6


class Assignment(nn.Module):
    """An assignment that is the same in every step; a module, so that it moves to the method's device.

    Args:
        mean_KM: float32 [K, M], rows summing to 1: the matrix, or its mean over the steps in a subclass that changes.

    Attributes:
        num_branches: K.
        num_teachers: M.
        changes: Whether `matrix` depends on its arguments.
    """

    changes = False
    mean_KM: Tensor  # noqa: N815  # shape letters

    def __init__(self, mean_KM: Tensor) -> None:
        super().__init__()
        self.num_branches, self.num_teachers = mean_KM.shape
        # Not persistent: a checkpoint must not override the configuration.
        self.register_buffer("mean_KM", mean_KM, persistent=False)

    def matrix(self, step: int, progress: float = 0.0) -> Tensor:
        """Returns the assignment float32 [K, M], rows summing to 1, of an optimiser step, counted from 0.

        `progress` is the completed share of the training, in [0, 1].
        """
        return self.mean_KM

    def matrices(self) -> list[Tensor]:
        """Returns the matrices [K, M] in order of use; one draw for a random assignment."""
        return [self.matrix(0)]

    def pairs(self) -> list[tuple[int, int]]:
        """Returns all pairs (branch, teacher) that have a non-zero weight at some step."""
        return [(k, m) for k, m in self.mean_KM.nonzero().tolist()]


class RandomAssignment(Assignment):
    """A random assignment: every step draws, uniformly, one teacher for each branch.

    Teachers are shared as evenly as K and M allow: with K <= M all branches have different teachers, with K > M every
    teacher has floor(K/M) or ceil(K/M) branches. The draw is a pure function of (seed, step), hence the same on all
    devices and after a resume.

    Raises:
        UserError: For a negative seed.
    """

    changes = True

    def __init__(self, num_branches: int, num_teachers: int, seed: int = 0) -> None:
        super().__init__(torch.full((num_branches, num_teachers), 1.0 / num_teachers))
        if seed < 0:
            raise UserError(f"seed={seed} is not allowed for the random assignment; give an integer >= 0")
        self.seed = seed

    def matrix(self, step: int, progress: float = 0.0) -> Tensor:
        """Returns the assignment of one step, float32 [K, M], one 1 in each row (on the CPU)."""
        generator = np.random.default_rng((self.seed, step))
        teacher_of_place = generator.permutation(self.num_teachers)
        place_of_branch = generator.permutation(self.num_branches)
        teachers_K = teacher_of_place[place_of_branch % self.num_teachers]
        return torch.eye(self.num_teachers)[torch.from_numpy(teachers_K)]


class ScheduledAssignment(Assignment):
    """A sequence of fixed assignments, float32 [K, M], each of which holds from a given share of the training.

    These shares increase from 0 and stay below 1.
    """

    changes = True

    def __init__(self, starts: Sequence[float], matrices: Sequence[Tensor]) -> None:
        lengths = [end - start for start, end in zip(starts, (*starts[1:], 1.0), strict=True)]
        parts = [length * part for length, part in zip(lengths, matrices, strict=True)]
        super().__init__(torch.stack(parts).sum(0))
        self._starts, self._matrices = tuple(starts), tuple(matrices)

    def matrix(self, step: int, progress: float = 0.0) -> Tensor:
        """Returns the assignment at a share of the training, float32 [K, M] (on the CPU)."""
        return self._matrices[bisect_right(self._starts, progress) - 1]

    def matrices(self) -> list[Tensor]:
        """Returns the matrices [K, M] in order of use."""
        return list(self._matrices)


def build_assignment(kind: AssignmentSpec, num_branches: int, num_teachers: int, seed: int = 0) -> Assignment:
    """Builds an assignment of any kind, for K branches and M teachers; only `random` uses the seed.

    Args:
        kind: `random`; {schedule: [[0, kind], [share, kind], ...]}, where each kind holds from its share of the
            training on; or any `kind` of `make_assignment`.
        num_branches: K >= 1.
        num_teachers: M >= 1.
        seed: Seed of a random assignment.

    Raises:
        UserError: For an unknown kind, impossible counts or rows that do not fit.
    """
    if isinstance(kind, str) and kind not in KINDS and _teacher_numbers(kind) is None:
        raise unknown_name("assignment", kind, KINDS)
    if kind == "random":
        _check_counts(num_branches, num_teachers)
        return RandomAssignment(num_branches, num_teachers, seed)
    if isinstance(kind, Mapping):
        starts, kinds = zip(*_schedule(kind), strict=True)
        return ScheduledAssignment(starts, [make_assignment(part, num_branches, num_teachers) for part in kinds])
    return Assignment(make_assignment(kind, num_branches, num_teachers))


def last_kind(kind: AssignmentSpec) -> AssignmentSpec:
    """Returns the kind that holds at the end of the training: the last kind of a schedule, else `kind` itself."""
    return _schedule(kind)[-1][1] if isinstance(kind, Mapping) else kind


def _schedule(spec: Mapping[str, Any]) -> list[tuple[float, Any]]:
    """Checks a schedule of assignments; returns shares and kinds."""
    parts = spec.get("schedule")
    parts = parts if set(spec) == {"schedule"} and isinstance(parts, (list, tuple)) else []
    if not parts or any(not isinstance(part, (list, tuple)) or len(part) != 2 for part in parts):
        raise UserError(f"assignment={spec!r} is not allowed; give {{schedule: [[0, one_to_one], [0.8, permuted]]}}")
    starts = [number("assignment.schedule, share", start, low=0.0, high=1.0) for start, _ in parts]
    if starts[0] != 0 or any(later <= earlier for earlier, later in pairwise((*starts, 1.0))):
        raise UserError(
            f"assignment.schedule: shares {starts} are not allowed; they must increase from 0 and stay below 1"
        )
    if any(kind == "random" or isinstance(kind, Mapping) for _, kind in parts):
        raise UserError(f"assignment={spec!r} is not allowed: a schedule takes fixed kinds, no random and no schedule")
    return [(start, kind) for start, (_, kind) in zip(starts, parts, strict=True)]


def make_assignment(kind: AssignmentSpec, num_branches: int, num_teachers: int) -> Tensor:
    """Returns the matrix of a fixed assignment.

    Kinds: `one_to_one` gives branch k the teacher k mod M; `mean` gives every branch the mean of all teachers;
    `permuted` is one_to_one shifted by one, branch k has the teacher (k + 1) mod M. It is a null control: if branches
    are interchangeable, only their names change. With one teacher `permuted` equals `one_to_one`, which is a warning
    and not an error, so that sweeps over M run through.

    Args:
        kind: One of the kinds above; the teacher of each branch, counted from 0, as a list ([2, 0, 1]) or a string
            ("2,0,1"); or K rows of M non-negative weights, each summing to 1.
        num_branches: K >= 1.
        num_teachers: M >= 1.

    Returns:
        float32 [K, M], rows summing to 1 within 1e-6.

    Raises:
        UserError: For an unknown kind, impossible counts or rows that do not fit.
    """
    K, M = num_branches, num_teachers
    _check_counts(K, M)
    teachers = _teacher_numbers(kind)
    if teachers is not None:
        return _explicit(torch.eye(M)[teachers].tolist() if len(teachers) == K and max(teachers) < M else kind, K, M)
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
            f"assignment={kind}: {M} teachers for {K} {'branch' if K == 1 else 'branches'}, so teachers {idle}"
            " (counted from 0) teach no branch; they still count in the mean of the teachers",
            stacklevel=2,
        )
    return torch.eye(M)[teachers_K]


def _teacher_numbers(kind: AssignmentSpec) -> list[int] | None:
    """Returns the teacher of each branch, if `kind` lists them; None for any other kind."""
    if isinstance(kind, str) and re.fullmatch(r"\d+(,\d+)+", kind):
        return [int(m) for m in kind.split(",")]
    listed = isinstance(kind, Sequence) and not isinstance(kind, str) and len(kind) > 0
    fits = listed and all(isinstance(m, int) and not isinstance(m, bool) and m >= 0 for m in kind)
    return [int(m) for m in kind] if fits else None  # type: ignore[arg-type]


def _check_counts(num_branches: int, num_teachers: int) -> None:
    if num_branches < 1:
        raise UserError(f"number of branches={num_branches} is not allowed; give an integer >= 1")
    if num_teachers < 1:
        raise UserError(f"number of teachers={num_teachers}: an assignment needs at least 1 teacher")


def _explicit(rows: Any, K: int, M: int) -> Tensor:
    is_table = isinstance(rows, Sequence) and all(
        isinstance(row, Sequence) and not isinstance(row, str) for row in rows
    )
    if not is_table or len(rows) != K or any(len(row) != M for row in rows):
        raise UserError(
            f"assignment={rows!r} is not allowed; give one of {', '.join(KINDS)}, a list of {K} teachers (one per "
            f"branch, 0 to {M - 1}), or {K} rows (branches) of {M} weights (teachers)"
        )
    for k, row in enumerate(rows):
        values = [number(f"assignment, row {k}, teacher {m}", value, low=0.0) for m, value in enumerate(row)]
        # The slack beyond the tolerance is for the rounding of the sum itself.
        if abs(sum(values) - 1.0) > ROW_SUM_TOLERANCE * (1 + 1e-6):
            raise UserError(f"assignment, row {k}={list(row)} sums to {sum(values):.7g}; each row must sum to 1")
    return torch.tensor([list(row) for row in rows], dtype=torch.float32)
