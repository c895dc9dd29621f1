"""Answer in words: whether EKD helps, by how much, and at what cost. Every number is computed from the runs.

EKD is compared, by seed, with the controls that a claim about it has to stand up to. A verdict needs a p value below
0.05 after Holm's correction: over the controls of the block, and for the best other method, which is picked by its
result, over all methods that it was picked from.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ekd_lightning.reporting.blocks import Block
from ekd_lightning.reporting.estimates import (
    ENOUGH,
    SIGNIFICANCE,
    TOO_FEW,
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
"""What EKD is compared with, in the order of the report."""
METHODS = {
    "ekd": "a branched student with a teacher for each branch",
    "ekd_mean": "a branched student whose branches all imitate the mean teacher",
    "ekd_permuted": "EKD with its teachers shifted by one branch",
    "ce": "a plain student without teachers",
    "branched_ce": "a branched student without teachers",
    "kd_mean": "a plain student taught by the mean of the teachers",
    "kd_mean_feature": "a plain student that imitates the teachers' mean and their features",
}
"""What the usual methods are, for readers who do not know their names."""
VERDICTS = {
    "ahead": ("beats", "better in"),
    "behind": ("loses to", "worse in"),
    "undecided": ("cannot be told apart from", "no difference in"),
    "not_enough": ("", "too few runs in"),
}
"""What a comparison can come to, and how it is said of one other setting and of several blocks."""
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
    """What the runs of a block say of EKD.

    Attributes:
        block: The block.
        subject: The group that stands for EKD; None if none is done.
        headline: One or two sentences to lead with.
        findings: The comparisons, each a sentence.
        remarks: Further sentences: settings of EKD, costs, heterogeneity, missing controls, too few runs.
    """

    block: Block
    subject: Group | None
    headline: str
    findings: tuple[Finding, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def sentences(self) -> list[str]:
        """The comparisons in words; of one setting in several roles there is one sentence."""
        return list(dict.fromkeys(finding.sentence for finding in self.findings))


def answers(blocks: Sequence[Block]) -> list[Answer]:
    """The answer of each block in which a run is done."""
    return [answer(block) for block in blocks if block.done]


def answer(block: Block) -> Answer:
    """The answer of a block."""
    subject = representative(block)
    if subject is None or subject.accuracy is None:
        return Answer(block, None, f"{block.title}: no run of {SUBJECT} is done, so nothing can be said of it.")
    controls = _controls(block, subject)
    found = _differences(subject, controls.values())
    findings = [_finding(role, other, subject, found, _called(other, controls)) for role, other in controls.items()]
    best, above = _against_best(block, subject, findings)
    findings += [best] if best else []
    name = SUBJECT if subject.label == "ekd" else f"{SUBJECT} ({subject.label})"
    runs = "one run" if subject.n == 1 else f"mean of {plural(subject.n, 'run')}"
    cost = subject.mean("macs")
    start = (
        f"{block.title}: {name} reaches {share(subject.accuracy.mean)} % test accuracy ({runs})"
        f"{f' at {cost / 1e6:.1f} M MACs' if cost else ''}"
    )
    end = _verdicts(findings, above) if findings else f"; {_nothing_to_compare(block)}"
    notes = remarks(block, subject, controls, [finding.difference for finding in findings])
    return Answer(block, subject, f"{start}{end}", tuple(findings), tuple(notes))


def _called(other: Group, controls: Mapping[str, Group]) -> str:
    """A control by all the roles that it has, and its label."""
    return f"{listed([ROLES[role] for role, one in controls.items() if one is other])} ({other.label})"


def _nothing_to_compare(block: Block) -> str:
    """Why EKD is compared with nothing: there is no other method, or none that costs no more."""
    others = [one for one in block.done if not one.method.startswith("ekd")]
    if not others:
        return "no run of another method is done to say whether it helps."
    names = listed([f"{one.label}, {share(one.mean(_ACCURACY) or 0.0)} %" for one in others[:3]])
    more = " and others" if len(others) > 3 else ""
    return f"none of the other methods ({names}{more}) is of comparable cost, so whether it helps is open."


def _verdicts(findings: Sequence[Finding], above: Sequence[Group]) -> str:
    """The end of a headline: what the comparisons came to."""
    named: dict[str, list[str]] = {}
    for verdict in VERDICTS:
        alike = [finding for finding in findings if finding.verdict == verdict]
        for other in dict.fromkeys(finding.other.label for finding in alike):
            own = [finding for finding in alike if finding.other.label == other]
            accuracy = share(own[0].other.mean(_ACCURACY) or 0.0)
            named.setdefault(verdict, []).append(f"{listed([ROLES[f.role] for f in own])} ({other}, {accuracy} %)")
    missing = named.pop("not_enough", [])
    if not named:
        return f"; {TOO_FEW} to say whether it helps."
    text = f". It {'; it '.join(f'{VERDICTS[verdict][0]} {listed(names)}' for verdict, names in named.items())}."
    if missing:
        text += f" Too few runs to compare it with {listed(missing)}."
    if above:
        names = listed([f"{one.label} ({share(one.mean(_ACCURACY) or 0.0)} %)" for one in above])
        text += f" {names} {'has' if len(above) == 1 else 'have'} a higher test accuracy, but {TOO_FEW}."
    return text


def lead(found: Sequence[Answer]) -> str:
    """The answer of all blocks together; the headline if there is one block."""
    if len(found) == 1:
        return found[0].headline
    counts = Counter((finding.role, finding.verdict) for one in found for finding in one.findings)
    parts = []
    for role, name in ROLES.items():
        numbers = {verdict: counts[role, verdict] for verdict in VERDICTS}
        shown = [f"{words} {numbers[verdict]}" for verdict, (_, words) in VERDICTS.items() if numbers[verdict]]
        if shown:
            parts.append(f"against {name}, {', '.join(shown)} of {sum(numbers.values())}")
    where = f"{plural(len(found), 'setting')} of data and protocol"
    if not parts:
        return f"{SUBJECT} can be compared in none of {where}."
    return f"{SUBJECT} in {where}: {'; '.join(parts)}."


def representative(block: Block) -> Group | None:
    """The group that stands for EKD: of the student that most of its groups have, the strongest.

    With one branch EKD is plain distillation, so that stands for it only where there is nothing else.
    """
    own = branched([group for group in block.done if group.method == "ekd"])
    if not own:
        return None
    students = Counter(group.student for group in own)
    usual = min(own, key=lambda group: (-students[group.student], group.mean("macs") or 0.0, group.label)).student
    return strongest([group for group in own if group.student == usual])


def strongest(groups: Sequence[Group]) -> Group | None:
    """The group with the highest validation accuracy; the test set has no part in it. None without groups.

    Groups with too few runs are left aside where others have more.
    """
    least = min(ENOUGH, max((group.n for group in groups), default=0))
    several = [group for group in groups if group.n >= least]
    return max(several, key=lambda group: group.mean("val_accuracy") or -1.0, default=None)


def _controls(block: Block, subject: Group) -> dict[str, Group]:
    """The controls by role: of each method the strongest group with EKD's student."""
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


def _against_best(block: Block, subject: Group, findings: Sequence[Finding]) -> tuple[Finding | None, list[Group]]:
    """Against the highest test accuracy of the others; its p value is corrected for having been picked.

    Args:
        block: The block.
        subject: The group that stands for EKD.
        findings: The comparisons with the controls, of which the best may be one.

    Returns:
        The comparison, and the others that have too few runs to be compared, but a higher test accuracy.
    """
    most = (subject.mean("macs") or float("inf")) * (1 + SAME_COST)
    others = [one for one in block.done if not one.method.startswith("ekd") and (one.mean("macs") or 0.0) <= most]
    if not others:
        return None, []
    found = _differences(subject, others)
    tested = [one for one in others if one.label in found and found[one.label].half is not None]
    picked = tested or others
    best = max(picked, key=lambda group: group.mean(_ACCURACY) or 0.0)
    above = [g for g in others if g not in picked and (g.mean(_ACCURACY) or 0.0) > (best.mean(_ACCURACY) or 0.0)]
    among = f"the best of {len(picked)} other settings" if len(picked) > 1 else "the only other setting"
    enough = " with enough runs" if len(picked) < len(others) else ""
    finding = _finding("best", best, subject, found, f"{best.label} ({among}{enough} at no more cost)")
    if any((one.other, one.verdict) == (best, finding.verdict) for one in findings):  # no need to say it twice
        p = finding.difference.tested if finding.difference and len(tested) > 1 else None
        over = "" if p is None else f" ({p_text(p)} corrected for {len(tested)} comparisons)"
        finding = replace(finding, sentence=f"{best.label} is also {among}{enough} at no more cost{over}.")
    return finding, above


def _differences(subject: Group, others: Iterable[Group]) -> dict[str, Difference]:
    """EKD minus each of the others, by the others' labels, corrected for their number."""
    ours = subject.by_seed(_ACCURACY)
    return corrected({other.label: minus(ours, other.by_seed(_ACCURACY)) for other in others})


def _finding(role: str, other: Group, subject: Group, found: Mapping[str, Difference], called: str) -> Finding:
    """One comparison.

    Args:
        role: What the other is.
        other: Its group.
        subject: The group that stands for EKD.
        found: All differences that were corrected together, by label.
        called: What the other is called.
    """
    ours, theirs = subject.by_seed(_ACCURACY), other.by_seed(_ACCURACY)
    common = [seed for seed in ours if seed in theirs]
    means = [statistics.fmean(values[seed] for seed in common) for values in (ours, theirs)] if common else []
    difference = found.get(other.label)
    verdict = judge(difference)
    compared = sum(one.half is not None for one in found.values())
    return Finding(role, other, difference, verdict, comparison(verdict, called, difference, means, compared))


def judge(difference: Difference | None) -> str:
    """The verdict of a difference, EKD minus another: one of `VERDICTS`."""
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
        return f"Too few runs to compare {SUBJECT} with {other}: they have no seed in common."
    both, by = " against ".join(map(share, accuracies)) + " %", points(difference.mean)
    pairs = f"n = {plural(difference.n, 'pair')} of runs"
    if difference.half is None:
        return f"Too few runs to compare {SUBJECT} with {other}: {pairs}, which differ by {by} points ({both})."
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
