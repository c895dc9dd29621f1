"""Mean, spread and interval of a figure over runs, and how they are written."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from scipy import stats


@dataclass(frozen=True)
class Cell:
    """Mean and spread of one figure over runs.

    Attributes:
        mean: Arithmetic mean.
        std: Sample standard deviation (n - 1); None for a single run.
        n: Number of runs.
    """

    mean: float
    std: float | None
    n: int


def summarise(values: Iterable[float]) -> Cell:
    """Mean, sample standard deviation and n.

    Raises:
        ValueError: Without values.
    """
    numbers = list(values)
    if not numbers:
        raise ValueError("no values to summarise")
    spread = statistics.stdev(numbers) if len(numbers) > 1 else None
    return Cell(statistics.fmean(numbers), spread, len(numbers))


def half_width(cell: Cell, level: float = 0.95) -> float | None:
    """Half the width of Student's t interval for the mean, in the unit of the mean; None for a single run.

    Args:
        cell: Mean, standard deviation and n of (differences of) runs, taken to be normal.
        level: Confidence in (0, 1).
    """
    if cell.std is None:
        return None
    return _quantile(level, cell.n - 1) * cell.std / math.sqrt(cell.n)


@cache
def _quantile(level: float, freedom: int) -> float:
    """Of Student's t; scipy takes longer for it than for everything else in a report."""
    return float(stats.t.ppf(0.5 + level / 2, freedom))


def percent(cell: Cell | None, *, signed: bool = False) -> str:
    """A share as percent with its spread, e.g. `78.02 ± 0.31`."""
    if cell is None:
        return "–"
    sign = "+" if signed else ""
    spread = "" if cell.std is None else f" ± {100 * cell.std:.2f}"
    return f"{100 * cell.mean:{sign}.2f}{spread}"
