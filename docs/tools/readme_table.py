"""Writes the README's table of results, between its two marks, from the records of the studies.

    python docs/tools/readme_table.py docs/results/study README.md

The table shows the block of limited data with most rows, and the best other method at no more cost. `make study-pages`
calls this.
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

from ekd_lightning import markdown as md
from ekd_lightning.files import write_text
from ekd_lightning.reporting.estimates import interval_text, percent
from ekd_lightning.reporting.report import Report, make_report
from ekd_lightning.reporting.study_pages import LIMITED, lead, made_on, standings
from ekd_lightning.runs.collection import collect

START, END = "<!-- first-result -->\n", "<!-- /first-result -->"
NAMES = {
    "ce": "labels alone (`ce`)",
    "kd_mean": "plain distillation (`kd_mean`)",
    "kd_mean_maps": "the same, imitating maps of every stage, too (`kd_mean_maps`)",
    "kd_mean_macs": "plain distillation, larger student (`kd_mean_macs`)",
    "ekd": "**EKD** (`ekd`)",
    "ekd_pooled": "EKD with early branches and pooled features (`ekd_pooled`)",
}
"""Rows of the table, if the block has them, with their names there."""


def section(report: Report, folder: str) -> str:
    """The text between the marks.

    Args:
        report: The report on all records.
        folder: Path of the pages' folder, relative to the README.
    """
    found = [one for block in report.blocks for one in standings(block)]
    limited = [one for one in found if (one.block.fraction or 1.0) <= LIMITED]
    compared = [one for one in limited if one.best and one.side(one.best.label) != "too few runs"]
    one = max(compared, key=lambda s: (len(s.block.done), s.ekd.label == "ekd", s.ekd.label))
    block, best = one.block, one.best
    assert best is not None
    groups = {group.label: group for group in block.done}
    named = {**NAMES, one.ekd.label: NAMES.get(one.ekd.label, f"**EKD** ({md.code(one.ekd.label)})")}
    named.setdefault(best.label, f"the best other method at no more cost ({md.code(best.label)})")
    rows = [
        (
            md.Markdown(called),
            percent(groups[label].accuracy),
            f"{(groups[label].mean('macs') or 0) / 1e6:.1f} M",
            f"{(groups[label].mean('num_parameters') or 0) / 1e3:.0f} k",
        )
        for label, called in named.items()
        if label in groups
    ]
    counts = sorted({groups[label].n for label in named if label in groups})
    seeds = f"{counts[0]} seeds" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} seeds"
    intro = (
        f"{100 * (block.fraction or 1):g} % of {block.data}'s labels, {len(block.teachers)} pretrained teachers, "
        f"{block.protocol.steps or 0:,} steps, mean ± standard deviation over {seeds}; all {len(groups)} "
        f"rows, and the other studies, are in [{folder}]({folder}/README.md). "
        f"{made_on([groups[label] for label in named if label in groups])}"
    )
    cost = (best.mean("macs") or 0) / (one.ekd.mean("macs") or 1)
    said = (
        f"**{lead(found)}** In this table the best other method is {md.code(best.label)}, at {100 * cost:.0f} % of "
        f"EKD's cost; the difference (EKD minus this method) is {interval_text(one.against.get(best.label))} points."
    )
    table = md.table(("method", "test accuracy %", "MACs", "parameters"), rows)
    return f"{textwrap.fill(intro, 120)}\n\n{table}\n{textwrap.fill(said, 120)}\n\n"


def main(folder: str, readme: Path) -> None:
    """Replaces what stands between the marks of `readme`."""
    before, _, rest = readme.read_text(encoding="utf-8").partition(START)
    _, end, after = rest.partition(END)
    assert end, f"{readme}: lacks the marks {START.strip()} and {END}"
    report = make_report(collect(sorted(Path(folder).glob("*.jsonl"))))
    write_text(readme, f"{before}{START}{section(report, folder)}{END}{after}")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
