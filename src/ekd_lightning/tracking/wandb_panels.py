"""Panels of an evaluation as Weights & Biases shows them: charts of its own presets, tables, captioned images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import wandb

from ekd_lightning.tracking.panels import Lines, Table

if TYPE_CHECKING:
    from ekd_lightning.tracking.dashboards import Panels


def log_panels(run: Any, panels: Panels, *, epoch: int, step: int) -> None:
    """Logs everything in one step of the run's history, at its last epoch.

    Args:
        run: The W&B run.
        panels: What is shown.
        epoch: Epochs that were trained.
        step: Optimiser steps that were taken.
    """
    media: dict[str, Any] = {name: _table(table) for name, table in panels.tables.items()}
    media |= {name: _lines(name, lines) for name, lines in panels.curves.items()}
    if panels.confusion is not None:
        media["evaluation/confusion"] = _confusion(panels)
    if panels.examples:
        media["evaluation/misclassified"] = [
            wandb.Image(example.image, caption=example.caption) for example in panels.examples
        ]
    run.log({**panels.scalars, **media, "epoch": epoch, "trainer/global_step": step})


def _table(table: Table) -> wandb.Table:
    # Columns of one type may hold nothing, too: null where a figure is not known.
    return wandb.Table(columns=[*table.columns], data=table.rows, allow_mixed_types=True)


def _lines(name: str, lines: Lines) -> Any:
    return wandb.plot.line_series(
        xs=[x for x, _ in lines.lines.values()],
        ys=[y for _, y in lines.lines.values()],
        keys=list(lines.lines),
        title=f"{name.rpartition('/')[2].replace('_', ' ')}: {lines.y_name}",
        xname=lines.x_name,
    )


def _confusion(panels: Panels) -> Any:
    """W&B's preset, from the counts; its own helper wants N labels, and mixes classes up that never occur."""
    assert panels.confusion is not None
    names = panels.class_names
    rows = [[names[i], names[j], int(n)] for i, row in enumerate(panels.confusion) for j, n in enumerate(row)]
    table = wandb.Table(columns=["Actual", "Predicted", "nPredictions"], data=rows)
    return wandb.plot_table(
        "wandb/confusion_matrix/v1",
        table,
        fields={"Actual": "Actual", "Predicted": "Predicted", "nPredictions": "nPredictions"},
        string_fields={"title": "confusion of the ensemble output"},
    )
