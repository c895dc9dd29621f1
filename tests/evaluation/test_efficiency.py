"""Parameters and multiply-accumulates against counts worked out from the layer shapes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ekd_lightning.evaluation.efficiency import count_macs, count_parameters
from ekd_lightning.networks import BranchedStudent, NetworkSpec, build_network, normalization

SPLITS = ("stage2", "stage1", "stem", "none")


def _spec(depth: int, **options: str) -> NetworkSpec:
    return NetworkSpec(f"resnet{depth}", 10, normalization("cifar10"), options)


def _macs_from_layer_shapes(depth: int) -> int:
    """Input channels × kernel × output channels × positions, layer by layer."""
    macs, channels = 3 * 9 * 16 * 32 * 32, 16
    for width, size in ((16, 32), (32, 16), (64, 8)):
        for _ in range((depth - 2) // 6):
            shortcut = channels if channels != width else 0
            macs += (channels * 9 + width * 9 + shortcut) * width * size * size
            channels = width
    return macs + 64 * 10


@pytest.mark.parametrize(
    ("depth", "parameters", "millions"),
    [
        (8, 78_042, 12.5),
        (14, 175_258, 26.7),
        (20, 272_474, 40.8),
        (26, 369_690, 55.0),
        (32, 466_906, 69.1),
        (44, 661_338, 97.4),
        (56, 855_770, 125.8),
        (110, 1_730_714, 253.2),
    ],
)
def test_plain_networks(depth: int, parameters: int, millions: float) -> None:
    network = build_network(_spec(depth))
    assert count_parameters(network) == parameters
    assert count_macs(network) == _macs_from_layer_shapes(depth)
    assert count_macs(network) / 1e6 == pytest.approx(millions, abs=0.06)
    assert count_parameters(build_network(_spec(depth, shortcut="A"))) == parameters - 2752


@pytest.mark.parametrize(
    ("depth", "branches", "parameters", "millions"),
    [
        (8, 3, (194_798, 223_854, 233_198, 234_126), (19.8, 27.2, 36.6, 37.5)),
        (8, 4, (253_176, 296_760, 310_776, 312_168), (23.5, 34.5, 48.7, 50.0)),
        (14, 3, (439_982, 506_158, 524_846, 525_774), (43.4, 60.2, 79.1, 80.0)),
        (20, 3, (685_166, 788_462, 816_494, 817_422), (67.0, 93.2, 121.6, 122.4)),
    ],
)
def test_branched_students(
    depth: int, branches: int, parameters: tuple[int, ...], millions: tuple[float, ...]
) -> None:
    for split, count, macs in zip(SPLITS, parameters, millions, strict=True):
        student = BranchedStudent(_spec(depth), branches=branches, split_after=split)
        assert count_parameters(student) == count
        assert count_macs(student) / 1e6 == pytest.approx(macs, abs=0.0501)


def test_counts_by_hand() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, groups=1), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten()
    )
    network.append(nn.Linear(8 * 30 * 30, 5))
    assert count_parameters(network) == (3 * 8 * 9 + 8) + (8 * 9 + 8) + (7200 * 5 + 5)
    assert count_macs(network) == 3 * 8 * 9 * 32 * 32 + 8 * 9 * 30 * 30 + 7200 * 5


def test_macs_grow_with_the_image() -> None:
    network = build_network(_spec(8))
    head = 640
    assert count_macs(network, image_size=64) - head == 4 * (count_macs(network) - head)


def test_counting_touches_nothing() -> None:
    student = BranchedStudent(_spec(8), branches=2, split_after="stage2", ensemble="gate").train()
    before = copy.deepcopy(student.state_dict())
    assert count_macs(student) > 0
    assert student.training
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())
    assert {parameter.device.type for parameter in student.parameters()} == {"cpu"}
