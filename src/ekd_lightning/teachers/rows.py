"""Rows of teacher outputs: on disk, written in the background, and in device memory.

Shape letters: B batch, M teachers, N rows, V views.
"""

from __future__ import annotations

import os
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from math import isfinite, prod
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ekd_lightning.data.loader import Batch
from ekd_lightning.errors import UserError
from ekd_lightning.networks.staged import NetworkOutput
from ekd_lightning.teachers.source import LiveTeachers, Stages
from ekd_lightning.teachers.table import LOGITS, POOLED, Halves, JoinedTables, Rows, TableKey, TeacherTable

HELD_BYTES = {"cpu": 1 << 30, "cuda": 16 << 30}
"""Upper bound of the memory that rows of one kind may take on a device; see `memory_for_rows`."""

FLOAT16_MAX = 65504.0
_MOST_PENDING = 64  # writes that may wait for the disk
_NO_VIEW = -2  # -1 is taken: it stands for the unaugmented image

Shape = tuple[int, ...]
Shapes = Sequence[Mapping[str, Shape]]
Values = list[dict[str, Tensor]]
Found = tuple[dict[str, Halves], NDArray[np.bool_]]


class StoredRows:
    """Rows of M teachers, read from disk or else computed and stored.

    An error of the disk causes one warning and no failure: a table that cannot be opened or read counts as empty, and
    after a failed write no more rows are written.

    Args:
        folder: Folder of the tables.
        keys: For each teacher the keys of its tables, of the first image set: that of logits and pooled features, then
            one for each stage.
        live: The teachers.
        names: Their ids, for messages.
        device: Device of the teachers.
        image_sets: Hash and size of each image set.
    """

    def __init__(
        self,
        folder: Path,
        keys: Sequence[Sequence[TableKey]],
        live: LiveTeachers,
        names: Sequence[str],
        device: torch.device,
        image_sets: Sequence[tuple[str, int]],
    ) -> None:
        self._image_sets = image_sets
        self._folder, self._keys, self._live, self._names, self._device = folder, keys, live, names, device
        self._writable, self._warned = True, False
        self._clipped: set[str] = set()
        self._writer = ThreadPoolExecutor(1, "teacher-tables")
        self._written: deque[Future[None]] = deque()
        self._tables = [[self._opened(key) for key in own] for own in keys]

    def _opened(self, key: TableKey) -> TeacherTable | JoinedTables | None:
        keys = [replace(key, image_set_sha256=sha256, num_images=size) for sha256, size in self._image_sets]
        try:
            tables = [TeacherTable(self._folder, one) for one in keys]
            return JoinedTables(tables) if len(tables) > 1 else tables[0]
        except OSError as error:
            self._warn(error)
            return None

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            text = f"teacher tables in {self._folder} cannot be kept ({error}); teachers run live for missing rows"
            warnings.warn(text, RuntimeWarning, stacklevel=3)

    @property
    def keeping(self) -> bool:
        """Whether new rows are stored: all tables are open, and no write has failed."""
        self.flush()
        return self._writable and all(None not in own for own in self._tables)

    def disk_bytes(self) -> list[int]:
        """Returns the bytes on disk of each teacher's tables."""
        self.flush()
        return [sum(table.disk_bytes() for table in own if table is not None) for own in self._tables]

    def read(self, m: int, t: int, index: Rows, view: Rows) -> Found:
        """Reads rows [N] of table t of teacher m, as `TeacherTable.read`; if the table is lost, all are absent.

        Raises:
            IndexError: If an index or a view lies outside the image set or the view family.
        """
        table = self._tables[m][t]
        if table is not None:
            try:
                return table.read(index, view)
            except OSError as error:
                self._tables[m][t] = None
                self._warn(error)
        values = {name: np.empty((len(index), width), np.float16) for name, width in self._keys[m][t].columns}
        return values, np.zeros(len(index), dtype=np.bool_)

    def read_all(self, index: Rows, view: Rows, stages: Stages) -> tuple[list[dict[str, Halves]], NDArray[np.bool_]]:
        """Reads rows [N] of all teachers: their columns, and which are present, bool [M, tables, N]."""
        tables = range(1 + len(stages))
        read = [[self.read(m, t, index, view) for t in tables] for m in range(len(self._names))]
        values = [{name: column for columns, _ in own for name, column in columns.items()} for own in read]
        return values, np.stack([[present for _, present in own] for own in read])

    def flush(self) -> None:
        """Waits until all rows are written."""
        self._collect_writes(0)

    def _collect_writes(self, waiting: int) -> None:
        """Collects finished writes; waits while more than `waiting` writes are pending."""
        while len(self._written) > waiting or (self._written and self._written[0].done()):
            try:
                self._written.popleft().result()
            except OSError as error:
                self._writable = False  # rows are still read
                self._warn(error)

    def obtain(
        self, index: Rows, view: Rows, images_of: Callable[[Rows], Tensor], stages: Stages
    ) -> tuple[Values, NDArray[np.bool_]]:
        """Returns rows, computing and storing those that the disk lacks.

        Args:
            index: int64 [N].
            view: int64 [N]; no pair of index and view occurs twice.
            images_of: Makes the images of the given positions, which lie in 0..N-1.
            stages: () or all stages with tables.

        Returns:
            For each teacher its columns, float16 [N, width] on the device; bool [M, N], which rows were found.

        Raises:
            UserError: If a teacher's output is not finite.
        """
        tables = range(1 + len(stages))
        read, present = self.read_all(index, view, stages)
        found = np.logical_and.reduce(present, axis=1)
        values = [self.to_device(columns) for columns in read]
        missing = np.flatnonzero(~found.all(axis=0))
        teachers = self._live.frozen(stages)
        largest = torch.zeros(len(values), device=self._device)
        writes = []
        all_at = torch.from_numpy(missing).to(self._device)  # once, as every copy from the host waits for the device
        for start in range(0, len(missing), teachers.chunk):
            chunk = slice(start, start + teachers.chunk)
            rows, at = missing[chunk], all_at[chunk]
            images = images_of(rows)
            for m in np.flatnonzero(~found[:, rows].all(axis=1)).tolist():
                # Always the same batch size: the rows that a killed run left must not change the rounding.
                computed = _columns(teachers.outputs(m, images, teachers.chunk))
                for t in tables:
                    # Stored rows are not replaced: another graph may have rounded them otherwise.
                    new = np.flatnonzero(~present[m, t, rows])
                    host = {}
                    for name, _ in self._keys[m][t].columns:
                        column = _select(computed[name], new)
                        masked = computed[name].isneginf() if name == LOGITS else None  # unknown classes
                        known = computed[name] if masked is None else computed[name].masked_fill(masked, 0)
                        largest[m] = torch.maximum(largest[m], known.abs().amax())
                        half = column.clamp(-FLOAT16_MAX, FLOAT16_MAX).half()
                        if masked is not None:
                            half = half.masked_fill(column.isneginf(), -torch.inf)
                        values[m][name].index_copy_(0, _select(at, new), half)
                        host[name] = half.to("cpu", non_blocking=True)
                    writes.append((m, t, rows[new], host))
        if writes:  # waits for the device once; then all copies are complete, too
            self._check_range(largest.tolist())
        for m, t, rows, host in writes:
            table = self._tables[m][t]
            if table is not None and self._writable:
                numbers = {name: column.numpy() for name, column in host.items()}
                self._written.append(self._writer.submit(table.write, index[rows], view[rows], numbers))
                self._collect_writes(_MOST_PENDING)
        return values, found

    def _check_range(self, largest: list[float]) -> None:
        """Refuses outputs that are not finite; warns once per teacher that values beyond float16 are clipped."""
        for name, most in zip(self._names, largest, strict=True):
            if not isfinite(most):
                raise UserError(f"teacher {name} returned infinite or NaN outputs; check its weights")
            if most > FLOAT16_MAX and name not in self._clipped:
                self._clipped.add(name)
                text = f"teacher {name} returned outputs up to ±{most:.4g}: tables clip them at ±{FLOAT16_MAX:.0f}"
                warnings.warn(f"{text} (teachers.table=off does not)", RuntimeWarning, stacklevel=4)

    def to_device(
        self, columns: Mapping[str, NDArray[np.float16]], rows: NDArray[np.bool_] | slice = slice(None)
    ) -> dict[str, Tensor]:
        """Copies columns, or some of their rows, to the device."""
        return {name: torch.from_numpy(values[rows]).to(self._device) for name, values in columns.items()}


def _columns(output: NetworkOutput) -> dict[str, Tensor]:
    """Returns a teacher's outputs by column, [B, width], in one order for every memory format."""
    columns = {LOGITS: output.logits, POOLED: output.pooled, **output.stages}
    return {name: values.contiguous().flatten(1) for name, values in columns.items()}


def _select(column: Tensor, rows: Rows) -> Tensor:
    return column if len(rows) == len(column) else column[torch.from_numpy(rows).to(column.device)]


class DeviceRows:
    """Rows of M teachers in device memory, which a step looks up without waiting for the host.

    There is space for all rows of the images, int64 [n] positions in the whole training set, where the device has it,
    else for one row of each. `shapes` are for each teacher its columns, and the shape of one image's values in each.
    The buffers are changed in place, so that a CUDA graph may read them. A missing row reads as NaN, so that the loss
    becomes NaN and the student does not learn from a wrong target.

    Attributes:
        whole: Whether there is space for every view of every image, or only for one view of each at a time.
    """

    def __init__(self, shapes: Shapes, images: Rows, num_images: int, num_views: int, device: torch.device) -> None:
        self._device, self._num_views = device, num_views
        self.whole = len(images) * num_views * row_bytes(shapes) <= memory_for_rows(device)
        step = num_views if self.whole else 1
        self._blank = len(images) * step  # a row of NaN
        self._start = np.full(num_images, self._blank)
        self._start[images] = np.arange(len(images)) * step
        self._view = np.full(self._blank + 1, _NO_VIEW, dtype=np.int32)
        self._start_on_device = torch.from_numpy(self._start).to(device, copy=True)
        self._view_on_device = torch.from_numpy(self._view).to(device, copy=True)
        self._widths = [{name: prod(shape) for name, shape in own.items()} for own in shapes]
        width = sum(sum(own.values()) for own in self._widths)
        # All columns of all teachers side by side, so that one look-up finds them.
        self._values = torch.empty((self._blank + 1, width), dtype=torch.float16, device=device)
        self._values[self._blank] = torch.nan

    @property
    def nbytes(self) -> int:
        """Bytes of device memory."""
        return self._values.nbytes + self._view_on_device.nbytes + self._start_on_device.nbytes

    def holds(self, index: Rows, view: Rows) -> NDArray[np.bool_]:
        """Returns which rows [N] of an epoch are held.

        Raises:
            IndexError: If the rows of an image may not be held, or a view lies outside the family.
        """
        if len(view) and (view.min() < 0 or view.max() >= self._num_views):
            raise IndexError(f"view must lie in 0..{self._num_views - 1}")
        return self._view[self._places(index, view)] == view

    def put(self, index: Rows, view: Rows, values: Sequence[Mapping[str, Tensor]]) -> None:
        """Stores rows int64 [N] of different places; unless `whole`, a row replaces that of the image's other view.

        `values` are for each teacher its columns, float16 [N, width] on the device; unknown columns are ignored.
        """
        places = self._places(index, view)
        on_device = torch.from_numpy(places).to(self._device)
        columns = [own[name] for own, names in zip(values, self._widths, strict=True) for name in names]
        self._values.index_copy_(0, on_device, torch.cat(columns, dim=1))
        self._view[places] = view
        self._view_on_device.index_copy_(0, on_device, torch.from_numpy(self._view[places]).to(self._device))

    def _places(self, index: Rows, view: Rows) -> Rows:
        start = self._start[index]
        if (start == self._blank).any():
            raise IndexError("an index is not among the images whose rows may be held")
        return start + view if self.whole else start

    def look_up(self, batch: Batch) -> list[dict[str, Tensor]]:
        """Returns each teacher's columns, float32 [B, width], by `batch.index` and `batch.view`."""
        place = self._start_on_device[batch.index]
        if self.whole:
            place = (place + batch.view).clamp(0, self._blank)
        place = torch.where(self._view_on_device[place] == batch.view, place, self._blank)
        values = self._values[place].float()
        columns = iter(values.split([width for own in self._widths for width in own.values()], dim=1))
        return [{name: next(columns) for name in own} for own in self._widths]


def row_bytes(shapes: Shapes) -> int:
    """Returns the bytes of a row with these columns in memory, with 8 bytes for its place."""
    return 8 + sum(2 * prod(shape) for own in shapes for shape in own.values())


def memory_for_rows(device: torch.device) -> int:
    """Returns the bytes that rows of one kind may take on a device: `HELD_BYTES`, or a quarter of its free memory."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:  # the free memory of a computer changes too fast; a quarter of all counts as free
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    return min(HELD_BYTES.get(device.type, HELD_BYTES["cpu"]), free // 4)
