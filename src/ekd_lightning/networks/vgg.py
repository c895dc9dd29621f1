"""VGG with batch norm in its CIFAR form: the convolutions of Simonyan and Zisserman 2015, one linear head."""

from __future__ import annotations

from torch import nn

from ekd_lightning.networks.registry import register_network
from ekd_lightning.networks.spec import NetworkSpec
from ekd_lightning.networks.staged import StagedNetwork

WIDTHS = (64, 128, 256, 512, 512)
CONVOLUTIONS = {
    "vgg8": (1, 1, 1, 1, 1),
    "vgg11": (1, 1, 2, 2, 2),
    "vgg13": (2, 2, 2, 2, 2),
    "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
}
"""How many convolutions each of the five groups has."""


def _vgg(spec: NetworkSpec, convolutions: tuple[int, ...]) -> StagedNetwork:
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


def _register(name: str, convolutions: tuple[int, ...]) -> None:
    @register_network(name)
    def build(spec: NetworkSpec) -> StagedNetwork:
        return _vgg(spec, convolutions)


for _name, _convolutions in CONVOLUTIONS.items():
    _register(_name, _convolutions)
