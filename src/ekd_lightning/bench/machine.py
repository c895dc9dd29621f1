"""What the machine could do at best: its measured matrix-product peak."""

from __future__ import annotations

import torch

from ekd_lightning.bench.timing import seconds_of

_SIZES = {"cpu": 2048, "cuda": 8192}


def matmul_peak(dtype: torch.dtype, device: torch.device, repeats: int = 5) -> float:
    """Best multiply-accumulates a second of a square matrix product in this format, of several tries."""
    n = _SIZES.get(device.type, 2048)
    left, right = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    torch.mm(left, right)
    return max(n**3 / seconds_of(lambda: torch.mm(left, right), device) for _ in range(repeats))
