"""Tables of one teacher for several image sets under one index, so that each set's rows serve other runs, too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ekd_lightning.teachers.table import Halves, Rows, TeacherTable


class JoinedTables:
    """Reads and writes as `TeacherTable` does; the images of each table follow behind those of the one before.

    Args:
        tables: One for each image set, all with the same columns.
    """

    def __init__(self, tables: Sequence[TeacherTable]) -> None:
        self._tables = list(tables)
        self._starts = np.cumsum([0, *(table.key.num_images for table in tables)])

    def _parts(self, index: Rows) -> Iterator[tuple[TeacherTable, NDArray[np.bool_], int]]:
        """The tables with rows among those asked for, which rows these are, and what their index begins with."""
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
