"""Figures of a report: accuracy, cost and differences, those of the details, and a list of what each shows."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ekd_lightning import markdown as md
from ekd_lightning.files import write_text
from ekd_lightning.progress import track
from ekd_lightning.reporting import figure_style as fs
from ekd_lightning.reporting import figures_detail
from ekd_lightning.reporting.blocks import families, over_fractions
from ekd_lightning.reporting.details import Point, pareto, prefixes
from ekd_lightning.reporting.estimates import Difference
from ekd_lightning.reporting.figure_style import ACCURACY, CaptionedFigure, LineStyles, accuracy
from ekd_lightning.reporting.groups import Group, differences
from ekd_lightning.reporting.report import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LIST = "figures.md"
_MOST_NAMED = 14
"""Largest number of named points in a cost figure."""
_LONG_LABEL = 20
"""Longest label, in letters, with which bars of differences fit into half the width."""


def by_fraction(report: Report, styles: LineStyles) -> Iterator[CaptionedFigure]:
    """Accuracy against the share of training images, one line per setting; a figure per data set and protocol."""
    for position, blocks in enumerate(families(report.blocks)):
        lines = over_fractions(blocks)
        if not lines:
            continue
        last = fs.chunks(line[-1] for line in lines.values())
        figure, axes = fs.panels(len(last), most=2, height=2.7)
        for panel, ends in zip(axes, last, strict=True):
            own = {group.label: lines[group.label] for group in ends}
            _fraction_panel(panel, own, styles)
        shown = [accuracy(group) for line in lines.values() for group in line]
        data = blocks[0].data
        text = f"Test accuracy by the share of training images. {fs.band_text(shown)}"
        yield fs.captioned("accuracy_by_fraction", f"{data}-{position + 1}", figure, data, text)


def _fraction_panel(axes: Axes, lines: Mapping[str, Sequence[Group]], styles: LineStyles) -> None:
    ticks: dict[float, int | None] = {}
    for label, line in lines.items():
        shares = [100 * (group.protocol.fraction or 0) for group in line]
        fs.points(axes, shares, [accuracy(group) for group in line], styles(label), label)
        ticks |= dict(zip(shares, (group.protocol.num_images for group in line), strict=True))
    axes.set_xscale("log")
    axes.set_xticks([*ticks], [f"{t:.4g}\n({n:,})" if n else f"{t:.4g}" for t, n in ticks.items()])
    axes.minorticks_off()
    axes.set(xlabel="training images, % (number)", ylabel=ACCURACY)
    fs.limit_accuracy(axes, [accuracy(group) for line in lines.values() for group in line])
    fs.legend_above(axes)


def by_cost(report: Report, styles: LineStyles) -> Iterator[CaptionedFigure]:
    """Accuracy against multiply-accumulates and parameters, with the Pareto front; a figure per block."""
    for block in report.blocks:
        groups = [group for group in block.done if group.values("macs") and group.values("num_parameters")]
        if len(groups) < 2:
            continue
        figure, axes = fs.panels(2, most=2, height=3.0)
        named = _named(groups, report.references(block))
        cut = _cut(groups, report.references(block))
        shown = [accuracy(group) for group in groups]
        for panel, key in zip(axes, ("macs", "num_parameters"), strict=True):
            _cost_panel(panel, groups, key, styles, named)
            for group in cut:
                _prefix_points(panel, prefixes(group), key, styles(group.label)["color"])
            fs.limit_accuracy(panel, [*shown, *(point.accuracy for group in cut for point in prefixes(group))])
        fs.key(figure, axes)
        text = f"Test accuracy against multiply-accumulates and parameters. {fs.band_text(shown, 'interval')}"
        if any(len(_front(groups, key)) > 1 for key in ("macs", "num_parameters")):
            text += " Dashed: Pareto front of the means."
        if cut:
            text += f" Dotted: the first j branches alone ({', '.join(group.label for group in cut)})."
        yield fs.captioned(fs.COST_FIGURE, block.key, figure, block.title, text)


def _cut(groups: Sequence[Group], references: Sequence[str]) -> list[Group]:
    """The groups whose prefixes are drawn: the branched references, or else the most accurate branched group."""
    branched = [group for group in groups if len(prefixes(group)) > 1]
    best = sorted(branched, key=lambda group: -accuracy(group).mean)
    return [group for group in branched if group.label in references] or best[:1]


def _named(groups: Sequence[Group], references: Sequence[str]) -> set[str]:
    """Labels of the named points: the references, points of a front, and the most accurate ones."""
    fronts = {key: _front(groups, key) for key in ("macs", "num_parameters")}
    on_front = [g for key, front in fronts.items() for g in groups if (_cost(g, key), accuracy(g).mean) in front]
    best = sorted(groups, key=lambda group: -accuracy(group).mean)
    wanted = dict.fromkeys([*references, *(group.label for group in (*on_front, *best))])
    return set(list(wanted)[:_MOST_NAMED])


def _cost(group: Group, key: str) -> float:
    return (group.mean(key) or 0.0) / 1e6


def _front(groups: Sequence[Group], key: str) -> list[tuple[float, float]]:
    return pareto([(_cost(group, key), accuracy(group).mean) for group in groups])


def _cost_panel(axes: Axes, groups: Sequence[Group], key: str, styles: LineStyles, named: set[str]) -> None:
    front = _front(groups, key)
    if len(front) > 1:
        xs, ys = zip(*front, strict=True)
        line: dict[str, Any] = {"color": fs.GREY, "linestyle": "--", "linewidth": 1, "label": "Pareto front"}
        axes.step(xs, [100 * y for y in ys], where="post", **line)
    costs = [_cost(group, key) for group in groups]
    if _nearly_equal(costs):  # or the axis would zoom in on differences that mean nothing
        axes.set_xlim(0, 2 * max(costs) or 1)
    for group, place in zip(groups, beside(costs), strict=True):
        value, known = accuracy(group), group.label in named
        style = styles(group.label) if known else {"color": fs.PALE, "marker": "o"}
        face = "white" if value.half is None else style["color"]
        axes.errorbar(
            place, 100 * value.mean, yerr=fs.bars([value]), **style | {"linestyle": ""},
            markerfacecolor=face, elinewidth=1, label=group.label if known else "others", zorder=3 if known else 2,
        )  # fmt: skip
    what = "multiply-accumulates of an image" if key == "macs" else "parameters"
    axes.set(xlabel=f"{what}, millions", ylabel=ACCURACY)


def _nearly_equal(costs: Sequence[float]) -> bool:
    return max(costs) - min(costs) <= 0.1 * max(costs)


def beside(costs: Sequence[float]) -> list[float]:
    """Places of points; those that would hide each other stand beside each other, around their mean cost."""
    width = (2 * max(costs) if _nearly_equal(costs) else max(costs) - min(costs)) or 1.0
    clusters: list[list[int]] = []
    for position in sorted(range(len(costs)), key=lambda one: costs[one]):
        if clusters and costs[position] - costs[clusters[-1][-1]] < 0.012 * width:
            clusters[-1].append(position)
        else:
            clusters.append([position])
    places = [0.0] * len(costs)
    for cluster in clusters:
        mean, step = statistics.fmean(costs[one] for one in cluster), min(0.012, 0.08 / len(cluster)) * width
        for at, position in enumerate(cluster):
            places[position] = mean + step * (at - (len(cluster) - 1) / 2)
    return places


def _prefix_points(axes: Axes, points: Sequence[Point], key: str, colour: str) -> None:
    costs = [point.macs if key == "macs" else point.num_parameters for point in points]
    if len(points) < 2 or None in costs:
        return
    xs = [float(cost or 0) / 1e6 for cost in costs]
    ys = [100 * point.accuracy.mean for point in points]
    bars = fs.bars(point.accuracy for point in points[:-1])
    axes.plot(xs, ys, color=colour, linewidth=0.8, linestyle=":")
    axes.errorbar(
        xs[:-1], ys[:-1], yerr=bars, color=colour, linestyle="", marker="o", markersize=3,
        markerfacecolor="white", elinewidth=0.7,
    )  # fmt: skip


def by_difference(report: Report, styles: LineStyles) -> Iterator[CaptionedFigure]:
    """Bars of differences to the references of a block, with intervals; a figure per block."""
    for block in report.blocks:
        found = {name: differences(block.done, name) for name in report.references(block)}
        sure = {name: {k: d for k, d in one.items() if d.half is not None} for name, one in found.items()}
        sure = {name: one for name, one in sure.items() if one}
        if not sure:
            continue
        rows = max(len(one) for one in sure.values())
        long = max(len(label) for one in sure.values() for label in one) > _LONG_LABEL
        figure, axes = fs.panels(len(sure), most=1 if long else 2, height=0.8 + 0.19 * rows)
        for panel, (name, one) in zip(axes, sure.items(), strict=True):
            _difference_panel(panel, name, one, styles)
        alone = sorted({k for one in found.values() for k, d in one.items() if d.half is None})
        few = f" Too few runs: {', '.join(alone)}." if alone else ""
        numbers = fs.counts(d for one in sure.values() for d in one.values())
        text = f"Mean difference in test accuracy, paired by seed, 95 % interval, {numbers}.{few}"
        yield fs.captioned("differences", block.key, figure, block.title, text)


def _difference_panel(axes: Axes, name: str, found: Mapping[str, Difference], styles: LineStyles) -> None:
    rows = sorted(found.items(), key=lambda item: item[1].mean)
    values = [difference for _, difference in rows]
    colours = [styles(label)["color"] for label, _ in rows]
    axes.barh(range(len(rows)), [100 * v.mean for v in values], color=colours, alpha=0.75, height=0.68)
    axes.errorbar(
        [100 * v.mean for v in values], range(len(rows)), xerr=fs.bars(values),
        color=fs.INK, linestyle="", elinewidth=1,
    )  # fmt: skip
    axes.set_yticks(range(len(rows)), [label for label, _ in rows])
    axes.axvline(0, color=fs.GREY, linewidth=0.8)
    axes.grid(visible=False, axis="y")
    axes.set(title=f"minus {name}", xlabel="points of accuracy")


Draw = Callable[[Report, LineStyles], Iterator[CaptionedFigure]]
"""Makes the figures of a report: none, one, or one for each block."""
KINDS: dict[str, tuple[str, Draw]] = {
    "accuracy against training images": ("a setting at two fractions", by_fraction),
    "teachers × branches": ("a method with several numbers of teachers or branches", figures_detail.by_counts),
    "accuracy against cost": ("two settings in one block", by_cost),
    "ablations and controls": ("three seeds in common with the reference", by_difference),
    "branches": ("a student with several branches", figures_detail.branches),
    "learning curves": ("metrics.csv with two epochs", figures_detail.learning_curves),
    "calibration": ("arrays.npz, written by ekd-evaluate", figures_detail.reliability_diagrams),
    "corrupted images": ("an evaluation on corrupted images, by ekd-evaluate", figures_detail.corruption_curves),
    "similarity of features": ("CKA matrices, written by ekd-evaluate", figures_detail.similarity),
}
"""Content of figures -> data that they need, and the function that draws them."""


def write_figures(report: Report, folder: Path, formats: Sequence[str]) -> list[Path]:
    """Draws and writes all figures for which the runs have data, and figures.md with captions and what was left out."""
    folder.mkdir(parents=True, exist_ok=True)
    styles = LineStyles(report.ordered_labels)
    files: list[Path] = []
    lines = ["# Figures", ""]
    left_out = []
    with fs.style():
        for title, (needs, draw) in track(KINDS.items(), "drawing", "kinds of figures"):
            count = len(files)
            for drawn in draw(report, styles):
                files += fs.save(drawn.figure, folder / drawn.name, formats)
                lines += [md.image(files[-len(formats)].name, drawn.caption), "", md.prose(drawn.caption), ""]
            if len(files) == count:
                left_out.append(f"- {title}: needs {needs}")
    if left_out:
        lines += ["Left out for lack of data:", "", *left_out, ""]
    write_text(folder / LIST, "\n".join(lines))
    return [*files, folder / LIST]
