"""Names, specs and normalisations: what is accepted, and what a mistake is told."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest
import torch

from ekd_lightning.errors import UserError
from ekd_lightning.networks import (
    NORMALIZATIONS,
    NetworkSpec,
    Normalization,
    StagedNetwork,
    build_network,
    network_names,
    normalization,
    register_network,
)
from ekd_lightning.networks import registry as registry_module


def _spec(name: str = "resnet8", num_classes: int = 10, **options: Any) -> NetworkSpec:
    return NetworkSpec(name, num_classes, normalization("cifar10"), options)


def test_spec_survives_json() -> None:
    spec = _spec("wrn_16_1", 7, dropout=0.1)
    again = NetworkSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert again == spec
    assert hash(again) == hash(spec)
    assert pickle.loads(pickle.dumps(spec)) == spec


def test_spec_accepts_a_named_normalization() -> None:
    spec = NetworkSpec.from_dict(
        {"name": "resnet8", "num_classes": 3, "normalization": "unit", "options": {}}
    )
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
        ("resnet8", {"shortcutt": "A"}, "'shortcutt'; did you mean 'shortcut'.*allowed: shortcut, width"),
        ("resnet8", {"shortcut": "C"}, "shortcut='C'.*'A', 'B'"),
        ("resnet8", {"width": 0}, "width=0"),
        ("resnet8", {"width": "2"}, "width='2'"),
        ("resnet8", {"width": True}, "width=True"),
        ("resnet8", {"width": float("nan")}, "width=nan"),
        ("resnet8", {"width": 0.01}, "width=0.01"),
        ("wrn_16_1", {"dropout": 1.0}, "dropout=1.0"),
        ("wrn_16_1", {"dropout": -0.1}, "dropout=-0.1"),
        ("vgg8", {"dropout": 0.1}, "'dropout'.*allowed: none"),
    ],
)
def test_impossible_networks_are_refused_in_one_line(
    name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build_network(_spec(name, **options))
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


def test_a_name_is_registered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry_module, "_BUILDERS", dict(registry_module._BUILDERS))

    @register_network("mine")
    def build_mine(spec: NetworkSpec, *, size: int = 4) -> StagedNetwork:
        stages = {"stem": torch.nn.Conv2d(3, size, 1)}
        return StagedNetwork(spec, stages, num_features=size)

    assert "mine" in network_names()
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
            Normalization((0.0, 0.0, 0.0), bad)  # type: ignore[arg-type]
