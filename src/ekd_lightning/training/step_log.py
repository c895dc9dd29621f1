"""Values of every training step, kept on the device and read once per epoch."""

from __future__ import annotations

import torch
from torch import Tensor


class StepLog:
    """Named scalars of the steps of one epoch.

    Appending never synchronises with an accelerator; reading does, once.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self._rows: list[Tensor] = []

    def append(self, values: list[Tensor]) -> None:
        """Adds one step: a scalar tensor per name, without gradient."""
        self._rows.append(torch.stack([value.detach().float() for value in values]))

    def means(self) -> dict[str, Tensor]:
        """Mean over the steps so far, as scalar tensors on the device; empty without steps."""
        if not self._rows:
            return {}
        return dict(zip(self.names, torch.stack(self._rows).mean(dim=0).unbind(), strict=True))

    def first_non_finite(self) -> tuple[int, str, float] | None:
        """Looks for the first value that is not finite.

        The first name is that of the total: it is to blame only if everything else in its step is finite.

        Returns:
            (step within the epoch, name, value), or None when all are finite.
        """
        if not self._rows:
            return None
        table = torch.stack(self._rows)
        bad = (~torch.isfinite(table)).nonzero()
        if len(bad) == 0:
            return None
        row = int(bad[0, 0])
        columns = bad[bad[:, 0] == row, 1].tolist()
        column = columns[1] if columns[0] == 0 and len(columns) > 1 else columns[0]
        return row, self.names[column], float(table[row, column])

    def last_is_finite(self) -> bool:
        """Whether the newest step is finite; cheap on a CPU, a synchronisation elsewhere."""
        return bool(torch.isfinite(self._rows[-1]).all())

    def clear(self) -> None:
        """Forgets all steps."""
        self._rows.clear()
