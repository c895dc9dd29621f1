"""Cache of decoded images: memory-mapped files of uint8 pixels, named by what determines them.

A file of facts, written last, makes a file of pixels believed: a killed builder leaves nothing that a reader would
trust, and concurrent runs build a data set once. It holds the pixels' SHA-256, which is compared at each opening of
files that take no more than a few seconds to read.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from ekd_lightning.errors import UserError, quiet
from ekd_lightning.files import file_sha256, read_json, remove_parts, replacing, write_json

HASHED_BYTES = 1 << 30
"""The largest files of pixels that are compared with their checksum."""


def cached_images(
    folder: Path, key: Mapping[str, Any], build: Callable[[Path], dict[str, Any]]
) -> tuple[Tensor, dict[str, Any]]:
    """Returns the images of a key, building them where they are missing.

    Args:
        folder: Where the cache lies; made if missing.
        key: JSON-able; all that determines the images.
        build: Writes uint8 [N, 3, H, W] to the file that it is handed, and returns facts about them, JSON-able,
            `shape` among them.

    Returns:
        The images, uint8 [N, 3, H, W], mapped read-only: only what is looked at takes memory; and the facts.

    Raises:
        UserError: If the folder cannot be written, or whatever `build` raises.
    """
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    pixels, facts = folder / f"{digest}.pixels", folder / f"{digest}.json"
    if (found := _read(pixels, facts)) is not None:
        return found
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f".{digest}.lock"):
            if (found := _read(pixels, facts)) is not None:  # another process was faster
                return found
            remove_parts(folder, pixels.name)
            facts.unlink(missing_ok=True)
            with replacing(pixels) as temporary:
                record = build(temporary)
            write_json(facts, {**record, **_identity(pixels)})
    except UserError:
        raise
    except OSError as error:
        what = error.filename or folder
        raise UserError(f"data.cache={folder}: cannot be written ({what}: {error.strerror or error})") from error
    found = _read(pixels, facts)
    assert found is not None
    return found


def _read(pixels: Path, facts: Path) -> tuple[Tensor, dict[str, Any]] | None:
    try:
        record = read_json(facts)
        shape = tuple(record["shape"])
        if pixels.stat().st_size != math.prod(shape) or not _identity(pixels).items() <= record.items():
            return None
        with quiet():  # torch warns that the map cannot be written to
            return torch.from_numpy(np.memmap(pixels, np.uint8, "r", shape=shape)), record
    except (OSError, UserError, KeyError, TypeError):
        return None  # made again


def _identity(pixels: Path) -> dict[str, str]:
    """What the facts must say of a file of pixels: its name, and its hash where that is soon found."""
    hashed = {"pixels_sha256": file_sha256(pixels)} if pixels.stat().st_size <= HASHED_BYTES else {}
    return {"pixels": pixels.name, **hashed}
