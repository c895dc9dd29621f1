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

    The copy combines the kept branches as the student does. A gate keeps their scores, so the new weights are the
    student's gate weights rescaled to sum to 1; for a single branch the gate is dropped.

    Args:
        student: Does not change, and shares no weights with the copy.
        branches: Positions of the kept branches, 0 .. K-1, each at most once.

    Returns:
        The copy, with the student's device, floating-point type and mode.

    Raises:
        UserError: If `branches` is empty, or has a position that does not exist or occurs twice.
    """
    kept, count = list(branches), student.num_branches
    if not kept:
        raise UserError(f"branches=[] is not allowed; keep at least 1 of the branches 0 to {count - 1}")
    for k in kept:
        if isinstance(k, bool) or not isinstance(k, int) or not 0 <= k < count:
            raise UserError(f"branches={kept}: the student has branches 0 to {count - 1}, not {k!r}")
    if len(set(kept)) < len(kept):
        raise UserError(f"branches={kept}: a branch is named twice; give each branch once")
    cut = copy.deepcopy(student)
    cut.branches = nn.ModuleList(cut.branches[k] for k in kept)
    if cut.gate is not None and len(kept) == 1:
        cut.gate, cut.ensemble = None, "mean_logits"
    elif cut.gate is not None:
        cut.gate.keep(kept)
    return cut


def fold_branches(student: BranchedStudent) -> BranchedStudent:
    """Copies a student whose branches are linear heads on the trunk, replacing them by a single head.

    All heads read the same pooled features h, so the mean of their logits equals the logits of one head: 1/K Σ (W_k h +
    b_k) = (1/K Σ W_k) h + 1/K Σ b_k. The means are computed in float64. The student does not change, and shares no
    weights with the copy, whose logits are equal within rounding.

    Raises:
        UserError: If the branches cannot be folded exactly: for another ensemble than `mean_logits`, branches with
            stages or a trained neck of their own, or heads that are not linear.
    """
    reason = _obstacle(student)
    if reason:
        raise UserError(f"this student's branches cannot be folded into one head: {reason}")
    folded = cut_branches(student, [0])
    heads = [branch.get_submodule("head").state_dict() for branch in student.branches]
    mean = {name: torch.stack([head[name] for head in heads]).double().mean(dim=0) for name in heads[0]}
    folded.branches[0].get_submodule("head").load_state_dict(mean)
    return folded


def _obstacle(student: BranchedStudent) -> str | None:
    """Returns the reason why branches cannot be folded; None if they can."""
    if student.ensemble != "mean_logits":
        return f"ensemble={student.ensemble} combines them non-linearly (mean_logits can be folded)"
    branch = student.branches[0]
    assert isinstance(branch, Branch)
    if branch.stages:
        last = student.stage_names[-1]
        return (
            f"with split_after={student.split_after} each has its own stages {', '.join(branch.stages)}, which are not "
            f"linear (split_after={last} can be folded)"
        )
    if branch.neck.state_dict():
        return f"each has its own trained layers between the last stage of {student.spec.name!r} and its head"
    return None if isinstance(branch.head, nn.Linear) else f"{student.spec.name!r} does not end with a linear head"
