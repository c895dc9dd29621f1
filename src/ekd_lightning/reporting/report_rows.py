"""A block as rows of numbers: what its tables, and summary.json, show of each group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ekd_lightning.evaluation.diversity import Spread
from ekd_lightning.reporting.blocks import Block
from ekd_lightning.reporting.estimates import Difference
from ekd_lightning.reporting.groups import Group, differences
from ekd_lightning.reporting.run_files import seed_spread

MEANS = (
    "test_nll",
    "test_ece",
    "test_brier",
    "test_mean_branch_accuracy",
    "test_gain_over_mean_branch",
    "test_disagreement",
    "train_accuracy",
    "corruption_mce",
    "num_parameters",
    "num_adapter_parameters",
    "macs",
    "train_seconds",
    "latency_ms_batch1",
)
"""Fields of which a row gives the mean over runs, where they have them."""


@dataclass(frozen=True)
class GroupRow:
    """One group and how it compares.

    Attributes:
        group: The group.
        differences: Its test accuracy minus that of each reference; None for the reference itself, and without a
            common seed.
    """

    group: Group
    differences: Mapping[str, Difference | None]
    spread: Spread | None = None
    """How much its runs differ from seed to seed; None unless two of them have their predictions."""


def rows(block: Block, references: Sequence[str]) -> list[GroupRow]:
    """The groups of a block against each reference that it has.

    Args:
        block: The block.
        references: Labels of groups of it.
    """
    found = {reference: differences(block.groups, reference) for reference in references}
    return [
        GroupRow(
            group,
            {reference: found[reference].get(group.label) for reference in references},
            seed_spread(group),
        )
        for group in block.groups
    ]


def record(row: GroupRow) -> dict[str, Any]:
    """A row as a flat record; accuracies in [0, 1], differences in [-1, 1], half widths of 95 % intervals."""
    group = row.group
    accuracy = group.accuracy
    found: dict[str, Any] = {
        "label": group.label,
        "method": group.method,
        "student": group.student,
        "num_branches": group.num_branches,
        "num_teachers": group.num_teachers,
        "n": group.n,
        "seeds": [int(run.get("seed")) for run in group.done],
        "test_accuracy": accuracy.mean if accuracy else None,
        "test_accuracy_std": accuracy.std if accuracy else None,
        "test_accuracy_interval": [accuracy.low, accuracy.high]
        if accuracy and accuracy.std is not None
        else None,
        "differences": {
            label: difference_record(one) for label, one in row.differences.items() if one is not None
        },
    }
    for key in MEANS:
        cell = group.values(key)
        if cell is not None:
            found[key] = cell.mean
    if row.spread is not None:
        found |= {"seed_variance": row.spread.variance, "seed_disagreement": row.spread.disagreement}
    states = [run.state for run in group.others]
    return found | {state: states.count(state) for state in ("failed", "partial", "running")}


def difference_record(difference: Difference) -> dict[str, Any]:
    """A difference as a record: mean, n, half width of its 95 % interval, p and the corrected p."""
    return {
        "mean": difference.mean,
        "n": difference.n,
        "half_width": difference.half,
        "p": difference.p,
        "p_holm": difference.p_holm,
    }
