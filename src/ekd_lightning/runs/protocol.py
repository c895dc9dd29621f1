"""Protocol of runs: the settings that comparable runs share, and groups of comparable runs."""

from __future__ import annotations

import typing
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any


class Recorded(typing.Protocol):
    """Anything with fields of a result by name: a run, a result, or a record."""

    def get(self, key: str, /) -> Any:
        """The value of a field; None if unknown."""


@dataclass(frozen=True)
class Protocol:
    """The settings that comparable runs share; None where a run has not recorded one.

    Teachers are not among them, since a sweep may vary their number; see `comparison_groups`.
    """

    data: str
    fraction: float | None
    subset_sha256: str | None = None
    subset_seed: int | None = None
    num_train_images: int | None = None
    num_val_images: int | None = None
    num_unlabelled_images: int | None = None
    unlabelled_sha256: str | None = None
    unlabelled_share: float | None = None
    unlabelled_from: str | None = None
    epoch_over: str | None = None
    views: str | None = None
    mixup: float | None = None
    cutmix: float | None = None
    epochs: int | None = None
    epochs_done: int | None = None
    batch_size: int | None = None
    steps: int | None = None
    precision: str | None = None
    num_devices: int | None = None

    @classmethod
    def of(cls, run: Recorded) -> Protocol:
        """Reads the protocol of a run or a result; of a run without one, from its configuration."""
        values = {field.name: run.get(field.name) for field in fields(cls)}
        if values["num_train_images"] is not None:  # what was not recorded was not used
            none: dict[str, Any] = {"num_unlabelled_images": 0, "unlabelled_sha256": "none", "unlabelled_share": 0.0}
            if not values["num_unlabelled_images"]:
                none |= {"unlabelled_from": "none", "epoch_over": "labelled"}
            values |= {name: values[name] or value for name, value in none.items()}
        values["data"] = str(values["data"]) if values["data"] is not None else "unknown data"
        return cls(**values)

    @property
    def num_images(self) -> int | None:
        """Images of the subset, including its validation split; None if not recorded."""
        return None if self.num_train_images is None else self.num_train_images + (self.num_val_images or 0)

    @property
    def family(self) -> tuple[Any, ...]:
        """The fields that do not depend on the fraction; all points of a curve over fractions share them."""
        follows = {"fraction", "subset_sha256", "num_train_images", "num_val_images", "steps"}
        follows.add("num_unlabelled_images")
        if self.unlabelled_from != "own":  # images of their own are the same at every fraction
            follows.add("unlabelled_sha256")
        return tuple(getattr(self, f.name) for f in fields(self) if f.name not in follows)

    def differences(self, other: Protocol) -> list[str]:
        """Returns the names of the fields that both have recorded, with different values."""
        pairs = {f.name: (getattr(self, f.name), getattr(other, f.name)) for f in fields(self)}
        return [name for name, pair in pairs.items() if None not in pair and pair[0] != pair[1]]

    def fits(self, other: Protocol) -> bool:
        """Whether the two agree in all fields that both have recorded."""
        return not self.differences(other)


@dataclass(frozen=True)
class ComparisonGroup:
    """Trainings that may be compared with each other.

    Attributes:
        protocol: Their common protocol.
        pool: SHA-256 of teachers; each member was taught by some of these, or by none.
        members: Positions of the members, ascending.
    """

    protocol: Protocol
    pool: frozenset[str]
    members: tuple[int, ...]


@dataclass(frozen=True)
class Training:
    """Facts of a training that decide with which others it may be compared: protocol, and hashes of teachers.

    They may be incomplete unless it is `complete`, which means that it has a result.
    """

    protocol: Protocol
    taught_by: frozenset[str]
    complete: bool


def comparison_groups(trainings: Sequence[Training]) -> list[ComparisonGroup]:
    """Groups trainings that may be compared.

    Members of a group share the protocol, and their teachers come from one pool: the sets of teachers that no other
    set contains are the pools. A sweep over the number of teachers is one group; two sweeps with different teachers
    are two, and trainings without teachers belong to both. A training without a result joins every group whose
    protocol it fits, or forms one of its own.

    Returns:
        Groups in the order of their first members; every position is in at least one.
    """
    complete: dict[Protocol, list[int]] = defaultdict(list)
    for position, one in enumerate(trainings):
        if one.complete:
            complete[one.protocol].append(position)
    found: list[tuple[Protocol, frozenset[str], list[int]]] = []
    for protocol, positions in complete.items():
        for pool in maximal(trainings[p].taught_by for p in positions):
            found.append((protocol, pool, [p for p in positions if trainings[p].taught_by <= pool]))
    alone: dict[Protocol, list[int]] = defaultdict(list)
    for position, one in enumerate(trainings):
        if not one.complete:
            fitting = [members for protocol, _, members in found if one.protocol.fits(protocol)]
            for members in fitting or [alone[one.protocol]]:
                members.append(position)
    found += [(protocol, frozenset(), members) for protocol, members in alone.items()]
    groups = [ComparisonGroup(protocol, pool, tuple(sorted(members))) for protocol, pool, members in found]
    return sorted(groups, key=lambda group: (group.members[0], sorted(group.pool)))


def maximal(sets: Iterable[frozenset[str]]) -> list[frozenset[str]]:
    """Returns the sets that are no proper subset of another one, sorted."""
    distinct = set(sets)
    return sorted((one for one in distinct if not any(one < other for other in distinct)), key=sorted)
