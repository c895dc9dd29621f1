"""What networks, teacher ensembles and branched students return.

Shape letters: B batch, C classes, M teachers, K branches, D features.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class NetworkOutput(NamedTuple):
    """One network's outputs for a batch.

    Attributes:
        logits: [B, C].
        pooled: [B, D], globally average-pooled output of the last stage (the input of the head).
        stages: output of every named stage, [B, channels, height, width].
    """

    logits: Tensor
    pooled: Tensor
    stages: dict[str, Tensor]


class TeacherOutput(NamedTuple):
    """What M frozen teachers say about a batch. No tensor here carries a gradient.

    Attributes:
        logits: [M, B, C].
        pooled: M tensors [B, D_m].
        stages: for each teacher the stage outputs that were asked for (empty when none were).
    """

    logits: Tensor
    pooled: tuple[Tensor, ...]
    stages: tuple[dict[str, Tensor], ...]


class StudentOutput(NamedTuple):
    """What a branched student says about a batch.

    Attributes:
        logits: [B, C], the ensemble output. For `mean_probs` these are log-probabilities.
        branch_logits: [K, B, C].
        pooled: [K, B, D], pooled features of each branch.
        stages: stage outputs of each branch (K dicts); shared stages appear in every one of them.
    """

    logits: Tensor
    branch_logits: Tensor
    pooled: Tensor
    stages: tuple[dict[str, Tensor], ...]
