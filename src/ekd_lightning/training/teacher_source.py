"""Where a training step gets its teachers' outputs: from the networks, or from tables of known rows."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ekd_lightning.data.batch import Batch
from ekd_lightning.networks.outputs import TeacherOutput
from ekd_lightning.training.teacher_table import TableKey, TeacherTable, to_float16

if TYPE_CHECKING:
    from ekd_lightning.data.views import ViewFamily
    from ekd_lightning.networks.staged import StagedNetwork
    from ekd_lightning.networks.teachers import TeacherEnsemble


class LiveTeachers:
    """Passes every batch through every teacher.

    Attributes:
        hits: Always 0.
        misses: Always 0; nothing is looked up.
        hit_rate: Always None.
    """

    hits = 0
    misses = 0
    hit_rate: float | None = None

    def __init__(self, ensemble: TeacherEnsemble, channels_last: bool = True) -> None:
        """Keeps the teachers.

        Args:
            ensemble: The frozen teachers.
            channels_last: Whether images are handed over in that memory format.
        """
        self._ensemble = ensemble
        self._channels_last = channels_last

    def __call__(self, batch: Batch, stages: Sequence[str] = ()) -> TeacherOutput:
        """The outputs of all teachers for the batch, on its device.

        Args:
            batch: B images.
            stages: Names of the stages whose outputs are wanted.

        Returns:
            Logits [M, B, C], pooled features M x [B, D_m] and the wanted stages.
        """
        images = _arranged(batch.images, self._channels_last)
        # A student's autocast must not reach the teachers: what they say would depend on its precision.
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            return self._ensemble(images, stages)


class TabledTeachers:
    """Looks teacher outputs up, computes only what is missing and keeps it for every later epoch and run.

    What is returned has always been rounded to float16, freshly computed or not, so that a cold and a warm
    run see the same targets. Only for batches whose images are exactly the views that they name: nothing may
    change or mix the images afterwards. Trouble with the disk costs one warning, then teachers run live.

    Attributes:
        hits: Rows found so far, counted per teacher and image.
        misses: Rows computed so far, likewise.
    """

    def __init__(
        self,
        ensemble: TeacherEnsemble,
        folder: str | os.PathLike[str],
        *,
        image_set_sha256: str,
        num_images: int,
        views: ViewFamily,
        include_pooled: bool = False,
        numeric_format: str = "float32",
        channels_last: bool = True,
    ) -> None:
        """Opens, or creates, one table per teacher.

        Args:
            ensemble: The frozen teachers; on the batches' device when it is called.
            folder: Where the tables live.
            image_set_sha256: Hash of the whole image set.
            num_images: Images in the whole set; `batch.index` lies in 0..num_images-1.
            views: The view family that `batch.view` refers to.
            include_pooled: Whether pooled features are stored and returned. If not, `TeacherOutput.pooled`
                is the empty tuple.
            numeric_format: How the teachers compute; tables of other formats are not used.
            channels_last: Whether images are handed to the teachers in that memory format.
        """
        self.hits = 0
        self.misses = 0
        self._ensemble = ensemble
        self._live = LiveTeachers(ensemble, channels_last)
        self._channels_last = channels_last
        self._folder = Path(folder)
        self._num_views = views.num_views
        self._names = [identity.id for identity in ensemble.identities]
        self._widths = [width if include_pooled else 0 for width in ensemble.num_features]
        self._include_pooled = include_pooled
        self._writable = True
        self._warned: set[str] = set()
        self._tables: list[TeacherTable | None] = [None] * len(self._names)
        self._open(image_set_sha256, num_images, views, numeric_format)

    def _open(self, image_set_sha256: str, num_images: int, views: ViewFamily, numeric_format: str) -> None:
        """Opens one table per teacher; those that cannot be opened stay None.

        A table that holds pooled features too serves runs that need the logits only, so that the methods of a
        sweep share their rows.
        """
        for m, identity in enumerate(self._ensemble.identities):
            key = TableKey(
                teacher_sha256=identity.sha256,
                image_set_sha256=image_set_sha256,
                num_images=num_images,
                view_key=views.key,
                num_views=views.num_views,
                num_classes=self._ensemble.num_classes,
                pooled_dim=self._widths[m],
                numeric_format=numeric_format,
            )
            wider = replace(key, pooled_dim=self._ensemble.num_features[m])
            if not self._include_pooled and (self._folder / f"{wider.name}.rows").is_file():
                key, self._widths[m] = wider, wider.pooled_dim
            try:
                self._tables[m] = TeacherTable(self._folder, key, identity.id)
            except OSError as error:
                self._warn_disk(error)

    @property
    def hit_rate(self) -> float | None:
        """Share of the rows asked for that were found, in [0, 1]; None before the first batch."""
        asked = self.hits + self.misses
        return self.hits / asked if asked else None

    def disk_bytes(self) -> int:
        """Bytes that the tables take on disk now."""
        return sum(table.disk_bytes() for table in self._tables if table is not None)

    def __call__(self, batch: Batch, stages: Sequence[str] = ()) -> TeacherOutput:
        """The outputs of all teachers for the batch, on its device.

        Args:
            batch: B images with their index and view.
            stages: Names of the stages whose outputs are wanted. They are not stored: the teachers run live,
                every row counts as a miss, and the first such batch causes a warning.

        Returns:
            Logits [M, B, C] in float32, rounded to float16; pooled features M x [B, D_m] likewise, or ().

        Raises:
            IndexError: An index or a view lies outside the image set or the view family.
            UserError: A teacher's output is not finite.
        """
        if stages:
            self._warn("stages", f"teacher tables hold no stages ({', '.join(stages)}): teachers run live")
            self.misses += len(self._tables) * len(batch.index)
            output = self._live(batch, stages)
            return output if self._include_pooled else output._replace(pooled=())
        index, view = torch.stack((batch.index, batch.view)).cpu().numpy()
        found = [self._rows(m, batch.images, index, view) for m in range(len(self._tables))]
        device = batch.images.device
        logits = _sent(np.stack([row[0] for row in found]), device)
        return TeacherOutput(
            logits=logits,
            pooled=tuple(_sent(pooled, device) for _, pooled in found if pooled is not None)
            if self._include_pooled
            else (),
            stages=tuple({} for _ in found),
        )

    def _rows(
        self, m: int, images: Tensor, index: NDArray[np.int64], view: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """Logits [B, C] and pooled features [B, D] or None of teacher m, missing ones computed and stored."""
        logits, pooled, present = self._look_up(m, index, view)
        missing = np.flatnonzero(~present)
        self.hits += len(index) - len(missing)
        self.misses += len(missing)
        if len(missing):
            # An image may occur twice in a batch; computed once, both get what the table gets.
            rows = index[missing] * self._num_views + view[missing]
            _, first, inverse = np.unique(rows, return_index=True, return_inverse=True)
            once = missing[first]
            new_logits, new_pooled = self._compute(m, images, once)
            self._store(m, index[once], view[once], new_logits, new_pooled)
            logits[missing] = new_logits[inverse]
            if pooled is not None and new_pooled is not None:
                pooled[missing] = new_pooled[inverse]
        return logits, pooled

    def _look_up(
        self, m: int, index: NDArray[np.int64], view: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32] | None, NDArray[np.bool_]]:
        table = self._tables[m]
        if table is not None:
            try:
                return table.read(index, view)
            except OSError as error:
                self._tables[m] = None
                self._warn_disk(error)
        B, D = len(index), self._widths[m]
        logits = np.empty((B, self._ensemble.num_classes), dtype=np.float32)
        pooled = np.empty((B, D), dtype=np.float32) if D else None
        return logits, pooled, np.zeros(B, dtype=np.bool_)

    def _compute(
        self, m: int, images: Tensor, chosen: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """Passes the chosen images through teacher m alone; returns values as a table would hold them."""
        images = _arranged(images[torch.from_numpy(chosen).to(images.device)], self._channels_last)
        member = cast("StagedNetwork", self._ensemble.members[m])
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            output = member.outputs(images)
        logits = to_float16(output.logits.float().cpu().numpy(), self._names[m]).astype(np.float32)
        if not self._widths[m]:
            return logits, None
        return logits, to_float16(output.pooled.float().cpu().numpy(), self._names[m]).astype(np.float32)

    def _store(
        self,
        m: int,
        index: NDArray[np.int64],
        view: NDArray[np.int64],
        logits: NDArray[np.float32],
        pooled: NDArray[np.float32] | None,
    ) -> None:
        table = self._tables[m]
        if table is None or not self._writable:
            return
        try:
            table.write(index, view, logits, pooled)
        except OSError as error:
            self._writable = False  # known rows are still read
            self._warn_disk(error)

    def _warn_disk(self, error: OSError) -> None:
        self._warn("disk", f"teacher tables in {self._folder} cannot be kept ({error}); teachers run live")

    def _warn(self, cause: str, message: str) -> None:
        """Warns once per cause."""
        if cause not in self._warned:
            self._warned.add(cause)
            warnings.warn(message, RuntimeWarning, stacklevel=3)


def _arranged(images: Tensor, channels_last: bool) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last) if channels_last else images


def _sent(values: NDArray[np.float32], device: torch.device) -> Tensor:
    tensor = torch.from_numpy(values)
    if device.type == "cuda":
        # From pinned memory the copy does not hold up the student's step.
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
