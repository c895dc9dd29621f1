"""What a group of runs says, as estimates: a mean, half of its 95 % interval, and n. Figures and page draw these."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ekd_lightning.reporting.groups import Group
from ekd_lightning.reporting.tables import Cell, half_width, summarise

LEVEL = 0.95


class Estimate(NamedTuple):
    """A mean over runs.

    Attributes:
        mean: Arithmetic mean.
        half: Half the width of Student's t interval, in the unit of the mean; None with fewer than two runs.
        n: Number of runs.
    """

    mean: float
    half: float | None
    n: int

    @property
    def low(self) -> float:
        """Lower end of the interval; the mean itself without one."""
        return self.mean - (self.half or 0.0)

    @property
    def high(self) -> float:
        """Upper end of the interval; the mean itself without one."""
        return self.mean + (self.half or 0.0)


def estimate(values: Iterable[float], level: float = LEVEL) -> Estimate | None:
    """Mean and interval of finite numbers, one per run; None without any."""
    numbers = [float(value) for value in values if math.isfinite(value)]
    return of_cell(summarise(numbers), level) if numbers else None


def of_cell(cell: Cell, level: float = LEVEL) -> Estimate:
    """The same for a summary that exists."""
    return Estimate(cell.mean, half_width(cell, level), cell.n)


def field(group: Group, key: str, *index: int | str, level: float = LEVEL) -> Estimate | None:
    """A figure of the results of a group; None if no run has it."""
    return estimate(group.by_seed(key, *index).values(), level)


def scalars(group: Group, level: float = LEVEL) -> dict[str, Estimate]:
    """Every field of the results that is a number, by its name."""
    keys = {
        key: None
        for run in group.done
        for key, value in (run.result or {}).items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
    found = {key: field(group, key, level=level) for key in keys}
    if (
        "test_mean_branch_accuracy" not in found
    ):  # runs that were not evaluated further have the branches alone
        found["test_mean_branch_accuracy"] = estimate(_mean_branch(group), level)
    return {key: one for key, one in found.items() if one is not None}


def _mean_branch(group: Group) -> list[float]:
    rows = [run.get("test_branch_accuracy") or [] for run in group.done]
    return [sum(row) / len(row) for row in rows if row and all(map(_is_number, row))]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def per_item(group: Group, key: str, level: float = LEVEL) -> list[Estimate]:
    """A field that is a list of numbers, entry by entry, up to the first that no run has."""
    found: list[Estimate] = []
    while (one := field(group, key, len(found), level=level)) is not None:
        found.append(one)
    return found


@dataclass(frozen=True)
class Point:
    """An operating point of a student: some of its branches, or an exit threshold.

    Attributes:
        name: Branches, e.g. `(0, 1)`, or the threshold of confidence.
        accuracy: In [0, 1].
        macs: Multiply-accumulates of an image, the mean over images with early exit.
        num_parameters: Of what is run; None with early exit, which keeps all.
        mean_branches: Branches that an image passes, in [1, K].
    """

    name: tuple[int, ...] | float
    accuracy: Estimate
    macs: float
    num_parameters: float | None
    mean_branches: float


def subsets(group: Group, level: float = LEVEL) -> list[Point]:
    """Operating points by the branches that are kept, those with fewer branches first."""
    points = []
    for branches, rows in _collate(group, "test_subsets", lambda row: tuple(row["branches"])).items():
        accuracy = estimate((row["accuracy"] for row in rows), level)
        if accuracy is not None:
            first = rows[0]
            points.append(
                Point(branches, accuracy, first["macs"], first.get("num_parameters"), float(len(branches)))
            )
    return sorted(points, key=lambda point: (point.mean_branches, point.name))


def prefixes(group: Group, level: float = LEVEL) -> list[Point]:
    """The operating points that keep the first 1, 2, ..., K branches."""
    return [point for point in subsets(group, level) if point.name == tuple(range(int(point.mean_branches)))]


def early_exits(group: Group, level: float = LEVEL) -> list[Point]:
    """Operating points by the confidence at which no further branch is asked, the cheapest first."""
    points = []
    for threshold, rows in _collate(group, "test_early_exit", lambda row: float(row["threshold"])).items():
        accuracy = estimate((row["accuracy"] for row in rows), level)
        if accuracy is not None:
            macs, used = (sum(row[key] for row in rows) / len(rows) for key in ("macs", "mean_branches"))
            points.append(Point(threshold, accuracy, macs, None, used))
    return sorted(points, key=lambda point: point.macs)


def _collate(group: Group, key: str, name: Any) -> dict[Any, list[Mapping[str, Any]]]:
    """Entries of a list of records over the runs of a group, by their name."""
    found: dict[Any, list[Mapping[str, Any]]] = {}
    for run in group.done:
        for row in run.get(key) or ():
            if all(_is_number(row.get(figure)) for figure in ("accuracy", "macs")):
                found.setdefault(name(row), []).append(row)
    return found


def severities(group: Group, key: str = "corruption_accuracy_by_severity") -> list[Estimate]:
    """A figure at corruption severities 1 to 5, each a mean over corruptions; empty where it was not measured."""
    return per_item(group, key)


def corrupted(group: Group) -> str:
    """How the corrupted images of a group were made, in words; what is compared shares it."""
    source, images = group.only("corruption_source"), group.only("corruption_images")
    left = group.only("corruption_left_out") or []
    told = [f"{source or 'unknown'} corruptions"]
    told += [f"{images:,} images"] if images else []
    told += [f"without {', '.join(left)}"] if left else []
    return ", ".join(told)


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (cost, gain) that no other point beats in one and equals or beats in the other, by cost."""
    front: list[tuple[float, float]] = []
    for cost, gain in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or gain > front[-1][1]:
            front.append((cost, gain))
    return front


def own_teachers(group: Group) -> list[int | None]:
    """Which teacher each branch imitates, from 0; None for a branch without exactly one.

    Rules as in `ekd_lightning.methods.assignment`.
    """
    K, M, spec = group.num_branches or 0, group.num_teachers or 0, group.only("assignment")
    if not M or spec is None:
        return [None] * K
    if M == 1:
        return [0] * K
    if spec in ("one_to_one", "permuted"):
        shift = int(spec == "permuted")
        return [(k + shift) % M for k in range(K)]
    if isinstance(spec, list) and len(spec) == K:
        return [row.index(max(row)) if max(row) == sum(row) else None for row in spec]
    return [None] * K
