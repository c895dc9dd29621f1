"""A report as text: Markdown tables per block, and one tidy CSV of all runs."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ekd_lightning.reporting import setups
from ekd_lightning.reporting.blocks import Block
from ekd_lightning.reporting.estimates import NOT_ENOUGH, difference_text, percent
from ekd_lightning.reporting.groups import FEW, Group
from ekd_lightning.reporting.report import Report
from ekd_lightning.reporting.report_rows import GroupRow, rows
from ekd_lightning.runs.collection import RunEntry

LEGEND = f"""\
One row is one setting: runs that differ in their seed alone. Test accuracy is that of the weights after the last
epoch, in percent: mean ± sample standard deviation over n seeds, and the 95 % interval of Student's t. Differences
are in points, paired by seed, with their 95 % interval; p is that of a paired t-test, corrected by Holm's method
over the rows of the block. Gain is that of the ensemble over the mean of its branches, in points. Seeds disagree:
the share of test images on which two runs of the row predict different classes, mean over pairs. K branches, M
teachers. Seconds of training depend on what else the machine did. With fewer than {FEW} runs an interval rests on
the assumption that runs are normal, and is wide.
"""
_EMPTY = "–"


def markdown(report: Report) -> str:
    """The whole report as a Markdown page."""
    parts = [f"# {_prose(report.title)}\n", f"{_prose(report.lead)}\n"]
    for block in report.blocks:
        parts += [
            f"## {_prose(block.title)}\n",
            *_answer(report, block),
            block_table(block, report.references(block)),
        ]
    parts += ["## How to read the tables\n", LEGEND]
    parts += [f"Made on: {_prose('; '.join(report.machines) or 'no run is done')}.\n"]
    if report.notes:
        parts += ["## Notes\n", "".join(f"- {_prose(note)}\n" for note in report.notes)]
    parts += _not_done(report)
    return "\n".join(parts)


def _answer(report: Report, block: Block) -> list[str]:
    found = next((one for one in report.answers if one.block.key == block.key), None)
    if found is None:
        return ["No run is done here.\n"]
    sentences = [*(finding.sentence for finding in found.findings), *found.remarks]
    return [f"{_prose(found.headline)}\n", "".join(f"- {_prose(sentence)}\n" for sentence in sentences)]


def columns(references: Sequence[str]) -> list[str]:
    """Heads of a block's table."""
    return [
        "setting",
        "K",
        "M",
        "n",
        "test accuracy % [95 % interval]",
        *(f"− {reference} [95 % interval]" for reference in references),
        "NLL",
        "ECE",
        "gain",
        "seeds disagree %",
        "parameters",
        "MACs",
        "train s",
        "not done",
    ]


def cells(row: GroupRow) -> list[str]:
    """One row as texts, in the order of `columns`."""
    group = row.group
    return [
        f"`{group.label}`",
        _count(group.num_branches),
        _count(group.num_teachers),
        str(group.n),
        accuracy(group),
        *("" if label == group.label else difference_text(one) for label, one in row.differences.items()),
        _mean(group, "test_nll", ".3f"),
        _mean(group, "test_ece", ".3f"),
        _mean(group, "test_gain_over_mean_branch", "+.2f", 100),
        _EMPTY if row.spread is None else f"{100 * row.spread.disagreement:.1f}",
        _mean(group, "num_parameters", ",.0f"),
        _mean(group, "macs", ".1f", 1e-6, " M"),
        _mean(group, "train_seconds", ".0f"),
        _others(group),
    ]


def block_table(block: Block, references: Sequence[str]) -> str:
    """A block as a Markdown table."""
    heads = columns(references)
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    lines += [f"| {' | '.join(map(_cell, cells(row)))} |" for row in rows(block, references)]
    return "\n".join(lines) + "\n"


def accuracy(group: Group) -> str:
    """E.g. `71.55 ± 0.29 [70.83, 72.27]`; a single run has no interval, and says so."""
    found = group.accuracy
    if found is None:
        return _EMPTY
    if found.std is None:
        return f"{percent(found)} ({NOT_ENOUGH})"
    return f"{percent(found)} [{100 * found.low:.2f}, {100 * found.high:.2f}]"


def _mean(group: Group, key: str, form: str, scale: float = 1, unit: str = "") -> str:
    cell = group.values(key)
    return f"{format(scale * cell.mean, form)}{unit}" if cell else _EMPTY


def _count(value: int | None) -> str:
    return _EMPTY if value is None else str(value)


def _others(group: Group) -> str:
    states = [run.state for run in group.others]
    return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))


def _not_done(report: Report) -> list[str]:
    left = [(run, group) for group in report.groups for run in group.others]
    if not left:
        return []
    lines = ["| run | setting | seed | state | error |", "|---|---|---|---|---|"]
    for run, group in sorted(left, key=lambda pair: pair[0].name):
        texts = [run.name, f"`{group.label}`", str(run.get("seed")), run.state, _prose(run.error or "")]
        lines.append(f"| {' | '.join(map(_cell, texts))} |")
    return ["## Runs that do not count\n", "\n".join(lines) + "\n"]


def _cell(text: str) -> str:
    """Text that does not break a table."""
    return " ".join(text.split()).replace("|", "\\|")


def _prose(text: str) -> str:
    """Text in one line, in which `<class 'int'>` is no markup that a reader would not see."""
    return re.sub(r"<(?=[A-Za-z/!?])", r"\\<", " ".join(text.split()))


def runs_csv(report: Report) -> str:
    """One row per run, every field of the results a column.

    Lists become one column per element (`test_branch_accuracy_0`), those of operating points are named after what
    they are (`test_subsets_0+2_accuracy`, `test_early_exit_0.9_accuracy`). Settings that are in no result, e.g.
    `recipe.lr`, have their dotted name. Runs that are not done have empty fields.
    """
    counted = {run.name: group for group in report.groups for run in (*group.runs, *group.duplicates)}
    records = [_run(run, counted[run.name]) for run in report.collection.runs]
    heads = dict.fromkeys(key for one in records for key in one)
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(heads), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return stream.getvalue()


def _run(run: RunEntry, group: Group) -> dict[str, Any]:
    found: dict[str, Any] = {
        "run": run.name,
        "state": run.state,
        "error": run.error,
        "counts": run in group.done,
        "setting": group.label,
    }
    for key in ("method", "data", "student", "num_branches", "num_teachers", "fraction", "seed"):
        found[key] = run.get(key)
    for key, value in (run.result or {}).items():
        flatten(value, key, found)
    return found | {key: value for key, value in setups.settings(run).items() if not isinstance(value, list)}


def flatten(value: Any, name: str, into: dict[str, Any]) -> None:
    """Puts a field of a result into a flat record, nested lists and mappings as several columns."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            flatten(item, f"{name}_{key}", into)
    elif isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        into[name] = " ".join(value)
    elif isinstance(value, list):
        for position, item in enumerate(value):
            flatten(*_named(item, name, position), into)
    else:
        into[name] = value


def _named(item: Any, name: str, position: int) -> tuple[Any, str]:
    """An element and the name of its columns."""
    for key in ("branches", "threshold"):
        if isinstance(item, Mapping) and key in item:
            what = item[key]
            word = "+".join(map(str, what)) if isinstance(what, list) else f"{what}"
            return {k: v for k, v in item.items() if k != key}, f"{name}_{word}"
    return item, f"{name}_{position}"


def summary_json(content: Mapping[str, Any]) -> str:
    """Text of summary.json."""
    return json.dumps(content, indent=1, allow_nan=False) + "\n"
