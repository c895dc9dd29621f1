"""Page of a report: one HTML file that needs nothing but itself, no network, no files beside it."""

from __future__ import annotations

import base64
import gzip
import json
import re
from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from ekd_lightning.errors import UserError
from ekd_lightning.files import write_text
from ekd_lightning.reporting import figure_style
from ekd_lightning.reporting.answer import Answer, Finding
from ekd_lightning.reporting.answer_words import ROLES
from ekd_lightning.reporting.page_data import page_data, short_paths
from ekd_lightning.reporting.report import Report
from ekd_lightning.runs.collection import STATES

_SCRIPTS = (
    "base.js",
    "table.js",
    "filters.js",
    "columns.js",
    "rows.js",
    "runs.js",
    "chart_frame.js",
    "charts_accuracy.js",
    "charts_cost.js",
    "charts_detail.js",
    "charts_closer.js",
    "page.js",
)
_OPEN = 4
"""Answers, or notes, that are shown at once; further ones are folded."""
_MOST_COLUMNS = 8
_LONG = 240
_MARKS = {"ahead": ("up", "▲ ahead"), "behind": ("down", "▼ behind"), "undecided": ("", "≈ undecided")}
_NOTES = """\
<ul>
<li>One row is one setting: runs that differ in their seed alone. n is the number of runs that are done; failed,
partial and running ones never count.</li>
<li>Brackets are Student’s 95 % t interval for the mean over seeds. It says how much seeds matter, not how well the
test set stands for the world. With one run there is no interval, and no bar.</li>
<li>Differences are paired: the same seed, hence the same subset and order, on both sides. p is that of the paired
t-test, corrected by Holm’s method over the settings of a block. ▲ and ▼ mark differences
whose corrected p is below 0.05.</li>
<li>Settings are compared only inside a block: same data, subset, views, epochs, batch size, steps, precision, and
teachers from one pool.</li>
<li>Accuracy is that of the last epoch on the test set. Which setting speaks for EKD, and which for a control, is
chosen by validation accuracy; the best other method by test accuracy, and its p is corrected for that choice.</li>
<li>The view (filters, text) is kept in the page’s address, and can be sent as a link to the file.</li>
</ul>
"""


def write_page(report: Report, path: Path) -> None:
    """Writes the page to an `.html` file in a folder that exists.

    Raises:
        UserError: Without plotly.
    """
    write_text(path, page(report))


def page(report: Report) -> str:
    """The page as text; everything that runs have recorded is in it as escaped text or JSON, never as markup.

    Raises:
        UserError: Without plotly.
    """
    data = page_data(report, {"light": figure_style.LIGHT, "dark": figure_style.DARK})
    return _fill(
        _asset("page.html"),
        title=escape(report.title),
        subtitle=escape(_subtitle(report)),
        css=_asset("page.css"),
        theme_js=_asset("theme.js"),
        answer=_answers(report),
        alarm=_alarm(report),
        notes=_NOTES + f"<p>Made on: {escape('; '.join(report.machines) or 'no run is done')}.</p>",
        footer=_footer(),
        payload=script_json(data.payload),
        details=pack(script_json(data.details)),
        js='(() => {\n"use strict";\n' + "\n".join(_asset(name) for name in _SCRIPTS) + "})();",
        plotly=pack(plotly_js()),
    )


def _answers(report: Report) -> str:
    """The answer: all blocks in a sentence and a table, then each block; what it rests on is folded."""
    told = report.answers
    if not told:
        return f"<p class='lead'>{escape(report.lead)}</p>"
    shown = [_answer(answer, titled=len(told) > 1) for answer in told]
    size = "lead" if len(report.lead) < _LONG else "strong"
    lead = f"<p class='{size}'>{escape(report.lead)}</p>" if len(told) > 1 else ""
    folded = shown[_OPEN:]
    more = f"<details><summary>{len(folded)} more</summary>{''.join(folded)}</details>" if folded else ""
    return lead + _verdicts(told) + "".join(shown[:_OPEN]) + more


def _answer(answer: Answer, *, titled: bool) -> str:
    """One block; of several, only what leads is unfolded."""
    title = answer.block.title
    head = "" if answer.headline.startswith(title) else f"<h3>{escape(title)}</h3>"
    findings = "".join(f"<li>{escape(finding.sentence)}</li>" for finding in answer.findings)
    remarks = "".join(f"<li>{escape(remark)}</li>" for remark in answer.remarks)
    size = "strong" if titled else "lead"
    folded = "" if titled else " open"
    parts = [
        f"<details{folded}><summary>{name}</summary><ul>{items}</ul></details>"
        for name, items in (("Comparisons", findings), ("Cost, choices and caveats", remarks))
        if items
    ]
    return f"{head}<p class='{size}'>{escape(answer.headline)}</p>{''.join(parts)}"


def _alarm(report: Report) -> str:
    """What a reader has to know before the numbers: failed runs, and files that were left out."""
    failed = report.collection.count("failed")
    told = []
    if failed:
        runs = "1 run" if failed == 1 else f"{failed:,} runs"
        told.append(f"<p><strong>{runs} failed</strong>: <a href='#runs' id='to-failed'>see why</a>.</p>")
    failures = f"<div class='alarm'>{''.join(told)}</div>" if told else ""
    notes = "".join(f"<li>{escape(short_paths(note))}</li>" for note in report.notes)
    folded = " open" if len(report.notes) <= _OPEN else ""
    count = len(report.notes)
    more = f"<details{folded}><summary>Notes on the runs ({count})</summary><ul>{notes}</ul></details>"
    return failures + (f"<div class='notes'>{more}</div>" if notes else "")


def _verdicts(told: Sequence[Answer]) -> str:
    """EKD against each control in each block, at a glance; empty where no block has a comparison."""
    shown = [answer for answer in told if answer.findings][:_MOST_COLUMNS]
    found = [{finding.role: finding for finding in answer.findings} for answer in shown]
    roles = [role for role in ROLES if any(role in one for one in found)]
    if not roles:
        return ""
    heads = "".join(f"<th scope='col' class='plain'>{escape(answer.block.title)}</th>" for answer in shown)
    lines = "".join(
        f"<tr><th scope='row'>{escape(ROLES[role])}</th>{''.join(_verdict(one.get(role)) for one in found)}</tr>"
        for role in roles
    )
    return (
        "<div class='scroll' tabindex='0' role='region' aria-label='EKD against each control'><table id='verdicts'>"
        "<caption>EKD minus the control, in points of test accuracy</caption>"
        f"<thead><tr><th scope='col' class='plain'>EKD against</th>{heads}</tr></thead><tbody>{lines}</tbody>"
        "</table></div>"
    )


def _verdict(finding: Finding | None) -> str:
    if finding is None:
        return "<td class='soft'>no such run</td>"
    difference = finding.difference
    value = "" if difference is None else f"{100 * difference.mean:+.2f}".replace("-", "−")
    kind, mark = _MARKS.get(finding.verdict, ("", "not enough runs"))
    n = "" if difference is None else f", n = {difference.n}"
    who = f"<span class='sub'>{escape(finding.other.label)}{n}</span>"
    return f"<td title='{escape(finding.sentence)}'><span class='{kind}'>{mark}</span> {value}{who}</td>"


def _fill(template: str, **values: str) -> str:
    """Puts values into `{{name}}`, in one go: what a value contains is never looked at again."""
    return re.sub(r"\{\{(\w+)\}\}", lambda found: values[found[1]], template)


def _asset(name: str) -> str:
    return (resources.files("ekd_lightning.reporting") / "assets" / name).read_text(encoding="utf-8")


def script_json(content: Any) -> str:
    """JSON that may stand inside a script element: no `<`, so neither an end of it nor a comment, whatever the text.

    Raises:
        ValueError: If a number is not finite.
    """
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text


def pack(text: str) -> str:
    """Base64 of gzip; the page unpacks it. A third of the size, and nothing in it can be taken for markup."""
    return base64.b64encode(gzip.compress(text.encode(), compresslevel=9, mtime=0)).decode()


def plotly_js() -> str:
    """The plotting library of the page.

    Raises:
        UserError: Without plotly.
    """
    try:
        from plotly.offline import get_plotlyjs  # noqa: PLC0415
    except ImportError:
        raise UserError("the page needs plotly: pip install 'ekd-lightning[report]', or leave the page out") from None
    return str(get_plotlyjs())


def _subtitle(report: Report) -> str:
    states = {state: report.collection.count(state) for state in STATES}
    told = ", ".join(f"{count:,} {state}" for state, count in states.items() if count)
    settings = sum(1 for group in report.groups if group.n)
    return f"{len(report.collection.runs):,} runs ({told}), {settings:,} settings with results"


def _footer() -> str:
    from ekd_lightning import __version__  # noqa: PLC0415

    return f"<p>Made by ekd-report of ekd-lightning {escape(__version__)}. This file loads nothing from elsewhere.</p>"
