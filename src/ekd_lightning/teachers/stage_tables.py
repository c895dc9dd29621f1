"""The stage outputs of teachers on disk: large, so kept only where a run asks for it.

Shape letters: B batch, C classes, D features, M teachers, N rows.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ekd_lightning.data.batch import Batch
from ekd_lightning.networks.outputs import NetworkOutput
from ekd_lightning.networks.teachers import TeacherEnsemble
from ekd_lightning.teachers.source import LiveTeachers
from ekd_lightning.teachers.table import TableKey, TeacherTable, to_float16

Rows = NDArray[np.int64]
StageShape = tuple[int, int, int]


class StageTables:
    """One table per teacher and stage; missing rows are computed and kept.

    What is returned has been rounded to float16, freshly computed or not. Trouble with the disk is reported to
    `on_trouble`, then the rows are computed live.

    Attributes:
        stages: Names of the stages that are kept.
    """

    def __init__(
        self,
        ensemble: TeacherEnsemble,
        folder: str | os.PathLike[str],
        keys: Sequence[TableKey],
        stages: Sequence[str],
        image_size: int,
        *,
        live: LiveTeachers,
        on_computed: Callable[[int, Rows, Rows, NetworkOutput], None],
        on_trouble: Callable[[OSError], None],
    ) -> None:
        """Opens the tables, or creates them.

        Args:
            ensemble: The frozen teachers.
            folder: Where the tables live.
            keys: What each teacher's ordinary table holds.
            stages: Names of stages that all teachers have.
            image_size: Height and width of the images.
            live: Computes what is missing.
            on_computed: Hears of all that `complete` computed: teacher, index, view and outputs.
            on_trouble: Hears of disks that are full, read-only and the like.
        """
        self.stages = tuple(stages)
        self._live, self._on_computed, self._on_trouble = live, on_computed, on_trouble
        self._names = [identity.id for identity in ensemble.identities]
        self._shapes = [
            {name: shapes[name] for name in self.stages} for shapes in ensemble.stage_shapes(image_size)
        ]
        self._writable = True
        self._tables: list[dict[str, TeacherTable] | None] = []
        for key, shapes, name in zip(keys, self._shapes, self._names, strict=True):
            try:
                tables = {
                    stage: TeacherTable(folder, replace(key, stage=stage, pooled_dim=prod(shape)), name)
                    for stage, shape in shapes.items()
                }
                self._tables.append(tables)
            except OSError as error:
                self._tables.append(None)
                on_trouble(error)

    def disk_bytes(self) -> int:
        """Bytes that the tables take on disk now."""
        return sum(table.disk_bytes() for tables in self._tables if tables for table in tables.values())

    def complete(self, index: Rows, view: Rows, images_of: Callable[[Rows], Tensor]) -> None:
        """Computes and keeps what is missing of these rows.

        Args:
            index: int64 [N], positions in the whole image set.
            view: int64 [N].
            images_of: Makes the images at some of the positions 0..N-1.
        """
        chunk = self._live.frozen(self.stages).chunk
        present = np.stack([self._read(m, index, view)[1] for m in range(len(self._tables))])
        missing = np.flatnonzero(~present.all(axis=0))
        for start in range(0, len(missing), chunk):
            chosen = missing[start : start + chunk]
            images = images_of(chosen)
            for m in range(len(self._tables)):
                if not present[m, chosen].all():
                    output = self._compute(m, index[chosen], view[chosen], images)
                    self._on_computed(m, index[chosen], view[chosen], output)

    def __call__(self, batch: Batch) -> tuple[dict[str, Tensor], ...]:
        """The stage outputs of all teachers for a batch, float32 [B, channels, height, width] on its device."""
        index, view = torch.stack((batch.index, batch.view)).cpu().numpy()
        device = batch.images.device
        results = []
        for m, shapes in enumerate(self._shapes):
            found, here = self._read(m, index, view)
            if not here.all():
                rows = np.flatnonzero(~here)
                images = batch.images[torch.from_numpy(rows).to(device)]
                output = self._compute(m, index[rows], view[rows], images)
                for stage in self.stages:
                    found[stage][rows] = self._rounded(m, output.stages[stage]).astype(np.float32)
            results.append({stage: _maps(found[stage], shape).to(device) for stage, shape in shapes.items()})
        return tuple(results)

    def _compute(self, m: int, index: Rows, view: Rows, images: Tensor) -> NetworkOutput:
        teachers = self._live.frozen(self.stages)
        output = teachers.ask(m, images, teachers.chunk)
        self._keep(m, index, view, output)
        return output

    def _rounded(self, m: int, maps: Tensor) -> NDArray[np.float16]:
        """[B, channels * height * width], in that order whatever the memory format."""
        return to_float16(maps.contiguous().flatten(1).cpu().numpy(), self._names[m])

    def _read(
        self, m: int, index: Rows, view: Rows
    ) -> tuple[dict[str, NDArray[np.float32]], NDArray[np.bool_]]:
        here = np.ones(len(index), dtype=np.bool_)
        found: dict[str, NDArray[np.float32]] = {}
        try:
            for stage, table in (self._tables[m] or {}).items():
                _, values, present = table.read(index, view)
                assert values is not None
                found[stage], here = values, here & present
        except OSError as error:
            self._tables[m] = None
            self._on_trouble(error)
        if self._tables[m] is None:
            empty = {
                stage: np.empty((len(index), prod(s)), np.float32) for stage, s in self._shapes[m].items()
            }
            return empty, np.zeros(len(index), dtype=np.bool_)
        return found, here

    def _keep(self, m: int, index: Rows, view: Rows, output: NetworkOutput) -> None:
        tables = self._tables[m]
        if tables is None or not self._writable:
            return
        logits = to_float16(output.logits.cpu().numpy(), self._names[m]).astype(np.float32)
        try:
            for stage, table in tables.items():
                table.write(index, view, logits, self._rounded(m, output.stages[stage]).astype(np.float32))
        except OSError as error:
            self._writable = False  # known rows are still read
            self._on_trouble(error)


def _maps(values: NDArray[np.float32], shape: StageShape) -> Tensor:
    return torch.from_numpy(values).unflatten(1, shape)
