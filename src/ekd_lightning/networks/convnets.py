"""Convolutional networks of other families, for 32 × 32 images: VGG, MobileNetV2, DenseNet-BC.

VGG has batch norm: the convolutions of Simonyan and Zisserman 2015, one linear head. MobileNetV2 (Sandler et al. 2018)
is made of torchvision's blocks, with two strides removed. DenseNet-BC (Huang et al. 2017) has three dense blocks of
bottleneck layers.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import partial

import torch
from torch import Tensor, nn
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.ops.misc import Conv2dNormActivation

from ekd_lightning.networks.registry import register_network
from ekd_lightning.networks.staged import NetworkSpec, StagedNetwork

WIDTHS = (64, 128, 256, 512, 512)
CONVOLUTIONS = {
    "vgg8": (1, 1, 1, 1, 1),
    "vgg11": (1, 1, 2, 2, 2),
    "vgg13": (2, 2, 2, 2, 2),
    "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
}
"""How many convolutions each of the five groups has."""


def _vgg(convolutions: tuple[int, ...], spec: NetworkSpec) -> StagedNetwork:
    """Each stage begins with the max-pool that precedes its group; the last also ends with one.

    So `stem` works on 32 × 32, `stage1` on 16 × 16 and so on, and the fifth pool is where the
    original has it.
    """
    stages: dict[str, nn.Module] = {}
    channels = 3
    for number, (width, count) in enumerate(zip(WIDTHS, convolutions, strict=True)):
        layers: list[nn.Module] = [nn.MaxPool2d(2)] if number else []
        for _ in range(count):
            # With a bias, though batch norm cancels it: the published counts and weights have it.
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            channels = width
        if number == len(WIDTHS) - 1:
            layers.append(nn.MaxPool2d(2))
        stages[f"stage{number}" if number else "stem"] = nn.Sequential(*layers)
    return StagedNetwork(spec, stages, num_features=channels)


for _name, _convolutions in CONVOLUTIONS.items():
    register_network(_name)(partial(_vgg, _convolutions))


# Stage: (expansion, channels, blocks, stride of the first block) as in the paper's table 2, except that
# the stem and the 24-channel group keep the resolution: 32 × 32 images have none to spare.
GROUPS: dict[str, tuple[tuple[int, int, int, int], ...]] = {
    "stem": ((1, 16, 1, 1),),
    "stage1": ((6, 24, 2, 1),),
    "stage2": ((6, 32, 3, 2),),
    "stage3": ((6, 64, 4, 2), (6, 96, 3, 1)),
    "stage4": ((6, 160, 3, 2), (6, 320, 1, 1)),
}
STEM_CHANNELS, LAST_CHANNELS = 32, 1280


def _convolution(in_channels: int, out_channels: int, size: int) -> nn.Module:
    return Conv2dNormActivation(in_channels, out_channels, kernel_size=size, activation_layer=nn.ReLU6)


@register_network("mobilenetv2")
def _mobilenetv2(spec: NetworkSpec) -> StagedNetwork:
    """The head is linear only: the dropout before it, for ImageNet, is left out."""
    stages: dict[str, nn.Module] = {}
    channels = STEM_CHANNELS
    for name, groups in GROUPS.items():
        layers: list[nn.Module] = [_convolution(3, channels, 3)] if name == "stem" else []
        for expansion, width, blocks, first_stride in groups:
            for block in range(blocks):
                stride = first_stride if block == 0 else 1
                layers.append(InvertedResidual(channels, width, stride, expansion))
                channels = width
        if name == "stage4":
            layers.append(_convolution(channels, LAST_CHANNELS, 1))
        stages[name] = nn.Sequential(*layers)
    return StagedNetwork(spec, stages, num_features=LAST_CHANNELS)


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


def _densenet(depth: int, growth: int, spec: NetworkSpec) -> StagedNetwork:
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


for _depth, _growth in FORMS:
    register_network(f"densenetbc_{_depth}_{_growth}")(partial(_densenet, _depth, _growth))
