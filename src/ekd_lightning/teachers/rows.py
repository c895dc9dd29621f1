"""Rows of teacher outputs, where they are kept: on disk, written behind the training, and in the device's memory.

Shape letters: B batch, M teachers, N rows, V views.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ekd_lightning.data.loader import Batch
from ekd_lightning.errors import UserError
from ekd_lightning.networks.staged import NetworkOutput
from ekd_lightning.teachers.source import LiveTeachers, Stages
from ekd_lightning.teachers.table import FLOAT16_MAX, LOGITS, POOLED, Halves, Rows, TableKey, TeacherTable

log = logging.getLogger(__name__)

HELD_BYTES = {"cpu": 1 << 30, "cuda": 16 << 30}
"""Memory that rows of one kind may take on a device, and at most a quarter of what is free there."""

_WAITING = 64  # writes that may wait for the disk
_NOBODY = -2  # what no view is called; -1 is an image as it is

Shape = tuple[int, ...]
Values = list[dict[str, Tensor]]
Found = tuple[dict[str, Halves], NDArray[np.bool_]]


class KeptRows:
    """The tables of one teacher: known rows are read, new ones written behind, and trouble with the disk ends nothing.

    A table that cannot be opened or read is given up and has no rows; one that cannot be written is still read.

    Args:
        folder: Where the tables live.
        keys: What each table holds.
        teacher: The teacher's name for messages.
        writer: One thread that writes, in order.
        on_trouble: Hears of disks that are full, read-only and the like.
    """

    def __init__(
        self,
        folder: Path,
        keys: Sequence[TableKey],
        teacher: str,
        writer: ThreadPoolExecutor,
        on_trouble: Callable[[OSError], None],
    ) -> None:
        self.keys = tuple(keys)
        self._writer, self._on_trouble = writer, on_trouble
        self._writable = True
        self._written: deque[Future[None]] = deque()
        self._tables: list[TeacherTable | None] = []
        for key in keys:
            try:
                self._tables.append(TeacherTable(folder, key, teacher))
            except OSError as error:
                self._tables.append(None)
                on_trouble(error)

    @property
    def keeping(self) -> bool:
        """Whether new rows are kept: no table was lost, and the disk takes what is written."""
        return self._writable and None not in self._tables

    def disk_bytes(self) -> int:
        """Bytes that the tables take on disk now."""
        return sum(table.disk_bytes() for table in self._tables if table is not None)

    def read(self, t: int, index: Rows, view: Rows) -> Found:
        """Rows [N] of table t, as `TeacherTable.read`; none of them where it is lost.

        Raises:
            IndexError: An index or a view lies outside the image set or the view family.
        """
        table = self._tables[t]
        if table is not None:
            try:
                return table.read(index, view)
            except OSError as error:
                self._tables[t] = None
                self._on_trouble(error)
        values = {name: np.empty((len(index), width), np.float16) for name, width in self.keys[t].columns}
        return values, np.zeros(len(index), dtype=np.bool_)

    def write(self, t: int, index: Rows, view: Rows, values: Mapping[str, Halves]) -> None:
        """Hands rows [N] of table t to the writer; waits only where many writes wait already."""
        table = self._tables[t]
        if table is not None and self._writable:
            self._written.append(self._writer.submit(table.write, index, view, values))
            self._settle(_WAITING)

    def flush(self) -> None:
        """Waits until all is written."""
        self._settle(0)

    def _settle(self, waiting: int) -> None:
        while len(self._written) > waiting or (self._written and self._written[0].done()):
            try:
                self._written.popleft().result()
            except OSError as error:
                self._writable = False  # known rows are still read
                self._on_trouble(error)


class KnownRows:
    """Rows of M teachers: read from disk where they are there, else computed and handed to the disk.

    Attributes:
        kept: The tables of each teacher: first that of logits and pooled features, then one for each stage.
    """

    def __init__(
        self, kept: Sequence[KeptRows], live: LiveTeachers, names: Sequence[str], device: torch.device
    ) -> None:
        """Takes tables and teachers.

        Args:
            kept: See the attribute.
            live: The teachers themselves.
            names: Theirs, for messages.
            device: Where they are.
        """
        self.kept, self._live, self._names, self._device = tuple(kept), live, tuple(names), device

    def obtain(
        self, index: Rows, view: Rows, images_of: Callable[[Rows], Tensor], stages: Stages
    ) -> tuple[Values, NDArray[np.bool_]]:
        """Rows from disk; what is missing is computed, and handed to the disk.

        Args:
            index: int64 [N].
            view: int64 [N], so that no row occurs twice.
            images_of: Makes the images at some of the positions 0..N-1.
            stages: () or all that are kept.

        Returns:
            For each teacher its columns, float16 [N, width] on the device; bool [M, N], which rows were found.
        """
        tables = range(1 + len(stages))
        read = [[kept.read(t, index, view) for t in tables] for kept in self.kept]
        here = np.stack([[present for _, present in own] for own in read])  # [M, tables, N]
        found = np.logical_and.reduce(here, axis=1)
        values = [self.there({k: v for columns, _ in own for k, v in columns.items()}) for own in read]
        missing = np.flatnonzero(~found.all(axis=0))
        teachers = self._live.frozen(stages)
        finite = torch.ones(len(read), dtype=torch.bool, device=self._device)
        writes = []
        for start in range(0, len(missing), teachers.chunk):
            rows = missing[start : start + teachers.chunk]
            images = images_of(rows)
            for m in np.flatnonzero(~found[:, rows].all(axis=1)).tolist():
                # One size whatever is missing: how many rows a killed run left must not change the rounding.
                computed, finite[m] = _rounded(teachers.ask(m, images, teachers.chunk), finite[m])
                for t in tables:
                    # Rows that are there stay as they are: another graph may have rounded these otherwise.
                    new = np.flatnonzero(~here[m, t, rows])
                    names = [name for name, _ in self.kept[m].keys[t].columns]
                    own = {name: _some(computed[name], new) for name in names}
                    for name, column in own.items():
                        values[m][name].index_copy_(0, torch.from_numpy(rows[new]).to(self._device), column)
                    host = {name: column.to("cpu", non_blocking=True) for name, column in own.items()}
                    writes.append((self.kept[m], t, rows[new], host))
        if writes:  # one wait for the device; then all copies are complete, too
            self._refuse_non_finite(finite.tolist())
        for kept, t, rows, host in writes:
            kept.write(t, index[rows], view[rows], {name: column.numpy() for name, column in host.items()})
        return values, found

    def _refuse_non_finite(self, finite: list[bool]) -> None:
        for name, fine in zip(self._names, finite, strict=True):
            if not fine:
                raise UserError(f"teacher {name} returned outputs that are not finite; check its weights")

    def there(
        self, columns: Mapping[str, NDArray[np.float16]], rows: NDArray[np.bool_] | slice = slice(None)
    ) -> dict[str, Tensor]:
        """Numbers of some rows, moved to the device."""
        return {name: torch.from_numpy(values[rows]).to(self._device) for name, values in columns.items()}


def _rounded(output: NetworkOutput, finite: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The columns of a teacher's output as a table holds them, and whether they, too, are all finite."""
    columns = {LOGITS: output.logits, POOLED: output.pooled, **output.stages}
    for name, values in columns.items():
        flat = values.contiguous().flatten(1)  # in this order whatever the memory format
        finite = finite & torch.isfinite(flat).all()
        columns[name] = flat.clamp(-FLOAT16_MAX, FLOAT16_MAX).half()
    return columns, finite


def _some(column: Tensor, rows: Rows) -> Tensor:
    return column if len(rows) == len(column) else column[torch.from_numpy(rows).to(column.device)]


class HeldRows:
    """Rows of M teachers in the device's memory: a step finds its rows there without waiting for the host.

    The memory stays where it is and is changed in place, so that a CUDA graph may read it. A batch that holds other
    rows than these gets NaN for them, so that the loss says that something is wrong rather than a student learning
    from the wrong answer.

    Attributes:
        whole: Whether there is a place for every view of every image; else for one view of each at a time.
    """

    def __init__(
        self,
        shapes: Sequence[Mapping[str, Shape]],
        images: Rows,
        num_images: int,
        num_views: int,
        device: torch.device,
        *,
        whole: bool = True,
    ) -> None:
        """Makes room.

        Args:
            shapes: For each teacher the columns and the shape of their values.
            images: int64 [n], positions in the whole training set whose rows may be held.
            num_images: Images in the whole training set.
            num_views: V.
            device: Where batches are.
            whole: See the attribute.
        """
        self.whole, self._device = whole, device
        step = num_views if whole else 1
        self._blank = len(images) * step  # a row of NaN
        self._start = np.full(num_images, self._blank)
        self._start[images] = np.arange(len(images)) * step
        self._num_views = num_views
        self._view = np.full(self._blank + 1, _NOBODY, dtype=np.int32)
        self._start_there = torch.from_numpy(self._start).to(device, copy=True)
        self._view_there = torch.from_numpy(self._view).to(device, copy=True)
        self._widths = [{name: prod(shape) for name, shape in own.items()} for own in shapes]
        width = sum(sum(own.values()) for own in self._widths)
        # All columns of all teachers side by side: one look-up finds them.
        self._values = torch.empty((self._blank + 1, width), dtype=torch.float16, device=device)
        self._values[self._blank] = torch.nan

    @property
    def nbytes(self) -> int:
        """What they take on the device."""
        return self._values.nbytes + self._view_there.nbytes + self._start_there.nbytes

    def holds(self, index: Rows, view: Rows) -> NDArray[np.bool_]:
        """Which rows [N] of an epoch are here already.

        Raises:
            IndexError: An image is not among those whose rows may be held, or a view lies outside the family.
        """
        if len(view) and (view.min() < 0 or view.max() >= self._num_views):
            raise IndexError(f"view must lie in 0..{self._num_views - 1}")
        return self._view[self._places(index, view)] == view

    def put(self, index: Rows, view: Rows, values: Sequence[Mapping[str, Tensor]]) -> None:
        """Takes rows in; where there is one place for each image, in place of its other view.

        Args:
            index: int64 [N]; images whose rows may be held.
            view: int64 [N], so that no two rows have the same place.
            values: For each teacher its columns, float16 [N, width] on the device; others than ours are passed by.
        """
        places = self._places(index, view)
        there = torch.from_numpy(places).to(self._device)
        columns = [own[name] for own, names in zip(values, self._widths, strict=True) for name in names]
        self._values.index_copy_(0, there, torch.cat(columns, dim=1))
        self._view[places] = view
        self._view_there.index_copy_(0, there, torch.from_numpy(self._view[places]).to(self._device))

    def _places(self, index: Rows, view: Rows) -> Rows:
        start = self._start[index]
        if (start == self._blank).any():
            raise IndexError("rows can be held of the run's own images alone")
        return start + view if self.whole else start

    def look_up(self, batch: Batch) -> list[dict[str, Tensor]]:
        """For each teacher its columns, float32 [B, width], by `batch.index` and `batch.view`."""
        place = self._start_there[batch.index]
        if self.whole:
            place = (place + batch.view).clamp(0, self._blank)
        place = torch.where(self._view_there[place] == batch.view, place, self._blank)
        values = self._values[place].float()
        columns = iter(values.split([width for own in self._widths for width in own.values()], dim=1))
        return [{name: next(columns) for name in own} for own in self._widths]


def room_for_rows(
    shapes: Sequence[Mapping[str, Shape]],
    images: Rows,
    num_images: int,
    num_views: int,
    device: torch.device,
    *,
    optional: bool,
) -> HeldRows | None:
    """Room for all rows of the images where the device has it, else for one row of each; see `HeldRows`.

    Args:
        shapes: For each teacher the columns and the shape of their values.
        images: int64 [n].
        num_images: Images in the whole training set.
        num_views: V.
        device: Where batches are.
        optional: Whether None is returned where one row of each image is too much.
    """
    row = 8 + sum(2 * prod(shape) for own in shapes for shape in own.values())
    budget = _budget(device)
    whole = len(images) * num_views * row <= budget
    if not whole:
        size = len(images) * num_views * row / 1e9
        log.info("teachers: their rows take %.1f GB, more than the device's memory may hold: read by epoch", size)
        if optional and len(images) * row > budget:
            return None
    return HeldRows(shapes, images, num_images, num_views, device, whole=whole)


def _budget(device: torch.device) -> int:
    """Bytes that rows may take on a device."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:  # the computer's memory; how much of it is free now changes too fast to ask
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    return min(HELD_BYTES.get(device.type, HELD_BYTES["cpu"]), free // 4)
