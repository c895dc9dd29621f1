"""Convolutional networks for 32 × 32 images: ResNet, wide ResNet, VGG, MobileNetV2, DenseNet-BC.

ResNets have depth 6n + 2 (He et al. 2016) and shortcuts of option A or B; wide ResNets follow Zagoruyko and Komodakis
2016. VGG has the convolutions of Simonyan and Zisserman 2015 with batch norm, and a single linear head. MobileNetV2
(Sandler et al. 2018) consists of torchvision's blocks, with two strides removed. DenseNet-BC (Huang et al. 2017) has
three dense blocks of bottleneck layers.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.models.resnet import BasicBlock
from torchvision.ops.misc import Conv2dNormActivation

from ekd_lightning.errors import UserError
from ekd_lightning.networks.registry import FAMILIES, Builder, register_network, require
from ekd_lightning.networks.spec import NetworkSpec
from ekd_lightning.networks.staged import StagedNetwork, he_initialised
from ekd_lightning.roles import is_of

RESNET_DEPTHS = (8, 14, 20, 26, 32, 44, 56, 110)
RESNET_WIDTHS = (16, 16, 32, 64)
"""Channels of stem, stage1, stage2, stage3."""
DENSE_FORMS = ((40, 12), (100, 12), (100, 24), (190, 40))
"""Registered (depth, growth rate) pairs."""


def convolution(in_channels: int, out_channels: int, size: int = 3, stride: int = 1) -> nn.Conv2d:
    """Builds a convolution without bias (a batch norm follows), padded to divide the size by the stride only."""
    return nn.Conv2d(in_channels, out_channels, size, stride, padding=size // 2, bias=False)


def _named(**parts: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(parts))


def _activation(channels: int) -> dict[str, nn.Module]:
    return {"bn": nn.BatchNorm2d(channels), "relu": nn.ReLU(inplace=True)}


class ZeroPadShortcut(nn.Module):
    """Shortcut of option A, without parameters: subsamples in space and pads the missing channels with zeros.

    Half of the zero channels come before the others and half after, as the published weights require.
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
    return nn.Sequential(convolution(in_channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels))


def _resnet(spec: NetworkSpec, depth: int, widths: tuple[int, ...], shortcut: str) -> StagedNetwork:
    require(shortcut in ("A", "B"), spec, "shortcut", "'A', 'B'")
    channels = widths[0]
    stages: dict[str, nn.Module] = {"stem": _named(conv=convolution(3, channels), **_activation(channels))}
    for number, width in enumerate(widths[1:], 1):
        stride = 1 if number == 1 else 2
        first = BasicBlock(channels, width, stride, _shortcut(shortcut, channels, width, stride))
        rest = (BasicBlock(width, width) for _ in range((depth - 2) // 6 - 1))
        stages[f"stage{number}"], channels = nn.Sequential(first, *rest), width
    return he_initialised(StagedNetwork(spec, stages, num_features=channels))


def _scaled_resnet(
    depth: int,
    spec: NetworkSpec,
    *,
    shortcut: str = "B",
    width: float = 1,
    stage_widths: Sequence[float] = (1, 1, 1, 1),
) -> StagedNetwork:
    # All four widths are multiplied, the stem's too, so stage1 keeps its plain shortcuts.
    possible = is_of(width, float) and 0 < width <= 64 and all(round(base * width) >= 1 for base in RESNET_WIDTHS)
    require(possible, spec, "width", "a number in [1/16, 64] that multiplies the channels 16-32-64")
    possible = is_of(stage_widths, list[float]) and len(stage_widths) == len(RESNET_WIDTHS)
    widths = [base * width * own for base, own in zip(RESNET_WIDTHS, stage_widths, strict=True)] if possible else [0.0]
    possible = all(1 <= round(channels) <= 64 * RESNET_WIDTHS[-1] for channels in widths)
    require(
        possible, spec, "stage_widths", "four numbers that multiply the channels of stem, stage1, stage2 and stage3"
    )
    return _resnet(spec, depth, tuple(map(round, widths)), shortcut)


def _resnet_x4(depth: int, spec: NetworkSpec, *, shortcut: str = "B") -> StagedNetwork:
    # The stem is only doubled: the literature compares these two networks in this form.
    return _resnet(spec, depth, (32, 64, 128, 256), shortcut)


for _depth in RESNET_DEPTHS:
    register_network(f"resnet{_depth}")(partial(_scaled_resnet, _depth))
for _depth in (8, 32):
    register_network(f"resnet{_depth}x4")(partial(_resnet_x4, _depth))


class WideBlock(nn.Module):
    """Block of wide ResNets: twice BN, ReLU and 3×3 convolution, plus a shortcut.

    If the shape changes, the shortcut is a 1×1 convolution of the activated input.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = convolution(in_channels, out_channels, stride=stride)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = convolution(out_channels, out_channels)
        self.shortcut: nn.Conv2d | None = None
        if stride != 1 or in_channels != out_channels:
            self.shortcut = convolution(in_channels, out_channels, 1, stride)
        self.dropout = dropout

    def forward(self, maps: Tensor) -> Tensor:
        """Maps [B, in, H, W] to [B, out, H / stride, W / stride] (rounded up)."""
        active = torch.relu(self.bn1(maps))
        new = torch.relu(self.bn2(self.conv1(active)))
        new = self.conv2(functional.dropout(new, self.dropout, self.training))
        return new + (maps if self.shortcut is None else self.shortcut(active))


def _wide_resnet(depth: int, factor: int, spec: NetworkSpec, *, dropout: float = 0.0) -> StagedNetwork:
    require(is_of(dropout, float) and 0 <= dropout < 1, spec, "dropout", "a number in [0, 1)")
    channels = 16
    stages: dict[str, nn.Module] = {"stem": _named(conv=convolution(3, channels))}
    for number, base in ((1, 16), (2, 32), (3, 64)):
        parts: dict[str, nn.Module] = {}
        for block in range((depth - 4) // 6):
            stride = 2 if number > 1 and block == 0 else 1
            parts[str(block)] = WideBlock(channels, base * factor, stride, dropout)
            channels = base * factor
        # The last activation belongs to the last stage, whose output the head pools.
        stages[f"stage{number}"] = _named(**parts, **(_activation(channels) if number == 3 else {}))
    return he_initialised(StagedNetwork(spec, stages, num_features=channels))


@FAMILIES.register("wrn_<6n+4>_<k>")
def _any_wide_resnet(name: str) -> Builder | None:
    form = re.fullmatch(r"wrn_([1-9]\d{0,2})_([1-9]\d{0,2})", name)
    if form is None:
        return None
    depth, factor = int(form[1]), int(form[2])
    if depth < 10 or depth % 6 != 4:
        below = max(10, depth - (depth - 4) % 6)
        raise UserError(f"unknown network {name!r}: a wide ResNet needs 6n + 4 layers, e.g. {below} or {below + 6}")
    return partial(_wide_resnet, depth, factor)


VGG_WIDTHS = (64, 128, 256, 512, 512)
VGG_CONVOLUTIONS = {
    "vgg8": (1, 1, 1, 1, 1),
    "vgg11": (1, 1, 2, 2, 2),
    "vgg13": (2, 2, 2, 2, 2),
    "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
}
"""Numbers of convolutions in the five groups."""


def _vgg(convolutions: tuple[int, ...], spec: NetworkSpec) -> StagedNetwork:
    """Builds a VGG: every stage but the stem begins with a max-pool, and the last one also ends with one.

    For 32 × 32 images `stem` computes at 32 × 32, `stage1` at 16 × 16 and so on; the five pools are those of the
    original.
    """
    stages: dict[str, nn.Module] = {}
    channels = 3
    for number, (width, count) in enumerate(zip(VGG_WIDTHS, convolutions, strict=True)):
        layers: list[nn.Module] = [nn.MaxPool2d(2)] if number else []
        for _ in range(count):
            # With a bias, although batch norm cancels it, because the published parameter counts and weights have it.
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            channels = width
        if number == len(VGG_WIDTHS) - 1:
            layers.append(nn.MaxPool2d(2))
        stages[f"stage{number}" if number else "stem"] = nn.Sequential(*layers)
    return he_initialised(StagedNetwork(spec, stages, num_features=channels))


for _name, _convolutions in VGG_CONVOLUTIONS.items():
    register_network(_name)(partial(_vgg, _convolutions))


# Stage: (expansion, channels, blocks, stride of the first block) as in the paper's table 2, except that the stem and
# the 24-channel group keep the resolution, as 32 × 32 images are small.
MOBILENET_GROUPS: dict[str, tuple[tuple[int, int, int, int], ...]] = {
    "stem": ((1, 16, 1, 1),),
    "stage1": ((6, 24, 2, 1),),
    "stage2": ((6, 32, 3, 2),),
    "stage3": ((6, 64, 4, 2), (6, 96, 3, 1)),
    "stage4": ((6, 160, 3, 2), (6, 320, 1, 1)),
}
STEM_CHANNELS, LAST_CHANNELS = 32, 1280


@register_network("mobilenetv2")
def _mobilenetv2(spec: NetworkSpec) -> StagedNetwork:
    """Builds MobileNetV2 without the dropout before its head, which is meant for ImageNet."""
    full = partial(Conv2dNormActivation, activation_layer=nn.ReLU6)
    stages: dict[str, nn.Module] = {}
    channels = STEM_CHANNELS
    for name, groups in MOBILENET_GROUPS.items():
        layers: list[nn.Module] = [full(3, channels)] if name == "stem" else []
        for expansion, width, blocks, first_stride in groups:
            for block in range(blocks):
                stride = first_stride if block == 0 else 1
                layers.append(InvertedResidual(channels, width, stride, expansion))
                channels = width
        if name == "stage4":
            layers.append(full(channels, LAST_CHANNELS, kernel_size=1))
        stages[name] = nn.Sequential(*layers)
    return he_initialised(StagedNetwork(spec, stages, num_features=LAST_CHANNELS))


class DenseLayer(nn.Module):
    """Layer of DenseNet-BC: BN, ReLU, 1×1 convolution to 4 × growth, BN, ReLU, 3×3 convolution; appends its output."""

    def __init__(self, in_channels: int, growth: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = convolution(in_channels, 4 * growth, 1)
        self.bn2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = convolution(4 * growth, growth)

    def forward(self, maps: Tensor) -> Tensor:
        """Maps [B, in, H, W] to [B, in + growth, H, W]."""
        new = self.conv1(torch.relu(self.bn1(maps)))
        new = self.conv2(torch.relu(self.bn2(new)))
        return torch.cat([maps, new], dim=1)


def _densenet(depth: int, growth: int, spec: NetworkSpec) -> StagedNetwork:
    """Builds a DenseNet-BC; stages 2 and 3 begin with a transition, so every stage ends with its dense block."""
    layers = (depth - 4) // 6
    channels = 2 * growth
    stages: dict[str, nn.Module] = {"stem": _named(conv=convolution(3, channels))}
    for number in (1, 2, 3):
        parts: dict[str, nn.Module] = {}
        if number > 1:  # compression 0.5
            halved = convolution(channels, channels // 2, 1)
            parts["transition"] = _named(**_activation(channels), conv=halved, pool=nn.AvgPool2d(2))
            channels //= 2
        parts["block"] = nn.Sequential(*(DenseLayer(channels + i * growth, growth) for i in range(layers)))
        channels += layers * growth
        stages[f"stage{number}"] = _named(**parts, **(_activation(channels) if number == 3 else {}))
    return he_initialised(StagedNetwork(spec, stages, num_features=channels))


for _depth, _growth in DENSE_FORMS:
    register_network(f"densenetbc_{_depth}_{_growth}")(partial(_densenet, _depth, _growth))
