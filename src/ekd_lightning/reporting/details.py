"""Details of a group over its runs: branches, operating points, learning curves and arrays.

Curves come from metrics.csv and arrays from arrays.npz. Damaged files are left out; `damage` lists them.
"""

from __future__ import annotations

import contextlib
import csv
import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from ekd_lightning.errors import UserError, quiet
from ekd_lightning.evaluation.diversity import Spread, spread_over_runs
from ekd_lightning.files import DamagedFileError
from ekd_lightning.methods.assignment import last_kind, make_assignment
from ekd_lightning.reporting.estimates import SHARE, Estimate, estimate, limits_of
from ekd_lightning.reporting.groups import Group
from ekd_lightning.roles import is_finite
from ekd_lightning.runs.collection import RunEntry
from ekd_lightning.runs.directory import ARRAYS
from ekd_lightning.runs.directory import CURVES as CURVES_FILE

Array = np.ndarray

CURVES = ("val/accuracy", "val/nll", "train/loss")
MOST_EPOCHS = 60
"""Longer curves are thinned to about this number of points, including the last one."""
SUFFIXES = ("", "_calibrated")
"""Suffixes of reliability as trained and after temperature scaling."""
_RELIABILITY = ("confidence", "accuracy", "count")


@dataclass(frozen=True)
class Point:
    """An operating point of a student: some of its branches, or an exit threshold.

    Attributes:
        name: Branches, e.g. `(0, 1)`, or the threshold of confidence.
        accuracy: In [0, 1].
        macs: Multiply-accumulates of an image, the mean over images with early exit.
        num_parameters: Of the branches that are kept; None with early exit, which keeps all.
        mean_branches: Branches per image, in [1, K].
    """

    name: tuple[int, ...] | float
    accuracy: Estimate
    macs: float
    num_parameters: float | None
    mean_branches: float


def subsets(group: Group) -> list[Point]:
    """Operating points that keep some of the branches, those with fewer branches first."""
    return sorted(_points(group, "test_subsets"), key=lambda point: (point.mean_branches, point.name))


def prefixes(group: Group) -> list[Point]:
    """The operating points that keep the first 1, 2, ..., K branches."""
    return [point for point in subsets(group) if point.name == tuple(range(int(point.mean_branches)))]


def early_exits(group: Group) -> list[Point]:
    """Operating points that stop at a confidence, the cheapest first."""
    return sorted(_points(group, "test_early_exit"), key=lambda point: point.macs)


def _points(group: Group, key: str) -> list[Point]:
    """Means over the runs of a group of a field that lists operating points."""
    found: dict[tuple[int, ...] | float, list[Mapping[str, Any]]] = defaultdict(list)
    for run in group.done:
        for row in run.get(key) or ():
            if is_finite(row.get("accuracy")) and is_finite(row.get("macs")):
                found[tuple(row["branches"]) if "branches" in row else float(row["threshold"])].append(row)
    points = []
    for name, rows in found.items():
        if accuracy := estimate((row["accuracy"] for row in rows), SHARE):
            used = len(name) if isinstance(name, tuple) else fmean(row["mean_branches"] for row in rows)
            macs = fmean(row["macs"] for row in rows)
            points.append(Point(name, accuracy, macs, rows[0].get("num_parameters"), float(used)))
    return points


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (cost, gain) that no other point beats in one and equals or beats in the other, by cost."""
    front: list[tuple[float, float]] = []
    for cost, gain in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or gain > front[-1][1]:
            front.append((cost, gain))
    return front


def own_teachers(group: Group) -> list[int | None]:
    """Which teacher each branch imitates, from 0, at the end of the training; None for a branch without exactly one."""
    K, M, spec = group.num_branches or 0, group.num_teachers or 0, group.only("assignment")
    if M == 1 and spec is not None:
        return [0] * K
    try:
        with quiet():
            rows = make_assignment(last_kind(spec), K, M).tolist()
    except UserError:  # random, or not on record
        return [None] * K
    return [row.index(max(row)) if max(row) == sum(row) else None for row in rows]


def matrix(group: Group, key: str) -> Array | None:
    """Mean over runs of a matrix, float [rows, columns], NaN for null; None without one common shape."""
    try:
        found = [np.array(run.get(key), dtype=float) for run in group.done if run.get(key) is not None]
        mean = np.mean(np.stack(found), axis=0)
    except (TypeError, ValueError):  # no run, rows of different lengths, or matrices of different shapes
        return None
    return mean if mean.ndim == 2 and mean.size else None


def curves(group: Group, names: Sequence[str] = CURVES) -> dict[str, list[tuple[int, Estimate]]]:
    """Mean and interval of columns of metrics.csv over the runs that reached an epoch, by column and epoch, from 1."""
    read: list[Mapping[str, Mapping[int, float]]] = []
    for run in group.done:
        with contextlib.suppress(DamagedFileError):
            read.append(read_curves(run))
    found = {}
    for name in names:
        lines = [one[name] for one in read if name in one]
        epochs = thin(sorted({epoch for line in lines for epoch in line}))
        values = ((epoch, [line[epoch] for line in lines if epoch in line]) for epoch in epochs)
        if epochs:
            found[name] = [(epoch, one) for epoch, own in values if (one := estimate(own, limits_of(name)))]
    return found


def thin(epochs: list[int]) -> list[int]:
    """At most about `MOST_EPOCHS` epochs, evenly spread, with the last one."""
    step = -(-len(epochs) // MOST_EPOCHS) or 1
    return epochs[::-1][::step][::-1]


def read_curves(run: RunEntry) -> dict[str, dict[int, float]]:
    """Columns of metrics.csv: values by epoch, from 1; of an epoch that was written twice, the later one.

    Raises:
        DamagedFileError: If the file is no CSV file with a column `epoch`, or is cut off. A missing file has no curves.
    """
    found: dict[str, dict[int, float]] = defaultdict(dict)
    path = run.directory / CURVES_FILE
    content = run.on_disk.curves()
    if content is None:
        return found
    try:
        rows = csv.DictReader(io.StringIO(content.decode(), newline=""))
        if not rows.fieldnames and run.state != "done":  # the run ended within its first epoch
            return found
        if "epoch" not in (rows.fieldnames or ()):
            raise ValueError("no column epoch")
        for row in rows:
            if None in row or None in row.values() or not content.endswith(b"\n"):
                raise ValueError("cut off")
            for name, text in row.items():
                if text and row["epoch"]:
                    found[name][int(float(row["epoch"])) + 1] = float(text)
    except (ValueError, OverflowError, csv.Error) as error:
        raise DamagedFileError(f"{path}: damaged ({error}); its curves are left out") from None
    return found


def damage(run: RunEntry) -> list[str]:
    """One line for each damaged file of a run, apart from status.json and result.json."""
    found = []
    for read in (
        *(() if run.config else (run.on_disk.config,)),
        *(() if run.provenance else (run.on_disk.provenance,)),
        lambda: read_curves(run),
        run.on_disk.arrays,
    ):
        try:
            read()
        except DamagedFileError as error:
            found.append(f"{run.name}/{str(error).removeprefix(f'{run.directory}/')}")
    if "predictions" in (run.get("evaluated") or ()) and not (run.directory / ARRAYS).exists():
        found.append(f"{run.name}/{ARRAYS}: missing; its content is left out")
    return found


@dataclass(frozen=True)
class Bin:
    """A bin of confidences, over runs.

    Attributes:
        confidence: Mean over its images, in [0, 1].
        accuracy: Mean over runs.
        share: Of the images, in [0, 1].
    """

    confidence: float
    accuracy: Estimate
    share: float


def reliability(arrays: Sequence[dict[str, Array]], suffix: str = "") -> list[Bin]:
    """A reliability diagram over runs by confidence, without empty bins; none if runs differ in their number."""
    names = [f"reliability_{what}{suffix}" for what in _RELIABILITY]
    have = [[one[name] for name in names] for one in arrays if all(name in one for name in names)]
    if not have or any(part.shape != have[0][0].shape for one in have for part in one):
        return []
    confidence, accuracy, count = (np.array(part, dtype=float) for part in zip(*have, strict=True))
    bins = []
    for b in range(count.shape[1]):
        full = count[:, b] > 0
        if level := estimate(accuracy[full, b], SHARE):
            pooled = float(np.average(confidence[full, b], weights=count[full, b]))
            bins.append(Bin(pooled, level, float(count[:, b].sum() / count.sum())))
    return bins


def seed_spread(group: Group) -> Spread | None:
    """How much the runs of a group differ on the same test images; None unless two have predictions."""
    names = ("ensemble_probs", "labels")
    have = [one for one in read_arrays(group, names) if len(one) == len(names)]
    if len(have) < 2 or any(not np.array_equal(one["labels"], have[0]["labels"]) for one in have):
        return None
    probs = [one["ensemble_probs"] for one in have]
    if any(part.shape != probs[0].shape for part in probs):
        return None
    return spread_over_runs(np.stack(probs), have[0]["labels"])


def read_arrays(group: Group, names: Sequence[str] | None = None) -> list[dict[str, Array]]:
    """The named arrays of each run of a group that has some, by seed; those of reliability diagrams by default.

    A damaged file adds nothing.
    """
    names = names or [f"reliability_{what}{suffix}" for what in _RELIABILITY for suffix in SUFFIXES]
    found = []
    for run in group.done:
        with contextlib.suppress(DamagedFileError):
            found.append(run.on_disk.arrays(names))
    return [one for one in found if one]
