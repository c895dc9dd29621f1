"""What the teachers say about all images of an epoch, on the device of the student.

Shape letters: B batch, C classes, D features, M teachers, N rows.
"""

from __future__ import annotations

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
        index: Tensor,
        view: Tensor,
        logits: list[NDArray[np.float16]],
        pooled: list[NDArray[np.float16]],
        *,
        num_images: int,
        device: torch.device,
    ) -> None:
        """Moves the rows to the device.

        Args:
            index: int64 [N], distinct positions in the whole training set.
            view: int64 [N], the view of each.
            logits: M arrays [N, C].
            pooled: M arrays [N, D_m], or an empty list.
            num_images: Images in the whole training set.
            device: Where batches are.
        """
        self._row = torch.full((num_images,), len(index))
        self._row[index] = torch.arange(len(index))
        self._row = self._row.to(device)
        self._view = torch.cat([view, torch.tensor([_NOT_THERE])]).to(device)
        self._logits = torch.stack([_with_blank(values) for values in logits]).to(device)
        self._pooled = [_with_blank(values).to(device) for values in pooled]

    def look_up(self, batch: Batch) -> TeacherOutput:
        """Logits [M, B, C] and pooled features M x [B, D_m] in float32; NaN for rows that are not there."""
        row = self._row[batch.index]
        row = torch.where(self._view[row] == batch.view, row, len(self._view) - 1)
        return TeacherOutput(
            logits=self._logits[:, row].float(),
            pooled=tuple(values[row].float() for values in self._pooled),
            stages=tuple({} for _ in self._logits),
        )


def _with_blank(values: NDArray[np.float16]) -> Tensor:
    """The rows, and one more of NaN."""
    return torch.cat([torch.from_numpy(values), torch.full((1, values.shape[1]), torch.nan).half()])
