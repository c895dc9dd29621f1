"""MobileNetV2 for 32 × 32 images (Sandler et al. 2018): torchvision's blocks, two strides removed."""

from __future__ import annotations

from torch import nn
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.ops.misc import Conv2dNormActivation

from ekd_lightning.networks.registry import register_network
from ekd_lightning.networks.spec import NetworkSpec
from ekd_lightning.networks.staged import StagedNetwork

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
