"""Results of many runs, read from their result.json files, as one table over seeds."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

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


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Reads all result.json files below a folder, in the order of their paths.

    Left out are runs that are not done, and those that saw a part of the data only (debug=limit and the like).
    """
    results = []
    for path in sorted(folder.rglob("result.json")):
        status = path.with_name("status.json")
        if status.is_file() and json.loads(status.read_text())["state"] == "done":
            result = json.loads(path.read_text())
            if not result.get("partial"):
                results.append(result)
    return results


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


def paired_difference(
    results: Sequence[dict[str, Any]], method: str, reference: str, field: str = "test_accuracy"
) -> Cell | None:
    """Difference method - reference of a figure, paired by seed; None without a common seed.

    Raises:
        ValueError: If a method has several runs with one seed: they differ in something else.
    """
    ours, theirs = (_by_seed(results, name, field) for name in (method, reference))
    common = sorted(ours.keys() & theirs.keys())
    return summarise(ours[seed] - theirs[seed] for seed in common) if common else None


def _by_seed(results: Sequence[dict[str, Any]], method: str, field: str) -> dict[int, float]:
    values: dict[int, float] = {}
    for result in results:
        if result["method"] != method:
            continue
        if result["seed"] in values:
            raise ValueError(
                f"{method!r} has more than one run with seed {result['seed']}: which one is meant?"
            )
        values[result["seed"]] = result[field]
    return values


def percent(cell: Cell | None, *, signed: bool = False) -> str:
    """A share as percent with its spread, e.g. `78.02 ± 0.31`."""
    if cell is None:
        return "–"
    sign = "+" if signed else ""
    spread = "" if cell.std is None else f" ± {100 * cell.std:.2f}"
    return f"{100 * cell.mean:{sign}.2f}{spread}"


def short_table(results: Sequence[dict[str, Any]], methods: Sequence[str]) -> str:
    """A Markdown table for a first look: accuracy (percent, mean ± sample standard deviation), capacity, n."""
    lines = ["| method | test accuracy % | parameters | MACs | n |", "|---|---|---|---|---|"]
    for method in methods:
        rows = [r for r in results if r["method"] == method]
        if not rows:
            lines.append(f"| `{method}` | missing | | | 0 |")
            continue
        accuracy = percent(summarise(r["test_accuracy"] for r in rows))
        size = f"{rows[0]['num_parameters']:,} | {rows[0]['macs'] / 1e6:.1f} M"
        lines.append(f"| `{method}` | {accuracy} | {size} | {len(rows)} |")
    return "\n".join(lines)


def methods_table(results: Sequence[dict[str, Any]], methods: Sequence[str], reference: str) -> str:
    """A Markdown table with one row per method: accuracy over seeds, differences, capacity and cost.

    Args:
        results: Contents of result.json files of one data set, fraction and schedule.
        methods: Rows, in order; a method without results is shown as missing, not left out.
        reference: Method that differences are taken to, paired by seed.

    Returns:
        The table, with accuracies in percent as mean ± sample standard deviation over seeds.
    """
    lines = [
        f"| method | K | M | test accuracy, last epoch | − {reference}, paired | best on validation "
        "| mean branch | NLL | ECE | parameters | MACs | n |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for method in methods:
        rows = [r for r in results if r["method"] == method]
        if not rows:
            lines.append(f"| `{method}` | | | missing | | | | | | | | 0 |")
            continue
        first = rows[0]
        best = [r["test_accuracy_best"] for r in rows if r.get("test_accuracy_best") is not None]
        difference = None if method == reference else paired_difference(results, method, reference)
        cells = [
            f"`{method}`",
            str(first["num_branches"]),
            str(first["num_teachers"]),
            percent(summarise(r["test_accuracy"] for r in rows)),
            percent(difference, signed=True),
            percent(summarise(best) if best else None),
            percent(summarise(statistics.fmean(r["test_branch_accuracy"]) for r in rows)),
            f"{summarise(r['test_nll'] for r in rows).mean:.3f}",
            f"{summarise(r['test_ece'] for r in rows).mean:.3f}",
            f"{first['num_parameters']:,}",
            f"{first['macs'] / 1e6:.1f} M",
            str(len(rows)),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
