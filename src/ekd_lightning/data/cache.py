"""Cache of decoded images: memory-mapped files of uint8 pixels, named by a hash of everything that determines them.

A file of pixels is valid only with its file of facts, which is written last; so a killed process leaves nothing that
a reader would use. Concurrent runs build a data set once. The facts contain the SHA-256 of the pixels, which is checked
whenever a file of up to `HASHED_BYTES` is opened.
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
"""Size up to which files of pixels are compared with their SHA-256; larger ones take too long to read."""


def cached_images(
    folder: Path, key: Mapping[str, Any], build: Callable[[Path], dict[str, Any]]
) -> tuple[Tensor, dict[str, Any]]:
    """Returns the images of a key, and builds them if they are missing.

    Args:
        folder: The folder of the cache; created if missing.
        key: Everything that determines the images, JSON-able.
        build: Writes uint8 [N, 3, H, W] to a file and returns JSON-able facts about the images, including `shape`.

    Returns:
        The images, uint8 [N, 3, H, W], memory-mapped and read-only; and the facts.

    Raises:
        UserError: If the folder cannot be written, and as `build` raises.
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
        path = error.filename or folder
        raise UserError(f"data.cache={folder}: cannot be written ({path}: {error.strerror or error})") from error
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
        return None  # and build them again


def _identity(pixels: Path) -> dict[str, str]:
    """Returns the facts that identify a file of pixels: its name and, up to `HASHED_BYTES`, its SHA-256."""
    hashed = {"pixels_sha256": file_sha256(pixels)} if pixels.stat().st_size <= HASHED_BYTES else {}
    return {"pixels": pixels.name, **hashed}
