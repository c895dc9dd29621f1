"""Figures of accuracy: against training images, numbers of teachers and branches, and cost."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ekd_lightning.reporting import figure_style as fs
from ekd_lightning.reporting.blocks import Block, families, grids, over_fractions
from ekd_lightning.reporting.branches import Point, pareto, prefixes
from ekd_lightning.reporting.estimates import Estimate
from ekd_lightning.reporting.groups import Group
from ekd_lightning.reporting.report import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_LINES = 6
"""In a panel; further ones get a panel of their own."""
_MOST_NAMED = 14
"""Points of a cost figure that are told by name."""
ACCURACY = "test accuracy, %"


@dataclass(frozen=True)
class Drawn:
    """A figure.

    Attributes:
        name: Of its file, without ending.
        figure: The figure.
        caption: What it shows, with n.
    """

    name: str
    figure: Figure
    caption: str


def file_name(kind: str, key: str) -> str:
    """A name for a file, whatever a data set is called."""
    return f"{kind}-{re.sub(r'[^A-Za-z0-9._-]+', '_', key)}"


def accuracy(group: Group) -> Estimate:
    """Test accuracy of a group with a run that is done."""
    found = group.accuracy
    assert found is not None
    return found


def done(block: Block) -> list[Group]:
    """The groups of a block with results."""
    return [group for group in block.groups if group.n]


def chunks(groups: Sequence[Group]) -> list[list[Group]]:
    """Groups for panels: the more accurate ones first, `MOST_LINES` in each, about equally many."""
    ordered = sorted(groups, key=lambda group: -accuracy(group).mean)
    count = -(-len(ordered) // MOST_LINES)
    size = -(-len(ordered) // count) if count else 1
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def by_fraction(report: Report, looks: fs.Looks) -> Iterator[Drawn]:
    """Accuracy against the share of training images, one line per setting; a figure per data set and protocol."""
    for position, blocks in enumerate(families(report.blocks).values()):
        lines = over_fractions(blocks)
        if not lines:
            continue
        last = chunks([line[-1] for line in lines.values()])
        figure, axes = fs.panels(len(last), most=2, height=2.7)
        for panel, ends in zip(axes, last, strict=True):
            own = {group.label: lines[group.label] for group in ends}
            _fraction_panel(panel, own, looks)
        shown = [accuracy(group) for line in lines.values() for group in line]
        caption = f"{blocks[0].data}. {fs.band_text(shown)}"
        fs.note(figure, caption)
        yield Drawn(file_name("accuracy_by_fraction", f"{blocks[0].data}-{position + 1}"), figure, caption)


def _fraction_panel(axes: Axes, lines: Mapping[str, Sequence[Group]], looks: fs.Looks) -> None:
    for label, line in lines.items():
        fs.points(
            axes, [100 * (g.fraction or 0) for g in line], [accuracy(g) for g in line], looks(label), label
        )
    ticks = sorted({100 * (group.fraction or 0) for line in lines.values() for group in line})
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick:.4g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("training images, %")
    axes.set_ylabel(ACCURACY)
    fs.limit_accuracy(axes, [accuracy(group) for line in lines.values() for group in line])
    fs.legend_above(axes)


def by_counts(report: Report, looks: fs.Looks) -> Iterator[Drawn]:
    """Heat maps of accuracy over teachers and branches, one panel per method; a figure per block."""
    for block in report.blocks:
        found = {name: cells for name, cells in grids(block).items() if _is_grid(cells)}
        if not found:
            continue
        figure, axes = fs.panels(len(found), most=2, height=2.5)
        for panel, (name, cells) in zip(axes, found.items(), strict=True):
            _grid_panel(panel, name, cells)
        numbers = [accuracy(group) for cells in found.values() for group in cells.values()]
        caption = f"{block.title}. Test accuracy, mean and 95 % interval over seeds, {fs.counts(numbers)}."
        fs.note(figure, caption)
        yield Drawn(file_name("teachers_branches", block.key), figure, caption)


def _is_grid(cells: Mapping[tuple[int, int], Group]) -> bool:
    return len({m for m, _ in cells}) > 1 or len({k for _, k in cells}) > 1


def _grid_panel(axes: Axes, name: str, cells: Mapping[tuple[int, int], Group]) -> None:
    import numpy as np  # noqa: PLC0415

    teachers, branches = sorted({m for m, _ in cells}), sorted({k for _, k in cells})
    values = np.full((len(teachers), len(branches)), np.nan)
    texts = [[""] * len(branches) for _ in teachers]
    for (m, k), group in cells.items():
        value = accuracy(group)
        row, column = teachers.index(m), branches.index(k)
        values[row, column] = 100 * value.mean
        spread = "no interval" if value.half is None else f"[{100 * value.low:.2f}, {100 * value.high:.2f}]"
        texts[row][column] = f"{100 * value.mean:.2f}\n{spread}\nn = {value.n}"
    fs.heat_map(axes, values, texts, (np.nanmin(values), np.nanmax(values)), ACCURACY)
    axes.set_xticks(range(len(branches)), [str(k) for k in branches])
    axes.set_yticks(range(len(teachers)), [str(m) for m in teachers])
    axes.set_xlabel("branches K")
    axes.set_ylabel("teachers M")
    axes.set_title(name)


def by_cost(report: Report, looks: fs.Looks) -> Iterator[Drawn]:
    """Accuracy against multiply-accumulates and parameters, with the Pareto front; a figure per block."""
    for block in report.blocks:
        groups = [group for group in done(block) if group.values("macs") and group.values("num_parameters")]
        if len(groups) < 2:
            continue
        figure, axes = fs.panels(2, most=2, height=3.0)
        named = _named(groups, report.references(block))
        cut = _cut(groups, report.references(block))
        shown = [accuracy(group) for group in groups]
        for panel, key in zip(axes, ("macs", "num_parameters"), strict=True):
            _cost_panel(panel, groups, key, looks, named)
            for group in cut:
                _prefix_points(panel, prefixes(group), key, looks(group.label)["color"])
            fs.limit_accuracy(
                panel, [*shown, *(point.accuracy for group in cut for point in prefixes(group))]
            )
        fs.key(figure, axes)
        caption = f"{block.title}. {fs.band_text(shown, 'interval')} {_cost_words(cut)}"
        fs.note(figure, caption)
        yield Drawn(file_name("accuracy_cost", block.key), figure, caption)


def _cut(groups: Sequence[Group], references: Sequence[str]) -> list[Group]:
    """The branched references, or else the most accurate branched group: those whose prefixes are drawn."""
    branched = [group for group in groups if len(prefixes(group)) > 1]
    best = sorted(branched, key=lambda group: -accuracy(group).mean)
    return [group for group in branched if group.label in references] or best[:1]


def _cost_words(cut: Sequence[Group]) -> str:
    names = ", ".join(group.label for group in cut)
    small = f" Dotted: the first j branches alone ({names})." if cut else ""
    return f"Dashed: Pareto front of the means.{small}"


def _named(groups: Sequence[Group], references: Sequence[str]) -> set[str]:
    """Labels of points that are told by name: those on a front, the references, and the most accurate ones."""
    if len(groups) <= _MOST_NAMED:
        return {group.label for group in groups}
    best = sorted(groups, key=lambda group: -accuracy(group).mean)
    on_front = [
        group
        for key in ("macs", "num_parameters")
        for group in groups
        if (_cost(group, key), accuracy(group).mean) in _front(groups, key)
    ]
    wanted = dict.fromkeys([*references, *(group.label for group in (*on_front, *best))])
    return set(list(wanted)[:_MOST_NAMED])


def _cost(group: Group, key: str) -> float:
    found = group.values(key)
    assert found is not None
    return found.mean / 1e6


def _front(groups: Sequence[Group], key: str) -> list[tuple[float, float]]:
    return pareto([(_cost(group, key), accuracy(group).mean) for group in groups])


def _cost_panel(axes: Axes, groups: Sequence[Group], key: str, looks: fs.Looks, named: set[str]) -> None:
    front = _front(groups, key)
    xs, ys = zip(*front, strict=True)
    axes.step(
        xs,
        [100 * y for y in ys],
        where="post",
        color=fs.GREY,
        linestyle="--",
        linewidth=1,
        label="Pareto front",
    )
    places = beside([_cost(group, key) for group in groups])
    for group, place in zip(groups, places, strict=True):
        value, known = accuracy(group), group.label in named
        look = looks(group.label) if known else {"color": fs.PALE, "marker": "o"}
        face = "white" if value.half is None else look["color"]
        axes.errorbar(
            place, 100 * value.mean, yerr=fs.bar(value), **look | {"linestyle": ""},
            markerfacecolor=face, elinewidth=1, label=group.label if known else "others", zorder=3 if known else 2,
        )  # fmt: skip
    axes.set_xlabel("multiply-accumulates of an image, millions" if key == "macs" else "parameters, millions")
    axes.set_ylabel(ACCURACY)


def beside(costs: Sequence[float]) -> list[float]:
    """Where points are drawn that cost the same: a little beside each other."""
    width = max(costs) - min(costs) or 1.0
    places = []
    for position, cost in enumerate(costs):
        same = [at for at, other in enumerate(costs) if other == cost]
        step = min(0.012, 0.08 / len(same)) * width
        places.append(cost + step * (same.index(position) - (len(same) - 1) / 2))
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
