"""Figures of differences to a reference, paired by seed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from ekd_lightning.reporting import figure_style as fs
from ekd_lightning.reporting.estimates import Difference
from ekd_lightning.reporting.figures_accuracy import Drawn, done, file_name
from ekd_lightning.reporting.groups import differences
from ekd_lightning.reporting.report import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LONG_LABEL = 20
"""Letters beyond which bars need the whole width."""


def by_difference(report: Report, looks: fs.Looks) -> Iterator[Drawn]:
    """Bars of differences to the references of a block, with intervals; a figure per block."""
    for block in report.blocks:
        groups = done(block)
        found = {name: differences(groups, name) for name in report.references(block)}
        drawn = difference_figure(found, block.title, looks)
        if drawn:
            yield Drawn(file_name("differences", block.key), *drawn)


def difference_figure(
    found: Mapping[str, Mapping[str, Difference]], title: str, looks: fs.Looks
) -> tuple[Figure, str] | None:
    """Bars of differences with intervals, a panel for each reference.

    Args:
        found: Reference -> label -> difference.
        title: Of the caption.
        looks: Colours by label.

    Returns:
        The figure and its caption; None if no difference has an interval.
    """
    sure = {name: {k: d for k, d in one.items() if d.std is not None} for name, one in found.items()}
    sure = {name: one for name, one in sure.items() if one}
    if not sure:
        return None
    rows = max(len(one) for one in sure.values())
    long = max(len(label) for one in sure.values() for label in one) > _LONG_LABEL
    figure, axes = fs.panels(len(sure), most=1 if long else 2, height=0.8 + 0.19 * rows)
    for panel, (name, one) in zip(axes, sure.items(), strict=True):
        _difference_panel(panel, name, one, looks)
    alone = sorted({k for name, one in found.items() for k, d in one.items() if d.std is None})
    few = f" Not enough runs: {', '.join(alone)}." if alone else ""
    numbers = [d.n for one in sure.values() for d in one.values()]
    caption = f"{title}. Mean difference paired by seed, 95 % interval, {fs.counts(numbers)}.{few}"
    fs.note(figure, caption)
    return figure, caption


def _difference_panel(axes: Axes, name: str, found: Mapping[str, Difference], looks: fs.Looks) -> None:
    rows = sorted(found.items(), key=lambda item: item[1].mean)
    values = [difference for _, difference in rows]
    colours = [looks(label)["color"] for label, _ in rows]
    axes.barh(range(len(rows)), [100 * v.mean for v in values], color=colours, alpha=0.75, height=0.68)
    axes.errorbar(
        [100 * v.mean for v in values], range(len(rows)), xerr=fs.bars(values),
        color=fs.INK, linestyle="", elinewidth=1,
    )  # fmt: skip
    axes.set_yticks(range(len(rows)), [label for label, _ in rows])
    axes.axvline(0, color=fs.GREY, linewidth=0.8)
    axes.grid(visible=False, axis="y")
    axes.set_title(f"minus {name}")
    axes.set_xlabel("points of accuracy")
