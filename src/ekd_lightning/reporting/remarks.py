"""Remarks on a block: EKD's settings, cost and heterogeneity, and missing controls."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations

from ekd_lightning.reporting import estimates as es
from ekd_lightning.reporting.blocks import SUBJECTS, Block, cheaper_branch
from ekd_lightning.reporting.groups import FEW, Group, branched
from ekd_lightning.reporting.setups import describe
from ekd_lightning.runs.directory import RunState

SUBJECT = "EKD"
NO_EQUAL_COST = (
    "No plain student with teachers and equal cost (MACs within 5 %) is done here, so whether a gain comes from the "
    "method or from the larger network is open."
)
_NUMBERS = {
    "K": ("branches", "num_branches", "num_teachers", ("K", "split", "MACs", "parameters")),
    "M": ("teachers", "num_teachers", "num_branches", ("M", "teachers")),
}
"""For branches and teachers: name, field, field of the other, and the settings that follow from their number."""
_STATES = {
    RunState.FAILED: "failed",
    RunState.STOPPED: "interrupted or killed",
    RunState.RUNNING: "still running",
    RunState.PARTIAL: "on part of the data",
}


def remarks(
    block: Block, subject: Group, controls: Mapping[str, Group], differences: Sequence[es.Difference | None]
) -> list[str]:
    """All remarks that apply to a block."""
    candidates = [group for group in block.done if group.method in SUBJECTS and group.student == subject.student]
    siblings = [group for group in candidates if group.method == subject.method]
    found = [_chosen(subject, branched(candidates)), _trend("K", subject, siblings), _trend("M", subject, siblings)]
    found += [
        _cost(subject, controls.get("plain")),
        _ensemble(subject),
        _one_branch(block, subject),
        *_heterogeneity(subject, controls),
    ]
    found += [_chance(block, subject), "" if "equal_cost" in controls else NO_EQUAL_COST]
    pairs = [difference.n for difference in differences if difference is not None and difference.half is not None]
    if pairs and min(pairs) < FEW:
        found.append(
            f"Some of these comparisons have only n = {min(pairs)} pairs (fewer than {FEW}): their intervals assume "
            "normal differences and cannot check the assumption."
        )
    states = [run.state for group in block.groups for run in group.others]
    left = [f"{states.count(state)} {text}" for state, text in _STATES.items() if state in states]
    found += [f"Runs of this block that do not count: {es.listed(left)}."] if left else []
    return [sentence for sentence in found if sentence]


def _chosen(subject: Group, siblings: Sequence[Group]) -> str:
    """How the group that represents EKD was chosen from several."""
    if len(siblings) < 2:
        return ""
    several = " and several branches" if (subject.num_branches or 1) > 1 else ""
    start = f"Of {len(siblings)} settings of {SUBJECT} with this student{several}, {subject.label} represents it: it "
    why = "has the highest validation accuracy"
    if subject.values("val_accuracy") is None:
        why = "comes first; validation accuracies are not recorded"
    elif any(group.n < min(es.ENOUGH, subject.n) for group in siblings):
        why += f" of those with {min(es.ENOUGH, subject.n)} runs or more"
    return f"{start}{why}. Test accuracies played no part in the choice."


def _trend(letter: str, subject: Group, siblings: Sequence[Group]) -> str:
    """Accuracy over K at the subject's M, or over M at its K, where nothing else varies.

    The best number is selected by its result, so p is corrected over every pair.
    """
    words, number, fixed, follow = _NUMBERS[letter]
    alike: dict[int, list[Group]] = defaultdict(list)
    for group in siblings:
        same = getattr(group, number) is not None and getattr(group, fixed) == getattr(subject, fixed)
        if same and _rest(group, follow) == _rest(subject, follow):
            alike[getattr(group, number)].append(group)
    alike[getattr(subject, number) or 0] = [subject]
    own = {count: groups[0] for count, groups in sorted(alike.items()) if len(groups) == 1}  # else teachers decide
    means = {count: group.accuracy for count, group in own.items() if group.accuracy is not None}
    if len(means) < 2:
        return ""
    best = max(means, key=lambda count: means[count].mean)
    found = es.corrected({(few, many): own[few].minus(own[many]) for few, many in combinations(own, 2)})
    lower: dict[bool | None, list[str]] = defaultdict(list)
    for count in means:
        if count != best:
            lower[_significant(found.get((min(count, best), max(count, best))))].append(f"{letter} = {count}")
    parts = [f"{letter} = {best} is highest"]
    parts += [f"significantly lower: {es.listed(lower[True])}"] if lower[True] else []
    parts += [f"not significantly lower: {es.listed(lower[False])}"] if lower[False] else []
    parts += [f"too few runs: {es.listed(lower[None])}"] if lower[None] else []
    numbers = ", ".join(f"{letter} = {count}: {es.share(one.mean)} % (n = {one.n})" for count, one in means.items())
    return f"Number of {words}: {numbers}; {'; '.join(parts)}."


def _rest(group: Group, follow: Sequence[str]) -> dict[str, object]:
    return {name: value for name, value in group.varied.items() if name not in follow}


def _significant(difference: es.Difference | None) -> bool | None:
    """Whether a difference is significant; None without enough runs."""
    if difference is None or difference.half is None:
        return None
    return difference.p_holm is not None and difference.p_holm < es.SIGNIFICANCE


def _cost(subject: Group, plain: Group | None) -> str:
    parts = []
    for key, form in (
        ("num_parameters", "{:,.0f} parameters{}"),
        ("macs", "{:.1f} M MACs{}"),
        ("train_seconds", "{:.0f} s of training{}"),
    ):
        ours = subject.mean(key)
        if ours is None:
            return ""
        theirs = plain.mean(key) if plain is not None and plain.label != subject.label else None
        times = f" ({ours / theirs:.1f} × the plain student)" if theirs else ""
        parts.append(form.format(ours / 1e6 if key == "macs" else ours, times))
    return f"Cost: {', '.join(parts)}; seconds depend on the machine's load."


def _ensemble(subject: Group) -> str:
    parts = []
    for key, what in (
        ("test_gain_over_mean_branch", "the mean of the branches"),
        ("test_gain_over_best_branch", "the branch that is best on the test set"),
    ):
        if gain := subject.values(key):
            parts.append(f"minus {what}: {es.points(gain.mean)} points ({es.interval_words(gain)}, n = {gain.n})")
    return f"Ensemble accuracy {'; '.join(parts)}." if parts else ""


def _one_branch(block: Block, subject: Group) -> str:
    """What one branch achieves at its own cost, beside the best other method of this cost."""
    alone = cheaper_branch(subject)
    if alone is None or alone.accuracy is None:
        return ""
    text = (
        f"One branch alone, chosen on validation images, has {es.share(alone.accuracy.mean)} % "
        f"at {(alone.mean('macs') or 0.0) / 1e6:.1f} M MACs"
    )
    found = {one.label: (one, alone.minus(one)) for one in block.rivals(alone)}
    compared = [one for one, difference in found.values() if difference and difference.half is not None]
    if not compared:
        return f"{text}."
    best = max(compared, key=lambda one: one.mean_accuracy)
    difference = found[best.label][1]
    assert difference is not None
    by = f"{es.points(difference.mean)} points ({es.interval_words(difference)}, n = {es.plural(difference.n, 'pair')})"
    among = f"the best of {len(compared)} other methods" if len(compared) > 1 else "the only other method"
    return f"{text}. Minus {best.label}, {among} at no more cost, this is {by}."


def _heterogeneity(subject: Group, controls: Mapping[str, Group]) -> list[str]:
    """How much branches differ, and whether each resembles its own teacher most, the paper's reason for the gain."""
    control = controls.get("mean_teacher")
    parts = []
    if (subject.num_branches or 1) > 1 and (ours := subject.values("test_disagreement")):
        runs = es.plural(ours.n, "run")
        text = f"Two branches of EKD disagree on {es.share(ours.mean)} % of the test images (n = {runs})"
        if control and (theirs := control.values("test_disagreement")):
            text += "; if all branches imitate the mean teacher, on "
            text += f"{es.share(theirs.mean)} % (n = {es.plural(theirs.n, 'run')})"
        parts.append(f"{text}.")
    if ours := subject.values("test_own_teacher_cka_margin"):
        text = (
            "Linear CKA between a branch's features and its own teacher's, minus that with the other teachers': "
            f"{_signed(ours.mean)} ({es.interval_words(ours, _signed)}, n = {es.plural(ours.n, 'run')})"
        )
        if control and (theirs := control.values("test_one_to_one_cka_margin")):
            text += "; for the same pairs, if all branches imitate the mean teacher, "
            text += f"{_signed(theirs.mean)} (n = {es.plural(theirs.n, 'run')})"
        parts.append(f"{text}.")
    return parts


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def _chance(block: Block, subject: Group) -> str:
    """The size of chance: EKD with its teachers shifted should differ from EKD by chance alone."""
    for group in block.done:
        if group.method == "ekd_permuted" and _same_settings(group, subject):
            found = subject.minus(group)
            if found is None:
                return ""
            spread = f" ± {es.share(found.std)}" if found.std is not None else ""
            return (
                f"Size of chance: EKD minus EKD with its teachers shifted by one branch ({group.label}), which "
                f"should change nothing, is {es.points(found.mean)}{spread} points "
                f"(n = {es.plural(found.n, 'pair')} of runs)."
            )
    return ""


def _same_settings(group: Group, subject: Group) -> bool:
    """Whether two groups agree in student, teachers, and all settings that vary within their methods."""
    ours, theirs = (describe(one.done[0]) for one in (subject, group))
    names = {"student", "K", "teachers", *group.varied, *subject.varied} - {"assignment"}
    return all(ours.get(name) == theirs.get(name) for name in names)
