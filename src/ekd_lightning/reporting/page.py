"""Page of a report: one HTML file that needs neither a network nor other files.

Everything from records is escaped text or JSON, never markup.
"""

from __future__ import annotations

import base64
import gzip
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from jinja2.utils import htmlsafe_json_dumps

from ekd_lightning import __version__
from ekd_lightning.reporting import details, tables
from ekd_lightning.reporting.answer import METHODS, ROLES, Answer, judge
from ekd_lightning.reporting.blocks import Block, families, grid_name
from ekd_lightning.reporting.estimates import Difference, Estimate, interval, listed, plural, points, share
from ekd_lightning.reporting.figure_style import DARK, LIGHT
from ekd_lightning.reporting.groups import Group, differences
from ekd_lightning.reporting.report import Report
from ekd_lightning.runs.collection import STATES, RunEntry
from ekd_lightning.runs.directory import PROVENANCE
from ekd_lightning.runs.protocol import Protocol

_SCRIPTS = (
    *("base.js", "table.js", "filters.js", "columns.js", "rows.js", "runs.js"),
    *("chart_frame.js", "charts_accuracy.js", "charts_cost.js", "charts_detail.js", "charts_closer.js", "page.js"),
)
MAIN = "main"
"""Key of a block's own reference; other references have their labels as keys."""
CONTROLS = ("ekd", "ekd_pooled", "ce", "kd_mean", "kd_mean_maps", "kd_mean_feature", "branched_ce", "ekd_mean")
"""Methods that a reader may choose as references."""
_MOST_REFERENCES = 8
_LONG = 400
"""Longest list or mapping that a run's record shows, in characters."""
_FOLDERS = re.compile(r"(?<![\w.…/<])/(?:[\w.+@~=-]+/)+")
_MOST_COLUMNS = 8
_MOST_OVERVIEW = 10
_COSTS = ("MACs", "parameters", "train s", "n")
"""Columns of the first table beside accuracies."""
_MARKS = {
    "ahead": ("up", "▲ ahead"),
    "behind": ("down", "▼ behind"),
    "undecided": ("", "≈ undecided"),
    "not_enough": ("", "too few runs"),
}


def page(report: Report) -> str:
    """The page as text; needs plotly."""
    from plotly.offline import get_plotlyjs  # noqa: PLC0415

    compared = [answer for answer in report.answers if answer.findings][:_MOST_COLUMNS]
    shown = {finding.role for answer in compared for finding in answer.findings}
    states = [f"{count:,} {state}" for state in STATES if (count := report.collection.count(state))]
    values = {
        "report": report,
        "compared": compared,
        "overview": overview(report, report.answers[0]) if len(report.answers) == 1 else [],
        "roles": {role: name for role, name in ROLES.items() if role in shown},
        "marks": _MARKS,
        "states": ", ".join(states),
        "settings": sum(1 for group in report.groups if group.n),
        "version": __version__,
        "css": _asset("page.css"),
        "theme_js": _asset("theme.js"),
        "js": '(() => {\n"use strict";\n' + "\n".join(_asset(name) for name in _SCRIPTS) + "})();",
        "payload": script_json(payload(report)),
        "details": pack(script_json(records(report))),
        "plotly": pack(get_plotlyjs()),
    }
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    functions = {"plural": plural, "points": points, "short_paths": short_paths}
    return environment.from_string(_asset("page.html"), functions).render(values)


def overview(report: Report, answer: Answer) -> list[dict[str, Any]]:
    """Rows of the first table, by accuracy: EKD, the settings it is compared with, and the most accurate others.

    Differences and verdicts come from the answer's comparisons, or else from the table of results, whose p values are
    corrected for the comparisons of all its rows.
    """
    subject = answer.subject
    if subject is None:
        return []
    compared = {subject.label, *(finding.other.label for finding in answer.findings)}
    done = [row for row in report.rows[answer.block.key] if row.group.n]
    ordered = sorted(done, key=lambda row: -row.group.mean_accuracy)
    first = sorted(ordered, key=lambda row: row.group.label not in compared)[:_MOST_OVERVIEW]
    shown = []
    for row in (row for row in ordered if row in first):
        findings = [finding for finding in answer.findings if finding.other.label == row.group.label]
        difference = findings[0].difference if findings else row.differences.get(subject.label)
        if difference and not findings:  # of the setting minus EKD
            difference = replace(difference, mean=-difference.mean)
        roles = listed([ROLES[finding.role] for finding in findings])
        shown.append(
            {
                "group": row.group,
                "subject": row.group is subject,
                "words": roles or METHODS.get(row.group.method, ""),
                "accuracy": share(row.group.mean_accuracy),
                "interval": _ends(row.group.accuracy, share),
                "difference": points(difference.mean) if difference else "",
                "between": _ends(difference, points),
                "verdict": "" if row.group is subject else judge(difference),
                "numbers": tables.cells(row, _COSTS),
            }
        )
    return shown


def _ends(value: Estimate | None, words: Callable[[float], str]) -> str:
    return interval(value, words) if value and value.half is not None else ""


def _asset(name: str) -> str:
    return (resources.files("ekd_lightning.reporting") / "assets" / name).read_text(encoding="utf-8")


def script_json(content: Any) -> str:
    """JSON that is safe inside a script element: without `<`, so text cannot end the element or begin a comment.

    Raises:
        ValueError: If a number is not finite.
    """
    return htmlsafe_json_dumps(content, separators=(",", ":"), allow_nan=False)


def pack(text: str) -> str:
    """Base64 of gzip, which the page unpacks: a third of the size, and never markup."""
    return base64.b64encode(gzip.compress(text.encode(), compresslevel=9, mtime=0)).decode()


def payload(report: Report) -> dict[str, Any]:
    """The data of tables and charts as plain values, small enough for thousands of runs."""
    family_of = {block.key: position for position, own in enumerate(families(report.blocks)) for block in own}
    subjects = {answer.block.key: answer.subject.label for answer in report.answers if answer.subject}
    groups, names = [], []
    for block in report.blocks:
        found = _differences(block, report.reference.get(block.key))
        names += list(found)
        for one in block.groups:
            of_block = {"id": f"{block.key}/{one.label}", "block": block.key, "family": family_of.get(block.key)}
            subject = one.label == subjects.get(block.key)
            groups.append({**of_block, "subject": subject, **_group(one, found)})
    content = {
        "labels": report.ordered_labels,
        "references": _references(names, report.reference),
        "palette": {"light": LIGHT, "dark": DARK},
        "blocks": [{"key": block.key, "title": block.title} for block in report.blocks],
        "groups": groups,
        "runs": [_run(run) for run in report.collection.runs],
    }
    return dict(plain(content))


def records(report: Report) -> dict[str, Any]:
    """The record of each run, by its name; unpacked when a reader opens one."""
    return {
        run.name: {
            "config": _text(run.on_disk.config_path),
            "result": {key: _short(value) for key, value in (run.result or {}).items()},
            "provenance": _text(run.on_disk.file(PROVENANCE)),
        }
        for run in report.collection.runs
    }


def _differences(block: Block, main: str | None) -> dict[str, tuple[str, dict[str, Difference]]]:
    """Name of a reference -> its label, and the differences to it by label."""
    labels = [group.label for group in block.done if group.method in CONTROLS and group.label != main]
    wanted = ([(MAIN, main)] if main else []) + [(label, label) for label in labels[:_MOST_REFERENCES]]
    return {name: (label, differences(block.done, label)) for name, label in wanted if label}


def _references(names: Sequence[str], main: Mapping[str, str]) -> list[dict[str, Any]]:
    """The references that a reader may choose: the report's, then the others, the most frequent first."""
    labels = set(main.values())
    many = len(labels) > 1
    text = "the reference of each block" if many else next(iter(labels), "")
    others = sorted(dict.fromkeys(names), key=lambda name: -names.count(name))
    return [{"key": name, "text": text if name == MAIN else name, "many": many and name == MAIN} for name in others]


def _group(group: Group, references: Mapping[str, tuple[str, Mapping[str, Difference]]]) -> dict[str, Any]:
    return {
        "label": group.label,
        "setting": group.setting,
        "unlabelled": group.only("num_unlabelled_images") or 0,
        "grid": grid_name(group),
        "data": group.protocol.data,
        "method": group.method,
        "fraction": group.protocol.fraction,
        "images": group.protocol.num_images,
        "student": group.student,
        "teachers": group.num_teachers,
        "branches": group.num_branches,
        "n": group.n,
        "failed": sum(run.state == "failed" for run in group.others),
        "runs": [run.name for run in (*group.runs, *group.duplicates)],
        "metrics": group.scalars(),
        "reference_of": [name for name, (label, _) in references.items() if label == group.label],
        "differences": {
            name: {"to": label, **_figure(one), "p": one.p_holm}
            for name, (label, found) in references.items()
            if (one := found.get(group.label))
        },
        "branch_accuracy": group.per_item("test_branch_accuracy"),
        "subsets": details.subsets(group),
        "exits": details.early_exits(group),
        "severity": group.per_item("corruption_accuracy_by_severity"),
        "corrupted": group.corrupted,
        "curves": {
            name: [{"x": epoch, "figure": one} for epoch, one in line] for name, line in details.curves(group).items()
        },
        "reliability": _reliability(details.read_arrays(group)),
        "cka": _cka(group),
        "own_teachers": details.own_teachers(group),
    }


def _figure(value: Estimate) -> dict[str, float | None]:
    """Mean, ends of the interval (None without one) and number of runs."""
    low, high = (None, None) if value.half is None else (value.low, value.high)
    return {"mean": value.mean, "low": low, "high": high, "n": value.n}


def plain(value: Any) -> Any:
    """A value for JSON: numbers with six digits, null for NaN and infinity, estimates and points as mappings."""
    if isinstance(value, Estimate):
        value = _figure(value)
    elif isinstance(value, (details.Point, details.Bin)):
        value = vars(value)
    if isinstance(value, Mapping):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    if not isinstance(value, float):
        return value
    if not math.isfinite(value):
        return None
    return int(value) if value.is_integer() and abs(value) < 2**53 else float(f"{value:.6g}")


def _reliability(arrays: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    found = zip(("before", "after"), details.SUFFIXES, strict=True)
    have = {name: bins for name, suffix in found if (bins := details.reliability(arrays, suffix))}
    return {**have, "n": len(arrays)} if have else None


def _cka(group: Group) -> dict[str, Any] | None:
    keys = {"branch": "test_branch_cka", "teacher": "test_branch_teacher_cka"}
    found = {name: values.tolist() for name, key in keys.items() if (values := details.matrix(group, key)) is not None}
    runs = sum(run.get("test_branch_cka") is not None for run in group.done)
    return {**found, "n": runs} if found else None


def _run(run: RunEntry) -> dict[str, Any]:
    return {
        "name": run.name,
        "state": run.state,
        "error": run.error and short_paths(run.error),
        "images": Protocol.of(run).num_images,
        **{name: run.get(name) for name in ("data", "method", "fraction", "student", "seed")},
        "teachers": run.get("num_teachers"),
        "branches": run.get("num_branches"),
        "accuracy": run.get("test_accuracy"),
        "seconds": run.get("train_seconds"),
    }


def _text(path: Path | None) -> str | None:
    try:
        return None if path is None else short_paths(path.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return None


def short_paths(text: str) -> str:
    """Removes the folders of absolute paths, which are private to a machine."""
    return _FOLDERS.sub("…/", text)


def _short(value: Any) -> Any:
    """A value of a record; only the length of long lists and mappings."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, (list, dict)) and len(str(value)) > _LONG:
        return f"({len(value)} entries, in result.json)"
    return short_paths(value) if isinstance(value, str) else value
