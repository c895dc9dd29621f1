"""What a network costs: parameters and multiply-accumulates."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def count_parameters(module: nn.Module) -> int:
    """Counts all parameters, frozen ones included; buffers (batch norm statistics) are not parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def count_macs(module: nn.Module, image_size: int = 32) -> int:
    """Counts the multiply-accumulates of the forward pass of one image, convolutions and linear layers only.

    Nothing is computed (meta device, on a copy in eval mode), and the module is not touched.

    Args:
        module: takes images [B, 3, H, W].
        image_size: height and width of the image, in pixels.

    Returns:
        Half of the floating-point operations that PyTorch's counter reports.
    """
    probe = copy.deepcopy(module).to("meta").eval()
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        probe(torch.empty(1, 3, image_size, image_size, device="meta"))
    return int(counter.get_total_flops()) // 2
