"""A report as text: Markdown tables per block, and one tidy CSV of all runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ekd_lightning.reporting import setups, tables
from ekd_lightning.reporting.blocks import Block
from ekd_lightning.reporting.groups import Group
from ekd_lightning.reporting.report import Report
from ekd_lightning.runs.collection import RunEntry


def markdown(report: Report) -> str:
    """The whole report as a Markdown page."""
    parts = [f"# {tables.prose(report.title)}\n", f"{tables.prose(report.lead)}\n"]
    for block in report.blocks:
        parts += [
            f"## {tables.prose(block.title)}\n",
            *_answer(report, block),
            tables.markdown(tables.rows(block, report.references(block))),
        ]
    parts += ["## How to read the tables\n", tables.LEGEND]
    parts += [f"Made on: {tables.prose('; '.join(report.machines) or 'no run is done')}.\n"]
    if report.notes:
        parts += ["## Notes\n", "".join(f"- {tables.prose(note)}\n" for note in report.notes)]
    parts += _not_done(report)
    return "\n".join(parts)


def _answer(report: Report, block: Block) -> list[str]:
    found = next((one for one in report.answers if one.block.key == block.key), None)
    if found is None:
        return ["No run is done here.\n"]
    sentences = [*(finding.sentence for finding in found.findings), *found.remarks]
    return [
        f"{tables.prose(found.headline)}\n",
        "".join(f"- {tables.prose(sentence)}\n" for sentence in sentences),
    ]


def _not_done(report: Report) -> list[str]:
    left = [(run, group) for group in report.groups for run in group.others]
    if not left:
        return []
    lines = ["| run | setting | seed | state | error |", "|---|---|---|---|---|"]
    for run, group in sorted(left, key=lambda pair: pair[0].name):
        texts = [run.name, f"`{group.label}`", str(run.get("seed")), run.state, tables.prose(run.error or "")]
        lines.append(f"| {' | '.join(map(tables.cell, texts))} |")
    return ["## Runs that do not count\n", "\n".join(lines) + "\n"]


def runs_csv(report: Report) -> str:
    """One row per run, every field of the results a column.

    Lists become one column per element (`test_branch_accuracy_0`), those of operating points are named after what
    they are (`test_subsets_0+2_accuracy`, `test_early_exit_0.9_accuracy`). Settings that are in no result, e.g.
    `recipe.lr`, have their dotted name. Runs that are not done have empty fields.
    """
    counted = {run.name: group for group in report.groups for run in (*group.runs, *group.duplicates)}
    records = [_run(run, counted[run.name]) for run in report.collection.runs]
    return tables.csv_text(records)


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
