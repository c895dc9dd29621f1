"""Foreign weights fit exactly or are refused with names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ekd_lightning.errors import UserError
from ekd_lightning.networks import NetworkSpec, StagedNetwork, build_network, normalization
from ekd_lightning.networks.convert import load_foreign

# Ours to theirs, written down independently of the maps under test.
TO_CHENYAOFO = [(r"stages\.stem\.(conv|bn)\.", r"\g<1>1."), (r"stages\.stage(\d)\.", r"layer\1."), (r"head\.", "fc.")]
TO_AKAMASTER = [*TO_CHENYAOFO[:2], (r"downsample", "shortcut"), (r"head\.", "linear.")]
TO_DENSENET = [
    (r"stages\.stem\.conv\.", "conv1."),
    (r"stages\.stage2\.transition\.(bn|conv)\.", r"trans1.\g<1>1."),
    (r"stages\.stage3\.transition\.(bn|conv)\.", r"trans2.\g<1>1."),
    (r"stages\.stage(\d)\.block\.", r"block\1.layer."),
    (r"stages\.stage3\.bn\.", "bn1."),
    (r"head\.", "fc."),
]


def _spec(name: str, num_classes: int = 10, **options: Any) -> NetworkSpec:
    return NetworkSpec(name, num_classes, normalization("cifar10"), options)


def _foreign(network: StagedNetwork, renaming: list[tuple[str, str]]) -> dict[str, Tensor]:
    renamed = {}
    for key, value in network.state_dict().items():
        for pattern, replacement in renaming:
            key = re.sub(pattern, replacement, key)  # noqa: PLW2901
        renamed[key] = value
    return renamed


@pytest.mark.parametrize(
    ("spec", "key_map", "renaming"),
    [
        (_spec("resnet8"), "chenyaofo_resnet", TO_CHENYAOFO),
        (_spec("resnet14", shortcut="A"), "akamaster_resnet", TO_AKAMASTER),
        (_spec("resnet8", shortcut="B"), "akamaster_resnet", TO_AKAMASTER),
        (_spec("densenetbc_40_12"), "densenet_bc", TO_DENSENET),
        (_spec("vgg8"), "own", []),
    ],
)
def test_conversion_is_exact(tmp_path: Path, spec: NetworkSpec, key_map: str, renaming: list[tuple[str, str]]) -> None:
    network = build_network(spec)
    network(torch.rand(2, 3, 32, 32))
    torch.save({"state_dict": _foreign(network, renaming)}, tmp_path / "c.pth")
    loaded = load_foreign(tmp_path / "c.pth", spec, key_map)
    assert not loaded.training
    state = network.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())


def test_batch_counters_may_be_absent_from_old_files_only(tmp_path: Path) -> None:
    spec = _spec("resnet8", shortcut="A")
    path = tmp_path / "c.pth"
    for renaming, key_map in ((TO_AKAMASTER, "akamaster_resnet"), (TO_CHENYAOFO, "chenyaofo_resnet")):
        foreign = _foreign(build_network(spec), renaming)
        torch.save({k: v for k, v in foreign.items() if "num_batches" not in k}, path)
        if key_map == "akamaster_resnet":
            counters = [v for k, v in load_foreign(path, spec, key_map).state_dict().items() if "num_batches" in k]
            assert counters
            assert not any(counters)
        else:
            with pytest.raises(UserError, match=r"missing.*num_batches_tracked"):
                load_foreign(path, spec, key_map)


def _file(tmp_path: Path, **changes: Tensor | None) -> Path:
    foreign: dict[str, Any] = {**_foreign(build_network(_spec("resnet8")), TO_CHENYAOFO), **changes}
    torch.save({key: value for key, value in foreign.items() if value is not None}, tmp_path / "c.pth")
    return tmp_path / "c.pth"


@pytest.mark.parametrize(
    ("spec", "key_map", "message"),
    [
        (_spec("resnet14"), "chenyaofo_resnet", r"'resnet14'.*missing: stages\.stage1\.1\.conv1\.weight.* more"),
        (_spec("resnet8", 100), "chenyaofo_resnet", r"with 100 classes.*it has 10 classes.*fc\.weight \[10, 64\]"),
        (_spec("resnet8", width=2), "chenyaofo_resnet", r"width.*conv1\.weight \[16, 3, 3, 3\] instead of \[32"),
        (_spec("resnet8", shortcut="A"), "chenyaofo_resnet", r"names without a counterpart: layer2\.0\.downsample"),
        (_spec("resnet8"), "akamaster_resnet", r"names without a counterpart: .*downsample"),
        (_spec("wrn_16_1"), "densenet_bc", r"'wrn_16_1'.*names without a counterpart"),
        (_spec("resnet8"), "chenyaofo", "unknown key map.*did you mean 'chenyaofo_resnet'"),
    ],
)
def test_misfits_are_refused_in_one_line(tmp_path: Path, spec: NetworkSpec, key_map: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_foreign(_file(tmp_path), spec, key_map)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_single_odd_keys_are_refused(tmp_path: Path) -> None:
    spec = _spec("resnet8")
    with pytest.raises(UserError, match=r"names without a counterpart: extra\.weight"):
        load_foreign(_file(tmp_path, **{"extra.weight": torch.zeros(1)}), spec, "chenyaofo_resnet")
    with pytest.raises(UserError, match=r"missing: head\.bias"):
        load_foreign(_file(tmp_path, **{"fc.bias": None}), spec, "chenyaofo_resnet")
    both = {"layer2.0.shortcut.0.weight": torch.zeros(32, 16, 1, 1)}
    foreign = {**_foreign(build_network(spec), TO_AKAMASTER), **both}
    torch.save({**foreign, "layer2.0.downsample.0.weight": torch.zeros(1)}, tmp_path / "c.pth")
    with pytest.raises(UserError, match=r"names without a counterpart: layer2\.0\.downsample"):
        load_foreign(tmp_path / "c.pth", spec, "akamaster_resnet")


def test_two_names_for_one_place_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from ekd_lightning.networks import convert

    rules = (*convert.KEY_MAPS["chenyaofo_resnet"].rules, (r"classifier\.(\w+)", r"head.\1"))
    monkeypatch.setitem(convert.KEY_MAPS, "test", convert.KeyMap(rules, ignored=(r"extra\..*",)))
    ignored = {"extra.weight": torch.zeros(1)}
    load_foreign(_file(tmp_path, **ignored), _spec("resnet8"), "test")
    path = _file(tmp_path, **{"classifier.bias": torch.zeros(10)})
    with pytest.raises(UserError, match=r"two names for one tensor: classifier\.bias"):
        load_foreign(path, _spec("resnet8"), "test")
