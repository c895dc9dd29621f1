"""The answer in words: whether EKD helps, by how much, and at what cost. Every number is computed from the runs.

EKD is compared, seed by seed, with the controls that a claim about it must survive. A verdict needs a p value below
0.05 after Holm's correction over the controls of the block. The best other method is selected by its result, so its p
value is corrected over all candidates.
"""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ekd_lightning.reporting import estimates as es
from ekd_lightning.reporting.blocks import SAME_COST, SUBJECTS, Block
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
"""The controls, in the order of the report."""
_LEADING = ("best", "equal_cost", "plain")
"""The controls that the lead of several blocks names, if it can; a table has all."""
METHODS = {
    "ekd": "a branched student with a teacher for each branch",
    "ekd_pooled": "a branched student with a teacher for each branch, which imitates pooled features",
    "ekd_mean": "a branched student whose branches all imitate the mean teacher",
    "ekd_permuted": "EKD with its teachers shifted by one branch",
    "ce": "a plain student without teachers",
    "branched_ce": "a branched student without teachers",
    "kd_mean": "a plain student taught by the mean of the teachers",
    "kd_mean_maps": "a plain student that imitates the teachers' mean and their maps of every stage",
    "kd_mean_feature": "a plain student that imitates the teachers' mean and their pooled features",
}
"""The usual methods, for readers who do not know their names."""
VERDICTS = {
    "ahead": ("beats", "better in"),
    "behind": ("loses to", "worse in"),
    "undecided": ("does not differ significantly from", "undecided in"),
    "not_enough": ("", "too few runs in"),
}
"""Outcomes of a comparison, in words: against one setting, and counted over several blocks."""


@dataclass(frozen=True)
class Finding:
    """A comparison of EKD with another group: its role and verdict as in `ROLES` and `VERDICTS`, and a sentence.

    `difference` is EKD minus the other, None without a common seed. `p_holm` is corrected over the named controls, that
    of `best` over all other methods.
    """

    role: str
    other: Group
    difference: es.Difference | None
    verdict: str
    sentence: str


@dataclass(frozen=True)
class Answer:
    """What the runs of a block say about EKD, whose group is None if none is done.

    The headline leads; remarks are on settings of EKD, costs, heterogeneity, missing controls, too few runs.
    """

    block: Block
    subject: Group | None
    headline: str
    findings: tuple[Finding, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def sentences(self) -> list[str]:
        """The comparisons in words, each once."""
        return list(dict.fromkeys(finding.sentence for finding in self.findings))


def answer(block: Block) -> Answer:
    """The answer of a block in which a run is done."""
    subject = representative(block)
    if subject is None or subject.accuracy is None:
        return Answer(block, None, f"{block.title}: no run of {SUBJECT} is done, so there is nothing to compare.")
    controls = _controls(block, subject)
    found = es.corrected({other.label: subject.minus(other) for other in controls.values()})
    findings = []
    for role, other in controls.items():
        roles = es.listed([ROLES[name] for name, one in controls.items() if one is other])
        findings.append(_finding(role, other, subject, found, f"{roles} ({other.label})"))
    best, above = _against_best(block, subject, findings)
    findings += [best] if best else []
    name = SUBJECT if subject.label == "ekd" else f"{SUBJECT} ({subject.label})"
    runs = "one run" if subject.n == 1 else f"mean of {es.plural(subject.n, 'run')}"
    cost = subject.mean("macs")
    start = (
        f"{block.title}: {name} reaches {es.share(subject.accuracy.mean)} % test accuracy ({runs})"
        f"{f' at {cost / 1e6:.1f} M MACs' if cost else ''}"
    )
    end = _verdicts(findings, above) if findings else f"; {_nothing_to_compare(block)}"
    notes = remarks(block, subject, controls, [finding.difference for finding in findings])
    return Answer(block, subject, f"{start}{end}", tuple(findings), tuple(notes))


def _nothing_to_compare(block: Block) -> str:
    """Why EKD is compared with nothing: there is no other method, or none of comparable cost."""
    others = block.others
    if not others:
        return "no run of another method is done, so whether it helps is open."
    names = es.listed([f"{one.label}, {es.share(one.mean_accuracy)} %" for one in others[:3]])
    more = " and others" if len(others) > 3 else ""
    return f"none of the other methods ({names}{more}) is of comparable cost, so whether it helps is open."


def _verdicts(findings: Sequence[Finding], above: Sequence[Group]) -> str:
    """The end of a headline: the outcome of each comparison, with the size of the difference."""
    alike: dict[tuple[str, str], list[Finding]] = defaultdict(list)
    for finding in findings:
        alike[finding.verdict, finding.other.label].append(finding)
    named: dict[str, list[str]] = {verdict: [] for verdict in VERDICTS}
    for (verdict, label), own in alike.items():
        lead = f": {es.points(own[0].difference.mean)} points" if own[0].difference else ""
        roles = ", which is also ".join(ROLES[finding.role] for finding in own)
        named[verdict].append(f"{roles} ({label}, {es.share(own[0].other.mean_accuracy)} %{lead})")
    missing = named.pop("not_enough")
    told = [f"{VERDICTS[verdict][0]} {es.listed(names)}" for verdict, names in named.items() if names]
    if not told:
        return f"; {es.TOO_FEW} to say whether it helps."
    text = f". It {'; it '.join(told)}."
    if missing:
        text += f" Too few runs to compare it with {es.listed(missing)}."
    if above:
        names = es.listed([f"{one.label} ({es.share(one.mean_accuracy)} %)" for one in above])
        text += f" {names} {'has' if len(above) == 1 else 'have'} a higher test accuracy, but {es.TOO_FEW} to compare."
    return text


def lead(found: Sequence[Answer]) -> str:
    """The answer of all blocks together; the headline if there is one block."""
    if len(found) == 1:
        return found[0].headline
    counts = Counter((finding.role, finding.verdict) for one in found for finding in one.findings)
    parts = {}
    for role, name in ROLES.items():
        numbers = {verdict: counts[role, verdict] for verdict in VERDICTS}
        shown = [f"{words} {numbers[verdict]}" for verdict, (_, words) in VERDICTS.items() if numbers[verdict]]
        if shown:
            parts[role] = f"{', '.join(shown)} of {sum(numbers.values())} against {name}"
    most = [parts[role] for role in _LEADING if role in parts] or list(parts.values())
    where = f"{es.plural(len(found), 'setting')} of data and protocol"
    if not parts:
        return f"{SUBJECT} cannot be compared in any of {where}."
    return f"{SUBJECT} in {where}: {'; '.join(most)}."


def representative(block: Block) -> Group | None:
    """The group that represents EKD: the strongest of those with its most common student.

    With one branch EKD is plain distillation, so such a group represents it only where there is no other.
    """
    own = branched([group for group in block.done if group.method in SUBJECTS])
    if not own:
        return None
    students = Counter(group.student for group in own)
    usual = min(own, key=lambda group: (-students[group.student], group.mean("macs") or 0.0, group.label)).student
    return strongest([group for group in own if group.student == usual])


def strongest(groups: Sequence[Group]) -> Group | None:
    """The group with the highest validation accuracy, whatever its test accuracy; None without groups.

    Groups with too few runs are ignored if others have more.
    """
    least = min(es.ENOUGH, max((group.n for group in groups), default=0))
    several = [group for group in groups if group.n >= least]
    return max(several, key=lambda group: group.mean("val_accuracy") or -1.0, default=None)


def _controls(block: Block, subject: Group) -> dict[str, Group]:
    """The controls by role: the strongest group of each method with EKD's student, and of plain ones with its MACs."""
    taught = [one for one in block.done if one.num_branches == 1 and one.taught_by and one.method not in SUBJECTS]
    cost = subject.mean("macs")
    plain, own = (1, None), _shape(subject)
    features = "kd_mean_maps" if subject.only("weight_maps3") else "kd_mean_feature"
    imitates = subject.only("weight_maps3") or subject.only("weight_feature_branch")
    found = {
        "plain": _control(block, subject, "ce", plain),
        "plain_taught": _control(block, subject, "kd_mean", plain),
        "same_features": _control(block, subject, features, plain) if imitates else None,
        "equal_cost": strongest(
            [one for one in taught if cost and abs((one.mean("macs") or 0.0) / cost - 1) <= SAME_COST]
        ),
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


def _against_best(block: Block, subject: Group, findings: Sequence[Finding]) -> tuple[Finding | None, list[Group]]:
    """Compares EKD with the best other method; its p value is corrected for the selection.

    Returns:
        The comparison, and the groups with a higher test accuracy but too few runs to compare.
    """
    others = block.rivals(subject)
    found = es.corrected({other.label: subject.minus(other) for other in others})
    best, above = best_of(others, found)
    if best is None:
        return None, []
    tested = sum(one.half is not None for one in found.values())
    picked = tested or len(others)
    among = f"the best of {picked} other settings" if picked > 1 else "the only other setting"
    enough = " with enough runs" if picked < len(others) else ""
    finding = _finding("best", best, subject, found, f"{best.label} ({among}{enough} at no more cost)")
    if any((one.other, one.verdict) == (best, finding.verdict) for one in findings):  # no need to say it twice
        p = finding.difference.tested if finding.difference and tested > 1 else None
        over = "" if p is None else f" ({es.p_text(p)} corrected for {tested} comparisons)"
        finding = replace(finding, sentence=f"{best.label} is also {among}{enough} at no more cost{over}.")
    return finding, [one for one in others if one in above]


def best_of(others: Sequence[Group], found: Mapping[str, es.Difference]) -> tuple[Group | None, tuple[Group, ...]]:
    """The most accurate group with an interval in `found`, by label, or else of all; and the more accurate ones."""
    ranked = sorted(others, key=lambda one: one.mean_accuracy, reverse=True)
    best = next((g for g in ranked if g.label in found and found[g.label].half is not None), next(iter(ranked), None))
    return best, tuple(one for one in ranked if best is not None and one.mean_accuracy > best.mean_accuracy)


def _finding(role: str, other: Group, subject: Group, found: Mapping[str, es.Difference], called: str) -> Finding:
    """One comparison."""
    ours, theirs = subject.by_seed("test_accuracy"), other.by_seed("test_accuracy")
    common = ours.keys() & theirs.keys()
    means = [statistics.fmean(values[seed] for seed in common) for values in (ours, theirs)] if common else []
    difference = found.get(other.label)
    compared = sum(one.half is not None for one in found.values())
    return Finding(role, other, difference, judge(difference), comparison(called, difference, means, compared))


def judge(difference: es.Difference | None) -> str:
    """The verdict of a difference, EKD minus another: one of `VERDICTS`."""
    if difference is None or difference.tested is None:  # too few, or without any spread
        return "not_enough"
    if difference.tested >= es.SIGNIFICANCE:
        return "undecided"
    return "ahead" if difference.mean > 0 else "behind"


def comparison(other: str, difference: es.Difference | None, accuracies: Sequence[float], compared: int) -> str:
    """EKD against another, as a sentence, with the p value corrected for the number of comparisons.

    `accuracies` are the means of EKD and the other over their common seeds.
    """
    if difference is None:
        return f"Too few runs to compare {SUBJECT} with {other}: they have no seed in common."
    both, by = " against ".join(map(es.share, accuracies)) + " %", es.points(difference.mean)
    pairs = f"n = {es.plural(difference.n, 'pair')} of runs"
    if difference.half is None:
        return f"Too few runs to compare {SUBJECT} with {other}: {pairs}, which differ by {by} points ({both})."
    if difference.tested is None:
        return (
            f"{SUBJECT} and {other} differ by {by} points in each of {pairs} ({both}); a difference without spread "
            "cannot be tested."
        )
    over = f" corrected for {compared} comparisons" if compared > 1 else ""
    numbers = f"{es.interval_words(difference)}, {pairs}, {es.p_text(difference.tested)}{over}"
    if (verdict := judge(difference)) in ("ahead", "behind"):
        size = es.share(abs(difference.mean))
        return f"{SUBJECT} {VERDICTS[verdict][0]} {other} by {size} points: {both} ({numbers})."
    outside = abs(difference.mean) > difference.half
    though = "; the uncorrected interval excludes 0, as one in 20 does by chance" if outside else ""
    return f"{SUBJECT} {VERDICTS[verdict][0]} {other}: {by} points, {both} ({numbers}{though})."
