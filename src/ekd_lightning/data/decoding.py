"""Decoding of image files of any mode, orientation and size to upright RGB of one size, and a cache of the pixels.

The cache holds memory-mapped files of uint8 pixels, named by a hash of everything that determines them. A file of
pixels is valid only with its file of facts, which is written last; so a killed process leaves nothing that a reader
would use. Concurrent runs build a data set once. The facts contain the SHA-256 of the pixels, which is checked whenever
a file of up to `HASHED_BYTES` is opened.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ekd_lightning.errors import UserError, one_line, quiet
from ekd_lightning.files import file_sha256, read_json, remove_parts, replacing, write_json
from ekd_lightning.progress import track

DECODER = 1
"""Version of `to_rgb` and `fitted`; part of every cache's key."""
HASHED_BYTES = 1 << 30
"""Size up to which files of pixels are compared with their SHA-256; larger ones take too long to read."""
_SIXTEEN_BITS = ("I", "I;16", "I;16B", "I;16L", "I;16N")


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts any PIL image to RGB, after rotating it in place by its EXIF orientation.

    Transparent pixels are put on white, 16-bit grey keeps its high byte (as PIL reads 16-bit colour), and
    floating-point grey is taken as 0 to 1, or as 0 to 255 if any value exceeds 1.
    """
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode in _SIXTEEN_BITS:
        return _grey(np.asarray(image).astype(np.int64).clip(0, 65535) >> 8)
    if image.mode == "F":
        levels = np.asarray(image)
        return _grey((levels * (255 if levels.max() <= 1 else 1)).clip(0, 255).round())
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _grey(levels: np.ndarray) -> Image.Image:
    return Image.fromarray(levels.astype(np.uint8)).convert("RGB")


def fitted(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resizes an RGB image to cover `size` (height, width) in pixels, and crops the centre.

    For squares this is torchvision's `Resize` (bilinear, antialiased) of the short side and `CenterCrop`.
    """
    (width, height), (H, W) = image.size, size
    if H * width >= W * height:  # the height decides
        new_height, new_width = H, max(W, int(H * width / height))
    else:
        new_height, new_width = max(H, int(W * height / width)), W
    if (new_height, new_width) != (height, width):
        image = image.resize((new_width, new_height), Image.Resampling.BILINEAR)
    top, left = round((new_height - H) / 2), round((new_width - W) / 2)
    return image if image.size == (W, H) else image.crop((left, top, left + W, top + H))


@dataclass
class Decoded:
    """Results of decoding.

    Attributes:
        size: Height and width of all images in pixels.
        digests: BLAKE2 of each image before decoding; b"" for broken images.
        broken: Position -> reason, for images that cannot be read.
    """

    size: tuple[int, int]
    digests: list[bytes] = field(default_factory=list)
    broken: dict[int, str] = field(default_factory=dict)


class _OtherSizeError(Exception):
    """An image whose size differs from the first."""


def decode_all(
    target: Path, load: Callable[[int], bytes | Image.Image], count: int, size: tuple[int, int] | None, title: str
) -> Decoded:
    """Decodes images in parallel into one file of uint8 [N, 3, H, W], in which rows of broken images are zero.

    Args:
        target: The file.
        load: Returns the content of a file, or a decoded image, by position; called by several threads.
        count: N, at least 1.
        size: Height and width in pixels; None for those of the first image, which all images must then have.
        title: Title of the progress display.

    Raises:
        UserError: If `size` is None and images differ in size.
        OSError: If the file cannot be written.
    """
    exact, found = size is None, Decoded(size or _first_size(load, count))
    row_bytes = 3 * found.size[0] * found.size[1]
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    pool = ThreadPoolExecutor(workers)  # PIL decodes and resizes without the interpreter's lock
    with target.open("wb") as file, quiet():
        file.truncate(row_bytes * count)

        def work(position: int) -> tuple[bytes, str]:
            content: bytes | Image.Image | None = None
            try:
                content = load(position)
                digest = hashlib.blake2b(content if isinstance(content, bytes) else content.tobytes(), digest_size=16)
                pixels = _pixels(content, found.size, exact)
            except _OtherSizeError:
                raise
            except Exception as error:  # damaged files make PIL fail in many ways
                return b"", "has zero bytes" if content == b"" else _reason(error)
            os.pwrite(file.fileno(), pixels, position * row_bytes)  # unlike a memory map, it raises on a full disk
            return digest.digest(), ""

        try:
            for digest, reason in track(pool.map(work, range(count)), title, "images", count):
                if reason:
                    found.broken[len(found.digests)] = reason
                found.digests.append(digest)
        except _OtherSizeError as error:
            raise UserError(
                f"data.image_size=null: images differ in size ({error}): give data.image_size in pixels"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)
    return found


def _open(content: bytes | Image.Image) -> Image.Image:
    return Image.open(io.BytesIO(content)) if isinstance(content, bytes) else content


def _first_size(load: Callable[[int], bytes | Image.Image], count: int) -> tuple[int, int]:
    for position in range(count):
        with contextlib.suppress(Exception):  # broken images are reported later
            width, height = ImageOps.exif_transpose(_open(load(position))).size
            return height, width
    return 1, 1


def _pixels(content: bytes | Image.Image, size: tuple[int, int], exact: bool) -> bytes:
    image = _open(content)
    if not exact:
        # JPEG decodes large photographs faster at a reduced size, here at least twice the final one.
        image.draft(None, (2 * max(size), 2 * max(size)))  # None keeps the mode
    image = to_rgb(image)
    if exact and image.size != size[::-1]:
        raise _OtherSizeError(f"{size[0]}×{size[1]} and {image.height}×{image.width}")
    return np.ascontiguousarray(np.asarray(fitted(image, size)).transpose(2, 0, 1)).tobytes()


def read_images(files: str | Path | Iterable[str | Path], size: int | tuple[int, int]) -> Tensor:
    """Reads image files as `data=folder` does: upright RGB, resized to cover `size`, the centre cropped.

    Args:
        files: Images of any mode, size and format that Pillow reads, or one of them.
        size: Side of square images in pixels, or (height, width), e.g. a loaded student's `image_size`.

    Returns:
        uint8 [B, 3, H, W] in 0 .. 255.

    Raises:
        UserError: At the first file that cannot be read, naming it.
    """
    shape = (size, size) if isinstance(size, int) else size
    pixels = bytearray()
    for file in [files] if isinstance(files, str | Path) else files:
        try:
            pixels += _pixels(Path(file).read_bytes(), shape, exact=False)
        except OSError as error:
            raise UserError(f"{file}: {_reason(error)}") from None
    return torch.from_numpy(np.frombuffer(pixels, np.uint8).reshape(-1, 3, *shape))


def _reason(error: Exception) -> str:
    return "is not an image" if isinstance(error, UnidentifiedImageError) else f"cannot be read ({one_line(error, 80)})"


def cached_images(
    folder: Path, key: Mapping[str, Any], build: Callable[[Path], dict[str, Any]]
) -> tuple[Tensor, dict[str, Any]]:
    """Returns the images of a key from a folder, and builds them if they are missing.

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
