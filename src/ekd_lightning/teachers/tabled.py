"""Tabled teachers: outputs are looked up in tables, and only missing rows are computed.

Shape letters: B batch, C classes, D features, M teachers, N rows, V views.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ekd_lightning.data.loader import Batch
from ekd_lightning.data.views import ViewFamily
from ekd_lightning.networks.staged import ImageSize, TeacherOutput, shape_at
from ekd_lightning.networks.teachers import TeacherEnsemble
from ekd_lightning.networks.weights import answers_sha256
from ekd_lightning.progress import UNSEEN, readable, track
from ekd_lightning.teachers.rows import DeviceRows, StoredRows, Values, memory_for_rows, row_bytes
from ekd_lightning.teachers.source import ImagesOf, LiveTeachers, StageCounts, Stages, TeacherFormat, TeacherSource
from ekd_lightning.teachers.table import LOGITS, POOLED, Halves, Rows, TableKey

log = logging.getLogger(__name__)

_BLOCK_CHUNKS, _BLOCK_BYTES = 32, 1 << 28  # rows are computed and handed to the disk in blocks no larger
_LOAD_FROM = 1 / 8  # share of all rows from which reading all at once is cheaper than epoch by epoch
_LOGGED_FROM = 2.0  # seconds


Prefetched = tuple[list[DeviceRows], Rows, Rows, "Future[tuple[list[dict[str, Halves]], NDArray[np.bool_]]]"]


class TabledTeachers(TeacherSource):
    """A source that looks outputs up, computes missing ones, and stores them for later epochs and runs.

    Outputs are always rounded to float16, also when just computed, so that runs with an empty and with a filled table
    see the same targets. The images of a batch must be exactly the views that it names: nothing may change or mix them
    afterwards. An error of the disk causes one warning; then missing rows are computed and not stored.

    If the device has space for all rows that the run may need, each row is read or computed once in the run; otherwise
    the rows of an epoch are read before it begins. Without `prepare_epoch`, the rows of each batch are read by
    themselves.
    """

    def __init__(
        self,
        ensemble: TeacherEnsemble,
        folder: str | os.PathLike[str],
        *,
        image_sets: Sequence[tuple[str, int]],
        views: ViewFamily,
        images: Tensor | None = None,
        include_pooled: bool = False,
        keep_stages: Sequence[str] = (),
        image_size: ImageSize = 32,
        how: TeacherFormat | None = None,
    ) -> None:
        """Opens or creates the tables: for each teacher one of logits and pooled features, and one per stage.

        An existing table with pooled features also serves runs that need logits only, so that the methods of a sweep
        share rows.

        Args:
            ensemble: The frozen teachers; on the batches' device.
            folder: Folder of the tables.
            image_sets: Hash and size of each whole image set; `batch.index` numbers the images of one after the other.
            views: The view family that `batch.view` refers to.
            images: int64 [n], the training images; None for all.
            include_pooled: Whether pooled features are stored and returned. If not, `TeacherOutput.pooled`
                is the empty tuple.
            keep_stages: Stages whose outputs are kept, too; others are computed whenever they are needed.
            image_size: Height and width of the images; only stages depend on it.
            how: Numeric form of the teachers; tables of another form's dtype are not used.
        """
        self._live = LiveTeachers(ensemble, how)
        self._device = ensemble.device
        self._num_images, self._num_views = sum(size for _, size in image_sets), views.num_views
        self._images = np.arange(self._num_images) if images is None else images.numpy()
        self._columns = (LOGITS, POOLED) if include_pooled else (LOGITS,)
        self._stages = tuple(keep_stages)
        self._planned_rows = 0
        self._prepared, self._repeats = False, False
        self._groups: dict[Stages, DeviceRows | None] = {}
        self._reader = ThreadPoolExecutor(1, "teacher-rows")
        self._prefetched: Prefetched | None = None
        C = ensemble.num_classes
        self._shapes = [
            {LOGITS: (C,), POOLED: (D,), **{stage: shape_at(shapes, stage) for stage in self._stages}}
            for D, shapes in ((one.pooled_width, one.stage_shapes(image_size)) for one in ensemble.members)
        ]
        keys = []
        for identity, shapes in zip(ensemble.identities, self._shapes, strict=True):
            columns = {name: (name, prod(shape)) for name, shape in shapes.items()}
            narrow = TableKey(
                teacher_sha256=answers_sha256(identity.sha256, identity.network),
                image_set_sha256=image_sets[0][0],
                num_images=image_sets[0][1],
                view_key=views.key,
                num_views=views.num_views,
                columns=(columns[LOGITS],),
                numeric_format=self._live.frozen().numeric_format,
            )
            wide = replace(narrow, columns=(columns[LOGITS], columns[POOLED]))
            first = wide if include_pooled or (Path(folder) / f"{wide.name}.rows").is_file() else narrow
            keys.append([first, *(replace(narrow, columns=(columns[stage],)) for stage in self._stages)])
        names = [identity.id for identity in ensemble.identities]
        self._stored = StoredRows(Path(folder), keys, self._live, names, self._device, image_sets)

    @property
    def keeping(self) -> bool:
        """Whether new rows are stored: all tables are open, and no write has failed."""
        return self._stored.keeping

    @property
    def held_bytes(self) -> int:
        """Bytes of device memory that rows take."""
        return sum(group.nbytes for group in self._groups.values() if group is not None)

    def flush(self) -> None:
        """Waits until all rows computed so far are written, or their writes have failed."""
        self._stored.flush()

    def plan(self, rows: int, repeats: bool = False) -> None:
        """See `TeacherSource`. The first epoch need not contain repeats, so the caller has to announce them."""
        self._planned_rows = rows
        self._repeats |= repeats and self._num_views > 1
        self._live.plan(rows)

    def _keeps(self, stages: Stages) -> bool:
        """Whether outputs with these stages come from tables; those without stages always do."""
        return set(stages) <= set(self._stages)

    # -- an epoch ahead ---------------------------------------------------------------------------------

    def prepare_epoch(self, index: Tensor, view: Tensor, images_of: ImagesOf, counts: StageCounts) -> None:
        """Completes the tables for all rows of an epoch and loads these rows onto the device; see `TeacherSource`.

        Missing rows are computed in large batches, all of one size. Until the next call, batches may consist of these
        rows only. Nothing is looked up if all outputs come from live teachers.

        Raises:
            IndexError: If an index or a view lies outside the run's images or the view family.
            UserError: If a teacher's output is not finite.
        """
        start = time.perf_counter()
        if not self._prepared:  # an epoch with two views of an image needs space for more than one
            self._repeats |= len(np.unique(index.numpy())) < len(index)
        self._prepared = True
        self.misses += len(self._shapes) * sum(counts[stages] for stages in counts if not self._keeps(stages))
        before = self.misses
        self._collect_prefetched()
        self._complete(self._groups_for(counts, self._group), index.numpy(), view.numpy(), images_of)
        seconds = time.perf_counter() - start
        self.seconds += seconds
        if seconds > _LOGGED_FROM and self.misses > before:
            needed, computed = len(self._shapes) * sum(counts.values()), self.misses - before
            known = 100 * (1 - computed / max(needed, 1))
            text = "teacher outputs: %.1f %% of %s known, %s computed in %s"
            log.info(text, known, f"{needed:,}", f"{computed:,}", readable(seconds), extra=UNSEEN)

    def prefetch_epoch(self, index: Tensor, view: Tensor, counts: StageCounts) -> None:
        """Reads the missing rows of the next epoch in a thread; see `TeacherSource`.

        Does nothing if they would exceed the host memory for rows of one kind.
        """
        groups = self._groups_for(counts, self._groups.get)
        missing = self._missing(groups, index.numpy(), view.numpy())
        stages = self._stages if len(groups) > 1 else ()
        size = len(missing) * row_bytes(self._held_shapes((*self._columns, *stages)))
        if 0 < size <= memory_for_rows(torch.device("cpu")):
            rows = index.numpy()[missing], view.numpy()[missing]
            self._prefetched = groups, *rows, self._reader.submit(self._stored.read_all, *rows, stages)

    def _collect_prefetched(self) -> None:
        """Moves the rows that were read in advance to the device, once the epoch before has ended."""
        if self._prefetched is None:
            return
        groups, index, view, read = self._prefetched
        self._prefetched = None
        values, present = read.result()
        found = np.logical_and.reduce(present, axis=(0, 1))
        on_device = [self._stored.to_device(columns, found) for columns in values]
        for group in groups:
            group.put(index[found], view[found], on_device)

    def _groups_for(self, counts: StageCounts, group: Callable[[Stages], DeviceRows | None]) -> list[DeviceRows]:
        """Returns the device rows for these outputs: those of stages, if any are needed, then those without."""
        kept = [stages for stages in counts if self._keeps(stages)]
        groups = [group(self._stages)] if any(kept) else []
        if () in kept or any(groups):
            groups.append(group(()))
        return [one for one in groups if one is not None]

    @staticmethod
    def _missing(groups: Sequence[DeviceRows], index: Rows, view: Rows) -> Rows:
        """Returns the positions of rows that at least one of the device rows lacks."""
        held = [group.holds(index, view) for group in groups]
        return np.flatnonzero(~np.logical_and.reduce(held)) if held else np.zeros(0, np.int64)

    def _group(self, stages: Stages) -> DeviceRows | None:
        """Returns the device rows of these stages, () for logits and pooled features; None if stages do not fit."""
        if stages not in self._groups:
            shapes = self._held_shapes(stages or self._columns)
            n, V, budget = len(self._images), self._num_views, memory_for_rows(self._device)
            one = n * row_bytes(shapes)
            if one * V > budget:
                text = "teacher outputs: %.1f GB do not fit into the device's memory, so they are read epoch by epoch"
                log.info(text, one * V / 1e9)
            self._groups[stages] = None
            if not stages or one <= budget:
                group = DeviceRows(shapes, self._images, self._num_images, V, self._device)
                self._groups[stages] = None if self._repeats and not group.whole else group
                if group.whole and not stages:
                    self._load(group)
        return self._groups[stages]

    def _held_shapes(self, names: Sequence[str]) -> list[dict[str, tuple[int, ...]]]:
        return [{name: own[name] for name in names} for own in self._shapes]

    def _load(self, group: DeviceRows) -> None:
        """Loads all stored rows of the run's images, if the run will need a large share of them."""
        images, V, teachers = self._images, self._num_views, range(len(self._shapes))
        few = self._planned_rows < _LOAD_FROM * len(images) * V
        if few or not all(self._stored.disk_bytes()):
            return
        size = len(images) * V * row_bytes(self._held_shapes(self._columns))
        with ThreadPoolExecutor(len(teachers)) as readers:
            for some in np.array_split(images, -(-size // _BLOCK_BYTES)):
                index, view = np.repeat(some, V), np.tile(np.arange(V), len(some))
                found = list(readers.map(lambda m, i=index, v=view: self._stored.read(m, 0, i, v), teachers))
                present = np.logical_and.reduce([rows for _, rows in found])
                on_device = [self._stored.to_device(values, present) for values, _ in found]
                group.put(index[present], view[present], on_device)

    def _complete(self, groups: list[DeviceRows], index: Rows, view: Rows, images_of: ImagesOf) -> None:
        """Reads or computes the rows that the device rows lack."""
        if not groups:
            return
        self.flush()
        missing = self._missing(groups, index, view)
        self.hits += len(self._shapes) * (len(index) - len(missing))
        stages = self._stages if len(groups) > 1 else ()
        chunk, shapes = self._live.frozen().chunk, self._held_shapes((*self._columns, *stages))
        size = max(chunk, min(_BLOCK_CHUNKS * chunk, _BLOCK_BYTES // row_bytes(shapes)))
        for start in track(range(0, len(missing), size), "teacher outputs", "blocks"):
            rows = missing[start : start + size]

            def images(chosen: Rows, rows: Rows = rows) -> Tensor:
                positions = rows[chosen]
                return images_of(torch.from_numpy(index[positions]), torch.from_numpy(view[positions]))

            values, found = self._stored.obtain(index[rows], view[rows], images, stages)
            self.hits += int(found.sum())
            self.misses += int((~found).sum())
            for group in groups:
                group.put(index[rows], view[rows], values)

    def captured(self, stages: Stages = ()) -> bool:
        """Whether `outputs` only looks up rows on the device, or only runs live teachers; see `TeacherSource`."""
        needed = ((), self._stages) if stages else ((),)
        return not self._keeps(stages) or all(self._group(names) for names in needed)

    # -- a batch ----------------------------------------------------------------------------------------

    def outputs(self, batch: Batch, stages: Stages = ()) -> TeacherOutput:
        """See `TeacherSource`. Rows are rounded to float16; without `include_pooled`, pooled is ().

        Stages without tables come from live teachers, and every row counts as a miss.

        Raises:
            IndexError: If an index or a view lies outside the image set or the view family.
            UserError: If a teacher's output is not finite.
            ValueError: If the images were mixed, so that they are not the views that the batch names.
        """
        if batch.soft_labels is not None:
            raise ValueError("mixed images have no rows in teacher tables")
        if not self._keeps(stages):
            if not self._prepared:  # else `prepare_epoch` counted them, as a captured step runs no Python
                self.misses += len(self._shapes) * len(batch.index)
            output = self._live.outputs(batch, stages)
            return output if POOLED in self._columns else output._replace(pooled=())
        answers, maps = self._groups.get(()), self._groups.get(self._stages)
        if not self._prepared or answers is None or (stages and maps is None):
            return self._output(self._read(batch, stages), stages)
        values = answers.look_up(batch)
        if stages and maps is not None:
            values = [own | more for own, more in zip(values, maps.look_up(batch), strict=True)]
        return self._output(values, stages)

    def _output(self, values: Values, stages: Stages) -> TeacherOutput:
        return TeacherOutput(
            logits=torch.stack([own[LOGITS].float() for own in values]),
            pooled=tuple(own[POOLED].float() for own in values) if POOLED in self._columns else (),
            stages=tuple(
                {name: own[name].float().unflatten(1, shapes[name]) for name in stages}
                for own, shapes in zip(values, self._shapes, strict=True)
            ),
        )

    def _read(self, batch: Batch, stages: Stages) -> Values:
        """Reads the columns of a batch, each float16 [B, width]; missing rows are computed and stored."""
        index, view = torch.stack((batch.index, batch.view)).cpu().numpy()
        # An image may occur twice in a batch; it is computed once, and both get the row of the table.
        _, first, inverse, times = np.unique(
            index * self._num_views + view, return_index=True, return_inverse=True, return_counts=True
        )
        self.flush()

        def images(chosen: Rows) -> Tensor:
            return batch.images[torch.from_numpy(first[chosen]).to(self._device)]

        values, found = self._stored.obtain(index[first], view[first], images, self._stages if stages else ())
        if not self._prepared:  # else the disk has time until the next step
            self.flush()
        self.hits += int((found * times).sum())
        self.misses += int((~found * times).sum())
        at = torch.from_numpy(inverse).to(self._device)
        return [{name: column[at] for name, column in own.items()} for own in values]
