"""Who resembles whom: branches each other, branches their own and other teachers, the student the teachers.

Shape letters: N images, C classes, D features, K branches, M teachers. Everything is computed in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

_ROUNDING = 1e-12


class Fidelity(NamedTuple):
    """How well a student imitates a teacher (Stanton et al. 2021).

    Attributes:
        agreement: Share of images on which both predict the same class, in [0, 1].
        kl: Mean of KL(p_teacher ‖ p_student) at temperature 1, nats.
    """

    agreement: float
    kl: float


def cka_matrix(first: Sequence[Tensor], second: Sequence[Tensor]) -> np.ndarray:
    """Linear centred kernel alignment of every pair (Kornblith et al. 2019).

    ‖YᵀX‖²_F / (‖XᵀX‖_F ‖YᵀY‖_F) with the columns of X and Y centred: invariant to rotations and to the scale of
    either side, 1 if one is a rotation of the other.

    Args:
        first: Features X of the same N images, each [N, D]; of any widths.
        second: Features Y, likewise.

    Returns:
        float64 [len(first), len(second)] in [0, 1]; NaN where features do not vary over the images.
    """
    rows, columns = ([_centred(features) for features in side] for side in (first, second))
    scales = [[float(torch.linalg.matrix_norm(x.T @ x)) for x in side] for side in (rows, columns)]
    found = np.full((len(rows), len(columns)), np.nan)
    for i, x in enumerate(rows):
        for j, y in enumerate(columns):
            if scale := scales[0][i] * scales[1][j]:
                found[i, j] = min(float((y.T @ x).square().sum()) / scale, 1.0)  # but for rounding it is
    return found


def agreement_matrix(first: Tensor, second: Tensor) -> np.ndarray:
    """Share of images on which two members predict the same class.

    Args:
        first: Predicted classes, int [K, N].
        second: int [M, N].

    Returns:
        float64 [K, M] in [0, 1].
    """
    return np.array([[float((a == b).double().mean()) for b in second] for a in first])


def kl_matrix(student_logits: Tensor, teacher_logits: Tensor) -> np.ndarray:
    """Mean KL(p_teacher ‖ p_student) at temperature 1, of every branch to every teacher.

    Args:
        student_logits: [K, N, C].
        teacher_logits: [M, N, C].

    Returns:
        float64 [K, M], nats.
    """
    students, teachers = (logits.double().log_softmax(-1) for logits in (student_logits, teacher_logits))
    return np.array([[float((t.exp() * (t - s)).sum(-1).mean()) for t in teachers] for s in students])


def fidelity(student_logits: Tensor, teacher_logits: Tensor) -> Fidelity:
    """Compares one student with one teacher, or one ensemble with another.

    Args:
        student_logits: [N, C].
        teacher_logits: [N, C].
    """
    agreement = agreement_matrix(student_logits.argmax(-1)[None], teacher_logits.argmax(-1)[None])
    return Fidelity(
        float(agreement[0, 0]), float(kl_matrix(student_logits[None], teacher_logits[None])[0, 0])
    )


def own_teachers(assignment: Tensor) -> list[int | None]:
    """Each branch's own teacher: the one with the largest weight in its row.

    Args:
        assignment: [K, M], rows summing to 1.

    Returns:
        K positions; None for a branch whose largest weight is shared, as under the mean of the teachers.
    """
    own: list[int | None] = []
    for row in assignment:
        largest = (row == row.max()).nonzero().flatten().tolist()
        own.append(int(largest[0]) if len(largest) == 1 else None)
    return own


def teacher_margin(similarity: np.ndarray, teachers: Sequence[int | None]) -> float | None:
    """By how much more branches resemble certain teachers than the others.

    mean_k [ S_k,t(k) - mean over m ≠ t(k) of S_km ], over the branches for which there is a t(k). With t the own
    teachers, a positive margin is what "every branch learns from its own teacher" predicts; 0 is what is expected
    when the branches are alike. A teacher that all branches resemble most moves the margin only if teachers are not
    given out evenly. The controls are the same number under an assignment that the student was not trained with
    (each branch's neighbour's teacher), and under a nominal one for a student whose branches had no own teacher.

    Args:
        similarity: [K, M], e.g. of `cka_matrix` or `agreement_matrix`.
        teachers: t(k); None for branches that have none.

    Returns:
        The margin, in the unit of `similarity`. None where no branch has a teacher, with fewer than two teachers, or
        where a similarity that is needed is not finite.
    """
    margins = []
    for row, own in zip(similarity, teachers, strict=True):
        if own is None or len(row) < 2:
            continue
        margins.append(row[own] - np.delete(row, own).mean())
    margin = float(np.mean(margins)) if margins else float("nan")
    return margin if np.isfinite(margin) else None


def _centred(features: Tensor) -> Tensor:
    wide = features.double()
    centred = wide - wide.mean(0)
    # What rounding leaves of constant features is no variation.
    return centred if centred.abs().amax() > _ROUNDING * wide.abs().amax() else torch.zeros_like(centred)
