"""Pages of studies: one for each data set, and a first one that answers whether EKD is ahead at equal cost."""

from __future__ import annotations

import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ekd_lightning import markdown as md
from ekd_lightning.files import write_text
from ekd_lightning.reporting import tables
from ekd_lightning.reporting.answer import best_of
from ekd_lightning.reporting.blocks import SAME_COST, SUBJECTS, Block, cheaper_branch
from ekd_lightning.reporting.estimates import (
    ENOUGH,
    SIGNIFICANCE,
    Difference,
    interval_text,
    listed,
    p_text,
    percent,
    plural,
    share,
)
from ekd_lightning.reporting.figure_style import COST_FIGURE, file_name
from ekd_lightning.reporting.groups import Group, branched, corrected_by_row
from ekd_lightning.reporting.report import Report, kind_of_machine
from ekd_lightning.reporting.report_files import MADE_BY, PAGE_BEGINS, SUMMARY_PAGE, page_name

LIMITED = 0.2
"""Largest share of the training images that counts as limited data."""
SIDES = ("below", "level", "above", "too few runs")
_COLUMNS = (*("K", "M", "n", "test accuracy % [95 % interval]", "differences", "NLL", "parameters", "MACs"), "not done")


class Standing(NamedTuple):
    """A row of EKD against the other methods of its block.

    Attributes:
        block: The block.
        ekd: The row.
        against: EKD minus each other method that costs no more, by label; p values are corrected for their number,
            those of deciding rows for the number of deciding rows.
        best: The most accurate other method with enough common seeds, or else of all; None without other methods.
        better: Other methods that are more accurate than `best` but have too few common seeds, the best first.
    """

    block: Block
    ekd: Group
    against: dict[str, Difference]
    best: Group | None
    better: tuple[Group, ...] = ()

    def side(self, label: str) -> str:
        """One of `SIDES`: on which side of 0 the 95 % interval of the paired difference lies."""
        found = self.against.get(label)
        if found is None or found.half is None:
            return "too few runs"
        return "level" if abs(found.mean) <= found.half else "above" if found.mean > 0 else "below"


def standings(block: Block) -> list[Standing]:
    """Compares each row of EKD with all methods of at most 5 % more MACs, except other variants of EKD.

    Where a branch alone costs less than all branches together, it is compared at its own cost, too. EKD with one
    branch is plain distillation, so it counts as another method if there are rows with several.
    """
    found = []
    rows = branched([one for one in block.done if one.method in SUBJECTS])
    for ekd in (one for whole in rows for one in (whole, cheaper_branch(whole)) if one):
        others = block.rivals(ekd)
        against = corrected_by_row(others, {one.label: ekd.minus(one) for one in others})
        found.append(Standing(block, ekd, against, *best_of(others, against)))
    return found


def lead(found: Sequence[Standing]) -> str:
    """The answer in a few sentences: is EKD ahead at equal cost, with limited data? Single branches do not count."""
    whole = [one for one in found if one.ekd in one.block.groups]
    limited = [one for one in whole if (one.block.fraction or 1.0) <= LIMITED and one.best]
    counts = Counter(one.side(one.best.label) for one in limited if one.best)
    tested = len(limited) - counts["too few runs"]
    if not tested:
        return "Whether EKD is ahead at equal cost with limited data is open: no comparison has enough runs."
    start = "is" if counts["above"] == tested else "is not" if not counts["above"] else "is sometimes"
    enough = [one for one in limited if one.best and one.side(one.best.label) != "too few runs"]
    methods = dict.fromkeys(method for method in SUBJECTS if any(one.ekd.method == method for one in enough))
    each = "; ".join(_sides(method, limited) for method in methods)
    by_method = f" By method: {each}." if len(methods) > 1 else ""
    few = sum(bool(one.better) for one in limited)
    more = f" In {few} of them a more accurate method has too few runs to tell." if few else ""
    return (
        f"With at most {100 * LIMITED:g} % of the labels, EKD {start} ahead at equal cost. In "
        f"{plural(tested, 'comparison')} with the best other method that costs no more, EKD is below in "
        f"{counts['below']}, level in {counts['level']} and above in {counts['above']} (95 % intervals, paired by "
        f"seed).{by_method}{more}"
    )


def _sides(method: str, limited: Sequence[Standing]) -> str:
    counts = Counter(one.side(one.best.label) for one in limited if one.best and one.ekd.method == method)
    return f"{md.code(method)} is {', '.join(f'{side} in {counts[side]}' for side in SIDES[:3] if counts[side])}"


def _worth(one: Standing) -> tuple[Any, ...]:
    return (one.block.data, one.block.fraction or 1.0, one.block.key, one.ekd.label)


def summary_page(report: Report, missing: Sequence[str] = ()) -> str:
    """README.md of the pages, with lines on missing runs."""
    found = sorted((one for block in report.blocks for one in standings(block)), key=_worth)
    rows = [
        {
            "data": _link(one.block.data, f", {100 * (one.block.fraction or 1):g} %"),
            "steps": one.block.protocol.steps,
            "row": md.code(one.ekd.label),
            "test accuracy %": percent(one.ekd.accuracy),
            "MACs": f"{(one.ekd.mean('macs') or 0) / 1e6:.1f} M",
            "best other method at no more cost": md.code(one.best.label) if one.best else "–",
            "its test accuracy %": percent(one.best.accuracy) if one.best else "",
            "EKD minus it": interval_text(one.against.get(one.best.label)) if one.best else "",
            "EKD is": one.side(one.best.label) if one.best else "",
        }
        for one in found
    ]
    table = md.table(rows[0], [row.values() for row in rows]) if rows else ""
    pages = sorted({block.data for block in report.blocks})
    lines = [_better_words(one) for one in found if one.better]
    better = f"\n{_bullets(lines)}\n" if lines else ""
    not_done = f"## Not done\n\n{_bullets(missing)}" if missing else ""
    return (
        f"""# Is EKD ahead at equal cost?

{_filled(lead(found))}

{table}{better}
Every row of EKD is compared with every other method that costs at most {100 * SAME_COST:g} % more multiply-accumulates.
Differences are in points, paired by seed, with their 95 % interval. The best other method is the one with the highest
test accuracy among those with at least {ENOUGH} common seeds, if there are any. This choice flatters it, so the pages
correct p values for all comparisons. The runs of one line share data, images, views, number of steps and precision.
Lines that differ in these cannot be compared with each other. *One branch* is the branch with the highest validation
accuracy, deployed without the others (`ekd-export --branches best`); such rows do not count in the first sentence. EKD
trained with one branch is plain distillation, and counts as another method beside rows with several.

Pages: {", ".join(map(_link, pages))}. {MADE_BY}

```bash
make study-pages
```
{not_done}
""".rstrip()
        + "\n"
    )


def _better_words(one: Standing) -> str:
    """The line on methods that are more accurate than the best one with enough runs, but have too few."""
    names = ", ".join(f"{md.code(g.label)} ({share(g.mean_accuracy)} %, n {g.n})" for g in one.better)
    where = f"{md.prose(one.block.data)}, {100 * (one.block.fraction or 1):g} %, {one.block.protocol.steps} steps"
    return f"{where}, {md.code(one.ekd.label)}: more accurate than the best other method, with too few runs: {names}."


def data_page(report: Report, data: str, figures: Sequence[str]) -> str:
    """The page of a data set."""
    blocks = [block for block in report.blocks if block.data == data]
    found = [one for block in blocks for one in standings(block)]
    parts = [f"# {md.prose(data)}\n", _filled(lead(found)) + "\n", _LEGEND]
    for block in blocks:
        parts += [f"## {md.prose(block.title)}\n", _protocol(block)]
        parts += [_standing_words(one) for one in standings(block)]
        figure = f"figures/{file_name(COST_FIGURE, block.key)}.svg"
        if figure in figures:
            parts.append(md.image(figure, "Test accuracy against cost, with 95 % intervals") + "\n")
        best = sorted(report.rows[block.key], key=lambda row: -row.group.mean_accuracy)
        parts.append(tables.markdown(best, _COLUMNS))
    return "\n".join(parts)


_LEGEND = f"""\
{PAGE_BEGINS}: mean ± sample standard deviation over n seeds. Differences
are in points, paired by seed, with the 95 % t interval. p comes from the paired t-test, corrected by Holm's method. In
a list it is corrected for the number of methods that the list compares (for deciding rows: of deciding methods); in a
table for the number of comparisons with the same row, unless a line below the table says otherwise. K branches, M
teachers. *Below*, *level* and *above* say on which side of 0 the interval of a difference lies. With few seeds, only
large differences have a small corrected p value.
"""


def _link(data: str, more: str = "") -> md.Markdown:
    return md.Markdown(f"[{md.prose(data)}{more}]({page_name(data)})")


def _filled(text: str) -> str:
    return textwrap.fill(text, 120)


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(textwrap.fill(f"- {line}", 120, subsequent_indent="  ", break_on_hyphens=False) for line in lines)


def _protocol(block: Block) -> str:
    """The protocol and the teachers that the runs of a block share, and the machines that made them."""
    one = block.protocol
    runs = [run for group in block.groups for run in group.done]
    lines = [
        f"{one.num_train_images or 0:,} training and {one.num_val_images or 0:,} validation images (subset "
        f"`{(one.subset_sha256 or 'unknown')[:12]}`); {one.epochs} epochs of batch {one.batch_size}, "
        f"{one.steps or 0:,} steps, {one.precision}."
    ]
    if block.teachers:
        known = [f"{md.code(t['id'])} ({share(t['test_accuracy'])} %)" for t in block.teachers if "id" in t]
        lines.append(f"Teachers: {', '.join(known)}.")
    about = {str(run.study): run.about for run in runs if run.about}
    lines += [f"{md.code(name)}: {about[name]}" for name in sorted(about)]
    lines.append(made_on(block.done))
    return _bullets(lines) + "\n"


def made_on(groups: Sequence[Group]) -> str:
    """The machines of all runs, with the rows of each kind except the most frequent."""
    runs: dict[str, list[str]] = defaultdict(list)
    for group in groups:
        kinds = {int(run.get("seed")): kind_of_machine(run.provenance) for run in group.done}
        for kind in dict.fromkeys(kinds.values()):
            own = [str(seed) for seed, other in kinds.items() if other == kind]
            runs[kind].append(md.code(group.label) + ("" if len(own) == group.n else f" seed {', '.join(own)}"))
    first, *others = sorted(runs, key=lambda kind: -len(runs[kind]))
    if not others:
        return f"Made on {first}."
    rest = "; ".join(f"{kind} for {', '.join(runs[kind])}" for kind in others)
    return f"Made on {first}; {rest}: these rows differ from the others in the machine, too."


def _standing_words(one: Standing) -> str:
    """The methods that a row of EKD is below, level with and above."""
    lines = []
    for side in SIDES:
        own = sorted((label for label in one.against if one.side(label) == side), key=lambda n: one.against[n].mean)
        if own:
            lines.append(f"{side}: {'; '.join(f'{md.code(n)} {_difference(one.against[n])}' for n in own)}")
    sure = [n for n, d in one.against.items() if d.half is not None and (d.tested or 1.0) < SIGNIFICANCE]
    lines.append(f"p below {SIGNIFICANCE:g} after Holm's correction: {listed([md.code(n) for n in sure]) or 'none'}")
    cost = f"{(one.ekd.mean('macs') or 0) / 1e6:.1f} M MACs"
    head = f"**{md.code(one.ekd.label)}**, {percent(one.ekd.accuracy)} % at {cost}, against methods that cost no more:"
    return f"{head}\n\n{_bullets(lines)}\n"


def _difference(found: Difference) -> str:
    tested = "" if found.tested is None or found.half is None else f", {p_text(found.tested)}"
    return f"{interval_text(found)}{tested}"


def write_pages(report: Report, folder: Path, missing: Sequence[str] = ()) -> list[Path]:
    """Writes README.md, a page for each data set, and the figures of accuracy and cost."""
    from ekd_lightning.reporting import figure_style as fs  # noqa: PLC0415 (needs matplotlib)
    from ekd_lightning.reporting.figures import by_cost  # noqa: PLC0415

    files = []
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    with fs.style():
        for drawn in by_cost(report, fs.LineStyles(report.ordered_labels)):
            files += fs.save(drawn.figure, folder / "figures" / drawn.name, ["svg"])
    shown = [f"figures/{path.name}" for path in files]
    pages = {page_name(data): data_page(report, data, shown) for data in sorted({b.data for b in report.blocks})}
    for name, text in {**pages, SUMMARY_PAGE: summary_page(report, missing)}.items():
        files.append(folder / name)
        write_text(files[-1], text)
    return files
