"""Which source of teacher outputs a run has: tables on disk, or live teachers; and why."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from ekd_lightning.data import Dataset, Subset, ViewFamily
from ekd_lightning.errors import UserError
from ekd_lightning.methods import Method
from ekd_lightning.networks import TeacherEnsemble, build_network
from ekd_lightning.pipeline.table_budget import check_disk, present_bytes, table_bytes
from ekd_lightning.runs.record import is_rank_zero
from ekd_lightning.settings import Settings
from ekd_lightning.teachers.frozen import TeacherFormat
from ekd_lightning.teachers.source import LiveTeachers, TeacherSource
from ekd_lightning.teachers.tabled import TabledTeachers
from ekd_lightning.training.pool import PlannedTeacher

if TYPE_CHECKING:
    from ekd_lightning.pipeline.prepare import Prepared

log = logging.getLogger(__name__)

_ADVICE = "see teachers.table_budget_gb and teachers.table=off"


def uses_tables(
    settings: Settings,
    dataset: Dataset,
    subset: Subset,
    views: ViewFamily,
    plans: list[PlannedTeacher],
    method: Method,
) -> bool:
    """Whether teacher outputs are remembered; says why not, or how large the tables may become.

    Raises:
        UserError: If tables are required and cannot be had.
    """
    problem = _why_live(settings, method)
    if problem:
        if settings.teachers.table == "require":
            raise UserError(f"teachers.table=require: {problem}")
        _say(f"teachers run live: {problem}")
        return False
    images, set_size = len(subset.train_index), len(dataset.train)
    needed = 0
    for plan in plans:
        network = build_network(plan.spec)
        values = network.num_features if method.needs_pooled else 0
        needed += table_bytes(images, views.num_views, dataset.num_classes, values, 1, set_size=set_size)
        shapes = network.stage_shapes(dataset.image_size)
        # Rows as large as these are blocks of the disk by themselves, so a run needs only those that it asks for.
        asked = min(views.num_views, settings.recipe.epochs)
        for stage in _kept_stages(settings, method):
            needed += table_bytes(images, asked, dataset.num_classes, prod(shapes[stage]), 1)
    folder = table_folder(settings)
    try:
        present = present_bytes(
            folder, dataset.train.sha256, views.key, len(plans), _kept_stages(settings, method)
        )
        check_disk(folder, needed, int(settings.teachers.table_budget_gb * 1e9), present)
    except UserError as error:
        if settings.teachers.table == "require":
            raise UserError(f"teachers.table=require: {error} ({_ADVICE})") from None
        warnings.warn(f"{error} ({_ADVICE}); this run's teachers run live", stacklevel=3)
        return False
    size = f"{images * views.num_views:,} rows ({images:,} images, {views.num_views} views)"
    _say(f"teacher tables: {len(plans)} of {size}, at most {needed / 1e6:,.0f} MB in {folder}")
    return True


def _why_live(settings: Settings, method: Method) -> str:
    """What stands against tables, or nothing."""
    if settings.teachers.table == "off":
        return "teachers.table=off"
    if mixed := settings.recipe.mixed("recipe"):
        return f"with {mixed} images are not finite in number"
    if method.teacher_stages and not settings.teachers.table_stages and () not in method.stages_asked:
        stages = ", ".join(method.teacher_stages)
        return f"stage outputs ({stages}) are not kept in tables (teachers.table_stages=true keeps them)"
    return ""


def _kept_stages(settings: Settings, method: Method) -> tuple[str, ...]:
    """Stages with tables of their own.

    Without them, a method that needs stages for a part of its training asks the teachers live in that part.
    """
    return method.teacher_stages if settings.teachers.table_stages else ()


def _say(line: str) -> None:
    if is_rank_zero():
        log.info(line)


def table_folder(settings: Settings) -> Path:
    """Where the tables of teacher outputs lie."""
    return Path(settings.teachers.store) / "tables"


def source_factory(settings: Settings, prepared: Prepared) -> Callable[[TeacherEnsemble], TeacherSource]:
    """How every process of a run opens the teachers' outputs: as a table, or live."""
    return make_source(
        settings, prepared.dataset, prepared.subset, prepared.views, prepared.method, tables=prepared.table
    )


def make_source(
    settings: Settings, dataset: Dataset, subset: Subset, views: ViewFamily, method: Method, *, tables: bool
) -> Callable[[TeacherEnsemble], TeacherSource]:
    """How teachers of any training with these settings are asked what `method` needs; `tables` as `uses_tables`."""
    teachers = settings.teachers
    how = TeacherFormat(teachers.precision, teachers.fold, teachers.compile, settings.channels_last)
    if not tables:
        return partial(LiveTeachers, how=how)
    return partial(
        TabledTeachers,
        folder=table_folder(settings),
        image_set_sha256=dataset.train.sha256,
        num_images=len(dataset.train),
        views=views,
        images=subset.train_index,
        include_pooled=method.needs_pooled,
        keep_stages=_kept_stages(settings, method),
        image_size=dataset.image_size,
        how=how,
    )
