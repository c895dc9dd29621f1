"""Registered networks: names, options, shapes, published sizes, matches of equal cost."""

from __future__ import annotations

import copy
import io
import json
import pickle
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ekd_lightning.errors import UserError
from ekd_lightning.evaluation.efficiency import count_macs, count_parameters
from ekd_lightning.networks import (
    BranchedStudent,
    NetworkSpec,
    StagedNetwork,
    build_network,
    normalization,
    register_network,
)
from ekd_lightning.networks import registry as registry_module
from ekd_lightning.networks.convnets import RESNET_DEPTHS, ZeroPadShortcut
from ekd_lightning.networks.registry import CLOSE, NETWORKS, family, match_network, thinned
from ekd_lightning.networks.spec import NORMALIZATIONS, Normalization


def _spec(name: str = "resnet8", num_classes: int = 10, **options: Any) -> NetworkSpec:
    return NetworkSpec(name, num_classes, normalization("cifar10"), options)


def test_spec_survives_json() -> None:
    spec = _spec("wrn_16_1", 7, dropout=0.1)
    again = NetworkSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert again == spec
    assert hash(again) == hash(spec)
    assert pickle.loads(pickle.dumps(spec)) == spec


def test_spec_accepts_a_named_normalization() -> None:
    spec = NetworkSpec.from_dict({"name": "resnet8", "num_classes": 3, "normalization": "unit", "options": {}})
    assert spec.normalization == NORMALIZATIONS["unit"]


@pytest.mark.parametrize(
    "change", [{"num_classes": 0}, {"num_classes": 2.5}, {"extra": 1}, {"normalization": {"mean": [0, 0, 0]}}]
)
def test_broken_specs_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        NetworkSpec.from_dict({**_spec().to_dict(), **change})


def test_spec_without_a_key_is_refused() -> None:
    values = _spec().to_dict()
    del values["normalization"]
    with pytest.raises(UserError, match="normalization"):
        NetworkSpec.from_dict(values)


def test_spec_keeps_a_copy_of_the_options() -> None:
    options = {"shortcut": "A"}
    spec = NetworkSpec("resnet8", 10, normalization("unit"), options)
    options["shortcut"] = "B"
    assert spec.options == {"shortcut": "A"}
    with pytest.raises(UserError, match="JSON"):
        NetworkSpec("resnet8", 10, normalization("unit"), {"shortcut": object()})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet21", {}, "did you mean 'resnet"),
        ("resnet8", {"shortcutt": "A"}, "'shortcutt'; did you mean 'shortcut'.*allowed: shortcut, stage_widths, width"),
        ("resnet8", {"shortcut": "C"}, "shortcut='C'.*'A', 'B'"),
        ("resnet8", {"width": 0}, "width=0"),
        ("resnet8", {"width": "2"}, "width='2'"),
        ("resnet8", {"width": True}, "width=True"),
        ("resnet8", {"width": float("nan")}, "width=nan"),
        ("resnet8", {"width": 0.01}, "width=0.01"),
        ("wrn_17_2", {}, "needs 6n . 4 layers, e.g. 16 or 22"),
        ("wrn_4_2", {}, "e.g. 10 or 16"),
        ("wrn_16_0", {}, "wrn_<6n.4>_<k>"),
        ("wrn_16_1", {"dropout": 1.0}, "dropout=1.0"),
        ("wrn_16_1", {"dropout": -0.1}, "dropout=-0.1"),
        ("resnet8", {"width": "wide"}, r"^option width='wide' of network 'resnet8': must be float"),
        ("vgg8", {"dropout": 0.1}, "'dropout'.*allowed: none"),
    ],
)
def test_impossible_networks_are_refused_in_one_line(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build_network(_spec(name, **options))
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


def test_a_name_is_registered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry_module, "NETWORKS", copy.copy(registry_module.NETWORKS))

    @register_network("mine")
    def build_mine(spec: NetworkSpec, *, size: int = 4) -> StagedNetwork:
        stages = {"stem": torch.nn.Conv2d(3, size, 1)}
        return StagedNetwork(spec, stages, num_features=size)

    assert "mine" in registry_module.NETWORKS.names()
    assert build_network(_spec("mine", size=5)).head.in_features == 5
    with pytest.raises(ValueError, match=r"'mine'.*build_mine.*build_other"):

        @register_network("mine")
        def build_other(spec: NetworkSpec) -> StagedNetwork:
            raise NotImplementedError


def test_normalizations() -> None:
    assert normalization("cifar100").std == (0.2675, 0.2565, 0.2761)
    with pytest.raises(UserError, match="did you mean 'cifar10"):
        normalization("cifar")
    for bad in [(0.1, 0.1, 0.0), (0.1, 0.1), (0.1, 0.1, float("nan")), ("a", 1, 1)]:
        with pytest.raises(UserError, match="normalization"):
            Normalization((0.0, 0.0, 0.0), bad)


FAMILIES = ["resnet8", "wrn_16_1", "densenetbc_40_12", "vgg8", "mobilenetv2"]


def _build(name: str, num_classes: int = 10, seed: int = 0, **options: Any) -> StagedNetwork:
    torch.manual_seed(seed)
    return build_network(NetworkSpec(name, num_classes, normalization("cifar10"), options))


def _count(name: str, num_classes: int, **options: Any) -> int:
    with torch.device("meta"):
        return count_parameters(_build(name, num_classes, **options))


@pytest.mark.parametrize(
    ("name", "num_classes", "parameters"),
    [
        ("resnet8x4", 100, 1_233_540),
        ("resnet32x4", 100, 7_433_860),
        ("wrn_16_1", 10, 175_066),
        ("wrn_16_2", 100, 703_284),
        ("wrn_40_2", 100, 2_255_156),
        ("wrn_28_10", 100, 36_536_884),
        ("densenetbc_100_12", 10, 769_162),
        ("densenetbc_100_12", 100, 800_032),
        ("vgg8", 100, 3_965_028),
        ("vgg11", 10, 9_231_114),
        ("vgg13", 10, 9_416_010),
        ("vgg16", 10, 14_728_266),
        ("vgg19", 10, 20_040_522),
        ("mobilenetv2", 10, 2_236_682),
    ],
)
def test_published_parameter_counts(name: str, num_classes: int, parameters: int) -> None:
    assert _count(name, num_classes) == parameters


@given(n=st.integers(1, 8), k=st.integers(1, 12))
def test_wide_resnets_of_every_depth_and_width(n: int, k: int) -> None:
    count, before = 3 * 16 * 9 + 2 * 64 * k + 64 * k * 10 + 10, 16  # stem, last norm, head
    for width in (16 * k, 32 * k, 64 * k):
        for _ in range(n):
            count += 2 * before + 9 * before * width + 2 * width + 9 * width * width
            count += before * width if before != width else 0  # the shortcut
            before = width
    assert _count(f"wrn_{6 * n + 4}_{k}", 10) == count


@pytest.mark.parametrize("depth", [8, 20, 110])
def test_option_a_has_no_parameters_in_its_shortcuts(depth: int) -> None:
    assert _count(f"resnet{depth}", 10, shortcut="A") == _count(f"resnet{depth}", 10) - 2752


def test_option_a_resnet20_has_the_published_count() -> None:
    assert _count("resnet20", 10, shortcut="A") == 269_722


def test_width_multiplies_all_channels() -> None:
    shapes = _build("resnet8", width=0.5).stage_shapes()
    assert [shape[0] for shape in shapes.values()] == [8, 8, 16, 32]


@pytest.mark.parametrize("depth", [11, 13, 16, 19])
def test_vgg_is_torchvisions_features(depth: int) -> None:
    """Same weights, layer by layer, must give the same feature map."""
    ours = _build(f"vgg{depth}").eval()
    with torch.device("meta"):  # spares the weights of its classifier, 100 million and more
        theirs = torchvision.models.get_model(f"vgg{depth}_bn").features.eval()
    assert count_parameters(theirs) == count_parameters(ours.stages)
    pairs = zip(theirs.state_dict(), ours.stages.state_dict().values(), strict=True)
    theirs.load_state_dict(dict(pairs), assign=True)
    images = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(
            ours.outputs(images).stages["stage4"], theirs(ours.normalize(images)), rtol=1e-4, atol=1e-5
        )


def test_mobilenet_is_torchvisions_at_twice_the_resolution() -> None:
    """With its two removed strides put back, ours computes what torchvision's does."""
    ours = _build("mobilenetv2").eval()
    theirs = torchvision.models.mobilenet_v2(num_classes=10).eval()
    assert count_parameters(theirs) == count_parameters(ours)
    for target, source in zip(theirs.parameters(), ours.parameters(), strict=True):
        target.data.copy_(source.data)
    strided = copy.deepcopy(ours)
    for convolution in (strided.stages["stem"][0][0], strided.stages["stage1"][0].conv[1][0]):
        convolution.stride = (2, 2)
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(strided(images), theirs(strided.normalize(images)), rtol=1e-4, atol=1e-5)


def test_option_a_shortcut_against_numpy() -> None:
    maps = np.random.default_rng(0).normal(size=(2, 3, 5, 4)).astype(np.float32)
    expected = np.zeros((2, 8, 3, 2), dtype=np.float32)
    for b in range(2):
        for c in range(3):
            for i in range(3):
                for j in range(2):
                    expected[b, 2 + c, i, j] = maps[b, c, 2 * i, 2 * j]
    found = ZeroPadShortcut(3, 8, stride=2)(torch.from_numpy(maps))
    np.testing.assert_array_equal(found.numpy(), expected)


@pytest.mark.parametrize("name", [*NETWORKS.names(), "wrn_16_1", "wrn_28_4"])
def test_stages_are_named_in_order_and_probing_touches_nothing(name: str) -> None:
    with torch.device("meta"):
        network = _build(name)
    shapes = network.stage_shapes(64)
    assert tuple(shapes) == network.stage_names
    assert network.stage_names[:4] == ("stem", "stage1", "stage2", "stage3")
    assert list(shapes.values())[-1][0] == network.num_features == network.head.in_features
    sizes = [shape[1] for shape in shapes.values()]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 64


@pytest.mark.parametrize("name", FAMILIES)
def test_outputs_agree_with_forward_and_shapes(name: str) -> None:
    network = _build(name, num_classes=7).eval()
    before = copy.deepcopy(network.state_dict())
    images = torch.rand(2, 3, 32, 32)
    shapes = network.stage_shapes()
    with torch.no_grad():
        outputs = network.outputs(images)
        assert torch.equal(outputs.logits, network(images))
    assert outputs.logits.shape == (2, 7)
    assert {stage: tuple(maps.shape[1:]) for stage, maps in outputs.stages.items()} == shapes
    last = outputs.stages[network.stage_names[-1]]
    torch.testing.assert_close(outputs.pooled, last.flatten(2).mean(2))
    torch.testing.assert_close(outputs.logits, network.head(outputs.pooled))
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize("name", FAMILIES)
def test_no_stage_overwrites_the_output_of_an_earlier_one(name: str) -> None:
    network = _build(name).train()
    for stage in network.modules():
        if isinstance(stage, nn.BatchNorm2d):
            stage.momentum = 0.0
    images = torch.rand(2, 3, 32, 32)
    maps = network.normalize(images)
    with torch.no_grad():
        stages = network.outputs(images).stages
        for stage_name, stage in network.stages.items():
            maps = stage(maps)
            kept = maps.clone()
            assert torch.equal(stages[stage_name], kept)
            maps = kept


@pytest.mark.parametrize("name", FAMILIES)
def test_channels_last_autocast_deepcopy_and_pickled_weights(name: str) -> None:
    network = _build(name).eval()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = network(images)
        assert torch.equal(copy.deepcopy(network)(images), expected)
        fast = copy.deepcopy(network).to(memory_format=torch.channels_last)
        found = fast(images.contiguous(memory_format=torch.channels_last))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
        with torch.autocast("cpu", torch.bfloat16):
            assert network(images).isfinite().all()
        assert copy.deepcopy(network).bfloat16()(images).dtype is torch.bfloat16
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    file.seek(0)
    other = _build(name, seed=1).eval()
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    with torch.no_grad():
        assert torch.equal(other(images), expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_seed_gives_one_network(name: str) -> None:
    first, again, other = _build(name), _build(name), _build(name, seed=1)
    pairs = zip(first.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(first.head.weight, other.head.weight)


def test_normalization_is_the_networks_own() -> None:
    network = _build("resnet8").eval()
    images = torch.rand(2, 3, 32, 32)
    mean = np.array([0.4914, 0.4822, 0.4465], dtype=np.float32).reshape(1, 3, 1, 1)
    std = np.array([0.2023, 0.1994, 0.2010], dtype=np.float32).reshape(1, 3, 1, 1)
    np.testing.assert_allclose(network.normalize(images).numpy(), (images.numpy() - mean) / std, rtol=1e-6)
    assert not any("normalize" in key for key in network.state_dict())
    with pytest.raises(TypeError, match="uint8"):
        network((images * 255).to(torch.uint8))


def test_dropout_acts_in_train_mode_only() -> None:
    network = _build("wrn_16_1", dropout=0.5)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert not torch.equal(network(images), network(images))
        network.eval()
        assert torch.equal(network(images), network(images))


COSTS = {"macs": count_macs, "parameters": count_parameters}
UNIT = normalization("unit")


def plain(name, **options):
    with torch.device("meta"):
        return build_network(NetworkSpec(name, 10, UNIT, options))


def branched(branches=3, split_after="stage1", name="resnet8", **options):
    with torch.device("meta"):
        return BranchedStudent(NetworkSpec(name, 10, UNIT, options), branches=branches, split_after=split_after)


def test_the_family_of_a_cifar_resnet_is_its_depths_without_the_wide_forms():
    assert family("resnet20") == tuple(f"resnet{depth}" for depth in RESNET_DEPTHS)
    assert family("vgg8") == ("vgg8", "vgg11", "vgg13", "vgg16", "vgg19")
    assert family("wrn_16_2") == tuple(f"wrn_16_{factor}" for factor in range(1, 11))
    assert family("wrn_22_12")[-1] == "wrn_22_12"
    assert family("mobilenetv2") == ("mobilenetv2",)


def test_an_unknown_network_is_one_line_with_the_nearest():
    with pytest.raises(UserError, match="did you mean 'resnet8'"):
        family("resnet9")


@pytest.mark.parametrize("by", COSTS)
@pytest.mark.parametrize("name", ["resnet8", "resnet20"])
def test_a_plain_network_matches_itself_exactly(by, name):
    spec = NetworkSpec(name, 10, UNIT, {"width": 0.5})
    match = match_network(spec, COSTS[by](plain(name, width=0.5)), COSTS[by])
    assert (match.network, dict(match.options), match.off) == (name, {"width": 0.5}, 0.0)


@pytest.mark.parametrize("by", COSTS)
def test_one_branch_costs_what_the_plain_network_costs(by):
    target = COSTS[by](branched(branches=1))
    match = match_network(NetworkSpec("resnet8", 10, UNIT), target, COSTS[by])
    assert (match.network, dict(match.options), match.off) == ("resnet8", {}, 0.0)


@pytest.mark.parametrize("by", COSTS)
@pytest.mark.parametrize(("branches", "split_after"), [(3, "stage1"), (2, "none"), (4, "stage2")])
def test_branched_students_are_matched_and_the_number_said_is_that_of_the_network(by, branches, split_after):
    target = COSTS[by](branched(branches, split_after))
    match = match_network(NetworkSpec("resnet8", 10, UNIT), target, COSTS[by])
    assert match.cost == COSTS[by](plain(match.network, **match.options))
    assert match.target == target
    assert abs(match.off) < 0.05
    assert f"({100 * match.off:+.1f} %)" in str(match)


def test_the_choice_is_that_of_an_exhaustive_search():
    target = count_parameters(branched(3, "stage1"))
    options = [
        (name, sixteenths / 16, count_parameters(plain(name, width=sixteenths / 16)) / target - 1)
        for name in family("resnet8")[:5]
        for sixteenths in range(4, 33)
    ]
    close = [option for option in options if abs(option[2]) <= CLOSE]
    assert close
    nearest_width = min(max(width, 1 / width) for _, width, _ in close)
    match = match_network(NetworkSpec("resnet8", 10, UNIT), target, count_parameters)
    width = float(match.options.get("width", 1))
    assert max(width, 1 / width) == nearest_width


def test_without_the_option_width_the_nearest_depth_is_taken():
    spec = NetworkSpec("vgg8", 10, UNIT)
    target = count_macs(plain("vgg11")) + 1000
    match = match_network(spec, target, count_macs)
    assert (match.network, dict(match.options)) == ("vgg11", {})
    assert match.off < 0


def test_other_options_of_the_student_are_kept():
    spec = NetworkSpec("resnet8", 10, UNIT, {"shortcut": "A"})
    match = match_network(spec, count_parameters(branched(shortcut="A")), count_parameters)
    assert match.options["shortcut"] == "A"


def test_a_target_must_be_positive():
    with pytest.raises(ValueError, match="give a number > 0"):
        match_network(NetworkSpec("resnet8", 10, UNIT), 0, count_macs)


def block_weights(place, inputs, outputs):
    """Convolutions of a residual block with option B: two of 3 × 3, and 1 × 1 where channels or resolution change."""
    changes = inputs != outputs or place > 0
    return 9 * inputs * outputs + 9 * outputs * outputs + changes * inputs * outputs


@pytest.mark.parametrize("branches", [2, 5])
@pytest.mark.parametrize(("split_after", "after"), [("stage2", 1), ("stage1", 2), ("none", 4)])
def test_thin_branches_cost_what_their_channels_cost(branches, split_after, after):
    spec = thinned(NetworkSpec("resnet8", 10, UNIT), split_after, 0.5)
    widths = [base // 2 if place >= 4 - after else base for place, base in enumerate((16, 16, 32, 64))]
    assert spec.options["stage_widths"] == [width / base for width, base in zip(widths, (16, 16, 32, 64), strict=True)]
    with torch.device("meta"):
        student = BranchedStudent(spec, branches=branches, split_after=split_after)
    assert [shape[0] for shape in student.stage_shapes().values()] == widths
    macs = [32 * 32 * 27 * widths[0]]
    macs += [(32 >> place) ** 2 * block_weights(place, widths[place], widths[place + 1]) for place in range(3)]
    shared, own = sum(macs[: 4 - after]), sum(macs[4 - after :])
    assert count_macs(student) == shared + branches * (own + 10 * widths[-1])


def test_the_plain_network_of_equal_cost_has_one_width():
    spec = thinned(NetworkSpec("resnet8", 10, UNIT, {"width": 2}), "stage1", 0.25)
    with torch.device("meta"):
        target = count_macs(BranchedStudent(spec, branches=4, split_after="stage1"))
    match = match_network(spec, target, count_macs)
    assert set(match.options) <= {"width"}
    assert (match.cost, abs(match.off) < 0.05) == (count_macs(plain(match.network, **match.options)), True)


def test_widths_of_stages_multiply():
    spec = NetworkSpec("resnet8", 10, UNIT, {"width": 0.5, "stage_widths": [1, 1, 1, 2]})
    again = thinned(spec, "stage2", 0.25)
    assert again.options == {"width": 0.5, "stage_widths": [1, 1, 1, 0.5]}
    assert [shape[0] for shape in build_network(again).stage_shapes().values()] == [8, 8, 16, 16]


@pytest.mark.parametrize(
    ("name", "split_after", "factor", "message"),
    [
        ("vgg8", "stage2", 0.5, "student.branch_width=0.5: network 'vgg8' has no option stage_widths"),
        ("resnet8", "stage3", 0.5, "split_after=stage3 leaves the branches no stage"),
    ],
)
def test_branches_that_cannot_be_thin(name, split_after, factor, message):
    with pytest.raises(UserError, match=message):
        thinned(NetworkSpec(name, 10, UNIT), split_after, factor)


@pytest.mark.parametrize("widths", [0.5, [1, 1, 1], [1, 1, 1, "2"], [1, 1, 1, 0.001], [1, 1, 1, -1], [1, 1, 1, 1e9]])
def test_widths_that_a_resnet_cannot_have(widths):
    with pytest.raises(UserError, match=r"option stage_widths=.*four numbers"):
        build_network(NetworkSpec("resnet8", 10, UNIT, {"stage_widths": widths}))
