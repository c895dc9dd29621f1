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
"""Largest number of branches of which all subsets are scored (63 for 6); of more only single branches and prefixes."""

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
"""Confidence thresholds of `early_exit`."""


class Cost(NamedTuple):
    """Cost of a network: multiply-accumulates for one image, and the number of parameters."""

    macs: int
    num_parameters: int


class SubsetScores(NamedTuple):
    """Scores of a student with some of its branches, counted from 0 in order, and the cost of these branches alone.

    The accuracy is in [0, 1], the mean negative log-likelihood in nats; costs as in `Cost`.
    """

    branches: list[int]
    accuracy: float
    nll: float
    macs: int
    num_parameters: int


class EarlyExit(NamedTuple):
    """Scores of a student that stops after the first branch at which its confidence exceeds a threshold.

    The accuracy is in [0, 1]; numbers of evaluated branches and of multiply-accumulates are means over the images.
    """

    threshold: float
    accuracy: float
    mean_branches: float
    macs: float


def couple_branches(
    branch_logits: Tensor, branches: Sequence[int], ensemble: str, gate_weights: Tensor | None = None
) -> Tensor:
    """Combines branches of logits [K, N, C] as the whole student combines all of them, in float64 [N, C].

    The result are logits, or log-probabilities for `mean_probs`. `mean_logits` and `mean_probs` take the mean over
    these branches. A gate's weights, [N, K], are rescaled to sum to 1 over these branches, which equals the softmax of
    their scores in a student with these branches only; if all of them are 0, equal weights are used.

    Raises:
        ValueError: For `gate` without `gate_weights`.
    """
    chosen, weights = list(branches), None
    if ensemble == "gate":
        if gate_weights is None:
            raise ValueError(f"ensemble={ensemble!r} needs the gate's weights; pass gate_weights=")
        weights = gate_weights[:, chosen].double()
        total = weights.sum(1, keepdim=True)
        weights = torch.where(total > 0, weights / total, 1 / len(chosen))
    return couple(branch_logits[chosen].double(), ensemble, weights)


def branch_subsets(num_branches: int) -> list[list[int]]:
    """Lists the subsets to score by size: all non-empty ones; beyond `MOST_BRANCHES`, single branches and prefixes."""
    if num_branches <= MOST_BRANCHES:
        sizes = range(1, num_branches + 1)
        return [list(s) for size in sizes for s in itertools.combinations(range(num_branches), size)]
    return [[k] for k in range(num_branches)] + [list(range(n)) for n in range(2, num_branches + 1)]


def costs_by_size(student: BranchedStudent, image_size: ImageSize) -> list[Cost]:
    """Returns the costs of the student with 1, 2, ..., K branches, which are all equally large."""
    counted = []
    for size in range(1, min(student.num_branches, 3) + 1):
        cut = cut_branches(student, range(size))
        counted.append(Cost(count_macs(cut, image_size), count_parameters(cut)))
    while len(counted) < student.num_branches:  # each further branch adds the same; one alone has no gate
        grown = (2 * last - before for before, last in zip(*counted[-2:], strict=True))
        counted.append(Cost(*grown))
    return counted


def score_subsets(
    branch_logits: Tensor, labels: Tensor, costs: Sequence[Cost], ensemble: str, gate_weights: Tensor | None = None
) -> list[SubsetScores]:
    """Scores the student with the branches of each subset of `branch_subsets`, without retraining.

    Branch logits are [K, N, C], labels int64 [N]; for the costs see `costs_by_size`, for the others `couple_branches`.
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
    """Scores the student if it evaluates the branches in order and stops when the ensemble so far is confident.

    After branch j, branches 0 .. j are combined as in `couple_branches`. An image stops at the first j whose largest
    probability exceeds the threshold in [0, 1], and at the latest after all branches: threshold 1 never stops early,
    threshold 0 always stops after the first branch. The cost is that of a student with these branches, so the shared
    trunk counts once. Arguments are those of `score_subsets`; there is one result for each threshold.
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
