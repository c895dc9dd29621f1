"""Diversity of ensemble members, and similarity between branches, teachers and student.

Members are the K branches of one student, or the same student of R seeds.
Shape letters: K members or branches, M teachers, N images, C classes, D features. Everything is computed in float64.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Diversity(NamedTuple):
    """Diversity of K members: means over all pairs of members unless stated otherwise; None if not defined.

    Attributes:
        pairwise_kl: (KL(p_i ‖ p_j) + KL(p_j ‖ p_i)) / 2, mean over images, nats.
        pairwise_js: Jensen-Shannon divergence H((p_i + p_j)/2) - (H(p_i) + H(p_j))/2, nats, in [0, log 2].
        mutual_information: H(p̄) - mean_k H(p_k) over all members at once, nats, in [0, log K].
        q_statistic: Yule's Q of the members' correctness, (N11 N00 - N01 N10) / (N11 N00 + N01 N10), in [-1, 1], where
            e.g. N10 counts images that only the first member classifies correctly. Pairs with a zero denominator are
            left out; None if that leaves no pair.
        error_correlation: Pearson correlation of the members' correctness, in [-1, 1]; pairs as for `q_statistic`.
        double_fault: Share of images on which both are wrong, in [0, 1].
        oracle_accuracy: Share of images on which any member is right, in [0, 1].
        variance: mean over images of Σ_c Var_k(p_kc), dividing by K, in [0, 1]. It equals the members' mean Brier score
            minus the Brier score of the mean of the probabilities (Krogh and Vedelsby 1995).
    """

    pairwise_kl: float | None
    pairwise_js: float | None
    mutual_information: float | None
    q_statistic: float | None
    error_correlation: float | None
    double_fault: float | None
    oracle_accuracy: float
    variance: float | None


class Spread(NamedTuple):
    """Spread of one training over R seeds.

    Attributes:
        num_runs: R.
        variance: mean over images of Σ_c Var_r(p_rc), dividing by R - 1: the estimated variance over seeds.
        disagreement: Share of images on which two runs predict different classes, mean over pairs, in [0, 1].
        mean_accuracy: Mean over runs, in [0, 1].
        std_accuracy: Standard deviation over runs, dividing by R - 1.
    """

    num_runs: int
    variance: float
    disagreement: float
    mean_accuracy: float
    std_accuracy: float


def diversity(member_logits: Tensor, labels: Tensor) -> Diversity:
    """Measures the diversity of the members of an ensemble.

    Measures of correctness follow Kuncheva and Whitaker 2003, Measures of Diversity in Classifier Ensembles; the others
    are defined in `Diversity`.

    Args:
        member_logits: [K, N, C], N >= 1.
        labels: int64 [N].

    Returns:
        The measures; with one member, all except the oracle accuracy are None.
    """
    hits = (member_logits.argmax(-1) == labels).double()
    oracle = float(hits.amax(0).mean())
    K, N = hits.shape
    if K < 2:
        return Diversity(None, None, None, None, None, None, oracle, None)
    log_probs = member_logits.double().log_softmax(-1)
    probs = log_probs.exp()
    pairs = list(itertools.combinations(range(K), 2))
    # Numbers of images that both members of a pair, only the first, only the second, or neither classify correctly.
    first, second = hits[[i for i, _ in pairs]], hits[[j for _, j in pairs]]
    both, one, other = ((x * y).sum(1) for x, y in ((first, second), (first, 1 - second), (1 - first, second)))
    neither = N - both - one - other
    same, different = both * neither, one * other
    sides = (both + one) * (other + neither) * (both + other) * (one + neither)
    return Diversity(
        pairwise_kl=sum(_jeffreys(log_probs[i], log_probs[j]) for i, j in pairs) / len(pairs),
        pairwise_js=sum(_js(probs[[i, j]]) for i, j in pairs) / len(pairs),
        mutual_information=_js(probs),
        q_statistic=_mean_without_nan((same - different) / (same + different)),
        error_correlation=_mean_without_nan((same - different) / sides.sqrt()),
        double_fault=float((neither / N).mean()),
        oracle_accuracy=oracle,
        variance=float(probs.var(0, correction=0).sum(-1).mean()),
    )


def spread_over_runs(probs: np.ndarray, labels: np.ndarray) -> Spread:
    """Measures the spread of runs that differ only in the seed.

    Args:
        probs: [R, N, C], probabilities of R >= 2 runs for the same images, e.g. `ensemble_probs` of their arrays files.
        labels: int [N], the images' labels.

    Raises:
        ValueError: For fewer than two runs, or shapes that do not fit.
    """
    if probs.ndim != 3 or len(probs) < 2 or probs.shape[1:2] != labels.shape:
        raise ValueError(f"probs {probs.shape} must be [R >= 2, N, C], labels {labels.shape} must be [N]")
    wide = np.asarray(probs, dtype=np.float64)
    predicted = wide.argmax(-1)
    accuracies = (predicted == labels).mean(-1)
    pairs = itertools.combinations(range(len(wide)), 2)
    return Spread(
        num_runs=len(wide),
        variance=float(wide.var(0, ddof=1).sum(-1).mean()),
        disagreement=float(np.mean([(predicted[i] != predicted[j]).mean() for i, j in pairs])),
        mean_accuracy=float(accuracies.mean()),
        std_accuracy=float(accuracies.std(ddof=1)),
    )


def _jeffreys(first: Tensor, second: Tensor) -> float:
    """Returns half the sum of both KL divergences between log-probabilities [N, C], mean over images."""
    return float(((first.exp() - second.exp()) * (first - second)).sum(-1).mean() / 2)


def _js(probs: Tensor) -> float:
    """Returns H(p̄) - mean_k H(p_k) of probabilities [K, N, C], mean over images, clamped to 0."""
    gap = torch.special.entr(probs.mean(0)).sum(-1) - torch.special.entr(probs).sum(-1).mean(0)
    return float(gap.mean().clamp_min(0.0))


def _mean_without_nan(values: Tensor) -> float | None:
    """Returns the mean of the values that are not NaN; None if all are."""
    mean = float(values.nanmean())
    return None if math.isnan(mean) else mean


_ROUNDING = 1e-12


def cka_matrix(first: Sequence[Tensor], second: Sequence[Tensor]) -> np.ndarray:
    """Linear centred kernel alignment (CKA) of every pair of features (Kornblith et al. 2019).

    ‖YᵀX‖²_F / (‖XᵀX‖_F ‖YᵀY‖_F) with the columns of X and Y centred: invariant to rotation and scaling of X and of Y,
    and 1 if one is a rotation of the other.

    Args:
        first: Features X of the same N images, each [N, D] with its own D.
        second: Features Y of these images, each [N, D] with its own D.

    Returns:
        float64 [len(first), len(second)] in [0, 1]; NaN where features do not vary over the images.
    """
    rows, columns = ([_centred(features) for features in side] for side in (first, second))
    scales = [[float(torch.linalg.matrix_norm(x.T @ x)) for x in side] for side in (rows, columns)]
    found = np.full((len(rows), len(columns)), np.nan)
    for i, x in enumerate(rows):
        for j, y in enumerate(columns):
            if scale := scales[0][i] * scales[1][j]:
                found[i, j] = min(float((y.T @ x).square().sum()) / scale, 1.0)  # may exceed 1 by rounding
    return found


def agreement_matrix(first: Tensor, second: Tensor) -> np.ndarray:
    """Share of images on which two members predict the same class.

    Args:
        first: Predicted classes, int [K, N].
        second: Predicted classes, int [M, N].

    Returns:
        float64 [K, M] in [0, 1].
    """
    return (first[:, None] == second).double().mean(-1).numpy()


def kl_matrix(student_logits: Tensor, teacher_logits: Tensor) -> np.ndarray:
    """Mean KL(p_teacher ‖ p_branch) at temperature 1 for every branch and teacher (Stanton et al. 2021).

    Args:
        student_logits: [K, N, C].
        teacher_logits: [M, N, C].

    Returns:
        float64 [K, M], nats.
    """
    students, teachers = (logits.double().log_softmax(-1) for logits in (student_logits, teacher_logits))
    return np.array([[float((t.exp() * (t - s)).sum(-1).mean()) for t in teachers] for s in students])


def own_teachers(assignment: Tensor) -> list[int | None]:
    """Returns each branch's own teacher: the one with the largest weight in its row.

    Args:
        assignment: [K, M], rows summing to 1.

    Returns:
        K positions; None for a branch with several largest weights, as in the mean of the teachers.
    """
    own: list[int | None] = []
    for row in assignment:
        largest = (row == row.max()).nonzero().flatten().tolist()
        own.append(int(largest[0]) if len(largest) == 1 else None)
    return own


def teacher_margin(similarity: np.ndarray, teachers: Sequence[int | None]) -> float | None:
    """Returns how much more similar branches are to their own teachers than to the others.

    mean_k [ S_k,t(k) - mean over m ≠ t(k) of S_km ], over the branches k with a teacher t(k). If every branch learns
    from its own teacher, the margin is positive; if all branches are alike, its expectation is 0. A teacher that is
    most similar to all branches affects the margin only if teachers are assigned unevenly. Controls are the margin for
    another assignment than in training (each branch's neighbour's teacher), and the margin for a nominal assignment of
    a student whose branches had no own teacher.

    Args:
        similarity: [K, M], e.g. from `cka_matrix` or `agreement_matrix`.
        teachers: t(k), K positions; None for a branch without its own teacher.

    Returns:
        The margin, in the unit of `similarity`; None if no branch has a teacher, there are fewer than two teachers, or
        a required similarity is not finite.
    """
    margins = [
        row[own] - np.delete(row, own).mean()
        for row, own in zip(similarity, teachers, strict=True)
        if own is not None and len(row) > 1
    ]
    margin = float(np.mean(margins)) if margins else float("nan")
    return margin if np.isfinite(margin) else None


def _centred(features: Tensor) -> Tensor:
    wide = features.double()
    centred = wide - wide.mean(0)
    # Centred constant features may differ from 0 by rounding.
    return centred if centred.abs().amax() > _ROUNDING * wide.abs().amax() else torch.zeros_like(centred)
