"""Plans of teachers and of the source of their outputs, made before any teacher is loaded.

Outputs are looked up in tables where these can be had and fit the disk; else the teachers run live.
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

_ADVICE = "see teachers.table_budget_gb and teachers.table=off"
_BLOCK = 4096  # bytes of a file system's block, as usual


@dataclass(frozen=True)
class PlannedTeacher:
    """A teacher whose settings were checked and whose weights were not loaded yet.

    Attributes:
        id: Its name in records.
        spec: Its network, for the data's classes.
        source: Where it comes from, see `TeacherIdentity`.
        obtain: Loads or trains it; also what else is known of it.
        unknown: The classes of the data that it does not know; all of them where it teaches features alone.
    """

    id: str
    spec: NetworkSpec
    source: str
    obtain: Callable[[], tuple[StagedNetwork, dict[str, Any]]]
    unknown: frozenset[int] = frozenset()


@dataclass(frozen=True)
class SourcePlan:
    """Plan of the source of a run's teacher outputs.

    Attributes:
        tables: Whether they are remembered on disk.
        stages: Stages whose outputs are remembered, too.
        open: Opens the source, in every process when training starts.
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
    """Decides whether tables serve teacher outputs; logs why not, or how large the tables may become.

    Args:
        settings: The run's.
        dataset: The images.
        subset: Those that are trained on.
        views: The training's view family.
        teachers: The teachers, or others with tables at least as large.
        method: What is needed of them; the plan holds for every method that needs the same outputs.
        unlabelled: Images that are trained on without labels.

    Raises:
        UserError: If tables are required and cannot be had.
    """
    chosen = settings.teachers
    how = TeacherFormat(chosen.precision, chosen.fold, chosen.compile, settings.channels_last)
    live = SourcePlan(open=partial(LiveTeachers, how=how))
    problem = _why_live(settings, method)
    if problem:
        if chosen.table == "require":
            raise UserError(f"teachers.table=require: {problem}")
        _say(f"teachers run live: {problem}")
        return live
    stages = _kept_stages(settings, method)
    folder = table_folder(settings)
    sets = [(dataset.train.sha256, len(dataset.train))]
    images = subset.train_index
    if unlabelled is not None:
        images = torch.cat((images, unlabelled.index)).sort().values
        sets += [(unlabelled.own.sha256, len(unlabelled))] if unlabelled.own else []
    needed = _needed_bytes(settings, dataset, len(images), sets, views, teachers, method.needs_pooled, stages)
    try:
        present = sum(present_bytes(folder, sha256, views.key, len(teachers), stages) for sha256, _ in sets)
        check_disk(folder, needed, chosen.table_budget_gb * 1e9, present)
    except UserError as error:
        if chosen.table == "require":
            raise UserError(f"teachers.table=require: {error} ({_ADVICE})") from None
        warnings.warn(f"{error} ({_ADVICE}); this run's teachers run live", stacklevel=3)
        return live
    size = f"{len(images) * views.num_views:,} of each teacher ({len(images):,} images × {views.num_views} views)"
    _say(f"teacher outputs: at most {size}, kept in {folder} ({needed / 1e6:,.0f} MB when full)")
    tabled = partial(
        TabledTeachers,
        folder=folder,
        image_set_sha256=dataset.train.sha256,
        num_images=len(dataset.train),
        more_images=sets[1:],
        views=views,
        images=images,
        include_pooled=method.needs_pooled,
        keep_stages=stages,
        image_size=dataset.image_size,
        how=how,
    )
    return SourcePlan(tables=True, stages=stages, open=tabled)


def table_folder(settings: Settings) -> Path:
    """Returns the folder of the tables of teacher outputs."""
    return Path(settings.teachers.store) / "tables"


def _kept_stages(settings: Settings, method: Method) -> Stages:
    """Stages that tables are made for; while a method needs others, it asks the teachers live."""
    if settings.teachers.table_stages:
        return method.teacher_stages
    return tuple(name for name in method.teacher_stages if stage_and_grid(name)[1])


def _why_live(settings: Settings, method: Method) -> str:
    """Returns why there can be no tables; empty if there can."""
    if settings.teachers.table == "off":
        return "teachers.table=off"
    if mixed := settings.recipe.mixed("recipe"):
        return f"with {mixed} images are not finite in number"
    kept = _kept_stages(settings, method)
    left_out = [name for name in method.teacher_stages if name not in kept]
    if left_out and not any(set(needed) <= set(kept) for needed in method.needed_stage_sets):
        stages = ", ".join(left_out)
        return f"stage outputs ({stages}) are not kept in tables (teachers.table_stages=true keeps them)"
    return ""


def _say(line: str) -> None:
    if is_rank_zero():
        log.info(line)


def _needed_bytes(
    settings: Settings,
    dataset: Dataset,
    images: int,
    sets: Sequence[tuple[str, int]],
    views: ViewFamily,
    teachers: Sequence[PlannedTeacher],
    pooled: bool,
    stages: Stages,
) -> int:
    """Returns an upper bound of the disk space of the run's tables."""
    needed, in_sets = 0, sum(size for _, size in sets)
    used_views = min(views.num_views, settings.recipe.epochs)
    for teacher in teachers:
        network = build_network(teacher.spec)
        columns: Columns = ((LOGITS, dataset.num_classes),)
        if pooled:
            columns += ((POOLED, network.num_features),)
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

    Args:
        num_images: Images that the run uses.
        num_views: V.
        columns: What a row holds.
        set_size: Images in the whole set, when known: a tighter bound for large subsets.
        used_views: Views of an image that the run asks for at most, when known: a tighter bound for large rows.
    """
    row = row_dtype(columns).itemsize
    per_image = num_views * row
    # The views of an image are neighbours, but need not begin at a block's start.
    blocks = num_images * (-(-per_image // _BLOCK) + 1)
    if used_views is not None:
        latest = _BLOCK - gcd(row, _BLOCK)  # where in a block a row may begin
        blocks = min(blocks, num_images * used_views * -(-(latest + row) // _BLOCK))
    if set_size is not None:
        blocks = min(blocks, -(-set_size * per_image // _BLOCK))
    return blocks * _BLOCK


def present_bytes(
    folder: Path, image_set_sha256: str, view_key: str, num_teachers: int, stages: Sequence[str] = ()
) -> int:
    """Returns the bytes that tables of these images and views take on disk, holes not counted.

    Which teachers a table is of is not known before these are loaded; of more tables of a kind (ordinary ones, or
    those of one of the stages) than there are teachers the smallest count, so that the disk is never thought fuller of
    a run's own rows than it is.
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
            continue  # no table, or none that anybody could read
    return sum(sum(sorted(own)[:num_teachers]) for own in sizes.values())


def check_disk(folder: Path, needed: int, budget: float, present: int) -> None:
    """Checks that the tables fit, before training begins.

    Args:
        folder: Where the tables live; need not exist yet.
        needed: Upper bound of the bytes that the run's tables take when full.
        budget: Bytes that they may take at most.
        present: Bytes that they take already.

    Raises:
        UserError: The tables need more than the budget or the free space.
    """
    need = f"the teacher tables need up to {needed / 1e6:,.1f} MB in {folder}"
    advice = "use fewer images, views or teachers, or switch the table off"
    if needed > budget:
        raise UserError(f"{need}, but their budget is {budget / 1e6:,.1f} MB; raise it, {advice}")
    place = folder.absolute()
    free = shutil.disk_usage(next(parent for parent in (place, *place.parents) if parent.is_dir())).free
    if needed - present > free:
        raise UserError(f"{need}, but {free / 1e6:,.1f} MB are free there; free some, {advice}")
