"""Teacher tables filled ahead of training."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from ekd_lightning.data.loader import TrainLoader
from ekd_lightning.errors import UserError
from ekd_lightning.pipeline.choice import choose_teacher
from ekd_lightning.pipeline.prepare import Prepared, prepare
from ekd_lightning.pipeline.sources import source_factory
from ekd_lightning.settings import Settings
from ekd_lightning.teachers.tabled import TabledTeachers
from ekd_lightning.training.pool import gather_teachers

log = logging.getLogger(__name__)


def prepare_fill(settings: Settings, accelerator: str) -> Prepared | None:
    """Checks that the rows of `teachers.fill` can be kept; None when nothing is to be filled.

    Raises:
        UserError: There is no table to fill.
    """
    fill = settings.teachers.fill
    if fill == "none":
        return None
    prepared = prepare(settings, accelerator)
    if not prepared.table:
        raise UserError(f"teachers.fill={fill}: this configuration keeps no teacher tables")
    return prepared


def fill_tables(settings: Settings, prepared: Prepared, device: torch.device) -> tuple[int, int]:
    """Computes the rows that are missing: those of one run (`teachers.fill=run`), or every view (`all`).

    Can be stopped and started again: rows that are there are not computed twice.

    Args:
        settings: The run's settings; with `run`, epochs, batch size and seed say which rows these are.
        prepared: What `prepare_fill` returned.
        device: Where they compute.

    Returns:
        Rows found and rows computed, counted per teacher.

    Raises:
        UserError: The rows cannot be kept, e.g. because the disk is full.
    """
    prepared = choose_teacher(settings, prepared, device)
    source = source_factory(settings, prepared)(gather_teachers(prepared.teachers).to(device))
    assert isinstance(source, TabledTeachers)  # prepare_fill made sure
    parts = list(_epochs(settings, prepared) if settings.teachers.fill == "run" else _views(prepared))
    source.plan(sum(len(index) for index, _ in parts))
    gather = partial(prepared.datamodule.training_images, device=device)
    kept = prepared.method.teacher_stages if settings.teachers.table_stages else ()
    for number, (index, view) in enumerate(parts, start=1):
        source.prepare_epoch(index, view, gather, {kept: len(index)})
        if not source.keeping:
            raise UserError(
                f"teachers.store={settings.teachers.store}: teacher tables cannot be written there"
            )
        if number % max(1, len(parts) // 10) == 0:
            log.info("teacher tables: %d of %d parts filled", number, len(parts))
    return source.hits, source.misses


def _epochs(settings: Settings, prepared: Prepared) -> Iterator[tuple[Tensor, Tensor]]:
    """Index and view of every epoch of the run."""
    loader = TrainLoader(
        prepared.dataset.train,
        prepared.subset.train_index,
        prepared.views,
        settings.recipe.batch_size,
        settings.seed,
    )
    for epoch in range(settings.recipe.epochs):
        loader.sampler.set_epoch(epoch)
        yield loader.rows()


def _views(prepared: Prepared) -> Iterator[tuple[Tensor, Tensor]]:
    """All images of the subset, in one view after another."""
    index = prepared.subset.train_index
    for view in range(prepared.views.num_views):
        yield index, torch.full_like(index, view)
