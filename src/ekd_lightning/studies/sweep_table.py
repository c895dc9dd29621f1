"""The summary of a sweep in the terminal: one row per run, and means over seeds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from ekd_lightning.reporting.estimates import estimate, percent

SEED = "seed"
MOST_ROWS = 60
"""Longer tables are of no use in a terminal; runs that are not done are shown all the same."""
_STYLES = {"done": "green", "partial": "green", "failed": "red", "stopped": "yellow"}
_BEST = "★"


@dataclass(frozen=True)
class SweepRow:
    """One run of a sweep.

    Attributes:
        name: Its directory, below the sweep's.
        varied: What it was given for the keys that vary, by key.
        state: done, partial, failed, stopped or waiting.
        result: Content of result.json; empty unless it is done.
    """

    name: str
    varied: Mapping[str, str]
    state: str
    result: Mapping[str, Any] = field(default_factory=dict)

    @property
    def accuracy(self) -> float | None:
        """Test accuracy in [0, 1]; None without one."""
        value = self.result.get("test_accuracy")
        return None if value is None else float(value)


def sweep_tables(rows: Sequence[SweepRow], keys: Sequence[str]) -> list[Table]:
    """The tables of a sweep.

    Args:
        rows: All runs, in their order.
        keys: Keys that vary.

    Returns:
        One row per run, the highest accuracy marked; where seeds vary, also the mean over them, and the mark there,
        as single seeds are no settings to choose from. At most `MOST_ROWS` done runs are shown.
    """
    groups = seed_groups(rows, keys) if SEED in keys else {}
    shown = [row for row in rows if row.state not in ("done", "partial")]
    done = [row for row in rows if row.state in ("done", "partial")]
    few = {id(row) for row in [*shown, *done[:MOST_ROWS]]}
    tables = [
        _runs([row for row in rows if id(row) in few], keys, mark=not groups, left_out=len(rows) - len(few))
    ]
    if groups:
        tables.append(_means(groups, [key for key in keys if key != SEED]))
    return tables


def seed_groups(rows: Iterable[SweepRow], keys: Sequence[str]) -> dict[tuple[str, ...], list[SweepRow]]:
    """Runs that differ in nothing but the seed, by the values of the other keys; only runs with an accuracy."""
    others = [key for key in keys if key != SEED]
    groups: dict[tuple[str, ...], list[SweepRow]] = {}
    for row in rows:
        if row.accuracy is not None:
            groups.setdefault(tuple(row.varied.get(key, "–") for key in others), []).append(row)
    return groups


def _runs(rows: Sequence[SweepRow], keys: Sequence[str], *, mark: bool, left_out: int) -> Table:
    found = [row.accuracy for row in rows if row.accuracy is not None]
    best = max(found) if mark and len(found) > 1 else None
    caption = f"{left_out} more runs are done; ekd-report shows all" if left_out else None
    table = _table("runs", ["run", *keys], ["test %", "val %", "train s", "state"], caption)
    for row in rows:
        is_best = best is not None and row.accuracy == best
        table.add_row(
            row.name,
            *(row.varied.get(key, "–") for key in keys),
            _marked(_percent(row.accuracy), is_best),
            _percent(row.result.get("val_accuracy")),
            _number(row.result.get("train_seconds")),
            Text(row.state, _STYLES.get(row.state, "")),
            style="bold" if is_best else "",
        )
    return table


def _means(groups: Mapping[tuple[str, ...], Sequence[SweepRow]], keys: Sequence[str]) -> Table:
    cells = {
        values: estimate(row.accuracy for row in group if row.accuracy is not None)
        for values, group in groups.items()
    }
    best = max(cell.mean for cell in cells.values() if cell) if len(cells) > 1 else None
    table = _table("means over seeds ± std", keys, ["test %", "n", "train s"], None)
    for values, cell in cells.items():
        assert cell is not None  # only runs with an accuracy are in groups
        is_best = best is not None and cell.mean == best
        seconds = [row.result.get("train_seconds") for row in groups[values]]
        known = estimate(float(value) for value in seconds if value is not None)
        table.add_row(
            *values,
            _marked(percent(cell), is_best),
            str(cell.n),
            _number(known.mean if known else None),
            style="bold" if is_best else "",
        )
    return table


def _table(title: str, left: Sequence[str], right: Sequence[str], caption: str | None) -> Table:
    table = Table(title=title, title_justify="left", caption=caption, box=box.SIMPLE_HEAD, pad_edge=False)
    for name in left:
        table.add_column(name, overflow="fold")
    for name in right:
        table.add_column(name, justify="left" if name == "state" else "right", no_wrap=True)
    return table


def _marked(text: str, is_best: bool) -> Text:
    return Text.assemble((f"{_BEST} ", "yellow"), text) if is_best else Text(text)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.{0 if value >= 10 else 1}f}"
