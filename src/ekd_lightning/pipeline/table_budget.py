"""How much disk the tables of teacher outputs need, checked before training."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from ekd_lightning.errors import UserError
from ekd_lightning.teachers.table import row_dtype

_BLOCK = 4096  # bytes of a file system's block, as usual


def table_bytes(
    num_images: int,
    num_views: int,
    num_classes: int,
    pooled_dim: int,
    num_teachers: int,
    *,
    set_size: int | None = None,
) -> int:
    """Upper bound of the disk space of a run's tables, on a file system with blocks of 4096 bytes.

    Args:
        num_images: Images that the run uses.
        num_views: V.
        num_classes: C.
        pooled_dim: D, 0 when pooled features are not stored.
        num_teachers: M.
        set_size: Images in the whole set, when known: a tighter bound for large subsets.

    Returns:
        Bytes.
    """
    per_image = num_views * row_dtype((("logits", num_classes), ("pooled", pooled_dim))).itemsize
    # The views of an image are neighbours, but need not begin at a block's start.
    blocks = num_images * (-(-per_image // _BLOCK) + 1)
    if set_size is not None:
        blocks = min(blocks, -(-set_size * per_image // _BLOCK))
    return num_teachers * blocks * _BLOCK


def present_bytes(
    folder: str | os.PathLike[str],
    image_set_sha256: str,
    view_key: str,
    num_teachers: int,
    stages: Sequence[str] = (),
) -> int:
    """What tables of these images and views take on disk already.

    Which teachers a table is of is not known before these are loaded; of more tables of a kind (ordinary ones, or
    those of a stage) than there are teachers the smallest count, so that the disk is never thought fuller of a run's
    own rows than it is.

    Args:
        folder: Where the tables live; need not exist.
        image_set_sha256: Hash of the whole image set.
        view_key: The view family's key.
        num_teachers: M.
        stages: Stages whose tables count too.

    Returns:
        Bytes, holes not counted.
    """
    sizes: dict[str, list[int]] = {kind: [] for kind in ("", *stages)}
    for sidecar in Path(folder).glob("*.json"):
        rows = sidecar.with_suffix(".rows")
        try:
            facts = json.loads(sidecar.read_text(encoding="utf-8"))
            same = facts["image_set_sha256"] == image_set_sha256 and facts["view_key"] == view_key
            kind = "" if "num_classes" in facts else facts["content"]
            if same and kind in sizes:
                sizes[kind].append(rows.stat().st_blocks * 512)
        except (OSError, ValueError, KeyError, TypeError):
            continue  # no table, or none that anybody could read
    return sum(sum(sorted(own)[:num_teachers]) for own in sizes.values())


def check_disk(
    folder: str | os.PathLike[str], needed_bytes: int, budget_bytes: int | None = None, present_bytes: int = 0
) -> None:
    """Refuses tables that would not fit, before training begins.

    Args:
        folder: Where the tables live; need not exist yet.
        needed_bytes: Upper bound of what the run's tables take when full.
        budget_bytes: What they may take at most; None for no limit but the disk.
        present_bytes: What they take already.

    Raises:
        UserError: The tables need more than the budget or the free space.
    """
    need = f"the teacher tables need up to {needed_bytes / 1e6:,.1f} MB in {folder}"
    advice = "use fewer images, views or teachers, or switch the table off"
    if budget_bytes is not None and needed_bytes > budget_bytes:
        raise UserError(f"{need}, but their budget is {budget_bytes / 1e6:,.1f} MB; raise it, {advice}")
    place = Path(folder).absolute()
    existing = next(parent for parent in (place, *place.parents) if parent.is_dir())
    free = shutil.disk_usage(existing).free
    if needed_bytes - present_bytes > free:
        raise UserError(f"{need}, but {free / 1e6:,.1f} MB are free there; free some, {advice}")
