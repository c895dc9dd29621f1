"""Words of the answer: its sentences, made from numbers; which numbers, `answer` decides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ekd_lightning.reporting.estimates import Difference, p_value
from ekd_lightning.reporting.groups import Group

SUBJECT = "EKD"
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


def name(group: Group, role: str) -> str:
    """What another is, and its label, e.g. `the plain student (ce)`."""
    return f"{ROLES[role]} ({group.label})"


def subject_name(group: Group) -> str:
    """EKD, and its label where that says more."""
    return SUBJECT if group.label == "ekd" else f"{SUBJECT} ({group.label})"


def points(value: float) -> str:
    """A difference of shares as points with its sign, e.g. `+5.43`."""
    return f"{100 * value:+.2f}".replace("-", "−")


def share(value: float) -> str:
    """A share as percent, e.g. `71.55`."""
    return f"{100 * value:.2f}"


def plural(count: int, word: str) -> str:
    """A count and its noun, e.g. `1 pair`, `3 pairs`."""
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def interval(difference: Difference) -> str:
    """Its 95 % interval in points, e.g. `+4.10 to +6.76`.

    Raises:
        ValueError: If the difference has none.
    """
    if difference.std is None:
        raise ValueError("no interval")
    return f"{points(difference.low)} to {points(difference.high)}"


def comparison(
    verdict: str, other: str, difference: Difference | None, accuracies: tuple[float, float], compared: int
) -> str:
    """EKD against another, as a sentence.

    Args:
        verdict: One of `answer.VERDICTS`.
        other: What the other is called.
        difference: EKD minus the other, with the corrected p value; None without a common seed.
        accuracies: Mean test accuracies of EKD and the other over the seeds that both have.
        compared: For how many comparisons p is corrected.
    """
    if difference is None:
        return f"Not enough runs to compare {SUBJECT} with {other}: they have no seed in common."
    ours, theirs = accuracies
    both = f"{share(ours)} against {share(theirs)} %"
    if difference.std is None:
        return (
            f"Not enough runs to compare {SUBJECT} with {other}: n = {plural(difference.n, 'pair')} of runs, "
            f"which differ by {points(difference.mean)} points ({both})."
        )
    if difference.p is None:
        return (
            f"{SUBJECT} and {other} differ by {points(difference.mean)} points in each of n = {difference.n} pairs of "
            f"runs ({both}); without any spread the difference cannot be tested."
        )
    pairs = f"n = {plural(difference.n, 'pair')} of runs"
    numbers = f"95 % interval {interval(difference)}, {pairs}, {_corrected(difference, compared)}"
    if verdict == "ahead":
        return f"{SUBJECT} beats {other} by {share(abs(difference.mean))} points: {both} ({numbers})."
    if verdict == "behind":
        return f"{SUBJECT} loses to {other} by {share(abs(difference.mean))} points: {both} ({numbers})."
    return (
        f"No difference between {SUBJECT} and {other} can be told from n = {difference.n}: "
        f"{points(difference.mean)} points, {both} ({numbers}{_though(difference)})."
    )


def _corrected(difference: Difference, compared: int) -> str:
    p = difference.p_holm if difference.p_holm is not None else difference.p
    assert p is not None
    return p_value(p) + (f" corrected for {compared} comparisons" if compared > 1 else "")


def _though(difference: Difference) -> str:
    """Says it where the interval alone would have told a difference."""
    assert difference.half is not None
    outside = abs(difference.mean) > difference.half
    return "; the interval alone leaves 0 out, which one in 20 does by chance" if outside else ""


def headline(
    where: str, subject: Group | None, verdicts: Mapping[str, Sequence[str]], above: Sequence[Group] = ()
) -> str:
    """The sentence to lead with.

    Args:
        where: Title of the block.
        subject: The group of EKD; None if none is done.
        verdicts: Verdict -> roles of the others.
        above: Others that are more accurate than the best that was compared, but have not enough runs.
    """
    if subject is None or subject.accuracy is None:
        return f"{where}: no run of {SUBJECT} is done, so nothing can be said of it."
    start = (
        f"{where}: {subject_name(subject)} reaches {share(subject.accuracy.mean)} % test accuracy "
        f"(mean of n = {plural(subject.n, 'run')})"
    )
    told = [
        f"{words} {listed([ROLES[role] for role in verdicts[verdict]])}"
        for verdict, words in (("ahead", "beats"), ("behind", "loses to"), ("undecided", "cannot be told apart from"))
        if verdicts.get(verdict)
    ]
    if not told:
        why = "not enough runs" if verdicts.get("not_enough") else "no run of another method is done"
        return f"{start}; {why} to say whether it helps."
    missing = verdicts.get("not_enough")
    rest = f" Not enough runs to compare it with {listed([ROLES[role] for role in missing])}." if missing else ""
    return f"{start}. It {'; it '.join(told)}.{rest}{_above(above)}"


def _above(groups: Sequence[Group]) -> str:
    if not groups:
        return ""
    names = listed([f"{g.label} ({share(g.accuracy.mean)} %)" for g in groups if g.accuracy is not None])
    has = "has" if len(groups) == 1 else "have"
    return f" {names} {has} a higher test accuracy than the best other method that was compared, but not enough runs."


def lead(counts: Mapping[str, Mapping[str, int]], blocks: int) -> str:
    """One sentence over several blocks.

    Args:
        counts: Role -> verdict -> number of blocks.
        blocks: How many blocks there are.
    """
    words = {"behind": "loses in", "undecided": "cannot be told apart in", "not_enough": "not enough runs in"}
    told = []
    for role, found in counts.items():
        rest = ", ".join(f"{words[verdict]} {found[verdict]}" for verdict in words if found.get(verdict))
        total = sum(found.values())
        told.append(f"{ROLES[role]} in {found.get('ahead', 0)} of {total}" + (f" ({rest})" if rest else ""))
    if not told:
        return f"{plural(blocks, 'setting')} of data and protocol, in none of which {SUBJECT} can be compared."
    return f"Over {plural(blocks, 'setting')} of data and protocol, {SUBJECT} beats {'; '.join(told)}."


def listed(words: Sequence[str]) -> str:
    """E.g. `a, b and c`."""
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def best_of(other: Group, count: int, left: int = 0) -> str:
    """What the best other method is called.

    Args:
        other: Its group.
        count: From how many it was picked.
        left: How many more there are, which have not enough runs.
    """
    among = f"the best of {count} others" if count > 1 else "the only other"
    return f"{other.label} ({among}{' with enough runs' if left else ''} at no more cost)"
