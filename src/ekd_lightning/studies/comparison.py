"""Comparison of a study's rows: the tables of the results, and what was not run."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ekd_lightning import markdown as md
from ekd_lightning.config.commands import typed
from ekd_lightning.config.output import print_wide, terminal_width
from ekd_lightning.files import write_text
from ekd_lightning.reporting import tables
from ekd_lightning.reporting.blocks import Block, block_of_rows
from ekd_lightning.runs.directory import RunState
from ekd_lightning.studies.declaration import Declaration, require_declared
from ekd_lightning.studies.study import Runs, Study, every_run, read_runs, read_study

REFERENCES = ("ce", "ekd")
"""Rows that the others are compared with, if a study has them."""
_COUNTED = (RunState.FAILED, RunState.PARTIAL, RunState.STOPPED, RunState.RUNNING, RunState.PLANNED)
_COST = ("num_parameters", "num_adapter_parameters", "macs", "steps", "train_seconds")
_OWN = ("label", "method", "student", "seeds", "differences", "test_accuracy_interval", "running", "stopped")


def report(study: Study, folder: Path) -> bool:
    """Writes comparison.csv, .md and .json, and prints the table.

    Returns:
        Whether all runs are done.

    Raises:
        UserError: If runs cannot be compared.
    """
    found = read_runs(study, folder)
    settings = {row.name: row.settings for row in study.rows}
    flat, page, printed, width = [], ["# Comparison\n", tables.LEGEND], [], terminal_width()
    for fraction, runs in found.items():
        block = block_of_rows(study.data, fraction, {row: [*own.values()] for row, own in runs.items()}, study.deciding)
        rows = study_rows(block)
        flat += records(block, rows, runs, settings)
        page += [f"## {md.prose(block.title)}\n", tables.markdown(rows, tables.STUDY, settings)]
        printed.append(tables.printed_table(block.title, rows, width))
    write_text(folder / "comparison.md", "\n".join(page))
    write_text(folder / "comparison.json", json.dumps(flat, indent=1) + "\n")
    without = [{key: value for key, value in one.items() if key != "by_seed"} for one in flat]
    write_text(folder / "comparison.csv", tables.csv_text(without))
    print_wide(*printed, tables.LEGEND)
    states = Counter(run.state for run in every_run(found))
    counts = ", ".join(f"{count} {tables.STATE_NAMES[state]}" for state, count in states.most_common())
    print(f"{typed(folder)}: {counts}")
    return set(states) == {RunState.DONE}


def not_run(declared: Declaration, folder: Path) -> list[str]:
    """The runs of a declared study that are not done, a line for each part that lacks some.

    Raises:
        UserError: If a part's study was begun with another version of the declaration.
    """
    lines = []
    for part in declared.parts:
        study, count = read_study(folder / part.name), sum(len(row.seeds) for row in declared.rows)
        if study:
            require_declared(study, declared, part)
        found = read_runs(study, folder / part.name)[part.fraction] if study else {}
        done = {row: {s for s, run in own.items() if run.state is RunState.DONE} for row, own in found.items()}
        missing = {row.name: len({*row.seeds} - done.get(row.name, set())) for row in declared.rows}
        if left := sum(missing.values()):
            rows = ", ".join(f"{row} {number}" for row, number in missing.items() if number)
            share = f"all {count} runs" if left == count else f"{left} of {count} runs ({rows})"
            lines.append(f"{part.name}: {share}")
    return lines


def study_rows(block: Block) -> list[tables.Row]:
    """The rows of a study's block, with their differences to the rows of `REFERENCES` that it has."""
    labels = [group.label for group in block.groups]
    return tables.rows(block, [name for name in REFERENCES if name in labels])


def records(block: Block, rows: Sequence[tables.Row], runs: Runs, settings: Mapping[str, str]) -> list[dict[str, Any]]:
    """The rows of a study's block as flat records, accuracies and differences in [0, 1] and [-1, 1]."""
    made = []
    for row in rows:
        full, name = tables.record(row), row.group.label
        own = runs[name]
        one: dict[str, Any] = {"data": block.data, "fraction": block.fraction, "row": name}
        one |= {key: value for key, value in full.items() if key not in _OWN}
        one |= {key: full.get(key) for key in _COST}
        for reference in row.differences:
            minus = full["differences"].get(reference) or dict.fromkeys(("mean", "n", "half_width", "p", "p_holm"))
            one |= {f"minus_{reference}_{key}".removesuffix("_mean"): value for key, value in minus.items()}
        chain = row.group.values("chain_stored_seconds")
        one["assistants_seconds"] = chain.mean if chain else None
        counts = Counter(other.state for other in own.values())
        one |= {tables.STATE_NAMES[state]: counts[state] for state in _COUNTED}
        one["problems"] = tables.problems(row.group) or None
        one["settings"] = settings.get(name) or "defaults"
        one["by_seed"] = {
            str(seed): other.get("test_accuracy") if other.state is RunState.DONE else tables.STATE_NAMES[other.state]
            for seed, other in sorted(own.items())
        }
        made.append(one)
    return made
