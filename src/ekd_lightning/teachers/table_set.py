"""The tables of several teachers: known rows are read, new ones kept, and trouble with the disk ends neither.

Shape letters: B batch, C classes, D features, M teachers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ekd_lightning.networks.outputs import NetworkOutput
from ekd_lightning.networks.teachers import TeacherEnsemble
from ekd_lightning.teachers.table import TableKey, TeacherTable, to_float16

Rows = NDArray[np.int64]
Values = NDArray[np.float32]
Found = tuple[Values, Values | None, NDArray[np.bool_]]
"""Logits [B, C], pooled features [B, D_m] or None, and which rows are there [B]; the others hold anything."""


class TableSet:
    """One table per teacher. A table that cannot be opened or read is given up and has no rows."""

    def __init__(
        self,
        ensemble: TeacherEnsemble,
        folder: Path,
        keys: Sequence[TableKey],
        *,
        on_trouble: Callable[[OSError], None],
    ) -> None:
        """Opens the tables, or creates them.

        A table that holds pooled features too serves runs that need the logits only, so that the methods of a
        sweep share their rows.

        Args:
            ensemble: The frozen teachers.
            folder: Where the tables live.
            keys: What each table holds.
            on_trouble: Hears of disks that are full, read-only and the like.
        """
        self._on_trouble = on_trouble
        self._writable = True
        self._names = [identity.id for identity in ensemble.identities]
        self._num_classes = ensemble.num_classes
        self._tables: list[TeacherTable | None] = []
        self._widths: list[int] = []
        for m, wanted in enumerate(keys):
            wider = replace(wanted, pooled_dim=ensemble.num_features[m])
            serves = not wanted.pooled_dim and (folder / f"{wider.name}.rows").is_file()
            key = wider if serves else wanted
            self._widths.append(key.pooled_dim)
            self._tables.append(self._open(folder, key, self._names[m]))

    def _open(self, folder: Path, key: TableKey, name: str) -> TeacherTable | None:
        try:
            return TeacherTable(folder, key, name)
        except OSError as error:
            self._on_trouble(error)
            return None

    def __len__(self) -> int:
        """M."""
        return len(self._tables)

    @property
    def keeping(self) -> bool:
        """Whether new rows are kept: no table was lost, and the disk takes what is written."""
        return all(self.keeps(m) for m in range(len(self)))

    def keeps(self, m: int) -> bool:
        """Whether new rows of teacher m are kept."""
        return self._writable and self._tables[m] is not None

    def disk_bytes(self) -> int:
        """Bytes that the tables take on disk now."""
        return sum(table.disk_bytes() for table in self._tables if table is not None)

    def as_kept(self, m: int, output: NetworkOutput) -> tuple[Values, Values | None]:
        """What the table of teacher m holds of its output, rounded as it is there.

        Raises:
            UserError: A value is not finite.
        """
        logits = to_float16(output.logits.cpu().numpy(), self._names[m]).astype(np.float32)
        if not self._widths[m]:
            return logits, None
        return logits, to_float16(output.pooled.cpu().numpy(), self._names[m]).astype(np.float32)

    def read(self, m: int, index: Rows, view: Rows) -> Found:
        """The rows of teacher m; none of them where its table is lost.

        Raises:
            IndexError: An index or a view lies outside the image set or the view family.
        """
        table = self._tables[m]
        if table is not None:
            try:
                return table.read(index, view)
            except OSError as error:
                self._tables[m] = None
                self._on_trouble(error)
        B, D = len(index), self._widths[m]
        logits = np.empty((B, self._num_classes), dtype=np.float32)
        pooled = np.empty((B, D), dtype=np.float32) if D else None
        return logits, pooled, np.zeros(B, dtype=np.bool_)

    def write(self, m: int, index: Rows, view: Rows, logits: Values, pooled: Values | None) -> None:
        """Keeps rows of teacher m, where they can be kept."""
        table = self._tables[m]
        if table is None or not self._writable:
            return
        try:
            table.write(index, view, logits, pooled)
        except OSError as error:
            self._writable = False  # known rows are still read
            self._on_trouble(error)
