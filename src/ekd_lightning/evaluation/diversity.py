"""How different the members of an ensemble are: the K branches of one student, or the same student of R seeds.

Shape letters: K members, N images, C classes. Everything is computed in float64.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Diversity(NamedTuple):
    """Means over all pairs of members, unless said otherwise; None where it is not defined.

    Attributes:
        pairwise_kl: (KL(p_i ‖ p_j) + KL(p_j ‖ p_i)) / 2, mean over images, nats.
        pairwise_js: Jensen-Shannon divergence H((p_i + p_j)/2) - (H(p_i) + H(p_j))/2, nats, in [0, log 2].
        mutual_information: H(p̄) - mean_k H(p_k) over all members at once, nats, in [0, log K].
        q_statistic: Yule's Q of who is right, (N11 N00 - N01 N10) / (N11 N00 + N01 N10), in [-1, 1]. Pairs with a
            zero denominator are left out; None if there is no other.
        error_correlation: Pearson correlation of who is right, in [-1, 1]; likewise.
        double_fault: Share of images on which both are wrong, in [0, 1].
        oracle_accuracy: Share of images on which any member is right, in [0, 1].
        variance: mean over images of Σ_c Var_k(p_kc), dividing by K, in [0, 1]: by how much the Brier score of the
            mean of the probabilities is below that of the mean member, exactly (Krogh and Vedelsby 1995).
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
    """How much the same training differs from seed to seed.

    Attributes:
        num_runs: R.
        variance: mean over images of Σ_c Var_r(p_rc), dividing by R - 1: an estimate of what another seed would do.
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
    """Compares the members of an ensemble.

    Definitions: Kuncheva and Whitaker 2003, Measures of Diversity in Classifier Ensembles, for who is right; the
    others are written out at `Diversity`.

    Args:
        member_logits: [K, N, C], N >= 1.
        labels: int64 [N].

    Returns:
        With one member, all but the oracle accuracy are None.
    """
    hits = (member_logits.argmax(-1) == labels).double()
    oracle = float(hits.amax(0).mean())
    if len(member_logits) < 2:
        return Diversity(None, None, None, None, None, None, oracle, None)
    log_probs = member_logits.double().log_softmax(-1)
    probs = log_probs.exp()
    pairs = list(itertools.combinations(range(len(probs)), 2))
    tables = [_contingency(hits[i], hits[j]) for i, j in pairs]
    return Diversity(
        pairwise_kl=_mean(float(_jeffreys(log_probs[i], log_probs[j])) for i, j in pairs),
        pairwise_js=_mean(_js(probs[[i, j]]) for i, j in pairs),
        mutual_information=_js(probs),
        q_statistic=_mean(_q_statistic(table) for table in tables),
        error_correlation=_mean(_correlation(table) for table in tables),
        double_fault=_mean(table.neither / len(labels) for table in tables),
        oracle_accuracy=oracle,
        variance=float(probs.var(0, correction=0).sum(-1).mean()),
    )


def spread_over_runs(probs: np.ndarray, labels: np.ndarray) -> Spread:
    """How much runs differ that differ in nothing but their seed.

    Args:
        probs: [R, N, C], R >= 2 runs' probabilities of the same images, e.g. `ensemble_probs` of their arrays files.
        labels: int [N], the images' labels.

    Raises:
        ValueError: With fewer than two runs, or if the shapes do not fit.
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


class _Contingency(NamedTuple):
    both: int
    first: int
    second: int
    neither: int


def _contingency(first: Tensor, second: Tensor) -> _Contingency:
    both, one, other = (int(x.sum()) for x in (first * second, first * (1 - second), (1 - first) * second))
    return _Contingency(both, one, other, len(first) - both - one - other)


def _q_statistic(table: _Contingency) -> float | None:
    same, different = table.both * table.neither, table.first * table.second
    return (same - different) / (same + different) if same + different else None


def _correlation(table: _Contingency) -> float | None:
    sides = (
        (table.both + table.first)
        * (table.second + table.neither)
        * (table.both + table.second)
        * (table.first + table.neither)
    )
    same, different = table.both * table.neither, table.first * table.second
    return (same - different) / math.sqrt(sides) if sides else None


def _jeffreys(first: Tensor, second: Tensor) -> Tensor:
    """Half the sum of both KL divergences of log-probabilities [N, C], mean over images."""
    return ((first.exp() - second.exp()) * (first - second)).sum(-1).mean() / 2


def _js(probs: Tensor) -> float:
    """H(p̄) - mean_k H(p_k) of [K, N, C], mean over images; rounding below 0 is cut off."""
    gap = torch.special.entr(probs.mean(0)).sum(-1) - torch.special.entr(probs).sum(-1).mean(0)
    return float(gap.mean().clamp_min(0.0))


def _mean(values: Iterator[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
