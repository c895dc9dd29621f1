from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ekd_lightning.evaluation.efficiency import count_macs, count_parameters, measure_latency, peak_memory, stored_bytes
from ekd_lightning.networks import BranchedStudent, NetworkSpec, build_network, normalization
from ekd_lightning.networks.frozen import FrozenStudent

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
def test_branched_students(depth: int, branches: int, parameters: tuple[int, ...], millions: tuple[float, ...]) -> None:
    for split, count, macs in zip(SPLITS, parameters, millions, strict=True):
        student = BranchedStudent(_spec(depth), branches=branches, split_after=split)
        assert count_parameters(student) == count
        assert count_macs(student) / 1e6 == pytest.approx(macs, abs=0.0501)


def test_counts_by_hand() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, groups=1), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten())
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


def student(ensemble: str = "mean_logits") -> BranchedStudent:
    torch.manual_seed(0)
    spec = NetworkSpec("resnet8", 10, normalization("unit"))
    return BranchedStudent(spec, branches=3, split_after="stage1", ensemble=ensemble).eval()


def test_bytes_are_those_of_the_file(tmp_path):
    deployed = FrozenStudent(student())
    save_file({k: v.contiguous() for k, v in deployed.state_dict().items()}, tmp_path / "x.safetensors")
    assert stored_bytes(deployed) == (tmp_path / "x.safetensors").stat().st_size
    values = sum(tensor.numel() for tensor in deployed.state_dict().values())
    assert 4 * values < stored_bytes(deployed) < 4 * values + 10_000
    # Folding leaves one bias where batch norm had weight, bias and two statistics.
    assert values < count_parameters(student())


class Chain(nn.Module):
    """Two maps live at once, at most."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)

    def forward(self, images):
        maps = self.conv(images)  # 8 channels: 8/3 of the images
        for _ in range(5):
            maps = maps * 2  # the old one lives until the new one is there
        return maps.mean((-2, -1))


def test_memory_by_hand():
    images = torch.rand(4, 3, 16, 16)
    one = 4 * images.numel()
    weights = 4 * 8 * 3 * 9
    assert peak_memory(Chain().eval(), images) == one + weights + 2 * (8 * one // 3)


def test_memory_of_views_and_of_what_works_in_place():
    images = torch.rand(4, 3, 16, 16)
    in_place = nn.Sequential(nn.Identity(), nn.Flatten(), nn.Unflatten(1, (3, 16, 16)))
    assert peak_memory(in_place, images) == 4 * images.numel()
    twice = nn.Sequential(nn.Hardtanh(), nn.ReLU(inplace=True))
    assert peak_memory(twice, images) == 2 * 4 * images.numel()


def test_memory_grows_with_the_batch_and_counts_weights_once():
    deployed = FrozenStudent(student())
    small, large = (peak_memory(deployed, torch.rand(size, 3, 32, 32)) for size in (2, 6))
    middle = peak_memory(deployed, torch.rand(4, 3, 32, 32))
    assert large - middle == middle - small > 0
    fixed = small - (middle - small)
    assert fixed == pytest.approx(4 * count_parameters(deployed), rel=0.05)


def test_latency_counts_the_passes_it_made():
    class Counted(nn.Module):
        passes = 0

        def forward(self, images):
            Counted.passes += 1
            assert torch.is_inference_mode_enabled()
            return images.sum()

    latency = measure_latency(Counted(), torch.rand(1, 3, 8, 8), min_seconds=0.02)
    assert latency.median > 0
    assert latency.iqr >= 0
    assert latency.threads == torch.get_num_threads()
    assert Counted.passes >= 9
