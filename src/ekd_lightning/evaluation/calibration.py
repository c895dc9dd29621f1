"""Calibration of a classifier: reliability diagrams, calibration errors, temperature scaling.

Shape letters: N images, C classes, B bins. Everything is computed in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize_scalar
from torch import Tensor
from torch.nn import functional

from ekd_lightning.evaluation.scores import NUM_BINS

TEMPERATURES = (0.05, 20.0)
"""Range of `fit_temperature`; a minimum at its edge counts as none."""


@dataclass(frozen=True, eq=False)
class Reliability:
    """A reliability diagram. Empty bins have count 0 and NaN elsewhere.

    Attributes:
        confidence: Mean of the largest probability, float64 [B], in [0, 1].
        accuracy: Share of correctly classified images, float64 [B], in [0, 1].
        count: Number of images, int64 [B].
    """

    confidence: np.ndarray
    accuracy: np.ndarray
    count: np.ndarray


class ProbabilityScores(NamedTuple):
    """Scores of predicted probabilities.

    Attributes:
        nll: Mean of -log p_label, nats.
        brier: Mean of Σ_c (p_c - [c = label])², in [0, 2].
        ece: Expected calibration error over bins of equal width, in [0, 1].
        adaptive_ece: Expected calibration error over bins of equal numbers of images, in [0, 1].
        overconfidence: Overconfidence error, in [0, 1]; see `overconfidence`.
    """

    nll: float
    brier: float
    ece: float
    adaptive_ece: float
    overconfidence: float


def score_probabilities(logits: Tensor, labels: Tensor) -> ProbabilityScores:
    """Computes all scores of `ProbabilityScores`.

    Args:
        logits: [N, C], N >= 1; log-probabilities are logits too.
        labels: int64 [N].
    """
    log_probs = logits.double().log_softmax(-1)
    probs = log_probs.exp()
    diagram = reliability(probs, labels)
    return ProbabilityScores(
        nll=float(functional.nll_loss(log_probs, labels)),
        brier=float((probs - functional.one_hot(labels, probs.shape[-1])).square().sum(-1).mean()),
        ece=calibration_error(diagram),
        adaptive_ece=adaptive_calibration_error(probs, labels),
        overconfidence=overconfidence(diagram),
    )


def reliability(probs: Tensor, labels: Tensor, num_bins: int = NUM_BINS) -> Reliability:
    """Accuracy and confidence in equal bins (lo, hi] of the largest probability (Guo et al. 2017).

    Args:
        probs: [N, C], rows summing to 1.
        labels: int64 [N].
        num_bins: B >= 1.
    """
    confidence, hit = _confidence_and_hits(probs, labels)
    # Inner edges only, so that a confidence rounded above 1 stays in the last bin; "left" gives (lo, hi].
    bins = np.searchsorted(np.arange(1, num_bins) / num_bins, confidence, side="left")
    count = np.bincount(bins, minlength=num_bins)
    sums = (np.bincount(bins, weights=values, minlength=num_bins) for values in (confidence, hit))
    with np.errstate(invalid="ignore"):
        confidences, accuracies = (total / count for total in sums)
    return Reliability(confidences, accuracies, count)


def calibration_error(diagram: Reliability) -> float:
    """Expected calibration error Σ_b n_b/N |accuracy_b - confidence_b|, in [0, 1] (Guo et al. 2017)."""
    return float(np.sum(_shares(diagram) * np.abs(_gap(diagram))))


def overconfidence(diagram: Reliability) -> float:
    """Overconfidence error Σ_b n_b/N confidence_b · max(confidence_b - accuracy_b, 0), in [0, 1].

    Thulasidasan et al. 2019, On Mixup Training.
    """
    confidence = np.nan_to_num(diagram.confidence)
    return float(np.sum(_shares(diagram) * confidence * np.maximum(_gap(diagram), 0.0)))


def adaptive_calibration_error(probs: Tensor, labels: Tensor, num_bins: int = NUM_BINS) -> float:
    """Calibration error over bins of equal numbers of images (Nguyen and O'Connor 2015).

    Images are sorted by confidence and cut into `num_bins` bins whose sizes differ by one at most. As images of equal
    confidence may fall into two bins, each of them counts with their common accuracy, and the result does not depend on
    the order of the images.

    Args:
        probs: [N, C], rows summing to 1.
        labels: int64 [N].
        num_bins: Number of bins; with fewer images, one bin per image.

    Returns:
        Σ_b n_b/N |accuracy_b - confidence_b|, in [0, 1].
    """
    confidence, hit = _confidence_and_hits(probs, labels)
    values, position, counts = np.unique(confidence, return_inverse=True, return_counts=True)
    shared = (np.bincount(position, weights=hit, minlength=len(values)) / counts)[position]
    order = np.argsort(confidence, kind="stable")
    parts = np.array_split(order, min(num_bins, len(order)))
    return float(sum(abs(np.sum(shared[part] - confidence[part])) for part in parts) / len(order))


def fit_temperature(logits: Tensor, labels: Tensor) -> float | None:
    """Fits the temperature T that minimises the negative log-likelihood of softmax(logits / T) (Guo et al. 2017).

    The negative log-likelihood is convex in 1/T, so a bounded scalar search finds the minimum.

    Args:
        logits: [N, C] of images that the network was not trained on.
        labels: int64 [N].

    Returns:
        T > 0; 1.0 if T has no effect. None without images, and if the minimum is at an edge of `TEMPERATURES` (all
        images right: T → 0; worse than guessing: T → ∞).
    """
    if len(labels) == 0:
        return None
    logits = logits.double()

    def nll(log_temperature: float) -> float:
        return float(functional.cross_entropy(logits / math.exp(log_temperature), labels))

    low, high = (math.log(value) for value in TEMPERATURES)
    found = minimize_scalar(nll, bounds=(low, high), method="bounded", options={"xatol": 1e-6, "maxiter": 200})
    least, at_edges = float(found.fun), (nll(low), nll(high))
    if max(at_edges) - least < 1e-12:
        return 1.0
    if not math.isfinite(least) or min(at_edges) <= least:
        return None
    return math.exp(float(found.x))


def _confidence_and_hits(probs: Tensor, labels: Tensor) -> tuple[np.ndarray, np.ndarray]:
    confidence, predicted = probs.double().cpu().max(-1)
    return confidence.numpy(), (predicted == labels.cpu()).double().numpy()


def _shares(diagram: Reliability) -> np.ndarray:
    return diagram.count / diagram.count.sum()


def _gap(diagram: Reliability) -> np.ndarray:
    """Returns confidence minus accuracy per bin; 0 in empty bins."""
    return np.nan_to_num(diagram.confidence - diagram.accuracy)
