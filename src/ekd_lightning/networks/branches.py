"""Smaller copies of trained students: with some of the branches, or with the branches folded into one head.

Shape letters: B batch, C classes, D features, K branches.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn

from ekd_lightning.errors import UserError
from ekd_lightning.networks.student import Branch, BranchedStudent


def cut_branches(student: BranchedStudent, branches: Sequence[int]) -> BranchedStudent:
    """Copies a student with some of its branches, in the order given.

    Coupling is that of the student over the branches that stay. A gate keeps their scores, so its softmax is the
    student's gate weights, scaled to sum to 1 over these branches; where one branch stays its weight is 1 and the
    gate is left out.

    Args:
        student: Is not changed; no weight is shared with the copy.
        branches: Positions, 0 .. K-1, each at most once.

    Returns:
        The copy, on the student's device, in its floating-point type and its mode.

    Raises:
        UserError: If no branch stays, or one is not there or is named twice.
    """
    kept = list(branches)
    _check_kept(kept, student.num_branches)
    cut = copy.deepcopy(student)
    cut.branches = nn.ModuleList(cut.branches[k] for k in kept)
    if cut.gate is not None and len(kept) == 1:
        cut.gate, cut.ensemble = None, "mean_logits"
    elif cut.gate is not None:
        cut.gate.keep(kept)
    return cut


def _check_kept(kept: list[int], count: int) -> None:
    if not kept:
        raise UserError("branches=[]: at least 1 branch must stay")
    for k in kept:
        if isinstance(k, bool) or not isinstance(k, int) or not 0 <= k < count:
            raise UserError(f"branches={kept}: the student has branches 0 to {count - 1}, not {k!r}")
    if len(set(kept)) < len(kept):
        raise UserError(f"branches={kept}: a branch is named twice")


def fold_branches(student: BranchedStudent) -> BranchedStudent:
    """Copies a student whose branches are linear heads on the trunk, with one head in their place.

    All heads see the same pooled features h, so that the mean of their logits is that of one head:
    1/K Σ (W_k h + b_k) = (1/K Σ W_k) h + 1/K Σ b_k. The K branches then cost nothing. The mean is taken in float64.

    Args:
        student: Is not changed; no weight is shared with the copy.

    Returns:
        The copy, with one branch and the same logits within rounding.

    Raises:
        UserError: If the branches do not fold exactly, with the reason: another coupling than `mean_logits`, stages or
            a neck of their own, or no linear head.
    """
    reason = _obstacle(student)
    if reason:
        raise UserError(f"this student's branches do not fold into one head: {reason}")
    folded = cut_branches(student, [0])
    heads = [branch.get_submodule("head").state_dict() for branch in student.branches]
    mean = {name: torch.stack([head[name] for head in heads]).double().mean(dim=0) for name in heads[0]}
    folded.branches[0].get_submodule("head").load_state_dict(mean)
    return folded


def _obstacle(student: BranchedStudent) -> str | None:
    """Why the path from the trunk to the coupled logits is not one linear head; None if it is."""
    if student.ensemble != "mean_logits":
        return f"ensemble={student.ensemble} couples them non-linearly (mean_logits folds)"
    branch = student.branches[0]
    assert isinstance(branch, Branch)
    if branch.stages:
        last = student.stage_names[-1]
        return (
            f"split_after={student.split_after} leaves each the stages {', '.join(branch.stages)}, which are not "
            f"linear (split_after={last} folds)"
        )
    if branch.neck.state_dict():
        return f"each has layers of its own between the last stage of {student.spec.name!r} and its head"
    return None if isinstance(branch.head, nn.Linear) else f"{student.spec.name!r} does not end with a linear head"
