"""Wide residual networks for CIFAR (Zagoruyko and Komodakis 2016), pre-activation."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional

from ekd_lightning.networks.registry import is_number, register_network, require
from ekd_lightning.networks.spec import NetworkSpec
from ekd_lightning.networks.staged import StagedNetwork

FORMS = ((16, 1), (16, 2), (16, 4), (40, 1), (40, 2), (28, 4), (28, 10))
"""Registered (depth, widening factor) pairs."""


class WideBlock(nn.Module):
    """BN, ReLU, 3×3 convolution, twice, plus the shortcut.

    Where the shape changes, the shortcut is a 1×1 convolution of the activated input.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.shortcut: nn.Conv2d | None = None
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
        self.dropout = dropout

    def forward(self, maps: Tensor) -> Tensor:
        """Maps [B, in, H, W] to [B, out, H / stride, W / stride] (rounded up)."""
        active = torch.relu(self.bn1(maps))
        new = torch.relu(self.bn2(self.conv1(active)))
        new = self.conv2(functional.dropout(new, self.dropout, self.training))
        return new + (maps if self.shortcut is None else self.shortcut(active))


def _wide_resnet(spec: NetworkSpec, depth: int, factor: int, dropout: float) -> StagedNetwork:
    require(is_number(dropout) and 0 <= dropout < 1, spec, "dropout", "a number in [0, 1)")
    blocks = (depth - 4) // 6
    channels = 16
    stem = nn.Sequential(OrderedDict(conv=nn.Conv2d(3, channels, 3, padding=1, bias=False)))
    stages: dict[str, nn.Module] = {"stem": stem}
    for number, base in ((1, 16), (2, 32), (3, 64)):
        width = base * factor
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        for block in range(blocks):
            stride = 2 if number > 1 and block == 0 else 1
            parts[str(block)] = WideBlock(channels, width, stride, dropout)
            channels = width
        if number == 3:
            # The last activation belongs to the last stage, whose output the head pools.
            parts["bn"] = nn.BatchNorm2d(channels)
            parts["relu"] = nn.ReLU(inplace=True)
        stages[f"stage{number}"] = nn.Sequential(parts)
    return StagedNetwork(spec, stages, num_features=channels)


def _register(depth: int, factor: int) -> None:
    @register_network(f"wrn_{depth}_{factor}")
    def build(spec: NetworkSpec, *, dropout: float = 0.0) -> StagedNetwork:
        return _wide_resnet(spec, depth, factor, dropout)


for _form in FORMS:
    _register(*_form)
