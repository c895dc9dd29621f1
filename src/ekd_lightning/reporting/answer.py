"""The answer in words: does EKD help, by how much, at what cost. Every number in it is computed from the runs."""

from __future__ import annotations

from dataclasses import dataclass

from ekd_lightning.reporting.blocks import Block
from ekd_lightning.reporting.comparison import Difference
from ekd_lightning.reporting.groups import Group

VERDICTS = ("ahead", "behind", "undecided", "not_enough")


@dataclass(frozen=True)
class Finding:
    """EKD against one other.

    Attributes:
        role: What the other is: `plain`, `plain_taught`, `equal_cost`, `branched_untaught`, `mean_teacher`, `best`.
        other: Its group.
        difference: EKD minus the other; None without a common seed.
        verdict: `ahead`, `behind`, `undecided` or `not_enough` (runs).
        sentence: The same in words.
    """

    role: str
    other: Group
    difference: Difference | None
    verdict: str
    sentence: str


@dataclass(frozen=True)
class Answer:
    """What a block says of EKD.

    Attributes:
        block: The block.
        subject: The group of EKD that is spoken of; None if the block has none that is done.
        headline: One sentence to lead with.
        findings: The comparisons, each a sentence.
        remarks: Further sentences: settings of EKD, costs, heterogeneity, too few runs.
    """

    block: Block
    subject: Group | None
    headline: str
    findings: tuple[Finding, ...]
    remarks: tuple[str, ...]
