"""DenseNet-BC for 32 × 32 images (Huang et al. 2017): three dense blocks of bottleneck layers."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from ekd_lightning.networks.registry import register_network
from ekd_lightning.networks.spec import NetworkSpec
from ekd_lightning.networks.staged import StagedNetwork

FORMS = ((40, 12), (100, 12), (100, 24), (190, 40))
"""Registered (depth, growth rate) pairs."""


class DenseLayer(nn.Module):
    """BN, ReLU, 1×1 convolution to four times the growth, BN, ReLU, 3×3 convolution; output appended."""

    def __init__(self, in_channels: int, growth: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, 4 * growth, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        """Maps [B, in, H, W] to [B, in + growth, H, W]."""
        new = self.conv1(torch.relu(self.bn1(maps)))
        new = self.conv2(torch.relu(self.bn2(new)))
        return torch.cat([maps, new], dim=1)


def _transition(in_channels: int, out_channels: int) -> nn.Sequential:
    parts: OrderedDict[str, nn.Module] = OrderedDict(
        bn=nn.BatchNorm2d(in_channels),
        relu=nn.ReLU(inplace=True),
        conv=nn.Conv2d(in_channels, out_channels, 1, bias=False),
        pool=nn.AvgPool2d(2),
    )
    return nn.Sequential(parts)


def _densenet(spec: NetworkSpec, depth: int, growth: int) -> StagedNetwork:
    """Stages 2 and 3 begin with their transition, so a stage's output is that of its dense block."""
    layers = (depth - 4) // 6
    channels = 2 * growth
    stem = nn.Sequential(OrderedDict(conv=nn.Conv2d(3, channels, 3, padding=1, bias=False)))
    stages: dict[str, nn.Module] = {"stem": stem}
    for number in (1, 2, 3):
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        if number > 1:
            parts["transition"] = _transition(channels, channels // 2)  # compression 0.5
            channels //= 2
        parts["block"] = nn.Sequential(*(DenseLayer(channels + i * growth, growth) for i in range(layers)))
        channels += layers * growth
        if number == 3:
            parts["bn"] = nn.BatchNorm2d(channels)
            parts["relu"] = nn.ReLU(inplace=True)
        stages[f"stage{number}"] = nn.Sequential(parts)
    return StagedNetwork(spec, stages, num_features=channels)


def _register(depth: int, growth: int) -> None:
    @register_network(f"densenetbc_{depth}_{growth}")
    def build(spec: NetworkSpec) -> StagedNetwork:
        return _densenet(spec, depth, growth)


for _form in FORMS:
    _register(*_form)
