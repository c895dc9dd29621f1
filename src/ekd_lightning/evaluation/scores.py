"""Scores of a classifier over a whole data set: accuracy, calibration, diversity of branches, confusion.

Shape letters: N images, B batch, C classes, K branches.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics import Metric

from ekd_lightning.data.views import to_unit

NUM_BINS = 15
MIN_CLASSES_FOR_TOP5 = 20


class ClassificationScores(Metric):
    """All scores of one pass over a data set, exact for any number of devices and any padding.

    The states are sums over images, which are summed over devices and do not grow. Nothing is read back from the device
    before `compute`. The calibration error is computed here, because torchmetrics keeps every sample and puts a
    confidence on a bin edge into the upper bin instead of the lower one.

    `compute` returns, with p = softmax(logits) in float32:

    - `accuracy`: share of images whose argmax is the label, in [0, 1];
    - `nll`: mean of -log p_label, nats;
    - `ece`: Σ_b n_b/n |accuracy_b - confidence_b| over 15 equal bins (lo, hi] of the largest p, in [0, 1]
      (Guo et al. 2017);
    - `brier`: mean of Σ_c (p_c - [c = label])², in [0, 2];
    - `top5`: share of images whose label is among the five largest logits, in [0, 1]; from 20 classes on;
    - `branch_accuracy`: K numbers in [0, 1]; with branches;
    - `disagreement`: share of images on which the argmax of two branches differs, mean over pairs of branches, in
      [0, 1]; from two branches on;
    - `ambiguity`: mean of mean_k KL(p_geo ‖ p_k), p_geo = softmax(mean_k z_k), nats; from two branches on. It equals
      the mean NLL of the branches minus the NLL of their averaged logits.

    Args:
        num_classes: C >= 2.
        num_branches: K, 0 for a plain classifier.
        options: Options of `torchmetrics.Metric`, e.g. `sync_on_compute=False` in a single process.
    """

    full_state_update = False
    higher_is_better = None
    is_differentiable = False

    count: Tensor
    correct: Tensor
    top5_correct: Tensor
    nll_sum: Tensor
    brier_sum: Tensor
    bin_correct: Tensor
    bin_confidence: Tensor
    branch_correct: Tensor
    disagreement_sum: Tensor
    ambiguity_sum: Tensor

    def __init__(self, num_classes: int, num_branches: int = 0, **options: Any) -> None:
        super().__init__(**options)
        self.num_classes = num_classes
        self.num_branches = num_branches
        # With sums in float64, batches and devices do not affect the printed digits. Apple's GPUs have no float64.
        real = torch.float32 if torch.backends.mps.is_available() else torch.float64
        for name in ("count", "correct", "top5_correct"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        for name in ("nll_sum", "brier_sum", "disagreement_sum", "ambiguity_sum"):
            self.add_state(name, torch.zeros((), dtype=real), dist_reduce_fx="sum")
        for name in ("bin_correct", "bin_confidence"):
            self.add_state(name, torch.zeros(NUM_BINS, dtype=real), dist_reduce_fx="sum")
        self.add_state("branch_correct", torch.zeros(num_branches, dtype=torch.int64), dist_reduce_fx="sum")

    def update(
        self, logits: Tensor, labels: Tensor, valid: Tensor | None = None, branch_logits: Tensor | None = None
    ) -> None:
        """Adds one batch.

        Args:
            logits: [B, C]; log-probabilities are logits too.
            labels: int64 [B], 0 .. C-1 in valid rows.
            valid: bool [B], False for padding rows, which are not counted; None if all are valid.
            branch_logits: [K, B, C]; None if and only if `num_branches` is 0.

        Raises:
            ValueError: If a shape does not fit.
        """
        self._check_shapes(logits, labels, branch_logits)
        if valid is None:
            valid = torch.ones_like(labels, dtype=torch.bool)
        labels = labels.where(valid, 0)  # padding may carry any label
        self._add_ensemble(logits.float(), labels, valid)
        if branch_logits is not None:
            self._add_branches(branch_logits.float(), labels, valid)

    def names(self) -> tuple[str, ...]:
        """Returns the names of all scores; names of a branch's scores end with its number."""
        found = ["accuracy", "nll", "ece", "brier"]
        found += ["top5"] if self.num_classes >= MIN_CLASSES_FOR_TOP5 else []
        found += [f"branch_accuracy_{branch}" for branch in range(self.num_branches)]
        return (*found, *(("disagreement", "ambiguity") if self.num_branches > 1 else ()))

    def compute(self) -> dict[str, float | list[float]]:
        """Returns all scores as plain numbers; see the class.

        Raises:
            ValueError: If no image was counted.
        """
        sums = self._on_host()
        count = int(sums["count"])
        if count == 0:
            raise ValueError("no image was scored: update() was never called with a valid row")
        scores: dict[str, float | list[float]] = {
            "accuracy": float(sums["correct"]) / count,
            "nll": float(sums["nll_sum"]) / count,
            # n_b/n |acc_b - conf_b| = |correct_b - Σ confidence| / n, without a division by empty bins
            "ece": float((sums["bin_correct"] - sums["bin_confidence"]).abs().sum()) / count,
            "brier": float(sums["brier_sum"]) / count,
        }
        if self.num_classes >= MIN_CLASSES_FOR_TOP5:
            scores["top5"] = float(sums["top5_correct"]) / count
        if self.num_branches:
            scores["branch_accuracy"] = [correct / count for correct in sums["branch_correct"].tolist()]
        if self.num_branches > 1:
            scores["disagreement"] = float(sums["disagreement_sum"]) / count
            scores["ambiguity"] = float(sums["ambiguity_sum"]) / count
        return scores

    def _on_host(self) -> dict[str, Tensor]:
        """Returns all states on the CPU, after one copy from the device.

        Counts become real numbers, which are exact (on Apple's GPUs up to 16 million images).
        """
        states: dict[str, Tensor] = {name: getattr(self, name) for name in self.metric_state}
        flat = torch.cat([state.flatten().to(self.nll_sum.dtype) for state in states.values()]).cpu()
        parts = flat.split([state.numel() for state in states.values()])
        return {name: part.view(state.shape) for (name, state), part in zip(states.items(), parts, strict=True)}

    def _add_ensemble(self, logits: Tensor, labels: Tensor, valid: Tensor) -> None:
        probs = logits.softmax(-1)
        confidence = probs.amax(-1)
        # argmax of the logits: different logits may round to equal probabilities.
        hit = (logits.argmax(-1) == labels) & valid
        self.count += valid.sum()
        self.correct += hit.sum()
        self.nll_sum += self._total(functional.cross_entropy(logits, labels, reduction="none"), valid)
        squared = (probs - functional.one_hot(labels, self.num_classes)).square().sum(-1)
        self.brier_sum += self._total(squared, valid)
        # Inner edges only, so that a confidence rounded above 1 stays in the last bin; right=False gives (lo, hi].
        edges = torch.arange(1, NUM_BINS, device=logits.device) / NUM_BINS
        bins = functional.one_hot(torch.bucketize(confidence, edges), NUM_BINS).to(self.bin_correct.dtype)
        confidence = confidence.where(valid, 0).to(bins.dtype)
        self.bin_correct += (bins * hit[:, None]).sum(0)
        self.bin_confidence += (bins * confidence[:, None]).sum(0)
        if self.num_classes >= MIN_CLASSES_FOR_TOP5:
            top5 = logits.topk(5, dim=-1).indices
            self.top5_correct += ((top5 == labels[:, None]).any(-1) & valid).sum()

    def _add_branches(self, logits_KBC: Tensor, labels: Tensor, valid: Tensor) -> None:
        K = self.num_branches
        predictions = logits_KBC.argmax(-1)
        self.branch_correct += ((predictions == labels) & valid).sum(-1)
        if K < 2:
            return
        differ = (predictions[:, None] != predictions[None]).sum((0, 1)).float() / (K * (K - 1))
        self.disagreement_sum += self._total(differ, valid)
        # mean_k KL(p_geo ‖ p_k) = -logsumexp(mean_k log p_k), which may be below 0 by rounding.
        gap = -logits_KBC.log_softmax(-1).mean(0).logsumexp(-1)
        self.ambiguity_sum += self._total(gap.clamp_min(0.0), valid)

    def _total(self, per_image: Tensor, valid: Tensor) -> Tensor:
        # `where`, not a product, because padding rows may hold NaN.
        return per_image.where(valid, 0.0).sum(dtype=self.nll_sum.dtype)

    def _check_shapes(self, logits: Tensor, labels: Tensor, branch_logits: Tensor | None) -> None:
        B, C = len(labels), self.num_classes
        if logits.shape != (B, C):
            raise ValueError(f"logits have shape {list(logits.shape)}, expected [{B}, {C}]")
        branches = None if branch_logits is None else tuple(branch_logits.shape)
        expected = (self.num_branches, B, C) if self.num_branches else None
        if branches != expected:
            raise ValueError(f"branch_logits have shape {branches}, expected {expected}")


@torch.no_grad()
def score_batches(
    network: nn.Module, batches: Iterator[tuple[Tensor, Tensor]], num_classes: int, device: torch.device | str
) -> dict[str, Any]:
    """Scores a network, which must be in eval mode, on batches of images uint8 [B, 3, H, W] and labels int64 [B].

    Returns:
        The scores of `ClassificationScores`.
    """
    scores = ClassificationScores(num_classes, sync_on_compute=False).to(device)  # one process alone
    for pixels, labels in batches:
        images = to_unit(pixels.to(device)).contiguous(memory_format=torch.channels_last)
        scores.update(network(images).float(), labels.to(device))
    return scores.compute()


def score_logits(logits: Tensor, labels: Tensor) -> dict[str, Any]:
    """Computes the scores of `ClassificationScores` for logits [N, C] and labels, int64 [N]."""
    scores = ClassificationScores(logits.shape[-1], sync_on_compute=False).to(logits.device)
    scores.update(logits, labels)
    return scores.compute()


def class_accuracy(confusion: np.ndarray) -> list[float | None]:
    """Returns the accuracy of each class, in [0, 1]; None for a class without images.

    The confusion, int [C, C], holds numbers of images by label (rows) and predicted class (columns).
    """
    totals = confusion.sum(1)
    return [
        int(right) / int(total) if total else None for right, total in zip(confusion.diagonal(), totals, strict=True)
    ]
