"""Subsets of a student's branches as operating points, and early exit when the ensemble is confident.

Shape letters: N images, C classes, K branches. Everything is computed in float64.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ekd_lightning.evaluation.efficiency import count_macs, count_parameters
from ekd_lightning.networks import BranchedStudent, cut_branches
from ekd_lightning.networks.staged import ImageSize
from ekd_lightning.networks.student import couple

MOST_BRANCHES = 6
"""Up to this many branches, all subsets are scored (63 for 6); beyond, single branches and prefixes."""

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
"""Confidences at which `early_exit` is tried."""


class Cost(NamedTuple):
    """Cost of one image.

    Attributes:
        macs: Multiply-accumulates.
        num_parameters: Of the network that is needed.
    """

    macs: int
    num_parameters: int


class SubsetScores(NamedTuple):
    """A student cut to some of its branches.

    Attributes:
        branches: Which, ascending, counted from 0.
        accuracy: In [0, 1].
        nll: Nats.
        macs: Of one image.
        num_parameters: Of the cut student.
    """

    branches: list[int]
    accuracy: float
    nll: float
    macs: int
    num_parameters: int


class EarlyExit(NamedTuple):
    """A student that stops at the first branch after which it is confident.

    Attributes:
        threshold: Confidence above which it stops.
        accuracy: In [0, 1].
        mean_branches: Branches evaluated for an image, mean.
        macs: Of one image, mean.
    """

    threshold: float
    accuracy: float
    mean_branches: float
    macs: float


def couple_branches(
    branch_logits: Tensor, branches: Sequence[int], ensemble: str, gate_weights: Tensor | None = None
) -> Tensor:
    """Couples some branches as the whole student couples all of them.

    `mean_logits` and `mean_probs` take the mean over these branches. A gate's weights are scaled so that they sum to
    1 over these branches, which is the softmax of their scores alone, as in a student that was cut to them; where all
    of them are 0 they are taken to be equal.

    Args:
        branch_logits: [K, N, C].
        branches: Positions, 0 .. K-1, at least one.
        ensemble: `mean_logits`, `mean_probs` or `gate`.
        gate_weights: [N, K]; required for `gate`.

    Returns:
        float64 [N, C]: logits, or log-probabilities for `mean_probs`.
    """
    chosen, weights = list(branches), None
    if ensemble == "gate":
        if gate_weights is None:
            raise ValueError(f"ensemble={ensemble!r} needs the gate's weights")
        weights = gate_weights[:, chosen].double()
        total = weights.sum(1, keepdim=True)
        weights = torch.where(total > 0, weights / total, 1 / len(chosen))
    return couple(branch_logits[chosen].double(), ensemble, weights)


def branch_subsets(num_branches: int) -> list[list[int]]:
    """Lists the subsets to score: all non-empty ones, by size; for many branches, single ones and prefixes."""
    if num_branches <= MOST_BRANCHES:
        sizes = range(1, num_branches + 1)
        return [list(s) for size in sizes for s in itertools.combinations(range(num_branches), size)]
    return [[k] for k in range(num_branches)] + [list(range(n)) for n in range(2, num_branches + 1)]


def costs_by_size(student: BranchedStudent, image_size: ImageSize) -> list[Cost]:
    """Returns the cost with 1, 2, ..., K branches; branches are equally large, so which ones does not matter."""
    counted = []
    for size in range(1, min(student.num_branches, 3) + 1):
        cut = cut_branches(student, range(size))
        counted.append(Cost(count_macs(cut, image_size), count_parameters(cut)))
    while len(counted) < student.num_branches:  # from two branches on, each adds the same; one alone has no gate
        grown = (2 * last - before for before, last in zip(*counted[-2:], strict=True))
        counted.append(Cost(*grown))
    return counted


def score_subsets(
    branch_logits: Tensor, labels: Tensor, costs: Sequence[Cost], ensemble: str, gate_weights: Tensor | None = None
) -> list[SubsetScores]:
    """Scores the student cut to each subset of `branch_subsets`, without training again.

    Args:
        branch_logits: [K, N, C], N >= 1.
        labels: int64 [N].
        costs: Of students with 1, ..., K branches; see `costs_by_size`.
        ensemble: How the branches are coupled; see `couple_branches`.
        gate_weights: [N, K], for `gate`.
    """
    found = []
    for branches in branch_subsets(len(branch_logits)):
        logits = couple_branches(branch_logits, branches, ensemble, gate_weights)
        accuracy = float((logits.argmax(-1) == labels).double().mean())
        nll = float(functional.cross_entropy(logits, labels))
        found.append(SubsetScores(branches, accuracy, nll, *costs[len(branches) - 1]))
    return found


def early_exit(
    branch_logits: Tensor,
    labels: Tensor,
    costs: Sequence[Cost],
    ensemble: str,
    gate_weights: Tensor | None = None,
    thresholds: Sequence[float] = THRESHOLDS,
) -> list[EarlyExit]:
    """Evaluates the branches in order and stops when the ensemble so far is confident.

    After branch j the prediction is that of branches 0 .. j, coupled as in `couple_branches`. An image stops at the
    first j whose largest probability is above the threshold, at the latest after all branches: a threshold of 1 never
    stops early, one of 0 always after the first branch. It costs what the student cut to these branches costs; the
    shared trunk is computed once.

    Args:
        branch_logits: [K, N, C], N >= 1.
        labels: int64 [N].
        costs: Of students with 1, ..., K branches.
        ensemble: How the branches are coupled.
        gate_weights: [N, K], for `gate`.
        thresholds: Confidences in [0, 1].
    """
    K = len(branch_logits)
    prefixes = [couple_branches(branch_logits, range(n), ensemble, gate_weights) for n in range(1, K + 1)]
    confidence = torch.stack([logits.softmax(-1).amax(-1) for logits in prefixes])
    hits = torch.stack([logits.argmax(-1) == labels for logits in prefixes]).double()
    macs = torch.tensor([cost.macs for cost in costs], dtype=torch.float64)

    def at(threshold: float) -> EarlyExit:
        stops = confidence > threshold
        stops[-1] = True
        used = stops.int().argmax(0)  # the first that stops
        accuracy = hits.gather(0, used[None])[0].mean()
        return EarlyExit(threshold, float(accuracy), float((used + 1).double().mean()), float(macs[used].mean()))

    return [at(threshold) for threshold in thresholds]
