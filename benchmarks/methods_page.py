"""The page of a study of `ekd-compare` over many methods: docs/results/methods_*.{md,json}.

    ekd-compare --methods ... --fractions 0.1 --seeds 0,1,2 --output compare/c10 experiment=cifar10_limited ...
    python benchmarks/methods_page.py compare/c10 docs/results/methods_cifar10_10pct.md

    python benchmarks/methods_page.py docs/results/methods_cifar10_10pct.md --readme README.md

Every number comes from the runs' files. --readme writes the README's table from the records beside the page, and needs
no runs. Text between the two marks `<!-- notes -->` of an existing page was written by hand and is kept.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from page_parts import NOTES, bullets, difference, kept_notes, named, read_study_runs, setup, side, table

from ekd_lightning import markdown as md
from ekd_lightning.reporting import figure_style, figures
from ekd_lightning.reporting.blocks import Block
from ekd_lightning.reporting.estimates import TOO_FEW, interval_text, minus
from ekd_lightning.reporting.tables import Row
from ekd_lightning.studies.comparison import Runs, records, study_block, study_rows

FAMILIES = {
    "Supervised": ("ce", "ce_label_smoothing", "ce@resnet20"),
    "One teacher, plain student": (
        *("kd", "dkd", "kd_logit_std", "fitnet", "fitnet_two_stage", "attention"),
        *("fsp", "bss", "sp", "vid", "rkd", "crd", "takd"),
    ),
    "Several teachers, plain student": ("kd_mean", "kd_mean_feature", "ebkd", "aekd", "camkd"),
    "Branches without teachers": ("branched_ce", "dml", "one", "okddip"),
    "Teachers and branches": ("ekd", "ekd_mean", "hydra_heads"),
    "Variants and ablations of EKD": (
        *("ekd_permuted", "ekd_random", "ekd_no_feature", "ekd_branch_only", "ekd_ensemble_only", "ekd_smd"),
    ),
    "Plain students of EKD's cost": (
        *("kd_mean_macs", "kd_mean_parameters", "kd_mean_feature_macs", "kd_mean_feature_parameters"),
    ),
}
VERDICTS = {"above": "; EKD is better", "below": "; EKD is worse", "unclear": "; no significant difference"}
DEFAULTS = (
    "the defaults of `conf/method/`, which are published where possible. EKD's feature weight was chosen "
    "on validation images ([search](equal_macs_cifar10_5pct.md)), the hint weight of two-stage FitNets by its loss on "
    "training images. Nothing else was tuned"
)


def findings(rows: dict[str, Row]) -> str:
    """The comparisons with `ce` and EKD over all rows, then EKD against each of its controls."""
    lines = all_findings(rows)
    for name, what in (
        ("ce", "the plain student without a teacher"),
        ("kd_mean", "plain distillation of the same network"),
        ("kd_mean_feature", "the same network that also imitates the teachers' pooled features"),
        ("kd_mean_macs", "plain distillation of the same MACs"),
        ("kd_mean_feature_macs", "a student of the same MACs that also imitates these features"),
        ("kd_mean_parameters", "plain distillation of the same parameters"),
        ("branched_ce", "the same branches without teachers"),
        ("ekd_mean", "the same branches, all taught by the mean of the teachers"),
    ):
        if name in rows and "ekd" in rows:
            found = difference(rows["ekd"], rows[name])
            verdict = VERDICTS.get(side(found), "")
            lines.append(f"EKD against {what} (`{name}`): {interval_text(found)}{verdict}.")
    return bullets(lines)


def all_findings(rows: dict[str, Row]) -> list[str]:
    """The rows that are above and below the plain student, and above and below EKD."""
    lines = []
    for reference, what in (("ce", "the plain student without a teacher (`ce`)"), ("ekd", "`ekd`")):
        sides: dict[str, list[str]] = {}
        for row in rows.values():
            if row.group.label != reference and row.group.n:
                sides.setdefault(side(row.differences.get(reference)), []).append(row.group.label)
        lines.append(
            f"Against {what}, by the 95 % interval of the paired difference (not corrected for the number of rows): "
            f"above it {named(sides.get('above', []))}; below it {named(sides.get('below', []))}; no significant "
            f"difference {named(sides.get('unclear', []))}; too few runs {named(sides.get('too few runs', []))}."
        )
    return lines


def page(block: Block, notes: str) -> str:
    """The whole page."""
    rows = by_name(block)
    known = {name for names in FAMILIES.values() for name in names}
    families = {**FAMILIES, "Others": tuple(name for name in rows if name not in known)}
    tables = "\n\n".join(
        f"### {family}\n\n{table([rows[name] for name in names if name in rows])}"
        for family, names in families.items()
        if any(name in rows for name in names)
    )
    return f"""# All methods on {100 * block.fraction:g} % of {block.data}

Made by `benchmarks/methods_page.py` from the runs of `ekd-compare`. No number here comes from a paper or can be
compared with one.

{setup(block.data, list(rows.values()), DEFAULTS)}

## Comparisons

{findings(rows)}

{NOTES}
{notes.strip()}
{NOTES}

## Tables

Accuracy in percent with the weights after the last epoch, mean ± sample standard deviation over n seeds. Differences in
points, paired by seed, with the 95 % t interval; p of the paired t-test after Holm's correction over all rows. With
three seeds the corrected test detects only large differences. K branches, M teachers.

{tables}
"""


def by_name(block: Block) -> dict[str, Row]:
    """The rows of a block."""
    return {row.group.label: row for row in study_rows(block)}


SHORT = {
    "ce": "labels alone (`ce`)",
    "kd_mean": "plain distillation (`kd_mean`)",
    "kd_mean_macs": "plain distillation, larger student (`kd_mean_macs`)",
    "kd_mean_feature_macs": "the same, imitating features, too (`kd_mean_feature_macs`)",
    "ekd": "**EKD** (`ekd`)",
    "camkd": "[CA-MKD](https://arxiv.org/abs/2201.00007) (`camkd`)",
}
"""The README's rows: what each is called there."""


def readme_section(records: Sequence[Mapping[str, Any]], page: Path) -> str:
    """The README's table and what it says, from the records beside a page."""
    rows = {record["row"]: record for record in records}
    first = rows["ekd"]
    lines = [
        (
            md.Markdown(called),
            f"{100 * rows[name]['test_accuracy']:.2f} ± {100 * rows[name]['test_accuracy_std']:.2f}",
            f"{rows[name]['macs'] / 1e6:.1f} M",
            f"{rows[name]['num_parameters'] / 1e3:.0f} k",
        )
        for name, called in SHORT.items()
    ]
    intro = (
        f"{100 * first['fraction']:g} % of CIFAR-10's labels, three pretrained teachers (ResNet-20, -32 and -56), "
        f"{first['steps']:,} steps, default weights, mean ± standard deviation over {first['n']} seeds; all "
        f"{len(rows)} rows are in [{page.stem}]({page})."
    )
    table = md.table(("method", "test accuracy %", "MACs", "parameters"), lines)
    best, plain, feature = (
        readme_difference(*pair)
        for pair in ((rows["camkd"], first), (first, rows["kd_mean_macs"]), (first, rows["kd_mean_feature_macs"]))
    )
    said = (
        f"**CA-MKD is {best[0]} EKD at {100 * rows['camkd']['macs'] / first['macs']:.0f} % of its cost: {best[1]} "
        f"points.** At equal cost EKD is {plain[0]} plain distillation ({plain[1]}) and {feature[0]} plain "
        f"distillation that imitates the same features ({feature[1]}). Brackets are 95 % intervals of differences "
        "paired by seed."
    )
    return f"{textwrap.fill(intro, 120)}\n\n{table}\n{textwrap.fill(said, 120)}\n\n"


def readme_difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> tuple[str, str]:
    """Which side of another row a row is on (`level with` where the interval holds 0), and by how many points."""
    found = minus(ours["by_seed"], theirs["by_seed"])
    words = {"above": "above", "below": "below", "unclear": "level with", TOO_FEW: "not compared with"}
    return words[side(found)], interval_text(found)


def draw(block: Block, path: Path) -> None:
    """The differences as `ekd-report` draws them."""
    rows = study_rows(block)
    found = {
        reference: {row.group.label: d for row in rows if (d := row.differences.get(reference))}
        for reference in rows[0].differences
    }
    styles = figure_style.LineStyles([row.group.label for row in rows])
    with figure_style.style():
        drawn = figures.difference_figure(found, block.key, block.title, styles)
        if drawn:
            figure_style.save(drawn.figure, path.with_suffix(""), [path.suffix.removeprefix(".")])


def write_readme(readme: Path, section: str) -> None:
    """Puts the section between its marks."""
    start, end = "<!-- first-result -->", "<!-- /first-result -->"
    before, rest = readme.read_text().split(start)
    readme.write_text(f"{before}{start}\n{section}{end}{rest.split(end)[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="--output of ekd-compare; without it the page stays")
    parser.add_argument("page", type=Path, help="the page; its records go beside it as .json")
    parser.add_argument("--figure", type=Path, help="an .svg of the differences to ce and to EKD")
    parser.add_argument("--readme", type=Path, help="its section between the marks is made anew")
    args = parser.parse_args()
    beside = args.page.with_suffix(".json")
    if args.folder:
        data, fraction, runs = read_study_runs(parser, args.folder)
        block = study_block(data, fraction, runs)
        args.page.write_text(page(block, kept_notes(args.page)))
        beside.write_text(json.dumps(kept(block, runs), indent=1) + "\n")
        if args.figure:
            draw(block, args.figure)
    if args.readme:
        write_readme(args.readme, readme_section(json.loads(beside.read_text()), args.page))


def kept(block: Block, runs: Runs) -> list[dict[str, Any]]:
    """The rows as they are kept beside the page, with the machine of every run."""
    made = {group.label: {str(run.get("seed")): run.get("machine") for run in group.done} for group in block.groups}
    found = records(block, study_rows(block), runs)
    return [{**record, "machines": made[record["row"]]} for record in found]


if __name__ == "__main__":
    main()
