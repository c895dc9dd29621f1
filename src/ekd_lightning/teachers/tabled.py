"""Teachers whose outputs are looked up in tables of known rows; only missing rows are computed."""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ekd_lightning.data.batch import Batch
from ekd_lightning.networks.outputs import NetworkOutput, TeacherOutput
from ekd_lightning.teachers.epoch_memo import EpochMemo
from ekd_lightning.teachers.frozen import TeacherFormat
from ekd_lightning.teachers.source import Asked, ImagesOf, LiveTeachers, Stages
from ekd_lightning.teachers.stage_tables import StageTables
from ekd_lightning.teachers.table import TableKey
from ekd_lightning.teachers.table_set import Rows, TableSet, Values

if TYPE_CHECKING:
    from ekd_lightning.data.views import ViewFamily
    from ekd_lightning.networks.teachers import TeacherEnsemble

log = logging.getLogger(__name__)

_BLOCK_CHUNKS = 32  # rows of an epoch are looked up in blocks of this many chunks, which bounds the memory
_WORTH_A_LINE = 2.0  # seconds
_PROGRESS_EVERY = 20.0  # seconds


class TabledTeachers:
    """Looks teacher outputs up, computes only what is missing and keeps it for every later epoch and run.

    What is returned has always been rounded to float16, freshly computed or not, so that a cold and a warm
    run see the same targets. Only for batches whose images are exactly the views that they name: nothing may
    change or mix the images afterwards. Trouble with the disk costs one warning, then teachers run live.

    Attributes:
        hits: Rows found so far, counted per teacher and image.
        misses: Rows computed so far, likewise.
        seconds: Time spent on preparing epochs so far: looking up, computing and keeping.
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
        keep_stages: Sequence[str] = (),
        image_size: int = 32,
        how: TeacherFormat | None = None,
    ) -> None:
        """Opens, or creates, one table per teacher.

        Args:
            ensemble: The frozen teachers; on the batches' device.
            folder: Where the tables live.
            image_set_sha256: Hash of the whole image set.
            num_images: Images in the whole set; `batch.index` lies in 0..num_images-1.
            views: The view family that `batch.view` refers to.
            include_pooled: Whether pooled features are stored and returned. If not, `TeacherOutput.pooled`
                is the empty tuple.
            keep_stages: Stages whose outputs are kept too; others are computed anew whenever they are asked for.
            image_size: Height and width of the images; only stages depend on it.
            how: How the teachers compute; tables of another numeric format are not used.
        """
        self.hits = 0
        self.misses = 0
        self.seconds = 0.0
        self._ensemble = ensemble
        self._live = LiveTeachers(ensemble, how)
        self._folder = Path(folder)
        self._num_images, self._num_views = num_images, views.num_views
        self._include_pooled = include_pooled
        self._warned = False
        self._prepared = False
        self._memo: EpochMemo | None = None
        keys = [
            TableKey(
                teacher_sha256=identity.sha256,
                image_set_sha256=image_set_sha256,
                num_images=num_images,
                view_key=views.key,
                num_views=views.num_views,
                num_classes=ensemble.num_classes,
                pooled_dim=width if include_pooled else 0,
                numeric_format=self._live.frozen().numeric_format,
            )
            for identity, width in zip(ensemble.identities, ensemble.num_features, strict=True)
        ]
        self._tables = TableSet(ensemble, self._folder, keys, on_trouble=self._warn_disk)
        self._stages: StageTables | None = None
        if keep_stages:
            self._stages = StageTables(
                ensemble,
                folder,
                keys,
                keep_stages,
                image_size,
                live=self._live,
                on_computed=self._keep_computed,
                on_trouble=self._warn_disk,
            )

    @property
    def hit_rate(self) -> float | None:
        """Share of the rows asked for that were found, in [0, 1]; None before the first batch."""
        asked = self.hits + self.misses
        return self.hits / asked if asked else None

    @property
    def keeping(self) -> bool:
        """Whether new rows are kept: no table was lost, and the disk takes what is written."""
        return self._tables.keeping

    def keeps_stages(self, stages: Sequence[str]) -> bool:
        """Whether answers with the outputs of these stages come from tables; without stages they always do."""
        return not stages or (self._stages is not None and set(stages) <= set(self._stages.stages))

    def disk_bytes(self) -> int:
        """Bytes that the tables take on disk now."""
        stages = 0 if self._stages is None else self._stages.disk_bytes()
        return stages + self._tables.disk_bytes()

    def plan(self, rows: int) -> None:
        """Says how many images the run will probably ask about; see `FrozenTeachers.plan`."""
        self._live.plan(rows)

    def prepare_epoch(self, index: Tensor, view: Tensor, images_of: ImagesOf, asked: Asked) -> None:
        """Completes the tables for all rows of an epoch and holds these ready on the device.

        Missing rows are computed in large batches, all of one size. Until the next call, only batches made of
        these rows may be asked for. Nothing is looked up where all that is asked for comes from live teachers.

        Args:
            index: int64 [N], the images of this process in the epoch, each once.
            view: int64 [N], their views.
            images_of: Makes images [B, 3, H, W] in [0, 1] on the device from index and view.
            asked: The stages that will be asked for, with how many of the images.

        Raises:
            UserError: A teacher's output is not finite.
        """
        self._prepared = True
        self.misses += len(self._tables) * sum(
            images for stages, images in asked.items() if not self.keeps_stages(stages)
        )
        if not any(self.keeps_stages(stages) for stages in asked):
            return
        said = start = time.perf_counter()
        before = self.misses
        blocks = []
        for rows in torch.arange(len(index)).split(_BLOCK_CHUNKS * self._live.frozen().chunk):
            some_index, some_view = index[rows], view[rows]

            def chosen_images(
                chosen: Rows, some_index: Tensor = some_index, some_view: Tensor = some_view
            ) -> Tensor:
                return images_of(some_index[chosen], some_view[chosen])

            if self._stages is not None:
                self._stages.complete(some_index.numpy(), some_view.numpy(), chosen_images)
            blocks.append(self._complete(some_index.numpy(), some_view.numpy(), chosen_images))
            if time.perf_counter() - said > _PROGRESS_EVERY:
                said = time.perf_counter()
                log.info("teachers: %d of %d images of the epoch are ready", int(rows[-1]) + 1, len(index))
        teachers = range(len(self._tables))
        if self._memo is None or not self._memo.holds(len(index)):
            widths = self._ensemble.num_features if self._include_pooled else ()
            device = next(self._ensemble.parameters()).device
            shape = len(teachers), self._ensemble.num_classes
            self._memo = EpochMemo(len(index), self._num_images, shape, widths, device)
        self._memo.fill(
            index,
            view,
            [_joined(block[m][0] for block in blocks) for m in teachers],
            [_joined(block[m][1] for block in blocks) for m in teachers if self._include_pooled],
        )
        seconds = time.perf_counter() - start
        self.seconds += seconds
        if seconds > _WORTH_A_LINE and self.misses > before:
            log.info("teachers computed %d rows in %.0f s", self.misses - before, seconds)

    def captured(self, stages: Stages = ()) -> bool:
        """Whether `ask` only looks rows up on the device, or passes images through live teachers."""
        return self._memo is not None if not stages else not self.keeps_stages(stages)

    def ask(self, batch: Batch, stages: Stages = ()) -> TeacherOutput:
        """The outputs of all teachers for the batch, on its device.

        Args:
            batch: B images with their index and view.
            stages: Names of the stages whose outputs are wanted. Where they are not kept the teachers run live,
                and every row counts as a miss.

        Returns:
            Logits [M, B, C] in float32, rounded to float16; pooled features M x [B, D_m] likewise, or ().

        Raises:
            IndexError: An index or a view lies outside the image set or the view family.
            UserError: A teacher's output is not finite.
            ValueError: The images were mixed, so they are not the views that the batch names.
        """
        if batch.soft_labels is not None:
            raise ValueError("mixed images have no rows in teacher tables")
        if stages:
            return self._with_stages(batch, tuple(stages))
        if self._memo is not None:
            return self._memo.look_up(batch)
        index, view = torch.stack((batch.index, batch.view)).cpu().numpy()
        device = batch.images.device
        found = self._complete(index, view, lambda chosen: batch.images[torch.from_numpy(chosen).to(device)])
        return TeacherOutput(
            logits=torch.from_numpy(np.stack([logits for logits, _ in found])).to(device),
            pooled=tuple(torch.from_numpy(pooled).to(device) for _, pooled in found if pooled is not None)
            if self._include_pooled
            else (),
            stages=tuple({} for _ in found),
        )

    def _with_stages(self, batch: Batch, stages: tuple[str, ...]) -> TeacherOutput:
        """Outputs with stages: from their tables where these are kept, else from live teachers."""
        if self._stages is not None and self.keeps_stages(stages):
            kept = tuple({name: maps[name] for name in stages} for maps in self._stages(batch))
            return self.ask(batch)._replace(stages=kept)
        if not self._prepared:  # else `prepare_epoch` counted them: a captured step runs no Python
            self.misses += len(self._tables) * len(batch.index)
        output = self._live.ask(batch, stages)
        return output if self._include_pooled else output._replace(pooled=())

    def _keep_computed(self, m: int, index: Rows, view: Rows, output: NetworkOutput) -> None:
        """Keeps logits and pooled features that were computed along with stages."""
        if not self._tables.keeps(m):
            return  # they will be computed, and counted, again
        logits, pooled = self._tables.as_kept(m, output)
        # Rows that are there stay as they are: another graph may have rounded these otherwise.
        new = ~self._tables.read(m, index, view)[2]
        self._tables.write(m, index[new], view[new], logits[new], None if pooled is None else pooled[new])
        self.misses += len(index)
        self.hits -= len(index)  # the look-up that follows will find them

    def _complete(
        self, index: Rows, view: Rows, images_of: Callable[[Rows], Tensor]
    ) -> list[tuple[Values, Values | None]]:
        """Logits [B, C] and pooled features [B, D_m] or None of every teacher, missing ones computed and kept.

        `images_of` makes the images at some of the positions 0..B-1.
        """
        found = [self._tables.read(m, index, view) for m in range(len(self._tables))]
        present = np.stack([here for _, _, here in found])
        self.hits += int(present.sum())
        self.misses += int((~present).sum())
        missing = np.flatnonzero(~present.all(axis=0))
        # An image may occur twice in a batch; computed once, both get what the table gets.
        _, first, inverse = np.unique(
            index[missing] * self._num_views + view[missing], return_index=True, return_inverse=True
        )
        once = missing[first]
        chunk = self._live.frozen().chunk
        for start in range(0, len(once), chunk):
            chosen = once[start : start + chunk]
            images = images_of(chosen)
            for m, (logits, pooled, here) in enumerate(found):
                new = ~here[chosen]
                if new.any():
                    computed, features = self._compute(m, images)
                    rows = chosen[new]
                    logits[rows] = computed[new]
                    if pooled is not None and features is not None:
                        pooled[rows] = features[new]
                    kept = None if pooled is None else pooled[rows]
                    self._tables.write(m, index[rows], view[rows], logits[rows], kept)
        source = once[inverse]
        for logits, pooled, here in found:
            twice = ~here[missing] & (source != missing)
            logits[missing[twice]] = logits[source[twice]]
            if pooled is not None:
                pooled[missing[twice]] = pooled[source[twice]]
        return [(logits, pooled) for logits, pooled, _ in found]

    def _compute(self, m: int, images: Tensor) -> tuple[Values, Values | None]:
        """Passes images through teacher m; returns values as a table would hold them."""
        # One size whatever is missing: how many rows a killed run left must not change the rounding of others.
        teachers = self._live.frozen()
        return self._tables.as_kept(m, teachers.ask(m, images, teachers.chunk))

    def _warn_disk(self, error: OSError) -> None:
        """Warns, once."""
        if not self._warned:
            self._warned = True
            text = f"teacher tables in {self._folder} cannot be kept ({error}); teachers run live"
            warnings.warn(text, RuntimeWarning, stacklevel=3)


def _joined(parts: Iterable[Values | None]) -> NDArray[np.float16]:
    """The parts one below the other; they were rounded to float16 before, so nothing is lost."""
    return np.concatenate([part.astype(np.float16) for part in parts if part is not None])
