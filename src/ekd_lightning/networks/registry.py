"""Registry of networks: builders by name, and plain networks that match a student's cost."""

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
from ekd_lightning.networks.staged import NetworkSpec, StagedNetwork

Builder = Callable[..., nn.Module]
BuilderT = TypeVar("BuilderT", bound=Builder)

FamilyT = TypeVar("FamilyT", bound=Callable[[str], Builder | None])
LibraryT = TypeVar("LibraryT", bound=Callable[[NetworkSpec], StagedNetwork])

_BUILDERS: Registry[Builder] = Registry("network")
_FAMILIES: Registry[Callable[[str], Builder | None]] = Registry("family of networks")
_LIBRARIES: dict[str, Callable[[NetworkSpec], StagedNetwork]] = {}


def register_network(name: str) -> Callable[[BuilderT], BuilderT]:
    """Registers a builder `fn(spec, **options)` under a name.

    It returns a `StagedNetwork`, or any module from normalised images [B, 3, H, W] to logits [B, C], which is cut into
    stages as networks of libraries are. The builder's keyword arguments after `spec` are the network's options. It
    checks their values with `require`.

    Raises:
        ValueError: when another builder has the name; both are named.
    """
    return _BUILDERS.register(name)


def register_family(form: str) -> Callable[[FamilyT], FamilyT]:
    """Registers `fn(name) -> builder`, for networks whose names hold numbers; None for a name of another form.

    Args:
        form: How messages write such names, e.g. `wrn_<6n+4>_<k>`.
    """
    return _FAMILIES.register(form)


def register_library(*prefixes: str) -> Callable[[LibraryT], LibraryT]:
    """Registers a builder `fn(spec) -> StagedNetwork` for all networks called `prefix:name`."""

    def register(builder: LibraryT) -> LibraryT:
        _LIBRARIES.update(dict.fromkeys(prefixes, builder))
        return builder

    return register


def is_of_library(name: str) -> bool:
    """Whether a network's name is one of a library's, such as `timm:resnet18`."""
    return name.partition(":")[0] in _LIBRARIES and ":" in name


def library_version(name: str) -> str:
    """Version of the library that makes a network; of a user's module the hash of its file; else empty."""
    prefix, _, own = name.partition(":")
    if not is_of_library(name):
        return ""
    if prefix == "module":
        file = getattr(sys.modules.get(own.rpartition(".")[0]), "__file__", None)
        return file_sha256(Path(file)) if file else ""
    return version(prefix).partition("+")[0]  # without what a build adds, such as +cpu: it answers the same


def network_names() -> tuple[str, ...]:
    """Returns all names that are registered one by one, sorted."""
    return tuple(_BUILDERS.names())


def require_network(name: str) -> None:
    """Refuses a name that no network has; one of a library is looked up when it is built.

    Args:
        name: A network's.

    Raises:
        UserError: With the nearest match.
    """
    if not is_of_library(name):
        _builder(name)


def _builder(name: str) -> Builder:
    found = _known(name)
    if found is None:
        load_plugins()
        found = _known(name)
    if found is None:
        raise unknown_name("network", name, [*_BUILDERS, *_FAMILIES, *(f"{prefix}:NAME" for prefix in _LIBRARIES)])
    return found


def _known(name: str) -> Builder | None:
    return _BUILDERS.get(name) or next(filter(None, (make(name) for make in _FAMILIES.values())), None)


def build_network(spec: NetworkSpec) -> StagedNetwork:
    """Builds a network with fresh weights drawn from PyTorch's global random generator.

    Args:
        spec: which network, for how many classes, with which options.

    Returns:
        The network, in train mode, on the default device.

    Raises:
        UserError: on an unknown name, an unknown option, or a value that the network cannot have.
    """
    network = _build(spec)
    return network if spec.projection is None else project(network, spec.projection)


def _build(spec: NetworkSpec) -> StagedNetwork:
    if is_of_library(spec.name):
        return _LIBRARIES[spec.name.partition(":")[0]](spec)
    builder = _builder(spec.name)
    allowed = list(inspect.signature(builder).parameters)[1:]
    for option in spec.options:
        if option not in allowed:
            raise unknown_name(f"option of network {spec.name!r}:", option, allowed)
    made: Any = builder(spec, **spec.options)
    return made if isinstance(made, StagedNetwork) else _cut(made, spec)


def _cut(made: object, spec: NetworkSpec) -> StagedNetwork:
    """A plain module of a builder, cut into stages where it can be; it keeps its weights."""
    if not isinstance(made, nn.Module):
        raise UserError(f"network {spec.name!r} is made a {type(made).__name__}, not a torch.nn.Module")
    parts = cut(made, spec.image_size)
    if isinstance(parts.head, nn.Linear) and parts.head.out_features != spec.num_classes:
        raise UserError(
            f"network {spec.name!r} predicts {parts.head.out_features} classes, not {spec.num_classes}: its builder "
            "finds the number as spec.num_classes"
        )
    return StagedNetwork(spec, parts.stages, parts.num_features, neck=parts.neck, head=parts.head)


STAGE_WIDTHS = "stage_widths"
"""The option of networks that scale the channels of each stage by a number of its own."""


def thinned(spec: NetworkSpec, split_after: str, factor: float) -> NetworkSpec:
    """Returns the spec of a network whose stages behind one are narrower, or wider; for the branches of a student.

    Args:
        spec: Of the network as it is.
        split_after: The last stage that keeps its width; another name than a stage's keeps none.
        factor: What multiplies the channels of the others, above 0.

    Raises:
        UserError: For a network without the option `stage_widths`, or without a stage behind that one.
    """
    where = f"student.branch_width={factor:g}"
    if is_of_library(spec.name) or STAGE_WIDTHS not in inspect.signature(_builder(spec.name)).parameters:
        raise UserError(f"{where}: network {spec.name!r} has no option {STAGE_WIDTHS} (CIFAR ResNets have it)")
    with torch.device("meta"):
        names = build_network(spec).stage_names
    kept = names.index(split_after) + 1 if split_after in names else 0
    if kept == len(names):
        raise UserError(
            f"{where}: split_after={split_after} leaves the branches no stage that could have another width"
        )
    own = list(spec.options.get(STAGE_WIDTHS, [1.0] * len(names)))
    widths = [*own[:kept], *(width * factor for width in own[kept:])]
    return replace(spec, options={**spec.options, STAGE_WIDTHS: widths})


def require(possible: bool, spec: NetworkSpec, option: str, allowed: str) -> None:
    """Refuses an option's value that a network cannot have.

    Args:
        possible: whether the value is fine.
        spec: the spec that holds the value.
        option: the option's name.
        allowed: what would be fine, in words.

    Raises:
        UserError: when not possible.
    """
    if not possible:
        raise UserError(f"network {spec.name!r}: option {option}={spec.options.get(option)!r} (allowed: {allowed})")


BASE_CHANNELS = 16
"""Widths are searched in steps of 1/16: one channel of the stem of a CIFAR ResNet, so no channel is rounded."""
CLOSE = 0.02
"""Networks this near to the target (as a share of it) count as equally near; see `match_network`."""
_MOST_SCALED = 2.5  # times, or parts of, the student's own width

Cost = Callable[[nn.Module], int]


@dataclass(frozen=True)
class Match:
    """A plain network found for a target.

    Attributes:
        network: Its registered name.
        options: Its options where they differ from the network's defaults.
        cost: What it costs, in the unit of the target.
        target: What it should cost.
    """

    network: str
    options: Mapping[str, Any] = field(default_factory=dict)
    cost: int = 0
    target: int = 0

    @property
    def off(self) -> float:
        """Deviation from the target, as a signed share of it."""
        return self.cost / self.target - 1

    def __str__(self) -> str:
        options = "".join(f", {name} {value:g}" for name, value in self.options.items() if name == "width")
        return f"{self.network}{options}: {self.cost:,} for {self.target:,} ({100 * self.off:+.1f} %)"


def family(name: str) -> tuple[str, ...]:
    """Returns the networks that differ from `name` in the number at its end, e.g. depth, in order.

    `resnet8` has resnet8, resnet14, ..., resnet110, `wrn_16_2` the factors 1 to 10; a network without such a number is
    alone.

    Raises:
        UserError: For an unknown name.
    """
    if is_of_library(name):
        return (name,)
    require_network(name)
    own = re.fullmatch(r"(.*?)(\d+)", name)
    if own is None:
        return (name,)
    known = network_names() if name in _BUILDERS else {name, *(f"{own[1]}{number}" for number in range(1, 11))}
    found = [(re.fullmatch(re.escape(own[1]) + r"(\d+)", other), other) for other in known]
    return tuple(other for number, other in sorted((int(m[1]), other) for m, other in found if m))


def match_network(spec: NetworkSpec, target: int, cost: Cost) -> Match:
    """Searches a student's family for the plain network whose cost comes nearest to a target.

    All depths of the family are tried and, where the networks have the option `width`, widths in steps of 1/16, up
    to 2.5 times, or down to 1/2.5 of, the student's own. Of the networks within `CLOSE` of the target the one whose
    width is nearest to the student's own is taken (a very thin, very deep network of the same cost would be an odd
    control), then the nearest; without any so close, the nearest of all.

    Args:
        spec: The network that the student's trunk and branches are cut from, with its options.
        target: What the match should cost, above 0.
        cost: Maps a plain network (on the meta device) to its cost, growing with width and depth; e.g.
            `count_macs` or `count_parameters` of `ekd_lightning.evaluation.efficiency`.

    Raises:
        UserError: For an unknown network.
        ValueError: For a target that is not above 0.
    """
    if target <= 0:
        raise ValueError(f"target={target}: must be above 0")
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

    def oddity(match: Match) -> tuple[float, float]:
        return abs(math.log(float(match.options.get("width", 1)) / own)), abs(match.off)

    return min(close, key=oddity) if close else min(found, key=lambda match: abs(match.off))


def _candidates(name: str, own: float, target: int, measured: Callable[[str, float | None], Match]) -> Iterator[Match]:
    """Yields the candidates of one depth: unscaled and, where possible, the two widths around the target."""
    if is_of_library(name) or "width" not in inspect.signature(_builder(name)).parameters:
        yield measured(name, None)
        return
    middle = measured(name, own)
    yield middle
    # Costs grow about with the square of the width: a first guess, then step by step until the target is passed.
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
