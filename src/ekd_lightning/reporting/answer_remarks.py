"""Remarks on a block: the settings of EKD, its cost, its heterogeneity, and what is missing to be sure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations

from ekd_lightning.reporting.answer_words import SUBJECT, listed, plural, points, share
from ekd_lightning.reporting.blocks import Block
from ekd_lightning.reporting.estimates import SIGNIFICANCE, Difference, Estimate, corrected, paired, paired_by_seed
from ekd_lightning.reporting.groups import FEW, Group, branched
from ekd_lightning.reporting.setups import describe
from ekd_lightning.runs.directory import RunState

NO_EQUAL_COST = (
    "No plain student of equal cost (MACs within 5 %) that was taught by teachers is done here: whether a gain "
    "comes from the method or from the larger network is open."
)


def remarks(
    block: Block, subject: Group, controls: Mapping[str, Group], differences: Sequence[Difference | None]
) -> list[str]:
    """All remarks that the runs give reason to.

    Args:
        block: The block.
        subject: The group of EKD that is spoken of.
        controls: Those it was compared with, by role.
        differences: All differences that were told.
    """
    siblings = [group for group in block.done if group.method == "ekd" and group.student == subject.student]
    able = branched(siblings)
    found = [_chosen(subject, able)] if len(able) > 1 else []
    found += [_trend("K", subject, siblings), _trend("M", subject, siblings)]
    found += [_cost(subject, controls.get("plain")), _ensemble(subject), _disagreement(subject, controls)]
    found += [_margin(subject, controls), _chance(block, subject)]
    if "equal_cost" not in controls:
        found.append(NO_EQUAL_COST)
    pairs = [difference.n for difference in differences if difference is not None and difference.n > 1]
    if pairs and min(pairs) < FEW:
        found.append(
            f"Some of these comparisons rest on n = {min(pairs)} (fewer than {FEW} pairs): their intervals presume "
            "that differences are normal, and cannot check it."
        )
    found.append(_not_done(block))
    return [sentence for sentence in found if sentence]


def _chosen(subject: Group, siblings: Sequence[Group]) -> str:
    """How the group of EKD was chosen from several, itself among them."""
    several = " and several branches" if (subject.num_branches or 1) > 1 else ""
    start = f"Of {len(siblings)} settings of {SUBJECT} with this student{several}, {subject.label} is spoken of: it "
    if subject.values("val_accuracy") is None:
        return f"{start}comes first; validation accuracies are not recorded. The test set had no part in the choice."
    among = " of those with several runs" if any(g.n == 1 for g in siblings) and subject.n > 1 else ""
    return f"{start}has the highest validation accuracy{among}. The test set had no part in the choice."


def _trend(letter: str, subject: Group, siblings: Sequence[Group]) -> str:
    """Accuracy over K at the subject's M, or over M at its K; only where nothing else varies."""
    number, fixed = ("num_branches", "num_teachers") if letter == "K" else ("num_teachers", "num_branches")
    alike: dict[int, list[Group]] = defaultdict(list)
    for group in siblings:
        if getattr(group, fixed) == getattr(subject, fixed) and _alike(group, subject, letter):
            alike[getattr(group, number)].append(group)
    alike[getattr(subject, number)] = [subject]
    own = {count: groups[0] for count, groups in alike.items() if len(groups) == 1}  # else which teachers decides
    cells = {count: group.accuracy for count, group in own.items() if group.accuracy is not None}
    if len(cells) < 2:
        return ""
    best = max(cells, key=lambda count: cells[count].mean)
    found = _every_pair({count: group.by_seed("test_accuracy") for count, group in own.items()})
    apart = {count: _apart(found.get(_pair(count, best))) for count in cells if count != best}
    return _trend_words(letter, cells, best, apart)


def _trend_words(letter: str, accuracies: Mapping[int, Estimate], best: int, apart: Mapping[int, bool | None]) -> str:
    """Accuracy over K or M, and whether each other number can be told from the best; None without enough runs."""
    words = {"K": "branches", "M": "teachers"}
    numbers = ", ".join(
        f"{letter} = {number}: {share(cell.mean)} % (n = {cell.n})" for number, cell in sorted(accuracies.items())
    )
    below = [f"{letter} = {number}" for number, told in sorted(apart.items()) if told]
    equal = [f"{letter} = {number}" for number, told in sorted(apart.items()) if told is False]
    unknown = [f"{letter} = {number}" for number, told in sorted(apart.items()) if told is None]
    parts = [f"highest is {letter} = {best}"]
    parts += [f"{listed(below)} can be told to be lower"] if below else []
    parts += [f"{listed(equal)} cannot be told apart from it"] if equal else []
    parts += [f"not enough runs for {listed(unknown)}"] if unknown else []
    return f"Number of {words[letter]}: {numbers}; {', '.join(parts)}."


def _every_pair(values: Mapping[int, Mapping[int, float]]) -> dict[str, Difference]:
    """Each against each, corrected for all of them: the best is picked by its result, so any pair may be the one."""
    found = {}
    for one, other in combinations(sorted(values), 2):
        common = sorted(values[one].keys() & values[other].keys())
        if common:
            found[_pair(one, other)] = paired([values[one][seed] - values[other][seed] for seed in common])
    return corrected(found)


def _pair(one: int, other: int) -> str:
    return f"{min(one, other)}-{max(one, other)}"


def _alike(group: Group, subject: Group, letter: str) -> bool:
    """Whether nothing but K (or M, and what follows from it) sets two groups apart."""
    follow = {"K": ("K", "split", "MACs", "parameters"), "M": ("M", "teachers")}[letter]
    ours, theirs = (
        {name: value for name, value in one.varied.items() if name not in follow} for one in (subject, group)
    )
    return ours == theirs


def _apart(difference: Difference | None) -> bool | None:
    if difference is None or difference.half is None:
        return None
    return difference.p_holm is not None and difference.p_holm < SIGNIFICANCE


def _cost(subject: Group, plain: Group | None) -> str:
    keys = ("num_parameters", "macs", "train_seconds")
    found = [subject.mean(key) for key in keys]
    if None in found:
        return ""
    parameters, macs, seconds = (value or 0.0 for value in found)
    times = ["", "", ""]
    if plain is not None and plain.label != subject.label:
        theirs = [plain.mean(key) for key in keys]
        times = [
            f" ({(ours or 0.0) / other:.1f} × the plain student)" if other else ""
            for ours, other in zip(found, theirs, strict=True)
        ]
    return (
        f"Cost: {parameters:,.0f} parameters{times[0]}, {macs / 1e6:.1f} M MACs{times[1]}, {seconds:.0f} s of "
        f"training{times[2]}, which depends on what else the machine did."
    )


def _ensemble(subject: Group) -> str:
    parts = []
    for key, what in (
        ("test_gain_over_mean_branch", "their mean"),
        ("test_gain_over_best_branch", "the best of them on the test set"),
    ):
        if gain := subject.values(key):
            within = _interval(gain, points)
            parts.append(f"minus {what} {points(gain.mean)} points ({within}, n = {gain.n})")
    return f"Accuracy of the ensemble of branches {', '.join(parts)}." if parts else ""


def _interval(value: Estimate, words: Callable[[float], str]) -> str:
    if value.half is None:
        return "not enough runs for an interval"
    return f"95 % interval {words(value.low)} to {words(value.high)}"


def _disagreement(subject: Group, controls: Mapping[str, Group]) -> str:
    ours = subject.values("test_disagreement")
    if ours is None or (subject.num_branches or 1) < 2:
        return ""
    text = f"Two branches of EKD disagree on {share(ours.mean)} % of the test images (n = {plural(ours.n, 'run')})"
    control = controls.get("mean_teacher")
    theirs = control.values("test_disagreement") if control else None
    if theirs is not None:
        text += (
            f"; where all branches imitate the mean teacher it is {share(theirs.mean)} % "
            f"(n = {plural(theirs.n, 'run')})"
        )
    return f"{text}."


def _margin(subject: Group, controls: Mapping[str, Group]) -> str:
    """The paper's explanation in one number: is a branch more like its own teacher than like the others?"""
    ours = subject.values("test_own_teacher_cka_margin")
    if ours is None:
        return ""
    text = (
        f"Linear CKA of a branch's features with its own teacher's minus that with the others': {_signed(ours.mean)} "
        f"({_interval(ours, _signed)}, n = {plural(ours.n, 'run')})"
    )
    control = controls.get("mean_teacher")
    theirs = control.values("test_one_to_one_cka_margin") if control else None
    if theirs is not None:
        text += (
            "; with the same teachers assigned on paper only, where all branches imitate the mean teacher, "
            f"{_signed(theirs.mean)} (n = {plural(theirs.n, 'run')})"
        )
    return f"{text}."


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def _chance(block: Block, subject: Group) -> str:
    """EKD with its teachers shifted differs from EKD by chance alone: its distance shows how large chance is."""
    shifted = [
        group
        for group in block.done
        if group.method == "ekd_permuted"
        and (group.student, group.num_branches, group.taught_by)
        == (subject.student, subject.num_branches, subject.taught_by)
        and _same_settings(group, subject)
    ]
    if not shifted:
        return ""
    values = {"ekd": subject.by_seed("test_accuracy"), "": shifted[0].by_seed("test_accuracy")}
    found = paired_by_seed(values, "").get("ekd")
    if found is None:
        return ""
    spread = f" ± {share(found.std)}" if found.std is not None else ""
    return (
        f"For the size of chance: with its teachers shifted by one branch ({shifted[0].label}), which should change "
        f"nothing, EKD differs by {points(found.mean)}{spread} points "
        f"(n = {plural(found.n, 'pair')} of runs)."
    )


def _same_settings(group: Group, subject: Group) -> bool:
    """Whether what sets either apart from others of its method is the same in both."""
    ours, theirs = (describe(one.done[0]) for one in (subject, group))
    names = {*group.varied, *subject.varied} - {"assignment"}
    return all(ours.get(name) == theirs.get(name) for name in names)


def _not_done(block: Block) -> str:
    states = [run.state for group in block.groups for run in group.others]
    words = {
        RunState.FAILED: "failed",
        RunState.STOPPED: "were interrupted or killed",
        RunState.RUNNING: "are still running",
        RunState.PARTIAL: "saw a part of the data only",
    }
    told = [f"{states.count(state)} {text}" for state, text in words.items() if state in states]
    return f"Not counted here: of the runs of this block {listed(told)}." if told else ""
