"""Residual networks for CIFAR: of depth 6n + 2 (He et al. 2016), and wide ones with pre-activation.

Plain ones have option A or option B shortcuts; wide ones are those of Zagoruyko and Komodakis 2016.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.resnet import BasicBlock

from ekd_lightning.networks.registry import is_number, register_network, require
from ekd_lightning.networks.staged import NetworkSpec, StagedNetwork

DEPTHS = (8, 14, 20, 26, 32, 44, 56, 110)
WIDTHS = (16, 16, 32, 64)
"""Channels of stem, stage1, stage2, stage3."""


class ZeroPadShortcut(nn.Module):
    """Option A: subsamples in space and pads the missing channels with zeros, without parameters.

    Half of the new channels go before the old ones and half behind, as in the weights in circulation.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.before = (out_channels - in_channels) // 2
        self.behind = out_channels - in_channels - self.before

    def forward(self, maps: Tensor) -> Tensor:
        """Maps [B, in, H, W] to [B, out, H / stride, W / stride] (rounded up)."""
        maps = maps[:, :, :: self.stride, :: self.stride]
        return functional.pad(maps, (0, 0, 0, 0, self.before, self.behind))


def _shortcut(kind: str, in_channels: int, out_channels: int, stride: int) -> nn.Module | None:
    if stride == 1 and in_channels == out_channels:
        return None
    if kind == "A":
        return ZeroPadShortcut(in_channels, out_channels, stride)
    projection = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
    return nn.Sequential(projection, nn.BatchNorm2d(out_channels))


def _stage(blocks: int, in_channels: int, out_channels: int, stride: int, shortcut: str) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride, _shortcut(shortcut, in_channels, out_channels, stride))
    return nn.Sequential(first, *(BasicBlock(out_channels, out_channels) for _ in range(blocks - 1)))


def _resnet(spec: NetworkSpec, depth: int, widths: tuple[int, ...], shortcut: str) -> StagedNetwork:
    require(shortcut in ("A", "B"), spec, "shortcut", "'A', 'B'")
    stem = OrderedDict(
        conv=nn.Conv2d(3, widths[0], 3, padding=1, bias=False), bn=nn.BatchNorm2d(widths[0]), relu=nn.ReLU(inplace=True)
    )
    stages: dict[str, nn.Module] = {"stem": nn.Sequential(stem)}
    for number in (1, 2, 3):
        stride = 1 if number == 1 else 2
        stages[f"stage{number}"] = _stage((depth - 2) // 6, widths[number - 1], widths[number], stride, shortcut)
    return StagedNetwork(spec, stages, num_features=widths[3])


def _scaled_resnet(depth: int, spec: NetworkSpec, *, shortcut: str = "B", width: float = 1) -> StagedNetwork:
    # All four widths are multiplied, the stem's too, so stage1 keeps its plain shortcuts.
    possible = is_number(width) and 0 < width <= 64 and all(round(base * width) >= 1 for base in WIDTHS)
    require(possible, spec, "width", "a number in [1/16, 64] that multiplies the channels 16-32-64")
    return _resnet(spec, depth, tuple(round(base * width) for base in WIDTHS), shortcut)


def _resnet_x4(depth: int, spec: NetworkSpec, *, shortcut: str = "B") -> StagedNetwork:
    # The stem is only doubled: the form in which these two networks are compared in the literature.
    return _resnet(spec, depth, (32, 64, 128, 256), shortcut)


for _depth in DEPTHS:
    register_network(f"resnet{_depth}")(partial(_scaled_resnet, _depth))
for _depth in (8, 32):
    register_network(f"resnet{_depth}x4")(partial(_resnet_x4, _depth))


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


def _wide_resnet(depth: int, factor: int, spec: NetworkSpec, *, dropout: float = 0.0) -> StagedNetwork:
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


for _depth, _factor in FORMS:
    register_network(f"wrn_{_depth}_{_factor}")(partial(_wide_resnet, _depth, _factor))
