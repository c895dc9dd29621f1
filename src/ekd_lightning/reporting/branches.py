"""Branches of a group's student: whom each imitates, and what some of them reach at what cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ekd_lightning.reporting.estimates import Estimate, estimate
from ekd_lightning.reporting.groups import Group, is_number


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


def subsets(group: Group) -> list[Point]:
    """Operating points by the branches that are kept, those with fewer branches first."""
    points = []
    for branches, rows in _collate(group, "test_subsets", lambda row: tuple(row["branches"])).items():
        accuracy = estimate(row["accuracy"] for row in rows)
        if accuracy is not None:
            cost = rows[0]["macs"], rows[0].get("num_parameters")
            points.append(Point(branches, accuracy, *cost, float(len(branches))))
    return sorted(points, key=lambda point: (point.mean_branches, point.name))


def prefixes(group: Group) -> list[Point]:
    """The operating points that keep the first 1, 2, ..., K branches."""
    return [point for point in subsets(group) if point.name == tuple(range(int(point.mean_branches)))]


def early_exits(group: Group) -> list[Point]:
    """Operating points by the confidence at which no further branch is asked, the cheapest first."""
    points = []
    for threshold, rows in _collate(group, "test_early_exit", lambda row: float(row["threshold"])).items():
        accuracy = estimate(row["accuracy"] for row in rows)
        if accuracy is not None:
            macs, used = (sum(row[key] for row in rows) / len(rows) for key in ("macs", "mean_branches"))
            points.append(Point(threshold, accuracy, macs, None, used))
    return sorted(points, key=lambda point: point.macs)


def _collate(group: Group, key: str, name: Any) -> dict[Any, list[Mapping[str, Any]]]:
    """Entries of a list of records over the runs of a group, by their name."""
    found: dict[Any, list[Mapping[str, Any]]] = {}
    for run in group.done:
        for row in run.get(key) or ():
            if all(is_number(row.get(figure)) for figure in ("accuracy", "macs")):
                found.setdefault(name(row), []).append(row)
    return found


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
