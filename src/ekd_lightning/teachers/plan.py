"""Plans of teachers and of the source of their outputs, made before any teacher is loaded.

Outputs are looked up in tables if these are possible and fit the disk; otherwise the teachers run in every step.
"""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import gcd, prod
from pathlib import Path
from typing import Any

import torch

from ekd_lightning.data import Dataset, Subset, Unlabelled, ViewFamily
from ekd_lightning.errors import UserError
from ekd_lightning.files import read_json
from ekd_lightning.methods import Method
from ekd_lightning.networks import NetworkSpec, StagedNetwork, TeacherEnsemble, build_network
from ekd_lightning.networks.staged import shape_at, stage_and_grid
from ekd_lightning.runs.writer import is_rank_zero
from ekd_lightning.settings import Settings
from ekd_lightning.teachers.source import LiveTeachers, Stages, TeacherFormat, TeacherSource
from ekd_lightning.teachers.table import LOGITS, POOLED, Columns, row_dtype
from ekd_lightning.teachers.tabled import TabledTeachers

log = logging.getLogger(__name__)

_BLOCK = 4096  # bytes of a file system's block, as usual


@dataclass(frozen=True)
class PlannedTeacher:
    """A teacher whose settings are checked and whose weights are not loaded yet.

    Attributes:
        id: Its name in records.
        spec: Its network, with a head for the data's classes.
        source: Where it comes from, see `TeacherIdentity`.
        obtain: Loads or trains it; returns the network, and details for `TeacherIdentity`.
        unknown: Classes of the data that it does not know; all classes for a teacher of features alone.
        is_ready: Whether `obtain` has nothing to train; if it has, checks first that it can.
    """

    id: str
    spec: NetworkSpec
    source: str
    obtain: Callable[[], tuple[StagedNetwork, dict[str, Any]]]
    unknown: frozenset[int] = frozenset()
    is_ready: Callable[[], bool] = lambda: True


@dataclass(frozen=True)
class SourcePlan:
    """Plan of the source of a run's teacher outputs.

    Attributes:
        tables: Whether outputs are kept in tables on disk.
        stages: Stages whose outputs are kept, too.
        open: Opens the source; called in every process when training starts.
    """

    tables: bool = False
    stages: Stages = ()
    open: Callable[[TeacherEnsemble], TeacherSource] = LiveTeachers


def plan_source(
    settings: Settings,
    dataset: Dataset,
    subset: Subset,
    views: ViewFamily,
    teachers: Sequence[PlannedTeacher],
    method: Method,
    unlabelled: Unlabelled | None = None,
) -> SourcePlan:
    """Decides whether teacher outputs come from tables; logs why not, or how large the tables may become.

    The plan holds for other teachers with tables at most as large, and for every method that needs the same outputs.

    Raises:
        UserError: If tables are required (`teachers.table=require`) and not possible.
    """
    chosen = settings.teachers
    how = TeacherFormat(chosen.precision, chosen.fold, chosen.compile, settings.channels_last)
    live = SourcePlan(open=partial(LiveTeachers, how=how))
    problem = _why_live(settings, method)
    if problem:
        if chosen.table == "require":
            raise UserError(f"teachers.table=require: {problem}")
        _log_once(f"teachers run in every step: {problem}")
        return live
    stages = _kept_stages(settings, method)
    folder = Path(settings.teachers.store) / "tables"
    sets = [(dataset.train.sha256, len(dataset.train))]
    images = subset.train_index
    if unlabelled is not None:
        images = torch.cat((images, unlabelled.index)).sort().values
        sets += [(unlabelled.own.sha256, len(unlabelled))] if unlabelled.own else []
    # With unlabelled images, an epoch may contain several views of an image of the other kind.
    used_views = min(views.num_views, settings.recipe.epochs) if unlabelled is None else None
    needed = _needed_bytes(dataset, len(images), sets, views, used_views, teachers, method.needs_pooled, stages)
    try:
        present = sum(present_bytes(folder, sha256, views.key, len(teachers), stages) for sha256, _ in sets)
        check_disk(folder, needed, chosen.table_budget_gb * 1e9, present)
    except UserError as error:
        if chosen.table == "require":
            raise UserError(f"teachers.table=require: {error}") from None
        warnings.warn(f"{error}; this run's teachers run in every step, without tables", stacklevel=3)
        return live
    size = f"{len(images) * views.num_views:,} rows per teacher ({len(images):,} images × {views.num_views} views)"
    _log_once(f"teacher outputs: at most {size}, kept in {folder} ({needed / 1e6:,.0f} MB when full)")
    tabled = partial(
        TabledTeachers,
        folder=folder,
        image_sets=sets,
        views=views,
        images=images,
        include_pooled=method.needs_pooled,
        keep_stages=stages,
        image_size=dataset.image_size,
        how=how,
    )
    return SourcePlan(tables=True, stages=stages, open=tabled)


def _kept_stages(settings: Settings, method: Method) -> Stages:
    """Stages whose outputs have tables; in steps that need others, the teachers run."""
    if settings.teachers.table_stages:
        return method.teacher_stages
    return tuple(name for name in method.teacher_stages if stage_and_grid(name)[1])


def _why_live(settings: Settings, method: Method) -> str:
    """Returns why tables are not possible; empty if they are."""
    if settings.teachers.table == "off":
        return "teachers.table=off"
    if mixed := settings.recipe.mixed("recipe"):
        return f"no image occurs twice with {mixed}"
    kept = _kept_stages(settings, method)
    left_out = [name for name in method.teacher_stages if name not in kept]
    if left_out and not any(set(needed) <= set(kept) for needed in method.needed_stage_sets):
        stages = ", ".join(left_out)
        return f"tables keep no outputs of {stages} unless teachers.table_stages=true"
    return ""


def _log_once(line: str) -> None:
    if is_rank_zero():
        log.info(line)


def _needed_bytes(
    dataset: Dataset,
    images: int,
    sets: Sequence[tuple[str, int]],
    views: ViewFamily,
    used_views: int | None,
    teachers: Sequence[PlannedTeacher],
    pooled: bool,
    stages: Stages,
) -> int:
    """Returns an upper bound of the bytes of the run's tables."""
    needed, in_sets = 0, sum(size for _, size in sets)
    for teacher in teachers:
        network = build_network(teacher.spec)
        columns: Columns = ((LOGITS, dataset.num_classes),)
        if pooled:
            columns += ((POOLED, network.pooled_width),)
        needed += table_bytes(images, views.num_views, columns, set_size=in_sets)
        shapes = network.stage_shapes(dataset.image_size)
        widths = {stage: prod(shape_at(shapes, stage)) for stage in stages}
        needed += sum(
            table_bytes(images, views.num_views, (column,), set_size=in_sets, used_views=used_views)
            for column in widths.items()
        )
    return needed


def table_bytes(
    num_images: int, num_views: int, columns: Columns, *, set_size: int | None = None, used_views: int | None = None
) -> int:
    """Returns an upper bound of a table's bytes on a file system with blocks of 4096 bytes.

    The number of images in the whole set, `set_size`, makes it tighter for large subsets; the most views of an image
    that the run uses, `used_views`, for large rows.
    """
    row = row_dtype(columns).itemsize
    per_image = num_views * row
    # The views of an image are neighbours, but need not start with a block.
    blocks = num_images * (-(-per_image // _BLOCK) + 1)
    if used_views is not None:
        latest = _BLOCK - gcd(row, _BLOCK)  # latest start of a row in a block
        blocks = min(blocks, num_images * used_views * -(-(latest + row) // _BLOCK))
    if set_size is not None:
        blocks = min(blocks, -(-set_size * per_image // _BLOCK))
    return blocks * _BLOCK


def present_bytes(
    folder: Path, image_set_sha256: str, view_key: str, num_teachers: int, stages: Sequence[str] = ()
) -> int:
    """Returns the bytes on disk, without holes, of existing tables of these images and views.

    The teacher of a table is not known before the teachers are loaded. If there are more tables of a kind (logits, or
    one of the stages) than teachers, only the smallest count, so that the result is a lower bound.
    """
    sizes: dict[str, list[int]] = {kind: [] for kind in ("", *stages)}
    for sidecar in folder.glob("*.json"):
        try:
            facts = read_json(sidecar)
            same = facts["image_set_sha256"] == image_set_sha256 and facts["view_key"] == view_key
            kind = "" if "num_classes" in facts else facts["content"]
            if same and kind in sizes:
                sizes[kind].append(sidecar.with_suffix(".rows").stat().st_blocks * 512)
        except (OSError, ValueError, KeyError, TypeError):
            continue  # not a table, or not readable
    return sum(sum(sorted(own)[:num_teachers]) for own in sizes.values())


def check_disk(folder: Path, needed: int, budget: float, present: int) -> None:
    """Refuses tables that need more than the budget in bytes, or than the free space, before training begins.

    They need `needed` bytes when full, of which they take `present` already.
    """
    need = f"the teacher tables need up to {needed / 1e6:,.1f} MB in {folder}"
    advice = "use fewer images, views or teachers, or set teachers.table=off"
    if needed > budget:
        budget_mb = f"{budget / 1e6:,.1f} MB"
        raise UserError(f"{need}, but may take {budget_mb}: raise teachers.table_budget_gb, {advice}")
    place = folder.absolute()
    free = shutil.disk_usage(next(parent for parent in (place, *place.parents) if parent.is_dir())).free
    if needed - present > free:
        raise UserError(f"{need}, but only {free / 1e6:,.1f} MB are free: make space, {advice}")
