"""Registry of networks by name, and the search for a plain network of a given cost."""

from __future__ import annotations

import inspect
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from ekd_lightning.errors import Registry, UserError, load_plugins, unknown_name
from ekd_lightning.files import file_sha256
from ekd_lightning.networks.cutting import cut
from ekd_lightning.networks.projection import project
from ekd_lightning.networks.spec import NetworkSpec
from ekd_lightning.networks.staged import StagedNetwork
from ekd_lightning.roles import check_keywords, parameters_of

Builder = Callable[..., nn.Module]
BuilderT = TypeVar("BuilderT", bound=Builder)
NETWORKS: Registry[Builder] = Registry("network")
"""All single networks by name; families and libraries are not included."""
FAMILIES: Registry[Callable[[str], Builder | None]] = Registry("family of networks")
"""By form of the names (`wrn_<6n+4>_<k>`) a function of a name, which returns its builder, or None for other names."""
LIBRARIES: dict[str, Callable[[NetworkSpec], StagedNetwork]] = {}
"""Builders of networks `PREFIX:NAME`, by prefix."""


def register_network(name: str) -> Callable[[BuilderT], BuilderT]:
    """Registers a builder `fn(spec, **options)` under a name.

    The builder returns a `StagedNetwork`, or any module that maps normalised images [B, 3, H, W] to logits [B, C] and
    is then cut into stages as networks of libraries are. Its keyword arguments after `spec` are the network's options;
    `require` checks their values.

    Raises:
        ValueError: when another builder already has the name (when the decorator is applied).
    """
    return NETWORKS.register(name)


def is_of_library(name: str) -> bool:
    """Returns whether a name is that of a library's network, such as `timm:resnet18`."""
    return name.partition(":")[0] in LIBRARIES and ":" in name


def library_version(name: str) -> str:
    """Returns the version of a network's library, or the hash of the file of a user's module; "" for own networks."""
    prefix, _, own = name.partition(":")
    if not is_of_library(name):
        return ""
    if prefix == "module":
        file = getattr(sys.modules.get(own.rpartition(".")[0]), "__file__", None)
        return file_sha256(Path(file)) if file else ""
    return version(prefix).partition("+")[0]  # without a build tag such as +cpu, which does not affect outputs


def require_network(name: str) -> None:
    """Refuses an unknown name; names of libraries are checked only when the network is built."""
    if not is_of_library(name):
        _builder(name)


def _builder(name: str) -> Builder:
    found = _known(name)
    if found is None:
        load_plugins()
        found = _known(name)
    if found is None:
        names = [*NETWORKS, *FAMILIES, *(f"{prefix}:NAME" for prefix in LIBRARIES)]
        advice = "a network of your own is known once its module is imported (imports=[MODULE])"
        raise UserError(f"{unknown_name('network', name, names)}; {advice}")
    return found


def _known(name: str) -> Builder | None:
    return NETWORKS.get(name) or next(filter(None, (make(name) for make in FAMILIES.values())), None)


def build_network(spec: NetworkSpec) -> StagedNetwork:
    """Builds a network, in train mode, with new weights from PyTorch's global random generator.

    Raises:
        UserError: for an unknown name, an unknown option, or an option's value that is not allowed.
    """
    if not isinstance(spec, NetworkSpec):
        raise UserError(
            f"spec must be a NetworkSpec, not a {type(spec).__name__}: register_network gives a network of your own a "
            "name, and NetworkSpec(name, num_classes=..., normalization=...) describes it"
        )
    network = _build(spec)
    return network if spec.projection is None else project(network, spec.projection)


def _build(spec: NetworkSpec) -> StagedNetwork:
    if is_of_library(spec.name):
        return LIBRARIES[spec.name.partition(":")[0]](spec)
    builder = _builder(spec.name)
    check_keywords(f"network {spec.name!r}", spec.options, dict([*parameters_of(builder).items()][1:]))
    made: Any = builder(spec, **spec.options)
    return made if isinstance(made, StagedNetwork) else _cut(made, spec)


def _cut(made: object, spec: NetworkSpec) -> StagedNetwork:
    """Cuts a builder's plain module into stages, if possible; it keeps its weights."""
    if not isinstance(made, nn.Module):
        raise UserError(f"network {spec.name!r}: its builder returned a {type(made).__name__}, not a torch.nn.Module")
    parts = cut(made, spec.image_size)
    if isinstance(parts.head, nn.Linear) and parts.head.out_features != spec.num_classes:
        raise UserError(
            f"network {spec.name!r} predicts {parts.head.out_features} classes instead of {spec.num_classes}; its "
            "builder must use spec.num_classes"
        )
    return StagedNetwork(spec, parts.stages, parts.num_features, neck=parts.neck, head=parts.head)


STAGE_WIDTHS = "stage_widths"
"""The option by which networks scale the channels of each stage separately."""


def thinned(spec: NetworkSpec, split_after: str, factor: float) -> NetworkSpec:
    """Returns the spec of a network with narrower (or wider) late stages, for the branches of a student.

    The channels of the stages after `split_after`, or of all stages if it names none, are multiplied by a factor above
    0.

    Raises:
        UserError: For a network without the option `stage_widths`, or without a stage after `split_after`.
    """
    where = f"student.branch_width={factor:g}"
    if is_of_library(spec.name) or STAGE_WIDTHS not in inspect.signature(_builder(spec.name)).parameters:
        raise UserError(f"{where}: network {spec.name!r} has no option {STAGE_WIDTHS} (CIFAR ResNets have it)")
    with torch.device("meta"):
        names = build_network(spec).stage_names
    kept = names.index(split_after) + 1 if split_after in names else 0
    if kept == len(names):
        raise UserError(
            f"{where}: split_after={split_after} leaves the branches no stage to change; split after an earlier stage"
        )
    own = list(spec.options.get(STAGE_WIDTHS, [1.0] * len(names)))
    widths = [*own[:kept], *(width * factor for width in own[kept:])]
    return replace(spec, options={**spec.options, STAGE_WIDTHS: widths})


def require(possible: bool, spec: NetworkSpec, option: str, allowed: str) -> None:
    """Refuses an option's value unless it is possible; `allowed` says in words which values a network takes."""
    if not possible:
        raise UserError(f"network {spec.name!r}: option {option}={spec.options.get(option)!r} (allowed: {allowed})")


BASE_CHANNELS = 16
"""Widths are searched in steps of 1/16: one channel of a CIFAR ResNet's stem, so that no width is rounded."""
CLOSE = 0.02
"""Relative deviation from the target up to which costs count as equal; see `match_network`."""
_MOST_SCALED = 2.5  # the largest factor, or divisor, of the student's own width

Cost = Callable[[nn.Module], int]


@dataclass(frozen=True)
class Match:
    """A plain network that comes near a target cost.

    Its options are those that differ from the network's defaults; its cost is in the unit of the target.
    """

    network: str
    options: Mapping[str, Any] = field(default_factory=dict)
    cost: int = 0
    target: int = 0

    @property
    def off(self) -> float:
        """Deviation from the target as a signed share of the target."""
        return self.cost / self.target - 1

    def __str__(self) -> str:
        options = "".join(f", {name} {value:g}" for name, value in self.options.items() if name == "width")
        return f"{self.network}{options}: {self.cost:,} for {self.target:,} ({100 * self.off:+.1f} %)"


def family(name: str) -> tuple[str, ...]:
    """Returns the networks whose names differ from `name` only in the final number (e.g. the depth), in its order.

    For `resnet8` these are resnet8, resnet14, ..., resnet110, for `wrn_16_2` the factors 1 to 10; a network without a
    final number is returned alone.

    Raises:
        UserError: For an unknown name.
    """
    if is_of_library(name):
        return (name,)
    require_network(name)
    own = re.fullmatch(r"(.*?)(\d+)", name)
    if own is None:
        return (name,)
    known = NETWORKS.names() if name in NETWORKS else {name, *(f"{own[1]}{number}" for number in range(1, 11))}
    found = [(re.fullmatch(re.escape(own[1]) + r"(\d+)", other), other) for other in known]
    return tuple(other for number, other in sorted((int(m[1]), other) for m, other in found if m))


def match_network(spec: NetworkSpec, target: int, cost: Cost) -> Match:
    """Searches a student's family for the plain network whose cost is nearest to a target.

    The candidates are all depths of the family and, for networks with the option `width`, widths in steps of 1/16 from
    1/2.5 to 2.5 times the student's own. Among the candidates within `CLOSE` of the target, the one whose width is
    nearest to the student's is chosen (a very thin, very deep network would be a poor control), and the nearest cost
    decides between equal widths; without such candidates, the nearest cost is chosen.

    Args:
        spec: The network that the student's trunk and branches are cut from, with its options.
        target: The target cost, above 0.
        cost: Maps a plain network (on the meta device) to its cost, which must grow with width and depth; e.g.
            `count_macs` or `count_parameters` of `ekd_lightning.evaluation.efficiency`.

    Raises:
        UserError: For an unknown network.
        ValueError: For a target that is not above 0.
    """
    if target <= 0:
        raise ValueError(f"target={target} is not allowed; give a number > 0")
    own = float(spec.options.get("width", 1))

    def measured(name: str, width: float | None) -> Match:
        options = {key: value for key, value in spec.options.items() if key not in ("width", STAGE_WIDTHS)}
        if width is not None and width != 1:
            options["width"] = width
        with torch.device("meta"):
            network = build_network(replace(spec, name=name, options=options))
        return Match(name, options, cost(network), target)

    found = [match for name in family(spec.name) for match in _candidates(name, own, target, measured)]
    close = [match for match in found if abs(match.off) <= CLOSE]

    def difference(match: Match) -> tuple[float, float]:
        return abs(math.log(float(match.options.get("width", 1)) / own)), abs(match.off)

    return min(close, key=difference) if close else min(found, key=lambda match: abs(match.off))


def _candidates(name: str, own: float, target: int, measured: Callable[[str, float | None], Match]) -> Iterator[Match]:
    """Yields the candidates of one depth: the student's width and, if possible, the two widths around the target."""
    if is_of_library(name) or "width" not in inspect.signature(_builder(name)).parameters:
        yield measured(name, None)
        return
    middle = measured(name, own)
    yield middle
    # Costs grow with about the square of the width, which gives a first guess; then step by step past the target.
    scale = math.sqrt(target / middle.cost)
    if not 1 / _MOST_SCALED <= scale <= _MOST_SCALED:
        return
    sixteenths = max(1, round(own * scale * BASE_CHANNELS))
    match = measured(name, sixteenths / BASE_CHANNELS)
    yield match
    step = -1 if match.off > 0 else 1
    while match.off * step < 0 and sixteenths + step >= 1:
        sixteenths += step
        match = measured(name, sixteenths / BASE_CHANNELS)
        yield match
