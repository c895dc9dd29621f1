"""Table of teacher outputs on disk: one row per (image, view) of one frozen teacher.

A table is a sparse file, named by the hash of its `TableKey`, with a sidecar that describes it. Any number of processes
read and write it without locks: every row holds a check value, so that a row that was never written, half written by
a killed process, or altered later counts as absent and is never used.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import warnings
import weakref
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from ekd_lightning.files import read_json, replacing, write_json

_LAYOUT = 1
_SALTED = {"salted": True}  # version 0.1 had no salt, so that rows of another table passed their check
_BLOCK_ROWS = 8192  # rows whose check values are computed at once: they fit the processor's cache
_SHORT = 160  # largest bytes of a row for check values in bulk, without the GIL: logits and features of a CIFAR ResNet
_LOCK_SECONDS = 60.0


Rows = NDArray[np.int64]
Halves = NDArray[np.float16]
Columns = tuple[tuple[str, int], ...]

LOGITS, POOLED = "logits", "pooled"


@dataclass(frozen=True)
class TableKey:
    """Key of a table: everything that determines its content. Its hash is the name of the file.

    Attributes:
        teacher_sha256: Hash of the teacher's architecture and weights.
        image_set_sha256: Hash of the whole image set (not of a subset, so that subsets share rows).
        num_images: Images in the whole set, at least 1.
        view_key: The view family's key.
        num_views: V, at least 1.
        columns: Names of a row's columns, each with its number of values: either the logits, with or without the pooled
            features after them, or the output of one stage.
        numeric_format: The dtype in which the teacher computes, "float32" or "bfloat16". Rows are always float16.
    """

    teacher_sha256: str
    image_set_sha256: str
    num_images: int
    view_key: str
    num_views: int
    columns: Columns
    numeric_format: str = "float32"

    def __post_init__(self) -> None:
        if min(self.num_images, self.num_views, *(width for _, width in self.columns)) < 1:
            raise ValueError(f"a table needs images, views and values: {self}")

    @property
    def content(self) -> str:
        """Names of the columns: "logits", "logits+pooled", or a stage."""
        return "+".join(name for name, _ in self.columns)

    @property
    def description(self) -> dict[str, object]:
        """The table's description in its sidecar."""
        facts = asdict(self)
        widths = dict(facts.pop("columns"))
        if LOGITS in widths:
            facts |= {"num_classes": widths[LOGITS], "pooled_dim": widths.get(POOLED, 0)}
        else:
            facts["width"] = sum(widths.values())
        return {"layout": _LAYOUT, "content": self.content, "stored": "float16", **facts}

    @property
    def name(self) -> str:
        """Hex SHA-256 of the description."""
        return hashlib.sha256(json.dumps(self.description, sort_keys=True).encode()).hexdigest()

    @property
    def salt(self) -> int:
        """Number that is mixed into the check values, so that rows of another table fail the check."""
        return int(self.name[:8], 16)

    @property
    def num_rows(self) -> int:
        """Number of rows, num_images * V."""
        return self.num_images * self.num_views


def row_dtype(columns: Columns) -> np.dtype:
    """Returns the layout of a row on disk: each column in float16, then a uint32 check value."""
    return np.dtype([*((name, "<f2", (width,)) for name, width in columns), ("check", "<u4")])


@cache
def _crc_parts(length: int) -> NDArray[np.uint32]:
    """Returns the contribution of each value of each byte to the CRC32 of a payload, [length, 256].

    CRC32 is affine: the exclusive or of all contributions and of the CRC32 of zeros is the CRC32 of the payload.
    """
    zeros = zlib.crc32(bytes(length))
    parts = np.empty((length, 256), dtype=np.uint32)
    for place in range(length):
        payload = bytearray(length)
        for byte in range(256):
            payload[place] = byte
            parts[place, byte] = zlib.crc32(payload) ^ zeros
    return parts


def _crc32(rows: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """Computes the CRC32 of every row [B, length]; in bulk for short rows, so that other threads run meanwhile."""
    count, length = rows.shape
    if length > _SHORT:
        return np.fromiter((zlib.crc32(row) for row in rows), dtype=np.uint32, count=count)
    crc = np.full(count, zlib.crc32(bytes(length)), dtype=np.uint32)
    for start in range(0, count, _BLOCK_ROWS):
        block = crc[start : start + _BLOCK_ROWS]
        part = np.empty_like(block)
        for parts, values in zip(_crc_parts(length), rows[start : start + _BLOCK_ROWS].T, strict=True):
            block ^= np.take(parts, values, out=part, mode="clip")  # "raise" would buffer
    return crc


def _check_values(payloads: NDArray[np.uint8], rows: Rows, salt: int) -> NDArray[np.uint32]:
    """Computes check values: the CRC32 of every payload [B, bytes], mixed with row number and salt; never 0."""
    wide = rows.astype(np.uint64)
    # An odd factor permutes 32-bit numbers, so any two row numbers below 2^32 are mixed in differently.
    mixed = ((wide ^ (wide >> np.uint64(32))) * np.uint64(0x9E3779B1)).astype(np.uint32)
    check = _crc32(payloads) ^ mixed ^ np.uint32(salt)
    check[check == 0] = 1
    return check


class TeacherTable:
    """Rows of one teacher for an image set and a view family; a missing table is created, with its folder.

    A file of the wrong length or with a wrong sidecar is named in a warning and replaced by an empty one.

    Attributes:
        key: The table's key.
        path: The file of rows; the sidecar has the same name with the suffix `.json`.

    Raises:
        OSError: If the folder or the file cannot be made, written or opened.
    """

    def __init__(self, folder: str | os.PathLike[str], key: TableKey) -> None:
        self.key, self._salt = key, key.salt
        self.path = Path(folder) / f"{key.name}.rows"
        self._sidecar = self.path.with_suffix(".json")
        self._dtype = row_dtype(key.columns)
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
            # A shared store may be read-only: its rows can still be read; `write` raises OSError.
            self._fd = os.open(self.path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._fd)
        # Mapped through the descriptor: meanwhile another process may have replaced the file of that name.
        self._mapped = mmap.mmap(self._fd, self._file_bytes, prot=mmap.PROT_READ)
        if hasattr(mmap, "MADV_RANDOM"):
            # Rows are far apart. With read-ahead, every row would bring along megabytes of a large table's holes.
            self._mapped.madvise(mmap.MADV_RANDOM)
        self._map = np.frombuffer(self._mapped, dtype=np.uint8).reshape(key.num_rows, self._row_bytes)

    def _defect(self) -> str | None:
        """Returns why the files cannot be used: "" if there are none, None if they can be used."""
        if not self.path.exists():
            return ""
        found = self.path.stat().st_size
        if found != self._file_bytes:
            return f"has {found} bytes instead of {self._file_bytes}"
        try:
            described = read_json(self._sidecar)
        except (OSError, ValueError):
            return f"has no readable description {self._sidecar.name}"
        same = described == self.key.description | _SALTED
        return None if same else f"does not match its description {self._sidecar.name}"

    def _build(self) -> None:
        """Creates an empty table, or replaces a defective one; the caller holds the lock."""
        defect = self._defect()
        if defect is None:  # another process was faster
            return
        if defect:
            message = f"teacher table {self.path} {defect}; it is replaced by an empty one"
            warnings.warn(message, RuntimeWarning, stacklevel=3)
        # The sidecar is written first: a kill in between leaves no file of rows, as for a missing table.
        write_json(self._sidecar, self.key.description | _SALTED)
        with replacing(self.path) as temporary:
            os.truncate(temporary, self._file_bytes)

    def _rows(self, index: Rows, view: Rows) -> Rows:
        for what, values, end in (("index", index, self.key.num_images), ("view", view, self.key.num_views)):
            if values.size and (values.min() < 0 or values.max() >= end):
                raise IndexError(f"{what} must lie in 0..{end - 1} for table {self.path.name}")
        return index * np.int64(self.key.num_views) + view

    def read(self, index: Rows, view: Rows) -> tuple[dict[str, Halves], NDArray[np.bool_]]:
        """Reads rows.

        A row that fails its check counts as absent; the first such row causes a warning.

        Args:
            index: int64 [B], positions in the whole image set.
            view: int64 [B] in 0..V-1.

        Returns:
            float16 [B, width] for every column, NaN in absent rows; bool [B], which rows are present.

        Raises:
            IndexError: If an index or a view is out of range.
            OSError: If the file was cut short while it was open.
        """
        rows = self._rows(index, view)
        # Touching mapped pages beyond the end of a file would kill the process.
        if os.fstat(self._fd).st_size < self._file_bytes:
            raise OSError(f"teacher table {self.path} was cut short while in use")
        copied = self._map[rows]
        if hasattr(mmap, "MADV_DONTNEED"):
            # The kernel also maps the neighbours of every touched page; in time that would be the whole file.
            self._mapped.madvise(mmap.MADV_DONTNEED)
        records = copied.view(self._dtype)[:, 0]
        check = records["check"]
        present = check != 0  # 0 is a hole
        written = slice(None) if present.all() else np.flatnonzero(present)
        payloads = copied[written, : -check.itemsize]
        present[written] = check[written] == _check_values(payloads, rows[written], self._salt)
        if not present.all():
            self._report_damage(copied[~present])
        columns = {name: records[name].copy() for name, _ in self.key.columns}
        for values in columns.values():
            values[~present] = np.nan
        return columns, present

    def _report_damage(self, absent: NDArray[np.uint8]) -> None:
        if self._reported_damage or not absent.any():
            return
        self._reported_damage = True
        message = f"teacher table {self.path} has damaged or half-written rows; they are computed again"
        warnings.warn(message, RuntimeWarning, stacklevel=3)

    def write(self, index: Rows, view: Rows, values: Mapping[str, NDArray[np.floating]]) -> None:
        """Stores rows, rounded to float16.

        Args:
            index: int64 [B], positions in the whole image set.
            view: int64 [B] in 0..V-1.
            values: [B, width] for every column, within the range of float16.

        Raises:
            IndexError: If an index or a view is out of range.
            ValueError: If the columns are not those of the table.
            OSError: If the disk is full or the file is not writable; rows written before the error are valid.
        """
        if set(values) != {name for name, _ in self.key.columns}:
            raise ValueError(f"table {self.path.name} holds {self.key.content}, not {'+'.join(values)}")
        rows = self._rows(index, view)
        records = np.zeros(len(rows), dtype=self._dtype)
        for name, column in values.items():
            records[name] = column
        size = self._row_bytes
        payloads = records.view(np.uint8).reshape(-1, size)[:, : -records["check"].itemsize]
        records["check"] = _check_values(payloads, rows, self._salt)
        blob = memoryview(records.tobytes())
        # On a full disk, pwrite raises; a write to mapped memory would kill the process.
        for i, offset in enumerate((rows * size).tolist()):
            if os.pwrite(self._fd, blob[i * size : (i + 1) * size], offset) != size:
                raise OSError(f"teacher table {self.path}: only part of a row was written; is the disk full?")

    def disk_bytes(self) -> int:
        """Bytes that the file takes on disk now, holes not counted."""
        return os.fstat(self._fd).st_blocks * 512


class JoinedTables:
    """Tables of one teacher for several image sets under one index; each can also serve runs with its set alone.

    Reads and writes as `TeacherTable`. The images of each table are numbered after those of the table before; all have
    the same columns.
    """

    def __init__(self, tables: Sequence[TeacherTable]) -> None:
        self._tables = list(tables)
        self._starts = np.cumsum([0, *(table.key.num_images for table in tables)])

    def _parts(self, index: Rows) -> Iterator[tuple[TeacherTable, NDArray[np.bool_], int]]:
        """Yields each table that holds some of the rows, which rows these are, and the table's first index."""
        if index.size and not 0 <= index.min() <= index.max() < self._starts[-1]:
            raise IndexError(f"index must lie in 0..{self._starts[-1] - 1}")
        for table, start, end in zip(self._tables, self._starts[:-1], self._starts[1:], strict=True):
            mine = (index >= start) & (index < end)
            if mine.any():
                yield table, mine, int(start)

    def read(self, index: Rows, view: Rows) -> tuple[dict[str, Halves], NDArray[np.bool_]]:
        """Looks rows up; see `TeacherTable.read`."""
        columns = self._tables[0].key.columns
        values = {name: np.empty((len(index), width), np.float16) for name, width in columns}
        present = np.zeros(len(index), dtype=np.bool_)
        for table, mine, start in self._parts(index):
            found, present[mine] = table.read(index[mine] - start, view[mine])
            for name, column in found.items():
                values[name][mine] = column
        return values, present

    def write(self, index: Rows, view: Rows, values: Mapping[str, NDArray[np.floating]]) -> None:
        """Stores rows; see `TeacherTable.write`."""
        for table, mine, start in self._parts(index):
            table.write(index[mine] - start, view[mine], {name: column[mine] for name, column in values.items()})

    def disk_bytes(self) -> int:
        """Bytes that the files take on disk now, holes not counted."""
        return sum(table.disk_bytes() for table in self._tables)
