"""What the page leads with, as HTML: the answer in words, a table of verdicts, failed runs and notes."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from ekd_lightning.reporting.answer import Answer, Finding
from ekd_lightning.reporting.answer_words import ROLES
from ekd_lightning.reporting.page_data import short_paths
from ekd_lightning.reporting.report import Report

_OPEN = 4
"""Answers, or notes, that are shown at once; further ones are folded."""
_MOST_COLUMNS = 8
_LONG = 240
_MARKS = {"ahead": ("up", "▲ ahead"), "behind": ("down", "▼ behind"), "undecided": ("", "≈ undecided")}


def answers(report: Report) -> str:
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


def alarm(report: Report) -> str:
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
