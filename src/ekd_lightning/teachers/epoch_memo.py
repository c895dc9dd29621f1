"""What the teachers say about all images of an epoch, on the device of the student.

Shape letters: B batch, C classes, D features, M teachers, N rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ekd_lightning.data.batch import Batch
from ekd_lightning.networks.outputs import TeacherOutput

_NOT_THERE = -1


class EpochMemo:
    """One row per image of the epoch: a step finds its rows on the device, without waiting for the host.

    A batch that holds other images or other views than the memo gets NaN for these, so that the loss says that
    something is wrong rather than a student learning from the wrong answer.
    """

    def __init__(
        self,
        num_rows: int,
        num_images: int,
        shape: tuple[int, int],
        widths: Sequence[int],
        device: torch.device,
    ) -> None:
        """Makes room for the rows; it stays where it is, so that a CUDA graph may read it.

        Args:
            num_rows: The most rows of an epoch.
            num_images: Images in the whole training set.
            shape: M and C.
            widths: D_m of each teacher; none without pooled features.
            device: Where batches are.
        """
        self._blank = num_rows  # the row of NaN
        M, C = shape
        self._row = torch.full((num_images,), num_rows, device=device)
        self._view = torch.full((num_rows + 1,), _NOT_THERE, device=device)
        self._logits = torch.full((M, num_rows + 1, C), torch.nan, dtype=torch.float16, device=device)
        self._pooled = [
            torch.full((num_rows + 1, width), torch.nan, dtype=torch.float16, device=device)
            for width in widths
        ]

    def holds(self, num_rows: int) -> bool:
        """Whether there is room for so many rows."""
        return num_rows <= self._blank

    def fill(
        self,
        index: Tensor,
        view: Tensor,
        logits: list[NDArray[np.float16]],
        pooled: list[NDArray[np.float16]],
    ) -> None:
        """Puts the rows of an epoch in place of those before.

        Args:
            index: int64 [N], distinct positions in the whole training set.
            view: int64 [N], the view of each.
            logits: M arrays [N, C].
            pooled: M arrays [N, D_m], or an empty list.
        """
        row = torch.full((len(self._row),), self._blank)
        row[index] = torch.arange(len(index))
        self._row.copy_(row)
        self._view[: len(index)] = view.to(self._view.device)
        self._logits[:, : len(index)] = torch.from_numpy(np.stack(logits)).to(self._logits.device)
        for place, values in zip(self._pooled, pooled, strict=True):
            place[: len(index)] = torch.from_numpy(values).to(place.device)

    def look_up(self, batch: Batch) -> TeacherOutput:
        """Logits [M, B, C] and pooled features M x [B, D_m] in float32; NaN for rows that are not there."""
        row = self._row[batch.index]
        row = torch.where(self._view[row] == batch.view, row, self._blank)
        return TeacherOutput(
            logits=self._logits[:, row].float(),
            pooled=tuple(values[row].float() for values in self._pooled),
            stages=tuple({} for _ in self._logits),
        )
