"""Panels of an evaluation for TensorBoard: scalars, hyperparameters, tables as text, figures, captioned images."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from ekd_lightning.tracking.panels import Example, Lines, Table

if TYPE_CHECKING:
    from pytorch_lightning.loggers import TensorBoardLogger

    from ekd_lightning.tracking.dashboards import Panels

log = logging.getLogger(__name__)

_HEADLINE = (
    "evaluation/test_accuracy",
    "evaluation/val_accuracy",
    "calibration/test_nll",
    "calibration/test_ece",
)
"""What TensorBoard's table of hyperparameters shows beside them."""
_TILE, _CAPTION, _COLUMNS = 96, 28, 8  # pixels, pixels, tiles in a row


def write_panels(logger: TensorBoardLogger, panels: Panels, *, step: int) -> None:
    """Writes everything at the last optimiser step.

    Args:
        logger: The run's.
        panels: What is shown.
        step: Optimiser steps that were taken.
    """
    writer: Any = logger.experiment
    logger.log_metrics(panels.scalars, step)
    told = {name: panels.scalars[name] for name in _HEADLINE if name in panels.scalars}
    logger.log_hyperparams({n: "none" if v is None else v for n, v in panels.columns.items()}, told, step)
    for name, table in panels.tables.items():
        writer.add_text(name, markdown(table), step)
    if panels.examples:
        writer.add_image("evaluation/misclassified", examples_grid(panels.examples), step, dataformats="HWC")
    try:
        import matplotlib.figure  # noqa: F401, PLC0415 (an optional package)
    except ModuleNotFoundError:
        log.info(
            "TensorBoard shows figures of calibration and confusion with `pip install 'ekd-lightning[report]'`"
        )
        return
    for name, lines in panels.curves.items():
        writer.add_figure(name, line_figure(lines), step)
    if panels.confusion is not None:
        figure = confusion_figure(panels.confusion, panels.class_names)
        writer.add_figure("evaluation/confusion", figure, step)


def markdown(table: Table) -> str:
    """A table as Markdown, numbers with four digits."""
    rows = [[f"{v:.4f}" if isinstance(v, float) else str(v) for v in row] for row in table.rows]
    lines = [table.columns, ["---"] * len(table.columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def examples_grid(examples: list[Example]) -> NDArray[np.uint8]:
    """All examples in one picture, uint8 [H, W, 3], each with its true and its predicted class below."""
    rows = -(-len(examples) // _COLUMNS)
    width = _COLUMNS if rows > 1 else len(examples)
    sheet = Image.new("RGB", (width * _TILE, rows * (_TILE + _CAPTION)), "white")
    draw = ImageDraw.Draw(sheet)
    for place, example in enumerate(examples):
        x, y = place % _COLUMNS * _TILE, place // _COLUMNS * (_TILE + _CAPTION)
        picture = Image.fromarray(example.image).resize((_TILE - 4, _TILE - 4), Image.Resampling.NEAREST)
        sheet.paste(picture, (x + 2, y + 2))
        draw.text((x + 3, y + _TILE - 1), _fitting(draw, example.true), fill="black")
        draw.text((x + 3, y + _TILE + 12), _fitting(draw, f"as {example.predicted}"), fill="#b00020")
    return np.asarray(sheet)


def _fitting(draw: ImageDraw.ImageDraw, text: str) -> str:
    while text and draw.textlength(text) > _TILE - 4:
        text = text[:-1]
    return text


def line_figure(lines: Lines) -> Any:
    """Lines as a figure of matplotlib; a line called `perfect` is dashed."""
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    for name, (x, y) in lines.lines.items():
        style: dict[str, Any] = {"linestyle": "--", "color": "0.5"} if name == "perfect" else {"marker": "o"}
        axes.plot(x, y, label=name, **style)
    axes.set(xlabel=lines.x_name, ylabel=lines.y_name)
    if len(lines.lines) > 1:
        axes.legend()
    return figure


def confusion_figure(confusion: NDArray[Any], class_names: tuple[str, ...]) -> Any:
    """A confusion matrix as shares of each true class; counts in the cells up to 20 classes."""
    from matplotlib.figure import Figure  # noqa: PLC0415

    classes = len(class_names)
    size = min(4 + 0.3 * classes, 14)
    figure = Figure(figsize=(size, size), layout="constrained")
    axes = figure.subplots()
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted", ylabel="true")
    if classes <= 20:
        axes.set_xticks(range(classes), class_names, rotation=90)
        axes.set_yticks(range(classes), class_names)
        for i, j in np.ndindex(classes, classes):
            colour = "white" if shares[i, j] > 0.5 else "black"
            axes.text(j, i, str(int(confusion[i, j])), ha="center", va="center", color=colour, fontsize=8)
    return figure
