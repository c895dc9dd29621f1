"""Source of teacher outputs: the interface that a step uses, and the frozen teachers.

Shape letters: B batch, C classes, D features, M teachers, N images of an epoch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ekd_lightning.data.loader import Batch
from ekd_lightning.evaluation.efficiency import count_macs
from ekd_lightning.networks.frozen import FrozenNetwork
from ekd_lightning.networks.staged import NetworkOutput, TeacherOutput
from ekd_lightning.networks.teachers import TeacherEnsemble
from ekd_lightning.teachers.hardware import compiled_or_not, teacher_dtype

log = logging.getLogger(__name__)

Stages = tuple[str, ...]
ImagesOf = Callable[[Tensor, Tensor], Tensor]
StageCounts = Mapping[Stages, int]


class TeacherSource:
    """Source of the teachers' outputs for a batch. This base prepares nothing and stores nothing.

    Attributes:
        hits: Rows found in a table so far, counted per teacher and image.
        misses: Rows computed so far, likewise.
        seconds: Seconds spent on preparing epochs so far.
    """

    hits = 0
    misses = 0
    seconds = 0.0

    @property
    def hit_rate(self) -> float | None:
        """Share of the requested rows that were found, in [0, 1]; None before the first look-up."""
        requested = self.hits + self.misses
        return self.hits / requested if requested else None

    @property
    def held_bytes(self) -> int:
        """Bytes of device memory that stored outputs take."""
        return 0

    def plan(self, rows: int, repeats: bool = False) -> None:
        """Announces how many images the run will probably process, each counted every time.

        `repeats` says whether an epoch, in this or another process, may need more than one view of an image.
        """

    def prepare_epoch(self, index: Tensor, view: Tensor, images_of: ImagesOf, counts: StageCounts) -> None:
        """Announces the rows of the next epoch, so that outputs can be prepared.

        Args:
            index: int64 [N], the images of this process in the epoch; no pair of image and view occurs twice.
            view: int64 [N], the view of each.
            images_of: Makes images [B, 3, H, W] in [0, 1] on the device from index and view.
            counts: For each tuple of stages that will be needed, the number of images that need it; () stands for
                logits and pooled features alone.
        """

    def prefetch_epoch(self, index: Tensor, view: Tensor, counts: StageCounts) -> None:
        """Announces the rows of the epoch after the prepared one, so that they can be read in advance.

        The arguments are those of `prepare_epoch`, which is still called for that epoch.
        """

    def outputs(self, batch: Batch, stages: Stages = ()) -> TeacherOutput:
        """Returns the outputs of all teachers for the batch.

        Args:
            batch: B images.
            stages: Names of the stages whose outputs are needed.

        Returns:
            On the batch's device, in float32: logits [M, B, C], pooled features M x [B, D_m], the needed stages.

        Raises:
            UserError: If a teacher lacks a stage.
        """
        raise NotImplementedError

    def flush(self) -> None:
        """Waits until everything computed so far is stored."""

    def captured(self, stages: Stages = ()) -> bool:
        """Whether `outputs` with these stages may be recorded in a CUDA graph and replayed for other batches.

        If so, it consists of tensor operations on the device whose shapes do not depend on values, and reads buffers
        that `prepare_epoch` changes only in place. The answer holds after `prepare_epoch` and the first `outputs` with
        these stages.
        """
        return True


CHUNK = {"cpu": 128, "cuda": 1024}
"""Images per forward pass when rows are computed in advance: enough to keep the device busy."""

COMPILE_MACS = {"cpu": 5e12, "cuda": 5e14}
"""Multiply-accumulates of one teacher in a run from which compiling pays. On two cores, compiling takes 5 to 40 s, and
saves about as much of 5e12 multiply-accumulates. The number for CUDA is an estimate."""


@dataclass(frozen=True)
class TeacherFormat:
    """Numeric form of frozen teachers; it changes their cost, and their outputs only within rounding.

    Attributes:
        precision: "auto" (bfloat16 where the hardware has it), "float32" or "bfloat16".
        fold: Whether batch norms are folded into convolutions.
        compile: "auto" (in long runs), "always" or "never".
        channels_last: Whether networks and images are in channels-last format.
    """

    precision: str = "auto"
    fold: bool = True
    compile: str = "auto"
    channels_last: bool = True


class FrozenTeachers:
    """The members of an ensemble as frozen copies on its device, which return the outputs of some stages.

    Attributes:
        numeric_format: "float32" or "bfloat16"; part of the key of a table.
        chunk: Preferred number of images in a batch.
        planned_rows: Number of images that each teacher will probably process in the whole run. It decides about
            compiling, so it must not depend on how far the run is: a resumed run has to go on with the same rounding.

    Raises:
        UserError: If a teacher lacks a stage.
    """

    def __init__(self, ensemble: TeacherEnsemble, how: TeacherFormat | None = None, stages: Sequence[str] = ()) -> None:
        how = how or TeacherFormat()
        ensemble.check_stages(stages)
        device = ensemble.device
        dtype = teacher_dtype(how.precision, device.type)
        self.numeric_format = str(dtype).removeprefix("torch.")
        self.chunk = CHUNK.get(device.type, 128)
        self._names = [identity.id for identity in ensemble.identities]
        form = partial(FrozenNetwork, dtype=dtype, fold=how.fold, channels_last=how.channels_last, stage_names=stages)
        self._frozen = [form(network).to(device) for network in ensemble.members]
        self._choice = how.compile
        self._from_macs = COMPILE_MACS.get(device.type, float("inf"))
        self._macs: dict[int, int] = {}
        self._compiled: dict[int, tuple[int, Callable[[Tensor], tuple[Tensor, ...]]]] = {}
        self.planned_rows = 0

    def outputs(self, m: int, images: Tensor, batch_size: int | None = None) -> NetworkOutput:
        """Returns the outputs of teacher m for images [B, 3, H, W], without gradient and outside autocast, in float32.

        `batch_size` is the size to compile for, if it is compiled; None for the size of the first batch.
        """
        frozen = self._frozen[m]
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            if m not in self._compiled and self._wants_compiling(m, images.shape[-2:]):
                log.info("compiling teacher %s", self._names[m])
                # Freezing makes constants of the weights, in the layout of the kernels.
                compiled = compiled_or_not(frozen.traced(), options={"freezing": True})
                self._compiled[m] = batch_size or len(images), compiled
            if m not in self._compiled:
                return frozen.named(frozen(images))
            size, compiled = self._compiled[m]
            parts = [compiled(_filled(part, size)) for part in images.split(size)]
            results = tuple(torch.cat(pieces)[: len(images)] for pieces in zip(*parts, strict=True))
        return frozen.named(results)

    def _wants_compiling(self, m: int, image_size: Sequence[int]) -> bool:
        if self._choice != "auto":
            return self._choice == "always"
        if m not in self._macs:
            self._macs[m] = count_macs(self._frozen[m], image_size)
        return self._macs[m] * self.planned_rows >= self._from_macs


def _filled(images: Tensor, size: int) -> Tensor:
    """Pads the images to `size` with the last one: a graph is compiled for one batch size."""
    missing = size - len(images)
    return images if missing == 0 else torch.cat([images, images[-1:].expand(missing, -1, -1, -1)])


class LiveTeachers(TeacherSource):
    """A source that runs every teacher on every batch. It has no table, so it counts neither hits nor misses.

    Frozen copies are made on first use; the ensemble must then be on the batches' device.
    """

    def __init__(self, ensemble: TeacherEnsemble, how: TeacherFormat | None = None) -> None:
        self._ensemble, self._how = ensemble, how
        self._frozen: dict[Stages, FrozenTeachers] = {}
        self._planned_rows = 0

    def plan(self, rows: int, repeats: bool = False) -> None:
        """See `FrozenTeachers.planned_rows`."""
        self._planned_rows = rows

    def outputs(self, batch: Batch, stages: Stages = ()) -> TeacherOutput:
        """See `TeacherSource`."""
        teachers = self.frozen(tuple(stages))
        results = [teachers.outputs(m, batch.images) for m in range(self._ensemble.num_teachers)]
        return TeacherOutput.of(results, stages)

    def frozen(self, stages: Stages = ()) -> FrozenTeachers:
        """Returns the frozen copies with these stages, made on first use."""
        if stages not in self._frozen:
            self._frozen[stages] = FrozenTeachers(self._ensemble, self._how, stages)
        self._frozen[stages].planned_rows = self._planned_rows
        return self._frozen[stages]
