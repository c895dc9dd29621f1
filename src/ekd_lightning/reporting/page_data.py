"""What the page is given: all groups and runs as plain values, small enough for thousands of runs."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ekd_lightning.reporting import details
from ekd_lightning.reporting.blocks import Block, families, grid_name
from ekd_lightning.reporting.details import Point, early_exits, own_teachers, subsets
from ekd_lightning.reporting.estimates import Difference, Estimate
from ekd_lightning.reporting.groups import Group, differences
from ekd_lightning.reporting.report import Report
from ekd_lightning.runs.collection import RunEntry
from ekd_lightning.runs.directory import PROVENANCE
from ekd_lightning.runs.protocol import Protocol

MAIN = "main"
"""Name of the reference that the report takes for a block; further ones go by their label."""
CONTROLS = ("ekd", "ce", "kd_mean", "kd_mean_feature", "branched_ce", "ekd_mean")
"""Methods that a reader may want differences to, too."""
_MOST_REFERENCES = 8
_DIGITS = 6
_LONG = 400
"""Characters of a list or mapping that are still shown in a run's record."""
_FOLDERS = re.compile(r"(?<![\w.…/<])/(?:[\w.+@~=-]+/)+")


@dataclass(frozen=True)
class PageData:
    """Plain values, ready for JSON.

    Attributes:
        payload: What tables and charts need at once.
        details: The record of each run, by its id, unpacked when a reader asks for one.
    """

    payload: dict[str, Any]
    details: dict[str, Any]


def page_data(report: Report, palette: Mapping[str, Sequence[str]]) -> PageData:
    """Gathers what the page shows.

    Args:
        report: What is known of the runs.
        palette: Colours of methods on light and on dark ground.
    """
    ids = {run.name: f"r{position}" for position, run in enumerate(report.collection.runs)}
    members = enumerate(families(report.blocks).values())
    family_of = {block.key: position for position, own in members for block in own}
    subjects = {told.block.key: told.subject.label for told in report.answers if told.subject}
    groups, names = [], []
    for block in report.blocks:
        found = _differences(block, report.reference.get(block.key))
        names += list(found)
        for one in block.groups:
            subject = one.label == subjects.get(block.key)
            groups.append(_group(one, block, found, ids) | {"family": family_of.get(block.key), "subject": subject})
    payload = {
        "labels": report.ordered_labels,
        "references": _references(names, report.reference),
        "palette": {name: list(colours) for name, colours in palette.items()},
        "blocks": [{"key": block.key, "title": block.title} for block in report.blocks],
        "groups": groups,
        "runs": [_run(run, ids[run.name]) for run in report.collection.runs],
    }
    return PageData(payload, {ids[run.name]: _details(run) for run in report.collection.runs})


def _differences(block: Block, main: str | None) -> dict[str, tuple[str, dict[str, Difference]]]:
    """Name of a reference -> its label, and the differences to it by label."""
    labels = [group.label for group in block.done if group.method in CONTROLS and group.label != main]
    wanted = ([(MAIN, main)] if main else []) + [(label, label) for label in labels[:_MOST_REFERENCES]]
    return {name: (label, differences(block.done, label)) for name, label in wanted if label}


def _references(names: Sequence[str], main: Mapping[str, str]) -> list[dict[str, Any]]:
    """The references that a reader may choose: that of the report, then the others, those of more blocks first."""
    labels = set(main.values())
    many = len(labels) > 1
    text = "the reference of each block" if many else next(iter(labels), "")
    others = sorted(dict.fromkeys(names), key=lambda name: -names.count(name))
    return [{"key": name, "text": text if name == MAIN else name, "many": many and name == MAIN} for name in others]


def _group(
    group: Group, block: Block, references: Mapping[str, tuple[str, Mapping[str, Difference]]], ids: Mapping[str, str]
) -> dict[str, Any]:
    arrays = details.read_arrays(group)
    return {
        "id": f"{block.key}/{group.label}",
        "block": block.key,
        "label": group.label,
        "grid": grid_name(group),
        "data": group.data,
        "method": group.method,
        "fraction": None if group.fraction is None else plain(group.fraction),
        "images": group.protocol.num_images,
        "student": group.student,
        "teachers": group.num_teachers,
        "branches": group.num_branches,
        "n": group.n,
        "failed": sum(run.state == "failed" for run in group.others),
        "runs": [ids[run.name] for run in (*group.runs, *group.duplicates)],
        "metrics": {key: one(value) for key, value in group.scalars().items()},
        "reference_of": [name for name, (label, _) in references.items() if label == group.label],
        "differences": {
            name: _difference(found[group.label], label)
            for name, (label, found) in references.items()
            if group.label in found
        },
        "branch_accuracy": [one(value) for value in group.per_item("test_branch_accuracy")],
        "subsets": [_point(point) for point in subsets(group)],
        "exits": [_point(point) for point in early_exits(group)],
        "severity": [one(value) for value in group.per_item("corruption_accuracy_by_severity")],
        "clean": one(clean) if (clean := group.values("corruption_clean_accuracy")) else None,
        "corrupted": group.corrupted,
        "curves": {
            name: [[epoch, plain(e.mean), plain(e.half), e.n] for epoch, e in points]
            for name, points in details.curves(group).items()
        },
        "reliability": _reliability(arrays),
        "cka": _cka(group),
        "own_teachers": own_teachers(group),
    }


def one(value: Estimate) -> dict[str, Any]:
    """An estimate as a mapping."""
    return {"mean": plain(value.mean), "half": plain(value.half), "n": value.n}


def plain(value: float | None) -> float | int | None:
    """A number as JSON knows it, with six digits; None for what is none."""
    if value is None or not math.isfinite(value):
        return None
    return int(value) if float(value).is_integer() and abs(value) < 2**53 else float(f"{value:.{_DIGITS}g}")


def _difference(found: Difference, label: str) -> dict[str, Any]:
    return {"to": label, "mean": plain(found.mean), "half": plain(found.half), "n": found.n, "p": plain(found.p_holm)}


def _point(point: Point) -> dict[str, Any]:
    name = {"branches": list(point.name)} if isinstance(point.name, tuple) else {"threshold": plain(point.name)}
    return {
        **name,
        "accuracy": one(point.accuracy),
        "macs": plain(point.macs),
        "num_parameters": plain(point.num_parameters),
        "mean_branches": plain(point.mean_branches),
    }


def _reliability(arrays: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    found = {
        name: [
            {"confidence": plain(b.confidence), "accuracy": one(b.accuracy), "share": plain(b.share)}
            for b in details.reliability(arrays, suffix)
        ]
        for name, suffix in (("before", ""), ("after", "_calibrated"))
    }
    have = {name: bins for name, bins in found.items() if bins}
    return {**have, "n": len(arrays)} if have else None


def _cka(group: Group) -> dict[str, Any] | None:
    found = {
        name: [[plain(value) for value in row] for row in matrix.tolist()]
        for name, key in (("branch", "test_branch_cka"), ("teacher", "test_branch_teacher_cka"))
        if (matrix := group.array(key)) is not None and matrix.ndim == 2 and matrix.size
    }
    runs = sum(run.get("test_branch_cka") is not None for run in group.done)
    return {**found, "n": runs} if found else None


def _run(run: RunEntry, key: str) -> dict[str, Any]:
    fields = {
        "data": "data",
        "method": "method",
        "fraction": "fraction",
        "student": "student",
        "teachers": "num_teachers",
        "branches": "num_branches",
        "seed": "seed",
        "accuracy": "test_accuracy",
        "seconds": "train_seconds",
    }
    values = {name: run.get(field) for name, field in fields.items()}
    numbers = {name: plain(value) if isinstance(value, float) else value for name, value in values.items()}
    return {
        "id": key,
        "name": run.name,
        "state": run.state,
        "error": run.error and short_paths(run.error),
        "images": Protocol.of(run).num_images,
        **numbers,
    }


def _details(run: RunEntry) -> dict[str, Any]:
    """Everything that was recorded of a run; what is unreadable is left out."""
    return {
        "config": _text(run.on_disk.config_path),
        "result": {key: _short(value) for key, value in (run.result or {}).items()},
        "provenance": _text(run.on_disk.file(PROVENANCE)),
    }


def _text(path: Path | None) -> str | None:
    try:
        return None if path is None else short_paths(path.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return None


def short_paths(text: str) -> str:
    """Takes the folders from absolute paths: a page is made to be shown, a machine's folders are not."""
    return _FOLDERS.sub("…/", text)


def _short(value: Any) -> Any:
    """A value of a record; of long lists and mappings only how long they are."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, (list, dict)) and len(str(value)) > _LONG:
        return f"({len(value)} entries, in result.json)"
    return short_paths(value) if isinstance(value, str) else value
