"""Groups of runs that may be compared, put together as blocks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from ekd_lightning.reporting.groups import Group
from ekd_lightning.runs.protocol import Place, Protocol, Way, places


@dataclass(frozen=True)
class Block:
    """Groups that may be compared with each other.

    Attributes:
        key: Short name for files and anchors, unique, e.g. `cifar10-f0.1`, `cifar10-f0.1-2`.
        title: E.g. `cifar10, 10 % of the training images`, and what sets it apart from others of the same.
        data: Name of the data set.
        fraction: Share of the training images; None if unknown (no run is done).
        protocol: Of its groups. Groups without results, which hardly know theirs, are where it fits.
        teachers: Records of the pool's teachers (`id`, `sha256`, `test_accuracy`, ...), in the order of the largest
            group. Every group was taught by some of them, or none.
        groups: In the order of `group`: method, K, M, label.
    """

    key: str
    title: str
    data: str
    fraction: float | None
    protocol: Protocol
    teachers: tuple[Mapping[str, Any], ...]
    groups: tuple[Group, ...]

    def find(self, label: str) -> Group | None:
        """The group with a label; None without one."""
        return next((group for group in self.groups if group.label == label), None)


def blocks(groups: Sequence[Group]) -> list[Block]:
    """Puts groups into blocks by data set, fraction, protocol and pool of teachers.

    A group without teachers is in the block of every pool.

    Args:
        groups: As `group` makes them.

    Returns:
        Blocks by data set and fraction, those with more groups first.
    """
    ways = [Way(one.protocol, frozenset(one.taught_by), _has_result(one)) for one in groups]
    found = places(ways)
    found.sort(key=lambda p: (p.protocol.data, p.protocol.fraction or 0.0, -len(p.members), p.members[0]))
    alike: dict[tuple[str, float | None], list[Place]] = defaultdict(list)
    for place in found:
        alike[place.protocol.data, place.protocol.fraction].append(place)
    return [
        _block(place, [groups[p] for p in place.members], number, _apart(same))
        for same in alike.values()
        for number, place in enumerate(same)
    ]


def _has_result(group: Group) -> bool:
    return any(run.result is not None for run in group.runs)


def _block(place: Place, groups: Sequence[Group], number: int, apart: Sequence[str]) -> Block:
    protocol = place.protocol
    share = "" if protocol.fraction is None else f"-f{protocol.fraction:g}"
    return Block(
        key=f"{protocol.data}{share}" + (f"-{number + 1}" if number else ""),
        title=", ".join([_what(protocol), *(_words(name, place) for name in apart)]),
        data=protocol.data,
        fraction=protocol.fraction,
        protocol=protocol,
        teachers=_teachers(groups),
        groups=tuple(groups),
    )


def _what(protocol: Protocol) -> str:
    if protocol.fraction is None:
        return protocol.data
    return f"{protocol.data}, {100 * protocol.fraction:.4g} % of the training images"


def _apart(same: Sequence[Place]) -> list[str]:
    """What sets places of the same data and fraction apart: fields of the protocol, and their teachers."""
    told = [f.name for f in fields(Protocol) if len({getattr(other.protocol, f.name) for other in same}) > 1]
    return told + (["teachers"] if len({other.pool for other in same}) > 1 else [])


def _words(name: str, place: Place) -> str:
    if name == "teachers":
        return "teachers " + (" ".join(sha[:6] for sha in sorted(place.pool)) or "none")
    words = name.removesuffix("_sha256").replace("_", " ")
    return f"{words} {_short(getattr(place.protocol, name))}"


def _short(value: Any) -> str:
    if value is None:
        return "unknown"
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text[:8] if len(text) == 64 else text


def _teachers(groups: Sequence[Group]) -> tuple[Mapping[str, Any], ...]:
    """Records of all teachers of the groups, each once; those of the group with most of them come first."""
    found: dict[str, Mapping[str, Any]] = {}
    for one in sorted(groups, key=lambda one: -len(one.taught_by)):
        for run in one.done:
            for teacher in run.get("teachers") or []:
                if teacher.get("sha256") in one.taught_by:  # an assistant is none of the pool
                    found.setdefault(teacher["sha256"], teacher)
    return tuple(found.values())
