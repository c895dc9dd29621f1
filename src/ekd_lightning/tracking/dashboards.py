"""Evaluations on dashboards: Weights & Biases and TensorBoard, under the same names.

W&B gets scalars, charts of its presets, tables and captioned images; TensorBoard gets scalars, hyperparameters, tables
as text, figures and one sheet of captioned images.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger
from pytorch_lightning.utilities import rank_zero_only

from ekd_lightning import markdown as md
from ekd_lightning.data import Dataset
from ekd_lightning.settings import LoggerSettings
from ekd_lightning.tracking.loggers import describe_metrics, finish_loggers, flat_columns, in_wandb_sweep, make_loggers
from ekd_lightning.tracking.panels import TEST, TEST_BEST, TEST_EMA, Example, Lines, Panels, Table, make_panels

log = logging.getLogger(__name__)

EVALUATION = "evaluation"
_HEADLINE = ("test/accuracy", "validation/val_accuracy", "test/nll", "test/ece")
"""Scores in TensorBoard's table of hyperparameters."""
FACTS = (
    *("method", "data", "student", "num_teachers", "num_branches", "split_after", "ensemble", "temperature"),
    *("assignment", "fraction", "seed", "epochs", "batch_size", "num_parameters", "macs"),
)
"""Fields of a result that say what was run, for flat columns."""
_TILE, _CAPTION, _COLUMNS = 96, 28, 8  # pixels, pixels, tiles in a row


@rank_zero_only
def log_evaluation(
    loggers: list[Logger],
    result: Mapping[str, Any],
    read_arrays: Callable[[], Mapping[str, NDArray[Any]]],
    dataset: Dataset,
    *,
    tested: bool = True,
) -> None:
    """Logs numbers, tables, plots and misclassified images of an evaluation; an error is logged and not raised.

    Args:
        loggers: Loggers of the run; metrics.csv is skipped, as result.json holds the same numbers.
        result: Content of result.json.
        read_arrays: Returns the content of arrays.npz, empty without one; called only if there is a dashboard.
        dataset: The data set, for its test images and class names.
        tested: Whether these loggers already have the scores of the run's own test.
    """
    shown = [logger for logger in loggers if isinstance(logger, (WandbLogger, TensorBoardLogger))]
    if not shown:
        return
    try:
        images = dataset.test.images.cpu().numpy()
        panels = make_panels(result, read_arrays(), images, tuple(dataset.class_names))
        hidden = (f"{TEST}/", f"{TEST_BEST}/", f"{TEST_EMA}/") if tested else ()
        numbers = {name: value for name, value in panels.scalars.items() if not name.startswith(hidden)}
        for logger in shown:
            if isinstance(logger, WandbLogger):
                axes = {"epoch": int(result["epochs_done"]), "trainer/global_step": int(result["steps"])}
                logger.experiment.log({**numbers, **_wandb_media(panels), **axes})
            else:
                _write_tensorboard(logger, panels, numbers, result)
    except Exception:
        log.exception("the dashboard has no evaluation of this run, because of an error; result.json has it")


def log_evaluation_run(
    settings: LoggerSettings,
    result: Mapping[str, Any],
    read_arrays: Callable[[], Mapping[str, NDArray[Any]]],
    dataset: Dataset,
    directory: Path,
    *,
    config: dict[str, Any],
    sweep: str | None,
) -> None:
    """Logs a later evaluation of a finished run as a run of its own, of job type `evaluation`, in the same group.

    Files go to `evaluation/` below the run's directory. Without a dashboard nothing is done.
    """
    if in_wandb_sweep():
        return
    name = f"{result['method']}-T{result['num_teachers']}-B{result['num_branches']}-s{result['seed']}"
    loggers = make_loggers(settings, directory / EVALUATION, name=name, sweep=sweep, config=config, job_type=EVALUATION)
    try:
        describe_metrics(loggers, result_columns(result, config))
        log_evaluation(loggers, result, read_arrays, dataset, tested=False)
    except Exception:  # no server, no login
        log.exception("%s: dashboards do not have this evaluation, because of an error; result.json has it", directory)
    finish_loggers(loggers, result=result)


def result_columns(result: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what was run, according to a finished run's record, as flat columns."""
    return flat_columns({name: result[name] for name in FACTS if name in result}, config)


def _title(name: str) -> str:
    """Returns the title of a panel from its name."""
    return name.rpartition("/")[2].replace("_", " ")


def _wandb_media(panels: Panels) -> dict[str, Any]:
    import wandb  # noqa: PLC0415 (slow to import, and only where it is selected)

    media: dict[str, Any] = {
        # Columns of mixed types, because unknown numbers are null.
        name: wandb.Table(columns=[*table.columns], data=table.rows, allow_mixed_types=True)
        for name, table in panels.tables.items()
    }
    for name, shown in panels.curves.items():
        media[name] = wandb.plot.line_series(
            xs=[x for x, _ in shown.lines.values()],
            ys=[y for _, y in shown.lines.values()],
            keys=list(shown.lines),
            title=f"{_title(name)}: {shown.y_name}",
            xname=shown.x_name,
        )
    if panels.confusion is not None:
        # The preset from counts: W&B's own helper needs N labels, and mixes up classes that never occur.
        names = panels.class_names
        columns: list[str | int] = ["Actual", "Predicted", "nPredictions"]
        rows = [[names[i], names[j], int(n)] for i, row in enumerate(panels.confusion) for j, n in enumerate(row)]
        media["evaluation/confusion"] = wandb.plot_table(
            "wandb/confusion_matrix/v1",
            wandb.Table(columns=columns, data=rows),
            fields={str(column): str(column) for column in columns},
            string_fields={"title": "confusion of the ensemble output"},
        )
    if panels.examples:
        media["evaluation/misclassified"] = [
            wandb.Image(example.image, caption=example.caption) for example in panels.examples
        ]
    return media


def _write_tensorboard(
    logger: TensorBoardLogger, panels: Panels, numbers: Mapping[str, float], result: Mapping[str, Any]
) -> None:
    from torch.utils.tensorboard.summary import hparams  # noqa: PLC0415 (an optional package behind it)

    writer: Any = logger.experiment
    step = int(result["steps"])
    logger.log_metrics(dict(numbers), step)
    scores = {name: panels.scalars[name] for name in _HEADLINE if name in panels.scalars}
    # Lightning's log_hyperparams would write the scores a second time.
    columns = {n: "none" if v is None else v for n, v in result_columns(result, {}).items()}
    for summary in hparams(columns, scores):
        writer._get_file_writer().add_summary(summary, step)
    for name, table in panels.tables.items():
        writer.add_text(name, markdown(table), step)
    if panels.examples:
        writer.add_image("evaluation/misclassified", examples_grid(panels.examples), step, dataformats="HWC")
    try:
        import matplotlib.figure  # noqa: F401, PLC0415 (an optional package)
    except ModuleNotFoundError:
        log.info("TensorBoard lacks figures of calibration and confusion: pip install 'ekd-lightning[report]'")
        return
    for name, lines in panels.curves.items():
        writer.add_figure(name, line_figure(lines, _title(name)), step)
    if panels.confusion is not None:
        figure = confusion_figure(panels.confusion, panels.class_names)
        writer.add_figure("evaluation/confusion", figure, step)


def markdown(table: Table) -> str:
    """Returns a table as Markdown, with four digits after the point."""
    rows = [[f"{value:.4f}" if isinstance(value, float) else value for value in row] for row in table.rows]
    return md.table(table.columns, rows)


def examples_grid(examples: list[Example]) -> NDArray[np.uint8]:
    """Returns all examples in one picture, uint8 [H, W, 3], with the true and the predicted class below each."""
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


def line_figure(lines: Lines, title: str) -> Any:
    """Returns lines as a Matplotlib figure with a title; a line named `perfect` is dashed."""
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    for name, (x, y) in lines.lines.items():
        style: dict[str, Any] = {"linestyle": "--", "color": "0.5"} if name == "perfect" else {"marker": "o"}
        axes.plot(x, y, label=name, **style)
    axes.set(xlabel=lines.x_name, ylabel=lines.y_name, title=title)
    axes.legend()
    return figure


def confusion_figure(confusion: NDArray[Any], class_names: tuple[str, ...]) -> Any:
    """Returns a Matplotlib figure of a confusion matrix, as shares of each true class; with counts up to 20 classes."""
    from matplotlib.figure import Figure  # noqa: PLC0415

    classes = len(class_names)
    size = min(4 + 0.3 * classes, 14)
    figure = Figure(figsize=(size, size), layout="constrained")
    axes = figure.subplots()
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    shown = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(shown, ax=axes, label="share of the true class", shrink=0.8)
    axes.set(xlabel="predicted class", ylabel="true class", title="confusion of the ensemble output")
    if classes <= 20:
        axes.set_xticks(range(classes), class_names, rotation=90)
        axes.set_yticks(range(classes), class_names)
        for i, j in np.ndindex(classes, classes):
            colour = "white" if shares[i, j] > 0.5 else "black"
            axes.text(j, i, str(int(confusion[i, j])), ha="center", va="center", color=colour, fontsize=8)
    return figure
