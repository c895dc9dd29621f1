"""A comparison as files (CSV, Markdown, JSON) and as a table for the terminal."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from ekd_lightning.reporting.comparison import Block, Row
from ekd_lightning.reporting.estimates import NOT_ENOUGH, p_value, percent

LEGEND = """\
Test accuracy with the weights after the last epoch, in percent: mean ± sample standard deviation over n seeds.
Differences are in points, paired by seed, with the 95 % t interval; p is that of a paired t-test, corrected by
Holm's method over the rows of the block. K branches, M teachers. Seconds are those of training; they include
filling the table of teacher outputs for the run that came first, and depend on what else the machine did.
"""


def columns(references: Sequence[str]) -> list[str]:
    """Heads of the table."""
    return [
        "row",
        "K",
        "M",
        "teacher",
        "test accuracy %",
        "n",
        *(f"− {reference}" for reference in references),
        "parameters",
        "adapters",
        "MACs",
        "train s",
        "steps",
    ]


def cells(row: Row, references: Sequence[str], line: str = "\n") -> list[str]:
    """One row as texts, in the order of `columns`.

    Args:
        row: The row.
        references: Those of its block.
        line: What separates the lines of a cell.
    """
    return [
        row.name,
        _values(row, "num_branches"),
        _values(row, "num_teachers"),
        _teacher(row),
        percent(row.accuracy),
        str(len(row.done)),
        *(_difference(row, reference, line) for reference in references),
        _values(row, "num_parameters", ",d"),
        _values(row, "num_adapter_parameters", ",d"),
        " / ".join(f"{value / 1e6:.1f} M" for value in row.distinct("macs")) or "–",
        _seconds(row, line),
        _values(row, "steps", ",d"),
    ]


def _seconds(row: Row, line: str) -> str:
    seconds, chain = row.mean("train_seconds"), row.mean("chain_stored_seconds")
    if seconds is None:
        return "–"
    return f"{seconds:.0f}" + (f"{line}+ {chain:.0f} for assistants" if chain else "")


def _values(row: Row, key: str, form: str = "") -> str:
    return " / ".join(format(value, form) for value in row.distinct(key)) or "–"


def _teacher(row: Row) -> str:
    """Who taught: the chosen one, or `all`."""
    if not any(result.get("num_teachers") for result in row.done):
        return "–"
    return " / ".join(map(str, row.distinct("teacher"))) or "all"


def _difference(row: Row, reference: str, line: str) -> str:
    if row.name == reference:
        return ""
    difference = row.differences.get(reference)
    if difference is None:
        return "–"
    first = f"{100 * difference.mean:+.2f}"
    if difference.std is None:
        return f"{first}{line}{NOT_ENOUGH}"
    pairs = f" (n {difference.n})" if difference.n != len(row.done) else ""
    if difference.p is None:  # the same difference in every pair
        return f"{first}{pairs}{line}no spread"
    interval = f"[{100 * difference.low:+.2f}, {100 * difference.high:+.2f}]"
    return f"{first} {interval}{pairs}{line}{p_value(difference.p_holm or 0.0)}"


def title(block: Block) -> str:
    """What a block is about."""
    return f"{block.data}, {100 * block.fraction:g} % of the training images"


def rich_table(block: Block) -> Table:
    """A block for the terminal; rows with failed or missing runs say so below themselves."""
    table = Table(title=title(block), title_justify="left", show_lines=True)
    for position, name in enumerate(columns(block.references)):
        left = position == 0 or name == "teacher"
        table.add_column(name, justify="left" if left else "right", overflow="fold", no_wrap=position == 0)
    for row in block.rows:
        texts = [Text(cell) for cell in cells(row, block.references)]
        if row.problems:
            texts[4] = Text(f"{texts[4]}\n{row.problems}" if row.done else row.problems, style="red")
        table.add_row(*texts)
    return table


def markdown(blocks: Sequence[Block], settings: Mapping[str, str] | None = None) -> str:
    """All blocks as a Markdown page.

    Args:
        blocks: The blocks.
        settings: By row, what it changes of its method's defaults; None if that is not known.
    """
    parts = ["# Comparison\n", LEGEND]
    for block in blocks:
        heads = columns(block.references)
        if settings is not None:
            heads = [*heads, "settings"]
        lines = [f"## {title(block)}\n", f"| {' | '.join(heads)} | |", "|" + "---|" * (len(heads) + 1)]
        for row in block.rows:
            own = [f"`{row.name}`", *cells(row, block.references, "; ")[1:]]
            if settings is not None:
                own.append(settings.get(row.name) or "defaults")
            own.append(row.problems.replace("|", "\\|"))
            lines.append("| " + " | ".join(own) + " |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def records(blocks: Sequence[Block], settings: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """All rows of all blocks as flat records, accuracies and differences in [0, 1] and [-1, 1]."""
    return [_record(block, row, settings) for block in blocks for row in block.rows]


def _record(block: Block, row: Row, settings: Mapping[str, str] | None) -> dict[str, Any]:
    def only(key: str) -> Any:
        values = row.distinct(key)
        return values[0] if len(values) == 1 else "/".join(map(str, values)) or None

    record: dict[str, Any] = {
        "data": block.data,
        "fraction": block.fraction,
        "row": row.name,
        "num_branches": only("num_branches"),
        "num_teachers": only("num_teachers"),
        "teacher": None if _teacher(row) == "–" else _teacher(row),
        "n": len(row.done),
        "test_accuracy": row.accuracy.mean if row.accuracy else None,
        "test_accuracy_std": row.accuracy.std if row.accuracy else None,
    }
    for name in block.references:
        difference = row.differences.get(name)
        record |= {
            f"minus_{name}": difference.mean if difference else None,
            f"minus_{name}_n": difference.n if difference else None,
            f"minus_{name}_half_width": difference.half if difference else None,
            f"minus_{name}_p": difference.p if difference else None,
            f"minus_{name}_p_holm": difference.p_holm if difference else None,
        }
    for key in ("num_parameters", "num_adapter_parameters", "macs", "steps"):
        record[key] = only(key)
    record["train_seconds"] = row.mean("train_seconds")
    record["assistants_seconds"] = row.mean("chain_stored_seconds")
    for state in ("failed", "partial", "stopped", "missing"):
        record[state] = sum(run.state == state for run in row.runs)
    record["problems"] = row.problems or None
    if settings is not None:
        record["settings"] = settings.get(row.name) or "defaults"
    return record


def csv_text(blocks: Sequence[Block], settings: Mapping[str, str] | None = None) -> str:
    """The records as CSV; columns of references that a block lacks are empty."""
    rows = records(blocks, settings)
    heads = list(dict.fromkeys(key for row in rows for key in row))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, heads, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def json_text(blocks: Sequence[Block], settings: Mapping[str, str] | None = None) -> str:
    """The records, and with each the accuracy of every seed, as JSON."""
    rows = [
        {**_record(block, row, settings), "by_seed": {str(r.seed): _one(r) for r in row.runs}}
        for block in blocks
        for row in block.rows
    ]
    return json.dumps(rows, indent=1) + "\n"


def _one(run: Any) -> Any:
    return run.result["test_accuracy"] if run.state == "done" and run.result else run.state
