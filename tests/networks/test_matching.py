from __future__ import annotations

import pytest
import torch

from ekd_lightning.errors import UserError
from ekd_lightning.evaluation.efficiency import count_macs, count_parameters
from ekd_lightning.networks import BranchedStudent, NetworkSpec, build_network, normalization
from ekd_lightning.networks.matching import CLOSE, family, match_network
from ekd_lightning.networks.resnet import DEPTHS

COSTS = {"macs": count_macs, "parameters": count_parameters}
UNIT = normalization("unit")


def plain(name, **options):
    with torch.device("meta"):
        return build_network(NetworkSpec(name, 10, UNIT, options))


def branched(branches=3, split_after="stage1", name="resnet8", **options):
    with torch.device("meta"):
        return BranchedStudent(
            NetworkSpec(name, 10, UNIT, options), branches=branches, split_after=split_after
        )


def test_the_family_of_a_cifar_resnet_is_its_depths_without_the_wide_forms():
    assert family("resnet20") == tuple(f"resnet{depth}" for depth in DEPTHS)
    assert family("vgg8") == ("vgg8", "vgg11", "vgg13", "vgg16", "vgg19")
    assert family("wrn_16_1") == ("wrn_16_1", "wrn_16_2", "wrn_16_4")
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
    with pytest.raises(ValueError, match="above 0"):
        match_network(NetworkSpec("resnet8", 10, UNIT), 0, count_macs)
