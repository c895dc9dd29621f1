"""All figures of a report as files, with a list of what each shows and why others are left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ekd_lightning.reporting import figures_accuracy, figures_detail, figures_difference
from ekd_lightning.reporting.figure_style import Looks, save, style
from ekd_lightning.reporting.figures_accuracy import Drawn
from ekd_lightning.reporting.report import Report

LIST = "figures.md"


@dataclass(frozen=True)
class Kind:
    """A kind of figure.

    Attributes:
        title: What it shows.
        needs: What runs must have for it, in words.
        draw: Makes the figures of a report: none, one, or one for each block.
    """

    title: str
    needs: str
    draw: Callable[[Report, Looks], Iterator[Drawn]]


KINDS = (
    Kind("accuracy against training images", "a setting at two fractions", figures_accuracy.by_fraction),
    Kind(
        "teachers × branches",
        "a method with several numbers of teachers or branches",
        figures_accuracy.by_counts,
    ),
    Kind("accuracy against cost", "two settings in one block", figures_accuracy.by_cost),
    Kind(
        "ablations and controls", "two seeds in common with the reference", figures_difference.by_difference
    ),
    Kind("branches", "a student with several branches", figures_detail.branches),
    Kind("learning curves", "metrics.csv with two epochs", figures_detail.learning_curves),
    Kind("calibration", "arrays.npz, written by ekd-evaluate", figures_detail.reliability_diagrams),
    Kind(
        "corrupted images",
        "an evaluation on corrupted images, by ekd-evaluate",
        figures_detail.corruption_curves,
    ),
    Kind("similarity of features", "CKA matrices, written by ekd-evaluate", figures_detail.similarity),
)


def write_figures(report: Report, folder: Path, formats: Sequence[str]) -> list[Path]:
    """Draws and writes all figures that the runs have data for.

    Args:
        report: The runs.
        folder: Made if need be.
        formats: Of `svg` and `png`.

    Returns:
        What was written: `<name>.<format>`, and `figures.md`, which says what each figure shows, and which ones
        are left out for want of data.

    Raises:
        UserError: Without matplotlib.
    """
    folder.mkdir(parents=True, exist_ok=True)
    looks = Looks(report.ordered_labels)
    files: list[Path] = []
    lines = ["# Figures", ""]
    left_out = []
    with style():
        for kind in KINDS:
            count = len(files)
            for drawn in kind.draw(report, looks):
                files += save(drawn.figure, folder / drawn.name, formats)
                lines += [f"![{drawn.caption}]({files[-len(formats)].name})", "", drawn.caption, ""]
            if len(files) == count:
                left_out.append(f"- {kind.title}: needs {kind.needs}")
    if left_out:
        lines += ["Left out for want of data:", "", *left_out, ""]
    (folder / LIST).write_text("\n".join(lines), encoding="utf-8")
    return [*files, folder / LIST]
