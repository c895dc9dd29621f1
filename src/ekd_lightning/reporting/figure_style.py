"""Style of figures: colours, marks, axes and files, with one colour per setting and no global state of pyplot."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ekd_lightning.errors import quiet
from ekd_lightning.files import distinct_name
from ekd_lightning.reporting.details import Array
from ekd_lightning.reporting.estimates import Estimate
from ekd_lightning.reporting.groups import Group

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LIGHT = ("#0864BC", "#BA5309", "#00805C", "#C3598F", "#C28200", "#3F97CC", "#6D4400", "#52444E")
DARK = ("#63B8F2", "#E6903F", "#32BB97", "#E28CCB", "#E8B23A", "#A5D8F5", "#B48466", "#B6E6CE")
"""Colours of methods on white, and on the page's dark ground: the hues of Okabe and Ito (2008), moved until any two
differ by 0.06 in OKLab for normal, protanopic and deuteranopic vision (Machado et al. 2009), with a contrast of at
least 3 to 1 with their ground (WCAG 2.2, 1.4.11). Marks and dashes differ, too: no figure depends on colour alone."""
SHADES = ("#f4f1de", "#a9d5c3", "#4ea5c4")
"""Colours of heat maps, from low to high; dark text is readable on each of them."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", "--", ":", "-.")
DPI = 300
WIDTH = 6.9
"""Inches: two columns of a paper."""
PANEL = 2.4
"""Inches: height of a panel."""
_MANY = 12
"""Largest number of points of a line that are all marked."""
_SHORT = 20
"""Longest name, in letters, that leaves room for a second column in a legend."""
_LETTERS = 17
"""Letters of a caption per inch."""
_MOST_LINES = 6
"""Largest number of lines in a panel; further lines get another panel."""
ACCURACY = "test accuracy, %"
COST_FIGURE = "accuracy_cost"
"""Name of the figure that a report shows first."""
INK, GREY, PALE = "#191C20", "#505862", "#B8BDC4"
_RC: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["Helvetica", "Arial", "Liberation Sans", "DejaVu Sans"],
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.title_fontsize": 7,
    "legend.frameon": False,
    "text.parse_math": False,  # a $ in a label is a $
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.edgecolor": "#333333",
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E8EB",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.3,
    "lines.markersize": 4,
    "errorbar.capsize": 2,
    "svg.fonttype": "none",  # text stays text: it can be searched, edited and read aloud
    "svg.hashsalt": "ekd-lightning",  # the same figure, the same file
    "figure.constrained_layout.use": True,
}


@dataclass(frozen=True)
class CaptionedFigure:
    """A figure with the name of its file, without ending, and its caption."""

    name: str
    figure: Figure
    caption: str


def captioned(kind: str, key: str, figure: Figure, title: str, text: str) -> CaptionedFigure:
    """A finished figure with its caption below it, and a name for its file."""
    caption = f"{title}. {text}"
    wide = int(_LETTERS * figure.get_figwidth())
    figure.supxlabel(textwrap.fill(caption, wide), fontsize=7, color=GREY, x=0.005, ha="left")
    return CaptionedFigure(file_name(kind, key), figure, caption)


def file_name(kind: str, key: str) -> str:
    """Name of a figure's file, without ending, whatever a data set is called; no two keys have the same."""
    return f"{kind}-{distinct_name(key, r'[^A-Za-z0-9._-]+')}"


def accuracy(group: Group) -> Estimate:
    """Test accuracy of a group that has a finished run."""
    found = group.accuracy
    assert found is not None
    return found


def chunks(groups: Iterable[Group]) -> list[list[Group]]:
    """Groups for panels, the most accurate first: at most six in each, about equally many."""
    ordered = sorted(groups, key=lambda group: -accuracy(group).mean)
    count = -(-len(ordered) // _MOST_LINES)
    size = -(-len(ordered) // count) if count else 1
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


@contextmanager
def style() -> Iterator[None]:
    """Applies the style while figures are made and written."""
    import matplotlib  # noqa: PLC0415

    # Some of the alternative fonts are always missing.
    with quiet("matplotlib.font_manager"), matplotlib.rc_context(_RC):
        yield


class LineStyles:
    """Colour, marker and dash of each label, the same in all figures of a report.

    Colours repeat with other dashes after the eighth label.
    """

    def __init__(self, labels: Iterable[str]) -> None:
        self._order = {label: position for position, label in enumerate(dict.fromkeys(labels))}

    def __call__(self, label: str) -> dict[str, Any]:
        """Keyword arguments for a line of matplotlib."""
        position = self._order.setdefault(label, len(self._order))
        turn = position // len(LIGHT)
        return {
            "color": LIGHT[position % len(LIGHT)],
            "marker": MARKERS[(position + turn) % len(MARKERS)],
            "linestyle": DASHES[turn % len(DASHES)],
        }


def panels(count: int, most: int = 3, height: float = PANEL) -> tuple[Figure, list[Axes]]:
    """A figure with `count` panels, at most `most` beside each other, each `height` inches high."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    columns = min(count, most)
    rows = math.ceil(count / columns)
    wide = WIDTH if columns == most else WIDTH * max(columns / most, 0.62)
    figure = Figure(figsize=(wide, rows * height + 0.35))
    FigureCanvasAgg(figure)
    return figure, [figure.add_subplot(rows, columns, position + 1) for position in range(count)]


def points(
    axes: Axes,
    xs: Sequence[float],
    values: Sequence[Estimate],
    style: dict[str, Any],
    label: str | None = None,
    scale: float = 100.0,
) -> None:
    """A line through means with a band of intervals; on short lines, points without an interval are hollow."""
    pairs = list(zip(xs, values, strict=True))
    many = len(pairs) > _MANY
    marks = {"markevery": len(pairs) // 5} if many else {"marker": None}
    axes.plot(xs, [scale * v.mean for v in values], label=label, **style | marks)
    for hollow in (False, True):
        some = [(x, scale * v.mean) for x, v in pairs if (v.half is None) == hollow]
        if some and not many:
            face = {"markerfacecolor": "white"} if hollow else {}
            axes.plot(*zip(*some, strict=True), **style | {"linestyle": ""} | face)
    banded = [(x, v) for x, v in pairs if v.half is not None]
    if banded:
        lows, highs = ([scale * getattr(v, end) for _, v in banded] for end in ("low", "high"))
        axes.fill_between([x for x, _ in banded], lows, highs, color=style["color"], alpha=0.15, linewidth=0)


def heat_map(
    axes: Axes, values: Array, texts: Sequence[Sequence[str]], limits: tuple[float, float], label: str
) -> None:
    """A matrix as coloured cells with a text in each; row 0 is at the bottom.

    `values` is float [rows, columns], NaN leaves a cell empty; `limits` are the values of the first and last colour.
    """
    from matplotlib.colors import LinearSegmentedColormap  # noqa: PLC0415

    rows, columns = values.shape
    shades = LinearSegmentedColormap.from_list("ekd", SHADES)
    edges = [[at - 0.5 for at in range(count + 1)] for count in (columns, rows)]
    mesh = axes.pcolormesh(*edges, values, cmap=shades, vmin=limits[0], vmax=limits[1], edgecolors="white", lw=1.5)
    for row in range(rows):
        for column in range(columns):
            axes.text(
                column, row, texts[row][column], ha="center", va="center", fontsize=7, color=INK, linespacing=1.3
            )  # fmt: skip
    axes.grid(False)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    scale = axes.figure.colorbar(mesh, ax=axes, label=label)
    scale.outline.set_visible(False)


def bars(values: Iterable[Estimate], scale: float = 100.0) -> tuple[list[float], list[float]] | None:
    """Intervals for matplotlib's error bars: lengths below and above each mean, NaN for none; None without any."""
    sides = [
        (math.nan, math.nan) if v.half is None else (scale * (v.mean - v.low), scale * (v.high - v.mean))
        for v in values
    ]
    if all(math.isnan(below) for below, _ in sides):
        return None
    return [below for below, _ in sides], [above for _, above in sides]


def limit_accuracy(axes: Axes, values: Iterable[Estimate], axis: str = "y") -> None:
    """Limits an axis to all intervals, within 0 and 100 percent."""
    ends = [100 * end for value in values for end in (value.low, value.high)]
    room = 0.04 * (max(ends) - min(ends)) + 0.1
    limits = max(-0.5, min(ends) - room), min(100.5, max(ends) + room)
    (axes.set_ylim if axis == "y" else axes.set_xlim)(*limits)


def counts(values: Iterable[Estimate | int]) -> str:
    """The number of runs of a figure, e.g. `n = 3` or `n = 1 to 3`."""
    numbers = [value if isinstance(value, int) else value.n for value in values]
    low, high = min(numbers), max(numbers)
    return f"n = {low}" if low == high else f"n = {low} to {high}"


def band_text(values: Iterable[Estimate], what: str = "band") -> str:
    """The meaning of a figure's marks, with n."""
    found = list(values)
    if all(value.half is None for value in found):
        return f"Too few runs for intervals, {counts(found)}."
    alone = "; none where there are too few runs" if any(value.half is None for value in found) else ""
    return f"Mean and 95 % {what} over seeds, {counts(found)}{alone}."


def key(figure: Figure, axes: Sequence[Axes]) -> None:
    """One legend for all panels, below them."""
    handles = {label: handle for one in axes for handle, label in zip(*one.get_legend_handles_labels(), strict=True)}
    figure.legend(list(handles.values()), list(handles), loc="outside upper left", ncols=4)


def legend_above(axes: Axes) -> None:
    """The legend of one panel, above it."""
    longest = max(len(label) for label in axes.get_legend_handles_labels()[1])
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=2 if longest <= _SHORT else 1)


def title(axes: Axes, text: str) -> None:
    """A title of one panel, wrapped."""
    axes.set_title(textwrap.fill(text, _SHORT + 6))


def save(figure: Figure, stem: Path, formats: Sequence[str]) -> list[Path]:
    """Writes `stem`.svg or `stem`.png, the latter with 300 dots per inch."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # the layout holds for all formats and takes longer than drawing
    files = []
    for ending in formats:
        path = stem.with_name(f"{stem.name}.{ending}")  # a fraction has a point of its own
        metadata = {"Date": None, "Title": stem.name} if ending == "svg" else {"Title": stem.name}
        figure.savefig(path, dpi=DPI, metadata=metadata)
        files.append(path)
    return files
