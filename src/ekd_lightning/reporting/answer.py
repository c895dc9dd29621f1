"""Answer in words: does EKD help, by how much, at what cost. Every number in it is computed from the runs.

EKD is compared, by seed, with those that a claim about it has to stand up to. A verdict needs a p value below
0.05 after Holm's correction: over the named controls of the block for these, over all other methods for the best of
them, which is picked by its result.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ekd_lightning.reporting import answer_remarks, answer_words
from ekd_lightning.reporting.blocks import Block
from ekd_lightning.reporting.estimates import SIGNIFICANCE, Difference, paired_by_seed
from ekd_lightning.reporting.groups import Group, branched

VERDICTS = ("ahead", "behind", "undecided", "not_enough")
SAME_COST = 0.05
"""MACs within this share are equal cost."""
_ACCURACY = "test_accuracy"


@dataclass(frozen=True)
class Finding:
    """EKD against one other.

    Attributes:
        role: What the other is: one of `answer_words.ROLES`.
        other: Its group.
        difference: EKD minus the other; None without a common seed. `p_holm` is corrected over the named controls,
            that of `best` over all other methods.
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
        headline: One or two sentences to lead with.
        findings: The comparisons, each a sentence.
        remarks: Further sentences: settings of EKD, costs, heterogeneity, missing controls, too few runs.
    """

    block: Block
    subject: Group | None
    headline: str
    findings: tuple[Finding, ...] = ()
    remarks: tuple[str, ...] = ()


def answers(blocks: Sequence[Block]) -> list[Answer]:
    """The answer of each block in which a run is done."""
    return [answer(block) for block in blocks if block.done]


def answer(block: Block) -> Answer:
    """The answer of a block."""
    subject = spoken_of(block)
    if subject is None:
        return Answer(block, None, answer_words.headline(block.title, None, {}))
    controls = {role: other for role, pick in _CONTROLS.items() if (other := pick(block, subject))}
    findings = _findings(subject, controls)
    best, above = _against_best(block, subject)
    if best is not None:
        findings.append(best)
    verdicts = {v: [f.role for f in findings if f.verdict == v] for v in VERDICTS}
    headline = answer_words.headline(block.title, subject, verdicts, above)
    remarks = answer_remarks.remarks(block, subject, controls, [f.difference for f in findings])
    return Answer(block, subject, headline, tuple(findings), tuple(remarks))


def lead(found: Sequence[Answer]) -> str:
    """What all blocks together say; the headline if there is one block."""
    if len(found) == 1:
        return found[0].headline
    counts: dict[str, Counter[str]] = {role: Counter() for role in answer_words.ROLES}
    for one in found:
        for finding in one.findings:
            counts[finding.role][finding.verdict] += 1
    return answer_words.lead({role: count for role, count in counts.items() if count}, len(found))


def spoken_of(block: Block) -> Group | None:
    """The group of EKD that is compared: of the student that most of them have, the strongest.

    With one branch EKD is plain distillation, so that speaks for it only where there is nothing else.
    """
    own = branched([group for group in block.done if group.method == "ekd"])
    if not own:
        return None
    students = Counter(group.student for group in own)
    most = max(students.values())
    usual = min((g for g in own if students[g.student] == most), key=lambda g: (g.mean("macs") or 0.0, g.label)).student
    return strongest([group for group in own if group.student == usual])


def strongest(groups: Sequence[Group]) -> Group | None:
    """The group with the highest validation accuracy; the test set has no part in it. None without groups.

    Groups with a single run are left aside where others have more.
    """
    several = [group for group in groups if group.n > 1]
    return max(several or groups, key=lambda group: group.mean("val_accuracy") or -1.0, default=None)


def _control(method: str, *, branched: bool = False) -> Callable[[Block, Group], Group | None]:
    """Picks the strongest group of a method with EKD's student: plain, or branched as EKD's is."""

    def pick(block: Block, subject: Group) -> Group | None:
        shape = _shape(subject) if branched else (1, None)
        alike = [
            group
            for group in block.done
            if group.method == method and _shape(group) == shape and _network(group) == _network(subject)
        ]
        taught = [group for group in alike if group.taught_by == subject.taught_by]
        return strongest(taught or alike)

    return pick


def _shape(group: Group) -> tuple[int | None, str | None]:
    return group.num_branches, group.only("split_after")


def _network(group: Group) -> tuple[str | None, str]:
    """The student's network with its options, e.g. its width."""
    return group.student, repr(sorted((group.runs[0].setting("student.options") or {}).items()))


def _equal_cost(block: Block, subject: Group) -> Group | None:
    """The strongest plain student with teachers whose MACs are those of EKD's."""
    cost = subject.mean("macs")
    if not cost:
        return None
    return strongest(
        [
            group
            for group in block.done
            if group.num_branches == 1
            and group.taught_by
            and group.method != "ekd"
            and abs((group.mean("macs") or 0.0) / cost - 1) <= SAME_COST
        ]
    )


def _same_features(block: Block, subject: Group) -> Group | None:
    """The plain student that imitates the teachers' features, where EKD's branches do."""
    return _control("kd_mean_feature")(block, subject) if subject.only("weight_feature_branch") else None


_CONTROLS: dict[str, Callable[[Block, Group], Group | None]] = {
    "plain": _control("ce"),
    "plain_taught": _control("kd_mean"),
    "same_features": _same_features,
    "equal_cost": _equal_cost,
    "branched_untaught": _control("branched_ce", branched=True),
    "mean_teacher": _control("ekd_mean", branched=True),
}


def _findings(subject: Group, controls: dict[str, Group]) -> list[Finding]:
    found = _minus({other.label: other for other in controls.values()}, subject)
    count = sum(difference.std is not None for difference in found.values())
    return [
        _finding(role, other, subject, found.get(other.label), answer_words.name(other, role), count)
        for role, other in controls.items()
    ]


def _against_best(block: Block, subject: Group) -> tuple[Finding | None, list[Group]]:
    """Against the highest test accuracy of the others; its p value is corrected for having been picked.

    Returns:
        The comparison, and the others that have not enough runs to be compared, but a higher test accuracy.
    """
    cost = subject.mean("macs")
    others = {
        group.label: group
        for group in block.done
        if not group.method.startswith("ekd") and (not cost or (group.mean("macs") or 0.0) <= cost * (1 + SAME_COST))
    }
    if not others:
        return None, []
    found = _minus(others, subject)
    tested = [label for label, difference in found.items() if difference.std is not None]
    picked = tested or list(others)
    best = max((others[label] for label in picked), key=lambda group: group.mean(_ACCURACY) or 0.0)
    reached = best.mean(_ACCURACY) or 0.0
    above = [g for g in others.values() if g.label not in picked and (g.mean(_ACCURACY) or 0.0) > reached]
    called = answer_words.best_of(best, len(picked), left=len(others) - len(picked))
    return _finding("best", best, subject, found.get(best.label), called, len(tested)), above


def _minus(others: dict[str, Group], subject: Group) -> dict[str, Difference]:
    """EKD minus each of the others, by the others' labels."""
    negative = {label: {s: -v for s, v in other.by_seed(_ACCURACY).items()} for label, other in others.items()}
    ours = {seed: -value for seed, value in subject.by_seed(_ACCURACY).items()}
    return paired_by_seed({**negative, "": ours}, "")


def _finding(
    role: str, other: Group, subject: Group, difference: Difference | None, called: str, compared: int
) -> Finding:
    ours, theirs = subject.by_seed(_ACCURACY), other.by_seed(_ACCURACY)
    common = sorted(ours.keys() & theirs.keys())
    means = (
        (statistics.fmean(ours[s] for s in common), statistics.fmean(theirs[s] for s in common))
        if common
        else (0.0, 0.0)
    )
    verdict = judge(difference)
    sentence = answer_words.comparison(verdict, called, difference, means, compared)
    return Finding(role, other, difference, verdict, sentence)


def judge(difference: Difference | None) -> str:
    """What a difference, EKD minus another, says: one of `VERDICTS`."""
    if difference is None or difference.p is None:  # too few, or without any spread
        return "not_enough"
    p = difference.p_holm if difference.p_holm is not None else difference.p
    if p >= SIGNIFICANCE:
        return "undecided"
    return "ahead" if difference.mean > 0 else "behind"
