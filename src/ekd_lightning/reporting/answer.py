"""Answer in words: does EKD help, by how much, at what cost. Every number in it is computed from the runs.

EKD is compared, by seed, with those that a claim about it has to stand up to. A verdict needs a p value below
0.05 after Holm's correction: over the named controls of the block for these, over all other methods for the best of
them, which is picked by its result.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ekd_lightning.reporting.blocks import Block
from ekd_lightning.reporting.estimates import (
    SIGNIFICANCE,
    Difference,
    corrected,
    interval_words,
    listed,
    minus,
    p_text,
    plural,
    points,
    share,
)
from ekd_lightning.reporting.groups import Group, branched
from ekd_lightning.reporting.remarks import SUBJECT, remarks

ROLES = {
    "plain": "the plain student",
    "plain_taught": "the plain student taught by the mean of the teachers",
    "same_features": "the plain student that imitates the same features",
    "equal_cost": "the plain student of equal cost",
    "branched_untaught": "the branched student without teachers",
    "mean_teacher": "the branched student whose branches all imitate the mean teacher",
    "best": "the best other method",
}
"""What the others are, in the order in which they are spoken of."""
VERDICTS = {
    "ahead": ("beats", ""),
    "behind": ("loses to", "loses in"),
    "undecided": ("cannot be told apart from", "cannot be told apart in"),
    "not_enough": ("", "not enough runs in"),
}
"""What a comparison can come to, and how it is said of one other and of several blocks."""
SAME_COST = 0.05
"""MACs within this share are equal cost."""
_ACCURACY = "test_accuracy"


@dataclass(frozen=True)
class Finding:
    """EKD against one other.

    Attributes:
        role: What the other is: one of `ROLES`.
        other: Its group.
        difference: EKD minus the other; None without a common seed. `p_holm` is corrected over the named controls,
            that of `best` over all other methods.
        verdict: One of `VERDICTS`.
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
    if subject is None or subject.accuracy is None:
        return Answer(block, None, f"{block.title}: no run of {SUBJECT} is done, so nothing can be said of it.")
    controls = _controls(block, subject)
    found = _differences(subject, controls.values())
    findings = [
        _finding(role, other, subject, found, f"{ROLES[role]} ({other.label})") for role, other in controls.items()
    ]
    best, above = _against_best(block, subject)
    findings += [best] if best else []
    name = SUBJECT if subject.label == "ekd" else f"{SUBJECT} ({subject.label})"
    start = (
        f"{block.title}: {name} reaches {share(subject.accuracy.mean)} % test accuracy "
        f"(mean of n = {plural(subject.n, 'run')})"
    )
    said = remarks(block, subject, controls, [finding.difference for finding in findings])
    return Answer(block, subject, f"{start}{_verdicts(findings, above)}", tuple(findings), tuple(said))


def _verdicts(findings: Sequence[Finding], above: Sequence[Group]) -> str:
    """The end of a headline: what the comparisons came to."""
    roles = {verdict: [ROLES[f.role] for f in findings if f.verdict == verdict] for verdict in VERDICTS}
    missing = roles.pop("not_enough")
    told = [f"{VERDICTS[verdict][0]} {listed(names)}" for verdict, names in roles.items() if names]
    if not told:
        return f"; {'not enough runs' if missing else 'no run of another method is done'} to say whether it helps."
    text = f". It {'; it '.join(told)}."
    if missing:
        text += f" Not enough runs to compare it with {listed(missing)}."
    if above:
        names = listed([f"{one.label} ({share(one.mean(_ACCURACY) or 0.0)} %)" for one in above])
        has = "has" if len(above) == 1 else "have"
        text += f" {names} {has} a higher test accuracy than the best other method that was compared, but "
        text += "not enough runs."
    return text


def lead(found: Sequence[Answer]) -> str:
    """What all blocks together say; the headline if there is one block."""
    if len(found) == 1:
        return found[0].headline
    counts = Counter((finding.role, finding.verdict) for one in found for finding in one.findings)
    told = []
    for role, name in ROLES.items():
        total = sum(counts[role, verdict] for verdict in VERDICTS)
        rest = ", ".join(
            f"{words} {counts[role, verdict]}" for verdict, (_, words) in VERDICTS.items() if counts[role, verdict]
            and words
        )  # fmt: skip
        if total:
            told.append(f"{name} in {counts[role, 'ahead']} of {total}" + (f" ({rest})" if rest else ""))
    where = f"{plural(len(found), 'setting')} of data and protocol"
    if not told:
        return f"{where}, in none of which {SUBJECT} can be compared."
    return f"Over {where}, {SUBJECT} beats {'; '.join(told)}."


def spoken_of(block: Block) -> Group | None:
    """The group of EKD that is compared: of the student that most of them have, the strongest.

    With one branch EKD is plain distillation, so that speaks for it only where there is nothing else.
    """
    own = branched([group for group in block.done if group.method == "ekd"])
    if not own:
        return None
    students = Counter(group.student for group in own)
    usual = min(own, key=lambda group: (-students[group.student], group.mean("macs") or 0.0, group.label)).student
    return strongest([group for group in own if group.student == usual])


def strongest(groups: Sequence[Group]) -> Group | None:
    """The group with the highest validation accuracy; the test set has no part in it. None without groups.

    Groups with a single run are left aside where others have more.
    """
    several = [group for group in groups if group.n > 1]
    return max(several or groups, key=lambda group: group.mean("val_accuracy") or -1.0, default=None)


def _controls(block: Block, subject: Group) -> dict[str, Group]:
    """What EKD has to stand up to, by role: of each method the strongest group with EKD's student."""
    plain, own = (1, None), _shape(subject)
    features = subject.only("weight_feature_branch")
    found = {
        "plain": _control(block, subject, "ce", plain),
        "plain_taught": _control(block, subject, "kd_mean", plain),
        "same_features": _control(block, subject, "kd_mean_feature", plain) if features else None,
        "equal_cost": _equal_cost(block, subject),
        "branched_untaught": _control(block, subject, "branched_ce", own),
        "mean_teacher": _control(block, subject, "ekd_mean", own),
    }
    return {role: other for role, other in found.items() if other is not None}


def _control(block: Block, subject: Group, method: str, shape: tuple[int | None, str | None]) -> Group | None:
    alike = [
        group
        for group in block.done
        if group.method == method and _shape(group) == shape and _network(group) == _network(subject)
    ]
    taught = [group for group in alike if group.taught_by == subject.taught_by]
    return strongest(taught or alike)


def _shape(group: Group) -> tuple[int | None, str | None]:
    return group.num_branches, group.only("split_after")


def _network(group: Group) -> tuple[str | None, str]:
    """The student's network with its options, e.g. its width."""
    return group.student, repr(sorted((group.runs[0].setting("student.options") or {}).items()))


def _equal_cost(block: Block, subject: Group) -> Group | None:
    """The strongest plain student with teachers whose MACs are those of EKD's."""
    cost = subject.mean("macs")
    plain = [one for one in block.done if one.num_branches == 1 and one.taught_by and one.method != "ekd"]
    return strongest([one for one in plain if cost and abs((one.mean("macs") or 0.0) / cost - 1) <= SAME_COST])


def _against_best(block: Block, subject: Group) -> tuple[Finding | None, list[Group]]:
    """Against the highest test accuracy of the others; its p value is corrected for having been picked.

    Returns:
        The comparison, and the others that have not enough runs to be compared, but a higher test accuracy.
    """
    most = (subject.mean("macs") or float("inf")) * (1 + SAME_COST)
    others = [one for one in block.done if not one.method.startswith("ekd") and (one.mean("macs") or 0.0) <= most]
    if not others:
        return None, []
    found = _differences(subject, others)
    tested = [one for one in others if one.label in found and found[one.label].std is not None]
    picked = tested or others
    best = max(picked, key=lambda group: group.mean(_ACCURACY) or 0.0)
    above = [g for g in others if g not in picked and (g.mean(_ACCURACY) or 0.0) > (best.mean(_ACCURACY) or 0.0)]
    among = f"the best of {len(picked)} others" if len(picked) > 1 else "the only other"
    enough = " with enough runs" if len(picked) < len(others) else ""
    return _finding("best", best, subject, found, f"{best.label} ({among}{enough} at no more cost)"), above


def _differences(subject: Group, others: Iterable[Group]) -> dict[str, Difference]:
    """EKD minus each of the others, by the others' labels, corrected for their number."""
    ours = subject.by_seed(_ACCURACY)
    return corrected({other.label: minus(ours, other.by_seed(_ACCURACY)) for other in others})


def _finding(role: str, other: Group, subject: Group, found: Mapping[str, Difference], called: str) -> Finding:
    """One comparison.

    Args:
        role: What the other is.
        other: Its group.
        subject: That of EKD.
        found: All differences that were corrected together, by label.
        called: What the other is called.
    """
    ours, theirs = subject.by_seed(_ACCURACY), other.by_seed(_ACCURACY)
    common = [seed for seed in ours if seed in theirs]
    means = [statistics.fmean(values[seed] for seed in common) for values in (ours, theirs)] if common else []
    difference = found.get(other.label)
    verdict = judge(difference)
    compared = sum(one.std is not None for one in found.values())
    return Finding(role, other, difference, verdict, comparison(verdict, called, difference, means, compared))


def judge(difference: Difference | None) -> str:
    """What a difference, EKD minus another, says: one of `VERDICTS`."""
    if difference is None or difference.tested is None:  # too few, or without any spread
        return "not_enough"
    if difference.tested >= SIGNIFICANCE:
        return "undecided"
    return "ahead" if difference.mean > 0 else "behind"


def comparison(
    verdict: str, other: str, difference: Difference | None, accuracies: Sequence[float], compared: int
) -> str:
    """EKD against another, as a sentence.

    Args:
        verdict: One of `VERDICTS`.
        other: What the other is called.
        difference: EKD minus the other, with the corrected p value; None without a common seed.
        accuracies: Mean test accuracies of EKD and the other over the seeds that both have.
        compared: For how many comparisons p is corrected.
    """
    if difference is None:
        return f"Not enough runs to compare {SUBJECT} with {other}: they have no seed in common."
    both, by = " against ".join(map(share, accuracies)) + " %", points(difference.mean)
    pairs = f"n = {plural(difference.n, 'pair')} of runs"
    if difference.half is None:
        return f"Not enough runs to compare {SUBJECT} with {other}: {pairs}, which differ by {by} points ({both})."
    if difference.tested is None:
        return (
            f"{SUBJECT} and {other} differ by {by} points in each of {pairs} ({both}); without any spread the "
            "difference cannot be tested."
        )
    over = f" corrected for {compared} comparisons" if compared > 1 else ""
    numbers = f"{interval_words(difference)}, {pairs}, {p_text(difference.tested)}{over}"
    if verdict in ("ahead", "behind"):
        size = share(abs(difference.mean))
        return f"{SUBJECT} {VERDICTS[verdict][0]} {other} by {size} points: {both} ({numbers})."
    outside = abs(difference.mean) > difference.half
    though = "; the interval alone leaves 0 out, which one in 20 does by chance" if outside else ""
    return (
        f"No difference between {SUBJECT} and {other} can be told from n = {difference.n}: {by} points, {both} "
        f"({numbers}{though})."
    )
