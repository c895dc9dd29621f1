"""Figures of details: teachers and branches, training, calibration, corruptions, similarity of features."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from ekd_lightning.reporting import details
from ekd_lightning.reporting import figure_style as fs
from ekd_lightning.reporting.blocks import grids
from ekd_lightning.reporting.details import own_teachers
from ekd_lightning.reporting.estimates import ENOUGH, TOO_FEW, Estimate
from ekd_lightning.reporting.figure_style import ACCURACY, CaptionedFigure, accuracy
from ekd_lightning.reporting.groups import Group
from ekd_lightning.reporting.report import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_ROWS = 20
_MOST_PANELS = 6
_CURVE = "val/accuracy"


def _best(groups: Sequence[Group], references: Sequence[str], most: int) -> list[Group]:
    """The references of a block, then the most accurate groups."""
    return sorted(groups, key=lambda group: (group.label not in references, -accuracy(group).mean))[:most]


def _rest(groups: Sequence[Group], shown: Sequence[Group]) -> str:
    left = len(groups) - len(shown)
    return f" {left} more settings are on the page." if left else ""


def by_counts(report: Report, styles: fs.LineStyles) -> Iterator[CaptionedFigure]:
    """Heat maps of accuracy over teachers and branches, one panel per method; a figure per block."""
    for block in report.blocks:
        found = grids(block)
        if not found:
            continue
        figure, axes = fs.panels(len(found), most=2, height=2.5)
        for panel, (name, cells) in zip(axes, found.items(), strict=True):
            _grid_panel(panel, name, cells)
        numbers = [accuracy(group) for cells in found.values() for group in cells.values()]
        what = "Test accuracy by numbers of teachers and branches"
        text = f"{what}, mean and 95 % interval over seeds, {fs.counts(numbers)}."
        yield fs.captioned("teachers_branches", block.key, figure, block.title, text)


def _grid_panel(axes: Axes, name: str, cells: Mapping[tuple[int, int], Group]) -> None:
    import numpy as np  # noqa: PLC0415

    teachers, branches = sorted({m for m, _ in cells}), sorted({k for _, k in cells})
    values = np.full((len(teachers), len(branches)), np.nan)
    texts = [[""] * len(branches) for _ in teachers]
    for (m, k), group in cells.items():
        value = accuracy(group)
        row, column = teachers.index(m), branches.index(k)
        values[row, column] = 100 * value.mean
        spread = TOO_FEW if value.half is None else f"[{100 * value.low:.2f}, {100 * value.high:.2f}]"
        texts[row][column] = f"{100 * value.mean:.2f}\n{spread}\nn = {value.n}"
    fs.heat_map(axes, values, texts, (np.nanmin(values), np.nanmax(values)), ACCURACY)
    axes.set_xticks(range(len(branches)), [str(k) for k in branches])
    axes.set_yticks(range(len(teachers)), [str(m) for m in teachers])
    axes.set(xlabel="branches K", ylabel="teachers M", title=name)


def branches(report: Report, styles: fs.LineStyles) -> Iterator[CaptionedFigure]:
    """Accuracy of every branch, of their ensemble, and of the best possible choice; a figure per block."""
    for block in report.blocks:
        groups = [group for group in block.done if len(group.per_item("test_branch_accuracy")) > 1]
        if not groups:
            continue
        shown = sorted(_best(groups, report.references(block), _MOST_ROWS), key=lambda g: accuracy(g).mean)
        figure, (axes,) = fs.panels(1, most=1, height=0.8 + 0.26 * len(shown))
        for row, group in enumerate(shown):
            _branch_row(axes, row, group, named=row == len(shown) - 1)
        axes.set_yticks(range(len(shown)), [group.label for group in shown])
        axes.set_ylim(-0.6, len(shown) - 0.4)
        axes.set_xlabel(ACCURACY)
        drawn = [one for group in shown for one in _parts(group)]
        fs.limit_accuracy(axes, drawn, "x")
        fs.key(figure, [axes])
        what = "Test accuracy of each branch, of their ensemble, and if any right branch counts."
        text = f"{what} {fs.band_text(drawn, 'interval')}{_rest(groups, shown)}"
        yield fs.captioned("branches", block.key, figure, block.title, text)


def _parts(group: Group) -> list[Estimate]:
    oracle = group.values("test_oracle_accuracy")
    return [*group.per_item("test_branch_accuracy"), accuracy(group), *([oracle] if oracle else [])]


def _branch_row(axes: Axes, row: int, group: Group, *, named: bool) -> None:
    single = group.per_item("test_branch_accuracy")
    marks = [
        (value, row + 0.5 / len(single) * ((len(single) - 1) / 2 - k), "o", 3.5, fs.PALE, "branches")
        for k, value in enumerate(single)
    ]
    marks.append((accuracy(group), row, "D", 5, fs.LIGHT[0], "ensemble"))
    if oracle := group.values("test_oracle_accuracy"):
        marks.append((oracle, row, "^", 4.5, fs.LIGHT[1], "any branch right"))
    labelled: set[str] = set() if named else {label for *_, label in marks}
    for value, place, marker, size, colour, label in marks:
        axes.errorbar(
            100 * value.mean, place, xerr=fs.bars([value]), color=fs.GREY if colour == fs.PALE else colour,
            marker=marker, markersize=size, linestyle="", elinewidth=0.8,
            markerfacecolor="white" if value.half is None else colour, label=None if label in labelled else label,
        )  # fmt: skip
        labelled.add(label)


def learning_curves(report: Report, styles: fs.LineStyles) -> Iterator[CaptionedFigure]:
    """Accuracy on the validation split by epoch; a figure per block."""
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415

    for block in report.blocks:
        found = {group.label: details.curves(group, (_CURVE,)).get(_CURVE, []) for group in block.done}
        groups = [group for group in block.done if len(found[group.label]) > 1]
        if not groups:
            continue
        parts = fs.chunks(groups)
        figure, axes = fs.panels(len(parts), most=2, height=2.5)
        for panel, part in zip(axes, parts, strict=True):
            for group in part:
                epochs, values = zip(*found[group.label], strict=True)
                fs.points(panel, epochs, values, styles(group.label), group.label)
            panel.set(xlabel="epoch", ylabel="validation accuracy, %")
            panel.xaxis.set_major_locator(MaxNLocator(integer=True))
            fs.limit_accuracy(panel, [one for group in part for _, one in found[group.label]])
            fs.legend_above(panel)
        band = fs.band_text(found[group.label][-1][1] for group in groups)
        text = f"Accuracy on the validation images by epoch. {band}"
        yield fs.captioned("learning_curves", block.key, figure, block.title, text)


def reliability_diagrams(report: Report, styles: fs.LineStyles) -> Iterator[CaptionedFigure]:
    """Accuracy against confidence in 15 bins, before and after temperature scaling; a figure per block."""
    for block in report.blocks:
        arrays = {group.label: details.read_arrays(group) for group in block.done}
        groups = [group for group in block.done if details.reliability(arrays[group.label])]
        if not groups:
            continue
        shown = _best(groups, report.references(block), _MOST_PANELS)
        figure, axes = fs.panels(len(shown), most=3, height=2.4)
        for panel, group in zip(axes, shown, strict=True):
            _reliability_panel(panel, group, arrays[group.label])
        fs.key(figure, axes)
        numbers = [len(arrays[group.label]) for group in shown]
        bars = "; bars: 95 % intervals over seeds" if max(numbers) >= ENOUGH else ""
        text = (
            f"Accuracy against confidence in 15 bins, {fs.counts(numbers)}{bars}. Larger marks hold more images."
            f"{_rest(groups, shown)}"
        )
        yield fs.captioned("reliability", block.key, figure, block.title, text)


def _reliability_panel(axes: Axes, group: Group, arrays: Sequence[dict[str, details.Array]]) -> None:
    axes.plot([0, 1], [0, 1], color=fs.GREY, linestyle="--", linewidth=0.8, label="calibrated")
    errors = []
    kinds = (
        ("", "as trained", fs.LIGHT[1], "o", "test_ece"),
        ("_calibrated", "temperature-scaled", fs.LIGHT[0], "s", "test_ece_calibrated"),
    )
    for suffix, name, colour, marker, key in kinds:
        bins = details.reliability(arrays, suffix)
        if not bins:
            continue
        xs, ys = [b.confidence for b in bins], [b.accuracy.mean for b in bins]
        bars = fs.bars((b.accuracy for b in bins), 1)
        axes.errorbar(xs, ys, yerr=bars, color=colour, linewidth=1, elinewidth=0.7, label=name)
        axes.scatter(xs, ys, s=[4 + 50 * b.share for b in bins], color=colour, marker=marker, zorder=3)
        error = group.values(key)
        errors += [f"{error.mean:.3f}"] if error else []
    fs.title(axes, group.label)
    axes.text(0.97, 0.04, "ECE " + " → ".join(errors), transform=axes.transAxes, ha="right", fontsize=7, color=fs.GREY)
    axes.set(xlim=(0, 1.02), ylim=(0, 1.02), xlabel="confidence", ylabel="accuracy")


_SEVERITIES = "corruption_accuracy_by_severity"
_UNDER_SHIFT = (
    (_SEVERITIES, "corruption_clean_accuracy", ACCURACY, 100.0),
    ("corruption_nll_by_severity", "corruption_clean_nll", "NLL, nats", 1.0),
    ("corruption_ece_by_severity", "corruption_clean_ece", "ECE", 1.0),
)


def corruption_curves(report: Report, styles: fs.LineStyles) -> Iterator[CaptionedFigure]:
    """Accuracy, NLL and ECE by severity of corruption, each a mean over corruptions.

    A figure per block, and one for each way in which its corrupted images were made.
    """
    for block in report.blocks:
        alike: dict[str, list[Group]] = {}
        for group in block.done:
            if group.per_item(_SEVERITIES):
                alike.setdefault(group.corrupted, []).append(group)
        for number, (corruptions, groups) in enumerate(alike.items()):
            shown = _best(groups, report.references(block), 8)
            figure, axes = fs.panels(len(_UNDER_SHIFT), most=3, height=2.5)
            for panel, (field, clean, title, scale) in zip(axes, _UNDER_SHIFT, strict=True):
                for group in shown:
                    values = [*filter(None, [group.values(clean)]), *group.per_item(field)]
                    xs = list(range(6 - len(values), 6))
                    fs.points(panel, xs, values, styles(group.label), group.label, scale)
                panel.set(xlabel="severity (0: clean)", ylabel=title)
            fs.key(figure, axes)
            band = fs.band_text([group.per_item(_SEVERITIES)[0] for group in shown])
            text = f"Accuracy, NLL and ECE by severity, means over corruptions. {band}{_rest(groups, shown)}"
            key = block.key + (f"-way{number + 1}" if number else "")
            yield fs.captioned("corruptions", key, figure, f"{block.title}, {corruptions}", text)


def similarity(report: Report, styles: fs.LineStyles) -> Iterator[CaptionedFigure]:
    """CKA of branches with each other and with the teachers; a figure per block."""
    for block in report.blocks:
        branched = [group for group in block.done if (group.num_branches or 1) > 1]
        groups = [group for group in branched if details.matrix(group, "test_branch_cka") is not None]
        if not groups:
            continue
        shown = _heterogeneous(groups) or _best(groups, report.references(block), _MOST_PANELS // 2)
        figure, axes = fs.panels(2 * len(shown), most=2, height=2.1)
        for position, group in enumerate(shown):
            _matrix_panel(axes[2 * position], group, "test_branch_cka", "branch")
            _matrix_panel(axes[2 * position + 1], group, "test_branch_teacher_cka", "teacher")
        numbers = [sum(run.get("test_branch_cka") is not None for run in group.done) for group in shown]
        text = (
            f"Linear CKA of pooled features on the test images, mean over seeds, "
            f"{fs.counts(numbers)}. Framed: the branch's own teacher.{_rest(groups, shown)}"
        )
        yield fs.captioned("similarity", block.key, figure, block.title, text)


def _heterogeneous(groups: Sequence[Group]) -> list[Group]:
    """EKD and the controls of what its branches learn from their teachers; the most accurate group of each."""
    methods = ("ekd", "ekd_permuted", "ekd_mean")
    best = {group.method: group for group in sorted(groups, key=lambda group: accuracy(group).mean)}
    return [best[method] for method in methods if method in best]


def _matrix_panel(axes: Axes, group: Group, key: str, name: str) -> None:
    from matplotlib.patches import Rectangle  # noqa: PLC0415

    values = details.matrix(group, key)
    if values is None:
        axes.set_axis_off()
        return
    rows, columns = values.shape
    texts = [[f"{value:.2f}" for value in row] for row in values.tolist()]
    fs.heat_map(axes, values, texts, (0.0, 1.0), "CKA")
    axes.invert_yaxis()
    for row, column in enumerate(own_teachers(group)[:rows] if name == "teacher" else ()):
        if column is not None and column < columns:
            place = (column - 0.46, row - 0.44)
            axes.add_patch(Rectangle(place, 0.92, 0.88, fill=False, edgecolor=fs.INK, linewidth=1.5))
    axes.set_xticks(range(columns), [f"{name} {c}" for c in range(columns)])
    axes.set_yticks(range(rows), [f"branch {r}" for r in range(rows)])
    fs.title(axes, group.label)
