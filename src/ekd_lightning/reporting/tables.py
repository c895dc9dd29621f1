"""Tables of a block: its groups as rows of text and as records, for Markdown, the terminal, CSV and JSON."""

from __future__ import annotations

import csv
import io
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ekd_lightning import markdown as md
from ekd_lightning.evaluation.diversity import Spread
from ekd_lightning.reporting.blocks import Block
from ekd_lightning.reporting.details import seed_spread
from ekd_lightning.reporting.estimates import NONE, Difference, accuracy_text, difference_text
from ekd_lightning.reporting.groups import FEW, Group, differences
from ekd_lightning.runs.collection import STATES
from ekd_lightning.runs.directory import RunState

LEGEND = f"""\
Each row is one setting: runs that differ only in their seed. Test accuracy, in percent, is measured after the last
epoch: mean ± sample standard deviation over n seeds, and the 95 % interval of Student's t. Differences are in points,
paired by seed, with their 95 % interval. p comes from a paired t-test, corrected by Holm's method for the number of
comparisons with the same row, unless a line below the table says otherwise. K branches, M teachers. Seconds of training
depend on the machine's load; in the first run they include filling the teacher tables. With fewer than {FEW} runs, an
interval assumes normal results, and is wide.
"""
REPORT_LEGEND = f"""\
{LEGEND}Gain: ensemble minus the mean of its branches, in points. Seeds disagree: share of test images on which two runs
of the row predict different classes, mean over pairs.
"""
OTHER = "†"
"""Mark of rows that are not deciding rows of their study."""
MEANS = (
    *("test_accuracy_ema", "test_nll", "test_ece", "test_brier", "test_mean_branch_accuracy"),
    *("test_gain_over_mean_branch", "test_disagreement", "train_accuracy", "corruption_mce"),
    *("num_parameters", "num_adapter_parameters", "macs", "steps", "train_seconds", "latency_ms_batch1"),
)
"""Fields of which a record gives the mean over runs."""


_SHORT = 60  # characters of a problem on a terminal; comparison.md has all of it


@dataclass(frozen=True)
class Row:
    """One group and its comparisons.

    Attributes:
        group: The group.
        differences: Its test accuracy minus that of each reference; None for the reference itself, and without a
            common seed.
        spread: How much its runs differ between seeds; None unless two have predictions.
    """

    group: Group
    differences: Mapping[str, Difference | None] = field(default_factory=dict)
    spread: Spread | None = None


def rows(block: Block, references: Sequence[str]) -> list[Row]:
    """The groups of a block against each reference that it has."""
    found = {reference: differences(block.groups, reference) for reference in references}
    return [
        Row(group, {reference: found[reference].get(group.label) for reference in references}, seed_spread(group))
        for group in block.groups
    ]


def correction(groups: Iterable[Group]) -> str:
    """The line on which comparisons p values are corrected for, if some groups do not decide; else empty."""
    decide = {one.decides for one in groups}
    if decide != {True, False}:
        return ""
    return (
        f"{OTHER}: not a deciding row. Its p is corrected for the comparisons of all rows of the block; the p of a "
        "deciding row is corrected for the comparisons of deciding rows only."
    )


STATE_NAMES = {state: "missing" if state is RunState.PLANNED else state.value for state in RunState}
"""Names of states in tables."""


def problems(group: Group) -> str:
    """States, numbers and first errors of the runs that are not done; empty if all are done."""
    parts = []
    for state in dict.fromkeys(run.state for run in group.others):
        those = [run for run in group.others if run.state == state]
        error = next((f": {run.error}" for run in those if run.error), "")
        parts.append(f"{STATE_NAMES[state]} {len(those)} of {len(group.runs)}{error}")
    return "; ".join(parts)


def _mean(key: str, form: str, scale: float = 1, unit: str = "") -> Callable[[Row], str]:
    def text(row: Row) -> str:
        found = row.group.values(key)
        return f"{format(scale * found.mean, form)}{unit}" if found else NONE

    return text


def _seconds(row: Row) -> str:
    chain = row.group.values("chain_stored_seconds")
    more = f" + {chain.mean:.0f} for assistants" if chain and chain.mean else ""
    return _mean("train_seconds", ".0f")(row) + more


def _taught(group: Group) -> str | None:
    """The chosen teacher, or `all`; None without teachers."""
    return " / ".join(map(str, group.distinct("teacher"))) or ("all" if group.num_teachers else None)


_COLUMNS: dict[str, Callable[[Row], object]] = {
    "K": lambda row: row.group.num_branches,
    "M": lambda row: row.group.num_teachers,
    "teacher": lambda row: _taught(row.group),
    "n": lambda row: row.group.n,
    "unlabelled": lambda row: row.group.only("num_unlabelled_images") or None,
    "test accuracy % [95 % interval]": lambda row: accuracy_text(row.group.accuracy),
    "EMA %": _mean("test_accuracy_ema", ".2f", 100),
    "differences": lambda row: "",  # one column for each reference
    "NLL": _mean("test_nll", ".3f"),
    "ECE": _mean("test_ece", ".3f"),
    "gain": _mean("test_gain_over_mean_branch", "+.2f", 100),
    "seeds disagree %": lambda row: f"{100 * row.spread.disagreement:.1f}" if row.spread else None,
    "parameters": _mean("num_parameters", ",.0f"),
    "adapters": _mean("num_adapter_parameters", ",.0f"),
    "MACs": _mean("macs", ".1f", 1e-6, " M"),
    "train s": _seconds,
    "steps": _mean("steps", ",.0f"),
    "not done": lambda row: problems(row.group),
}
REPORT = tuple(name for name in _COLUMNS if name not in ("teacher", "adapters", "steps"))
STUDY = tuple(name for name in _COLUMNS if name not in ("NLL", "ECE", "gain", "seeds disagree %"))
"""Columns of a report, and of a study, which has more on cost."""
_SPARED = ("adapters", "steps", "parameters", "train s", "MACs", "teacher", "M", "K")
"""Columns of a study that a narrow terminal lacks, the first first; comparison.md has all of them."""
_OPTIONAL = ("unlabelled", "EMA %", "gain", "seeds disagree %")
"""Columns that are left out if no row has a value."""


def cells(row: Row, names: Sequence[str]) -> list[str]:
    """Some columns of a row."""
    return [NONE if cell is None else str(cell) for cell in (_COLUMNS[name](row) for name in names)]


def texts(found: Sequence[Row], names: Sequence[str] = REPORT) -> tuple[list[str], list[list[str]]]:
    """Heads of a block's table, the first of which is `setting`, and the cells of its rows."""
    empty = [name for name in _OPTIONAL if all(cells(row, [name]) == [NONE] for row in found)]
    names = [name for name in names if name not in empty]
    minus = [f"− {reference} [95 % interval]" for reference in found[0].differences]
    heads = ["setting", *(head for name in names for head in (minus if name == "differences" else [name]))]
    lines = []
    for row in found:
        label = row.group.label
        differences = ["" if name == label else difference_text(one) for name, one in row.differences.items()]
        parts = [differences if name == "differences" else cells(row, [name]) for name in names]
        lines.append([label, *(cell for part in parts for cell in part)])
    return heads, lines


def markdown(found: Sequence[Row], names: Sequence[str] = REPORT, settings: Mapping[str, str] | None = None) -> str:
    """Rows of a block as a Markdown table, with each row's changes to its method's defaults if `settings` are given."""
    heads, lines = texts(found, names)
    if settings is not None:
        heads, lines = [*heads, "settings"], [[*line, settings.get(line[0]) or "defaults"] for line in lines]
    note = correction(row.group for row in found)
    names = [md.Markdown(md.code(row.group.label) + _mark(row, note)) for row in found]
    table = md.table(heads, [[name, *cells] for name, (_, *cells) in zip(names, lines, strict=True)])
    return md.Markdown(f"{table}\n{note}\n") if note else table


def _mark(row: Row, note: str) -> str:
    return f" {OTHER}" if note and not row.group.decides else ""


def full_names(found: Sequence[Row]) -> dict[str, str]:
    """For each abbreviated label, all settings in which groups of the method differ."""
    groups = [row.group for row in found]
    return {one.label: one.setting for one in groups if one.label != ", ".join(filter(None, [one.method, one.setting]))}


def printed_table(title: str, found: Sequence[Row], width: int | None) -> Table:
    """Rows of a study's block, with problems in red in the last column.

    In lines of `width` characters, intervals have lines of their own, long problems are shortened, and columns without
    room are left out: those of cost, then those of teachers and branches.
    """
    for count in range(len(_SPARED) + 1):
        table = _printed(title, found, _SPARED[:count], narrow=width is not None)
        if width is None or Console(width=1000).measure(table).maximum <= width:
            break
    return table


def _printed(title: str, found: Sequence[Row], left_out: Sequence[str], *, narrow: bool) -> Table:
    heads, lines = texts(found, [name for name in STUDY if name not in left_out])
    note = correction(row.group for row in found)
    missing = f"No room for: {', '.join(left_out)}. They are in comparison.md." if left_out else ""
    table = Table(
        title=Text(title), caption=Text("\n".join(filter(None, [note, missing]))), title_justify="left",
        caption_justify="left", show_lines=narrow, box=box.SIMPLE_HEAD, pad_edge=False,
    )  # fmt: skip
    for head in heads:
        left, first = head in ("setting", "teacher", "not done"), head == "setting"
        table.add_column(_broken(head, narrow), justify="left" if left else "right", overflow="fold", no_wrap=first)
    table.columns[-1].max_width = _SHORT // 4 if narrow else None
    for row, (label, *cells, wrong) in zip(found, lines, strict=True):
        own = (_broken(cell, narrow) for cell in cells)
        told = textwrap.shorten(wrong, _SHORT, placeholder=" …") if narrow else wrong
        table.add_row(Text(f"{label}{_mark(row, note)}"), *own, Text(told, style="red"))
    return table


def _broken(cell: str, narrow: bool) -> Text:
    """A cell; if lines have a width, its interval and its p value start new lines."""
    return Text(re.sub(r" (?=[\[(])|(?<=\]), ", "\n", cell) if narrow else cell)


def record(row: Row) -> dict[str, Any]:
    """A row as a record; accuracies in [0, 1], differences in [-1, 1], half widths of 95 % intervals."""
    group, found = row.group, row.group.accuracy
    made: dict[str, Any] = {
        "label": group.label,
        "method": group.method,
        "student": group.student,
        "num_branches": group.num_branches,
        "num_teachers": group.num_teachers,
        "teacher": _taught(group),
        "n": group.n,
        "seeds": [int(run.get("seed")) for run in group.done],
        "test_accuracy": found.mean if found else None,
        "test_accuracy_std": found.std if found else None,
        "test_accuracy_interval": [found.low, found.high] if found and found.half is not None else None,
        "differences": {label: difference_record(one) for label, one in row.differences.items() if one is not None},
    }
    for key in MEANS:
        mean = group.values(key)
        if mean is not None:
            same = group.only(key)
            made[key] = mean.mean if same is None else same  # counts stay whole
    if row.spread is not None:
        made |= {"seed_variance": row.spread.variance, "seed_disagreement": row.spread.disagreement}
    states = [run.state for run in group.others]
    return made | {state.value: states.count(state) for state in STATES if state is not RunState.DONE}


def difference_record(difference: Difference) -> dict[str, Any]:
    """A difference as a record: mean, n, half width of its 95 % interval, p and the corrected p."""
    return {
        "mean": difference.mean,
        "n": difference.n,
        "half_width": difference.half,
        "p": difference.p,
        "p_holm": difference.p_holm,
    }


def csv_text(records: Sequence[Mapping[str, Any]]) -> str:
    """Flat records as CSV; a field that a record lacks is empty."""
    stream = io.StringIO()
    names = dict.fromkeys(key for one in records for key in one)
    writer = csv.DictWriter(stream, list(names), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return stream.getvalue()
