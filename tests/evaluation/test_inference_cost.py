"""Memory by hand, bytes against a written file, and a timing that is made of passes."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ekd_lightning.evaluation.efficiency import count_parameters
from ekd_lightning.evaluation.inference_cost import measure_latency, peak_memory, stored_bytes
from ekd_lightning.networks import BranchedStudent, NetworkSpec, normalization
from ekd_lightning.networks.frozen import FrozenStudent


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
