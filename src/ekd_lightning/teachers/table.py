"""The memo of teacher outputs on disk: one row per (image, view) of one frozen teacher.

A table is one sparse file, addressed by the content of its `TableKey`, next to a sidecar that describes it.
Any number of processes read and write it without locks: every row carries a check value, so a row that was
never written, was torn by a kill or was altered later is absent, never wrong.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import warnings
import weakref
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from ekd_lightning.errors import UserError

FLOAT16_MAX = 65504.0
_LAYOUT = 1
_BLOCK = 4096
_LOCK_SECONDS = 60.0


@dataclass(frozen=True)
class TableKey:
    """All that determines the content of a table; its hash is the file's name.

    Attributes:
        teacher_sha256: Hash of the teacher's architecture and weights.
        image_set_sha256: Hash of the whole image set (not of a subset, so that subsets share rows).
        num_images: Images in the whole set, at least 1.
        view_key: The view family's key.
        num_views: V, at least 1.
        num_classes: C, at least 1.
        pooled_dim: D, or 0 when the pooled features are not stored. In a stage's table the number of values of that
            stage's output, which is stored in place of the pooled features.
        stage: Name of the stage whose output is stored; "" for the pooled features.
        numeric_format: How the teacher computes, e.g. "float32" or "bfloat16". Rows are always float16.
    """

    teacher_sha256: str
    image_set_sha256: str
    num_images: int
    view_key: str
    num_views: int
    num_classes: int
    pooled_dim: int = 0
    numeric_format: str = "float32"
    stage: str = ""

    def __post_init__(self) -> None:
        if min(self.num_images, self.num_views, self.num_classes) < 1 or self.pooled_dim < 0:
            raise ValueError(f"a table needs images, views and classes: {self}")

    @property
    def description(self) -> dict[str, object]:
        """What the sidecar must say about the table."""
        content = f"logits+{self.stage or 'pooled'}" if self.pooled_dim else "logits"
        facts = asdict(self)
        if not self.stage:
            del facts["stage"]  # tables without stages keep the names they always had
        return {"layout": _LAYOUT, "content": content, "stored": "float16", **facts}

    @property
    def name(self) -> str:
        """Hex SHA-256 of the description."""
        return hashlib.sha256(json.dumps(self.description, sort_keys=True).encode()).hexdigest()

    @property
    def num_rows(self) -> int:
        """Rows of the table, num_images * V."""
        return self.num_images * self.num_views


def row_dtype(num_classes: int, pooled_dim: int) -> np.dtype:
    """Layout of one row on disk: float16 logits [C], float16 pooled [D], uint32 check value."""
    return np.dtype([("logits", "<f2", (num_classes,)), ("pooled", "<f2", (pooled_dim,)), ("check", "<u4")])


def to_float16(values: NDArray[np.float32], teacher: str) -> NDArray[np.float16]:
    """Rounds teacher outputs to what a row holds; values beyond ±65504 are clipped to it.

    Args:
        values: Array of any shape.
        teacher: Named in the error.

    Returns:
        Finite float16 array of the same shape.

    Raises:
        UserError: A value is NaN or infinite: the teacher's weights are broken.
    """
    if not np.isfinite(values).all():
        raise UserError(f"teacher {teacher} returned outputs that are not finite; check its weights")
    return np.clip(values, -FLOAT16_MAX, FLOAT16_MAX).astype(np.float16)


def _check_values(blob: bytes, rows: NDArray[np.int64], row_bytes: int) -> NDArray[np.uint32]:
    """CRC32 of every payload in `blob`, mixed with its row number; never 0, which marks a hole."""
    view, end = memoryview(blob), row_bytes - 4
    starts = range(0, len(blob), row_bytes)
    crc = np.fromiter((zlib.crc32(view[s : s + end]) for s in starts), dtype=np.uint32, count=len(rows))
    wide = rows.astype(np.uint64)
    # An odd factor permutes 32-bit numbers: any two rows below 2^32 differ in what is mixed in.
    mixed = ((wide ^ (wide >> np.uint64(32))) * np.uint64(0x9E3779B1)).astype(np.uint32)
    check = crc ^ mixed
    check[check == 0] = 1
    return check


class TeacherTable:
    """The rows of one teacher for one image set and view family; opened, or created when missing.

    Attributes:
        key: What the table holds.
        path: The file of rows; the sidecar has the same name with the suffix `.json`.
        teacher: The teacher's name for messages.
    """

    def __init__(self, folder: str | os.PathLike[str], key: TableKey, teacher: str = "") -> None:
        """Opens the table.

        A file of the wrong length or with a wrong sidecar is named in a warning and built anew, empty.

        Args:
            folder: Where tables live; made when missing.
            key: What the table holds.
            teacher: The teacher's name for messages; its hash when empty.

        Raises:
            OSError: The folder or the file cannot be made, written or opened.
        """
        self.key = key
        self.teacher = teacher or key.teacher_sha256[:12]
        self.path = Path(folder) / f"{key.name}.rows"
        self._sidecar = self.path.with_suffix(".json")
        self._dtype = row_dtype(key.num_classes, key.pooled_dim)
        self._row_bytes = self._dtype.itemsize
        self._file_bytes = key.num_rows * self._row_bytes
        self._reported_damage = False
        if self._defect() is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{self.path}.lock", timeout=_LOCK_SECONDS):
                self._build()
        try:
            self._fd = os.open(self.path, os.O_RDWR)
        except OSError:
            # A shared cache may be mounted read-only: its rows are still good; `write` raises OSError.
            self._fd = os.open(self.path, os.O_RDONLY)
        self._close = weakref.finalize(self, os.close, self._fd)
        # Mapped through the descriptor: the name may meanwhile stand for a file built anew.
        self._mapped = mmap.mmap(self._fd, self._file_bytes, prot=mmap.PROT_READ)
        if hasattr(mmap, "MADV_RANDOM"):
            # Rows are far apart. Read ahead, megabytes of a large table's holes would come along with every row.
            self._mapped.madvise(mmap.MADV_RANDOM)
        self._map = np.frombuffer(self._mapped, dtype=np.uint8).reshape(key.num_rows, self._row_bytes)

    def _defect(self) -> str | None:
        """Why the files cannot be used: "" when there are none, None when they can."""
        if not self.path.exists():
            return ""
        found = self.path.stat().st_size
        if found != self._file_bytes:
            return f"has {found} bytes instead of {self._file_bytes}"
        try:
            described = json.loads(self._sidecar.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return f"has no readable description {self._sidecar.name}"
        same = described == self.key.description
        return None if same else f"is described otherwise by {self._sidecar.name}"

    def _build(self) -> None:
        """Puts an empty table in place; the caller holds the lock."""
        defect = self._defect()
        if defect is None:  # another process was faster
            return
        if defect:
            message = f"teacher table {self.path} {defect}; it is built anew"
            warnings.warn(message, RuntimeWarning, stacklevel=3)
        # The sidecar goes first: a kill in between leaves no file of rows, which is simply built later.
        text = json.dumps(self.key.description, sort_keys=True, indent=2)
        _replace(self._sidecar, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        _replace(self.path, self._write_hole)

    def _write_hole(self, temporary: Path) -> None:
        with temporary.open("wb") as file:
            file.truncate(self._file_bytes)

    def _rows(self, index: NDArray[np.int64], view: NDArray[np.int64]) -> NDArray[np.int64]:
        for what, values, end in (("index", index, self.key.num_images), ("view", view, self.key.num_views)):
            if values.size and (values.min() < 0 or values.max() >= end):
                raise IndexError(f"{what} must lie in 0..{end - 1} for table {self.path.name}")
        return index * np.int64(self.key.num_views) + view

    def read(
        self, index: NDArray[np.int64], view: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32] | None, NDArray[np.bool_]]:
        """Looks rows up.

        A row that is there but fails its check counts as absent; the first such row is reported by a warning.

        Args:
            index: int64 [B], positions in the whole image set.
            view: int64 [B] in 0..V-1.

        Returns:
            float32 logits [B, C]; float32 pooled features [B, D], or None when they are not stored; bool [B],
            which rows are present. The values of absent rows are NaN.

        Raises:
            IndexError: An index or a view is out of range.
            OSError: The file was cut short while it was open.
        """
        rows = self._rows(index, view)
        # Touching mapped pages beyond the end of a file would kill the process.
        if os.fstat(self._fd).st_size < self._file_bytes:
            raise OSError(f"teacher table {self.path} was cut short while in use")
        copied = self._map[rows]
        if hasattr(mmap, "MADV_DONTNEED"):
            # The kernel maps neighbours of every page that is touched; in the end they would be the whole file.
            self._mapped.madvise(mmap.MADV_DONTNEED)
        records = copied.view(self._dtype)[:, 0]
        present = records["check"] == _check_values(copied.tobytes(), rows, self._row_bytes)
        logits, pooled = records["logits"].astype(np.float32), None
        if self.key.pooled_dim:
            pooled = records["pooled"].astype(np.float32)
        if not present.all():
            self._report_damage(copied.any(axis=1) & ~present)
            logits[~present] = np.nan
            if pooled is not None:
                pooled[~present] = np.nan
        return logits, pooled, present

    def _report_damage(self, damaged: NDArray[np.bool_]) -> None:
        if self._reported_damage or not damaged.any():
            return
        self._reported_damage = True
        message = f"teacher table {self.path} has damaged or half-written rows; they are computed again"
        warnings.warn(message, RuntimeWarning, stacklevel=3)

    def write(
        self,
        index: NDArray[np.int64],
        view: NDArray[np.int64],
        logits: NDArray[np.float32],
        pooled: NDArray[np.float32] | None = None,
    ) -> None:
        """Stores rows, rounded to float16 and clipped to ±65504.

        Args:
            index: int64 [B], positions in the whole image set.
            view: int64 [B] in 0..V-1.
            logits: [B, C].
            pooled: [B, D]; needed exactly when the table stores pooled features.

        Raises:
            IndexError: An index or a view is out of range.
            ValueError: Pooled features are missing, or given to a table of logits.
            RuntimeError: A value is not finite; nothing is stored.
            OSError: The disk is full or the file is not writable. Rows written so far are right.
        """
        if (pooled is not None) != bool(self.key.pooled_dim):
            raise ValueError(f"table {self.path.name} holds {self.key.description['content']}")
        rows = self._rows(index, view)
        records = np.zeros(len(rows), dtype=self._dtype)
        records["logits"] = to_float16(logits, self.teacher)
        if pooled is not None:
            records["pooled"] = to_float16(pooled, self.teacher)
        size = self._row_bytes
        records["check"] = _check_values(records.tobytes(), rows, size)
        blob = memoryview(records.tobytes())
        # pwrite and not the map: on a full disk it raises, where a write to mapped memory kills.
        for i, offset in enumerate((rows * size).tolist()):
            if os.pwrite(self._fd, blob[i * size : (i + 1) * size], offset) != size:
                raise OSError(f"teacher table {self.path}: a row was written in part; is the disk full?")

    def fill_fraction(self) -> float:
        """Share of the rows that were written, in [0, 1]; reads the file once, without checking the rows."""
        written, step = 0, self._row_bytes * max(1, (1 << 24) // self._row_bytes)
        for start in range(0, self._file_bytes, step):
            blob = os.pread(self._fd, min(step, self._file_bytes - start), start)
            written += int(np.count_nonzero(np.frombuffer(blob, dtype=self._dtype)["check"]))
        return written / self.key.num_rows

    def disk_bytes(self) -> int:
        """Bytes that the file takes on disk now, holes not counted."""
        return os.fstat(self._fd).st_blocks * 512

    def close(self) -> None:
        """Closes the file; the table must not be used afterwards."""
        self._close()


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file under another name and renames it, so that nobody sees half of it."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    os.replace(temporary, path)
