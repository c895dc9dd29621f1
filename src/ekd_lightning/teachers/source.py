"""Where a training step gets its teachers' outputs: the interface, and the teachers themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ekd_lightning.data.loader import Batch
from ekd_lightning.networks.outputs import TeacherOutput
from ekd_lightning.networks.teachers import TeacherEnsemble
from ekd_lightning.teachers.frozen import FrozenTeachers, TeacherFormat

Stages = tuple[str, ...]
ImagesOf = Callable[[Tensor, Tensor], Tensor]
Asked = Mapping[Stages, int]


class TeacherSource(Protocol):
    """Where the teachers' outputs for a batch come from.

    Attributes:
        hits: Rows found in a table so far, counted per teacher and image.
        misses: Rows computed so far, likewise.
        seconds: Time spent on preparing epochs so far.
    """

    hits: int
    misses: int
    seconds: float

    def plan(self, rows: int) -> None:
        """Hears how many images the run will probably ask about."""
        ...

    def prepare_epoch(self, index: Tensor, view: Tensor, images_of: ImagesOf, asked: Asked) -> None:
        """Hears what the next epoch's batches hold, so that the answers can be ready.

        Args:
            index: int64 [N], the images of this process in the epoch, each once.
            view: int64 [N], their views.
            images_of: Makes images [B, 3, H, W] in [0, 1] on the device from index and view.
            asked: The stages that will be asked for, with how many of the N images; () stands for logits and
                pooled features alone.
        """
        ...

    def ask(self, batch: Batch, stages: Stages = ()) -> TeacherOutput:
        """Returns the outputs of all teachers for the batch."""
        ...

    def flush(self) -> None:
        """Waits until all that was computed so far is kept."""
        ...

    def captured(self, stages: Stages = ()) -> bool:
        """Whether `ask` with these stages may be recorded in a CUDA graph and replayed for other batches.

        It is then made of tensor operations on the device alone, whose shapes do not depend on values, and all that
        it reads stays where it is: what `prepare_epoch` changes, it changes in place. Holds from `prepare_epoch`
        on, after the first `ask` of a kind.
        """
        ...


class LiveTeachers:
    """Passes every batch through every teacher.

    Attributes:
        hits: Always 0.
        misses: Always 0; nothing is looked up.
        seconds: Always 0; nothing is prepared.
        hit_rate: Always None.
    """

    hits = 0
    misses = 0
    seconds = 0.0
    hit_rate: float | None = None

    def __init__(self, ensemble: TeacherEnsemble, how: TeacherFormat | None = None) -> None:
        """Takes the teachers as they are; what they compute in is decided when they are first asked.

        Args:
            ensemble: The frozen teachers; on the batches' device when they are asked.
            how: Their format.
        """
        self._ensemble, self._how = ensemble, how
        self._frozen: dict[tuple[str, ...], FrozenTeachers] = {}
        self._planned_rows = 0

    def plan(self, rows: int) -> None:
        """Says how many images the run will probably ask about; see `FrozenTeachers.plan`."""
        self._planned_rows = rows

    def prepare_epoch(self, index: Tensor, view: Tensor, images_of: ImagesOf, asked: Asked) -> None:
        """Does nothing: every batch is asked about when it comes."""

    def flush(self) -> None:
        """Does nothing: nothing is kept."""

    def captured(self, stages: Stages = ()) -> bool:
        """Always: a forward pass is all there is."""
        return True

    def ask(self, batch: Batch, stages: Sequence[str] = ()) -> TeacherOutput:
        """The outputs of all teachers for the batch, on its device.

        Args:
            batch: B images.
            stages: Names of the stages whose outputs are wanted.

        Returns:
            Logits [M, B, C], pooled features M x [B, D_m] and the wanted stages, in float32.

        Raises:
            UserError: A teacher lacks a stage.
        """
        teachers = self.frozen(tuple(stages))
        results = [teachers.ask(m, batch.images) for m in range(self._ensemble.num_teachers)]
        return TeacherOutput(
            logits=torch.stack([result.logits for result in results]),
            pooled=tuple(result.pooled for result in results),
            stages=tuple({name: result.stages[name] for name in stages} for result in results),
        )

    def frozen(self, stages: tuple[str, ...] = ()) -> FrozenTeachers:
        """The frozen copies that return these stages, made when first asked for."""
        if stages not in self._frozen:
            self._frozen[stages] = FrozenTeachers(self._ensemble, self._how, stages)
        self._frozen[stages].plan(self._planned_rows)
        return self._frozen[stages]
