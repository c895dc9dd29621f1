"""CIFAR residual networks of depth 6n + 2 (He et al. 2016), with option A or option B shortcuts."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.resnet import BasicBlock

from ekd_lightning.networks.registry import is_number, register_network, require
from ekd_lightning.networks.spec import NetworkSpec
from ekd_lightning.networks.staged import StagedNetwork

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
    first = BasicBlock(
        in_channels, out_channels, stride, _shortcut(shortcut, in_channels, out_channels, stride)
    )
    return nn.Sequential(first, *(BasicBlock(out_channels, out_channels) for _ in range(blocks - 1)))


def _resnet(spec: NetworkSpec, depth: int, widths: tuple[int, ...], shortcut: str) -> StagedNetwork:
    require(shortcut in ("A", "B"), spec, "shortcut", "'A', 'B'")
    stem = OrderedDict(
        conv=nn.Conv2d(3, widths[0], 3, padding=1, bias=False),
        bn=nn.BatchNorm2d(widths[0]),
        relu=nn.ReLU(inplace=True),
    )
    stages: dict[str, nn.Module] = {"stem": nn.Sequential(stem)}
    for number in (1, 2, 3):
        stride = 1 if number == 1 else 2
        stages[f"stage{number}"] = _stage(
            (depth - 2) // 6, widths[number - 1], widths[number], stride, shortcut
        )
    return StagedNetwork(spec, stages, num_features=widths[3])


def _register(depth: int) -> None:
    @register_network(f"resnet{depth}")
    def build(spec: NetworkSpec, *, shortcut: str = "B", width: float = 1) -> StagedNetwork:
        # All four widths are multiplied, the stem's too, so stage1 keeps its plain shortcuts.
        possible = is_number(width) and 0 < width <= 64 and all(round(base * width) >= 1 for base in WIDTHS)
        require(possible, spec, "width", "a number in [1/16, 64] that multiplies the channels 16-32-64")
        return _resnet(spec, depth, tuple(round(base * width) for base in WIDTHS), shortcut)


def _register_x4(depth: int) -> None:
    @register_network(f"resnet{depth}x4")
    def build(spec: NetworkSpec, *, shortcut: str = "B") -> StagedNetwork:
        # The stem is only doubled: the form in which these two networks are compared in the literature.
        return _resnet(spec, depth, (32, 64, 128, 256), shortcut)


for _depth in DEPTHS:
    _register(_depth)
for _depth in (8, 32):
    _register_x4(_depth)
