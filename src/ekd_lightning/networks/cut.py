"""A smaller student: some of the branches of a trained one, without training again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ekd_lightning.errors import UserError
from ekd_lightning.networks.student import BranchedStudent


def cut_branches(student: BranchedStudent, branches: Sequence[int]) -> BranchedStudent:
    """Copies a student with some of its branches, in the order given.

    Coupling is that of the student over the branches that stay. A gate keeps their scores, so its softmax is the
    student's gate weights, scaled to sum to 1 over these branches; where one branch stays its weight is 1 and the
    gate is left out.

    Args:
        student: Is not changed; no weight is shared with the copy.
        branches: Positions, 0 .. K-1, each at most once.

    Returns:
        The copy, on the student's device, in its floating-point type and its mode. The global random generator is
        not advanced.

    Raises:
        UserError: If no branch stays, or one is not there or is named twice.
    """
    kept = list(branches)
    _check(kept, student.num_branches)
    gated = student.gate is not None and len(kept) > 1
    with torch.random.fork_rng(devices=[]):
        copy = BranchedStudent(
            student.spec,
            branches=len(kept),
            split_after=student.split_after,
            ensemble="mean_logits" if student.gate is not None and not gated else student.ensemble,
        )
    first = next(student.parameters())
    copy.to(first.device, first.dtype)
    copy.load_state_dict(_kept_state(student.state_dict(), kept, gated), strict=True)
    return copy.train(student.training)


def _check(kept: list[int], count: int) -> None:
    if not kept:
        raise UserError("branches=[]: at least 1 branch must stay")
    for k in kept:
        if isinstance(k, bool) or not isinstance(k, int) or not 0 <= k < count:
            raise UserError(f"branches={kept}: the student has branches 0 to {count - 1}, not {k!r}")
    if len(set(kept)) < len(kept):
        raise UserError(f"branches={kept}: a branch is named twice")


def _kept_state(state: dict[str, Tensor], kept: list[int], gated: bool) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        part, _, rest = name.partition(".")
        if part == "branches":
            k, _, inner = rest.partition(".")
            if int(k) in kept:
                found[f"branches.{kept.index(int(k))}.{inner}"] = value
        elif part == "gate":
            if gated:  # one row a branch, but for the counter of batches
                found[name] = value[kept] if value.ndim else value
        else:
            found[name] = value
    return found
