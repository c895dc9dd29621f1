"""What lies beside result.json and is drawn: learning curves (metrics.csv) and arrays (arrays.npz), over runs."""

from __future__ import annotations

import csv
import logging
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ekd_lightning.evaluation.diversity import Spread, spread_over_runs
from ekd_lightning.reporting.estimates import Estimate, estimate
from ekd_lightning.reporting.groups import Group
from ekd_lightning.runs.collection import RunEntry

Array = np.ndarray
log = logging.getLogger(__name__)

CURVES = ("val/accuracy", "val/nll", "train/loss")
MOST_EPOCHS = 60
"""Longer curves are thinned to about as many points, the last one kept."""


def curves(group: Group, names: Sequence[str] = CURVES) -> dict[str, list[tuple[int, Estimate]]]:
    """Curves over epochs: mean and interval over the runs that reached an epoch.

    Args:
        group: Its runs; one without a readable metrics.csv adds nothing.
        names: Columns of metrics.csv.

    Returns:
        By column: (epoch from 1, estimate), ascending; without the columns that no run has.
    """
    read = [_columns(run, names) for run in group.done]
    found = {}
    for name in names:
        lines = [one[name] for one in read if one.get(name)]
        epochs = thin(sorted({epoch for line in lines for epoch in line}))
        points = [(epoch, estimate(line[epoch] for line in lines if epoch in line)) for epoch in epochs]
        if points:
            found[name] = [(epoch, one) for epoch, one in points if one is not None]
    return found


def thin(epochs: list[int]) -> list[int]:
    """At most about `MOST_EPOCHS` of them, evenly spread, with the last."""
    step = -(-len(epochs) // MOST_EPOCHS) or 1
    return epochs[::-1][::step][::-1]


def _columns(run: RunEntry, names: Sequence[str]) -> dict[str, dict[int, float]]:
    """Value by epoch (from 1) of some columns; of an epoch that was written twice, the later one."""
    path = run.curves_path
    found: dict[str, dict[int, float]] = {name: {} for name in names}
    if path is None:
        return found
    try:
        with path.open(newline="") as file:
            rows = csv.reader(file)
            head = next(rows, [])
            places = [(found[name], head.index(name)) for name in names if name in head]
            at = head.index("epoch") if "epoch" in head else None
            for row in rows:
                if at is not None and len(row) == len(head) and row[at]:
                    for values, place in places:
                        if row[place]:
                            values[int(float(row[at])) + 1] = float(row[place])
    except (OSError, ValueError, csv.Error) as error:
        log.warning("%s: damaged, its curves are left out (%s)", path, error)
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


def reliability(arrays: Sequence[dict[str, np.ndarray]], suffix: str = "") -> list[Bin]:
    """A reliability diagram over runs, without empty bins.

    Args:
        arrays: One for each run, from `read_arrays`.
        suffix: `_calibrated` for that after temperature scaling.

    Returns:
        By confidence; empty where no run has the arrays, or they differ in the number of bins.
    """
    names = [f"reliability_{what}{suffix}" for what in ("confidence", "accuracy", "count")]
    have = [[one[name] for name in names] for one in arrays if all(name in one for name in names)]
    if not have or any(part.shape != have[0][0].shape for one in have for part in one):
        return []
    confidence, accuracy, count = (np.array(part, dtype=float) for part in zip(*have, strict=True))
    bins = []
    for b in range(count.shape[1]):
        full = count[:, b] > 0
        level = estimate(accuracy[full, b])
        if level is not None:
            pooled = float(np.average(confidence[full, b], weights=count[full, b]))
            bins.append(Bin(pooled, level, float(count[:, b].sum() / count.sum())))
    return bins


def seed_spread(group: Group) -> Spread | None:
    """How much the runs of a group differ on the same test images; None unless two of them have their predictions."""
    names = ("ensemble_probs", "labels")
    have = [one for one in read_arrays(group, names) if all(name in one for name in names)]
    if len(have) < 2 or any(not np.array_equal(one["labels"], have[0]["labels"]) for one in have):
        return None
    probs = [one["ensemble_probs"] for one in have]
    if any(part.shape != probs[0].shape for part in probs):
        return None
    return spread_over_runs(np.stack(probs), have[0]["labels"])


def read_arrays(group: Group, names: Sequence[str] | None = None) -> list[dict[str, np.ndarray]]:
    """The arrays of each run of a group that has some, by seed; a damaged file adds nothing.

    Args:
        group: The group.
        names: Which arrays; those of reliability diagrams and of the loss curve if None.
    """
    found = []
    for run in group.done:
        path = run.arrays_path
        if path is None:
            continue
        try:
            with np.load(path, allow_pickle=False) as file:
                wanted = names or [n for n in file.files if n.startswith(("reliability_", "loss_curve_"))]
                found.append({name: file[name] for name in wanted if name in file.files})
        except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
            log.warning("%s: damaged, left out (%s)", path, error)
    return found
