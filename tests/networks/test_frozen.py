"""Frozen networks say what the networks say: folded or not, traced or not, in any memory format."""

from __future__ import annotations

import pytest
import torch
from lived_networks import with_lived_norms
from torch import nn

from ekd_lightning.networks import BranchedStudent, NetworkSpec, StagedNetwork, build_network, normalization
from ekd_lightning.networks.frozen import FrozenNetwork, FrozenStudent
from ekd_lightning.networks.registry import NETWORKS
from ekd_lightning.networks.weights import state_sha256

SMALL = ("resnet8", "resnet14", "wrn_16_1", "densenetbc_40_12", "vgg8", "mobilenetv2")


def lived(name: str, seed: int = 0, **options) -> StagedNetwork:
    """A network whose batch norms have statistics and scales of their own."""
    torch.manual_seed(seed)
    return with_lived_norms(build_network(NetworkSpec(name, 10, normalization("cifar10"), options)).eval())


def images(batch: int = 4) -> torch.Tensor:
    return torch.rand(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def assert_same(found, expected, rtol=1e-4):
    for one, other in zip(found, expected, strict=True):
        scale = other.abs().max()
        assert (one - other).abs().max() <= rtol * scale, ((one - other).abs().max(), scale)


@pytest.mark.parametrize("name", [*(n for n in NETWORKS.names() if n.startswith(SMALL)), "wrn_16_1"])
@pytest.mark.parametrize("channels_last", [True, False])
def test_folding_changes_nothing_but_rounding(name, channels_last):
    network = lived(name)
    before = state_sha256(network)
    with torch.no_grad():
        logits, pooled, stages = network.outputs(images())
        frozen = FrozenNetwork(network, channels_last=channels_last, stage_names=network.stage_names)
        found = frozen(images())
        traced = frozen.traced()(images())
    expected = (logits, pooled, *stages.values())
    assert_same(found, expected)
    assert_same(traced, found, rtol=1e-6)
    output = frozen.named(found)
    assert list(output.stages) == list(stages)
    assert state_sha256(network) == before
    assert not any(p.requires_grad for p in frozen.parameters())


@pytest.mark.parametrize("name", ["resnet14", "vgg8", "mobilenetv2"])
def test_every_batch_norm_behind_a_convolution_is_folded(name):
    folded = FrozenNetwork(lived(name))
    assert sum(isinstance(m, nn.BatchNorm2d) for m in folded.modules()) == 0
    plain = FrozenNetwork(lived(name), fold=False)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in plain.modules()) > 0


def test_stages_on_a_grid_are_traced_like_others():
    """A graph each, so that torch.compile takes any number of teachers."""
    network = lived("resnet8")
    frozen = FrozenNetwork(network, stage_names=("stage1.4x4", "stage2"))
    graph = frozen.traced()
    assert isinstance(graph, torch.fx.GraphModule)
    assert_same(graph(images()), frozen(images()))


def test_only_wanted_stages_are_returned_in_order():
    network = lived("resnet8")
    frozen = FrozenNetwork(network, stage_names=("stage3", "stage1"))
    with torch.no_grad():
        found = frozen.named(frozen(images()))
        expected = network.outputs(images()).stages
    assert list(found.stages) == ["stage1", "stage3"]
    assert_same(found.stages.values(), (expected["stage1"], expected["stage3"]))


@pytest.mark.parametrize("name", ["wrn_16_1", "densenetbc_40_12"])
def test_batch_norms_that_cannot_be_folded_stay_in_float32(name):
    """Pre-activation networks keep some; their statistics need more than 8 bits."""
    network = lived(name)
    frozen = FrozenNetwork(network, dtype=torch.bfloat16)
    norms = [m for m in frozen.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    assert {tensor.dtype for m in norms for tensor in (m.weight, m.running_mean)} == {torch.float32}
    with torch.no_grad():
        logits, _ = frozen(images(16))
        expected = network(images(16))
    assert_same((logits,), (expected,), rtol=0.05)


def test_bfloat16_stages_between_a_float32_beginning_and_end():
    network = lived("resnet8")
    frozen = FrozenNetwork(network, dtype=torch.bfloat16)
    assert {p.dtype for p in frozen.stages.parameters()} == {torch.bfloat16}
    assert frozen.head.weight.dtype == frozen.normalize.mean.dtype == torch.float32
    with torch.no_grad():
        logits, pooled = frozen(images(16))
        expected = network.outputs(images(16))
    assert logits.dtype == pooled.dtype == torch.float32
    # bfloat16 keeps 8 bits; a network of 8 layers loses a little more than one rounding.
    assert_same((logits, pooled), (expected.logits, expected.pooled), rtol=0.03)


class Moody(nn.Module):
    """Cannot be traced: what it does depends on its values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, maps):
        return self.bn(self.conv(maps)) if maps.sum() > 0 else self.conv(maps)


def test_a_stage_that_cannot_be_traced_is_left_as_it_is():
    spec = NetworkSpec("resnet8", 10, normalization("unit"))
    network = StagedNetwork(spec, {"stem": Moody()}, num_features=8).eval()
    frozen = FrozenNetwork(network)
    with torch.no_grad():
        assert_same(frozen(images())[:1], (network(images()),))
        assert_same(frozen.traced()(images())[:1], (network(images()),))
    assert any(isinstance(m, nn.BatchNorm2d) for m in frozen.modules())


@pytest.mark.parametrize("ensemble", ["mean_logits", "mean_probs", "gate"])
@pytest.mark.parametrize("split_after", ["stage1", "stage3", "stem"])
def test_a_frozen_student_says_what_the_student_says(ensemble, split_after):
    torch.manual_seed(2)
    spec = NetworkSpec("resnet8", 10, normalization("cifar10"))
    student = BranchedStudent(spec, branches=3, split_after=split_after, ensemble=ensemble)
    student(images(16))  # batch norms get statistics of their own
    student.eval()
    with torch.no_grad():
        expected = student(images())
        assert_same((FrozenStudent(student)(images()),), (expected,))
        half = FrozenStudent(student, dtype=torch.bfloat16)(images())
    assert half.dtype == torch.float32
    assert_same((half,), (expected,), rtol=0.05)
