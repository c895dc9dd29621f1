"""Logits for the tests of evaluation: random ones, and the degenerate ones that real students produce."""

from __future__ import annotations

import torch
from torch import Tensor


def random_logits(K: int = 3, N: int = 40, C: int = 5, seed: int = 0, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    """Branch logits float32 [K, N, C] that know something of the labels, and the labels [N]."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, C, (N,), generator=g)
    logits = scale * torch.randn(K, N, C, generator=g)
    logits[:, torch.arange(N), labels] += scale
    return logits, labels


def degenerate() -> dict[str, tuple[Tensor, Tensor]]:
    """By name: branch logits and labels."""
    logits, labels = random_logits()
    right = 30.0 * torch.nn.functional.one_hot(labels, 5).float().expand(3, -1, -1)
    some = labels.clone()
    some[some == 2] = 1
    return {
        "random": (logits, labels),
        "one branch": (logits[:1], labels),
        "identical branches": (logits[:1].expand(3, -1, -1), labels),
        "all right": (right, labels),
        "all wrong": (right, (labels + 1) % 5),
        "uniform": (torch.zeros(3, 40, 5), labels),
        "a class is missing": (logits, some),
        "fewer images than bins": (logits[:, :4], labels[:4]),
        "one image": (logits[:, :1], labels[:1]),
        "very sure": (1e4 * logits, labels),
    }
