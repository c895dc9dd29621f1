"""Groups: runs that differ only in their seed. A group is one row of a table and one point of a curve.

Nothing is averaged over groups; `blocks` says which of them may be compared.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from ekd_lightning.reporting import setups
from ekd_lightning.reporting.estimates import SHARE, Difference, Estimate, corrected, estimate, limits_of, minus
from ekd_lightning.reporting.setups import taught_by
from ekd_lightning.roles import is_finite
from ekd_lightning.runs.collection import Collection, RunEntry
from ekd_lightning.runs.protocol import Protocol
from ekd_lightning.runs.result import Result

FEW = 5
"""An interval over fewer runs comes with a warning."""
MEASURED = {
    "figures on corrupted images": (
        ("corruption_",),
        ("corruption_source", "corruption_images", "corruption_left_out"),
    ),
    "sharpness": (("sharpness_",), ("sharpness_images",)),
    "latency, throughput and memory": (
        ("latency_", "throughput_", "memory_"),
        ("efficiency_device", "efficiency_threads"),
    ),
}
"""Measurement of the evaluation -> prefixes of its fields, and the fields that record the conditions. Runs under
different conditions have no common mean."""


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their seed.

    Attributes:
        label: The method, and what distinguishes the group within it, e.g. `ekd`, `ekd, K=2, M=3`,
            `kd_mean, resnet14`, `ekd, feature_branch=0`. Unique in a block, the same in all blocks. If many settings
            differ, the label names only those that distinguish the group; `setting` names all.
        method: Name of the method.
        protocol: Shared by all its runs; includes data set and fraction.
        student: Name of the student's network.
        num_teachers: M; None if no run is done.
        num_branches: K.
        taught_by: SHA-256 of the teachers, in order; of all of them if the method chose one per run.
        runs: Those that count, one per seed, by seed; then failed, partial and running ones, which do not.
        duplicates: Finished runs with a newer run of the same seed; they do not count.
        varied: Settings in which groups of the method differ -> value in this group.
        decides: Whether it is a deciding row of its study: p values of deciding groups are corrected for the
            comparisons of deciding groups only.
    """

    label: str
    method: str
    protocol: Protocol
    student: str | None
    num_teachers: int | None
    num_branches: int | None
    taught_by: tuple[str, ...]
    runs: tuple[RunEntry, ...]
    duplicates: tuple[RunEntry, ...] = ()
    varied: Mapping[str, Any] = field(default_factory=dict)
    decides: bool = True

    @cached_property
    def done(self) -> tuple[RunEntry, ...]:
        """The runs that count, by seed."""
        return tuple(run for run in self.runs if run.state == "done")

    @property
    def others(self) -> tuple[RunEntry, ...]:
        """Failed, partial and running ones."""
        return tuple(run for run in self.runs if run.state != "done")

    @property
    def setting(self) -> str:
        """All settings in which groups of the method differ, e.g. `resnet8, split=stage3, feature_branch=50`."""
        return ", ".join(setups.words(self.varied))

    @property
    def n(self) -> int:
        """Number of runs that count."""
        return len(self.done)

    @property
    def accuracy(self) -> Estimate | None:
        """Test accuracy in [0, 1]; None if no run is done."""
        return self.values("test_accuracy")

    @property
    def mean_accuracy(self) -> float:
        """Mean test accuracy in [0, 1]; 0 if no run is done."""
        return self.mean("test_accuracy") or 0.0

    def by_seed(self, key: str, *index: int | str) -> dict[int, float]:
        """A figure of each run that has it, by seed; empty if the runs measured it under different conditions.

        Args:
            key: Field of the results.
            index: Position within a list or mapping: `by_seed("test_branch_cka", 0, 1)`,
                `by_seed("corruption_accuracy", "fog", 4)`.
        """
        values = [(run, _at(run.result or {}, (key, *index))) for run in self.done]
        found = [(run, value) for run, value in values if value is not None]
        for starts, conditions in MEASURED.values():
            if key.startswith(starts) and disagreements([run for run, _ in found], conditions):
                return {}
        return {int(run.get("seed")): value for run, value in found}

    def values(self, key: str, *index: int | str) -> Estimate | None:
        """A figure over the runs that have it; None if none has."""
        return estimate(self.by_seed(key, *index).values(), limits_of(key))

    def mean(self, key: str) -> float | None:
        """Mean of a figure over the runs that have it; None if none has."""
        found = self.values(key)
        return found.mean if found else None

    def minus(self, other: Group) -> Difference | None:
        """Its test accuracy minus that of another group, paired by seed; None without a common seed."""
        return minus(self.by_seed("test_accuracy"), other.by_seed("test_accuracy"))

    def per_item(self, key: str) -> list[Estimate]:
        """A field that is a list of numbers, entry by entry, up to the first that no run has."""
        found: list[Estimate] = []
        while (one := self.values(key, len(found))) is not None:
            found.append(one)
        return found

    def scalars(self) -> dict[str, Estimate]:
        """Every field of the results that is a number, by its name."""
        keys = dict.fromkeys(key for run in self.done for key, value in (run.result or {}).items() if is_finite(value))
        found = {key: self.values(key) for key in keys}
        if "test_mean_branch_accuracy" not in found:  # without an evaluation only the branches are on record
            rows = [run.get("test_branch_accuracy") or [] for run in self.done]
            means = [sum(row) / len(row) for row in rows if row and all(map(is_finite, row))]
            found["test_mean_branch_accuracy"] = estimate(means, SHARE)
        return {key: one for key, one in found.items() if one is not None}

    @property
    def corrupted(self) -> str:
        """Origin of its corrupted images, in words; only groups with the same origin are compared."""
        source, images = self.only("corruption_source"), self.only("corruption_images")
        left = self.only("corruption_left_out") or []
        parts = [f"{source or 'unknown'} corruptions"]
        parts += [f"{images:,} images"] if images else []
        parts += [f"without {', '.join(left)}"] if left else []
        return ", ".join(parts)

    def only(self, key: str) -> Any:
        """The value of a field if all runs that have it agree; else None."""
        values = self.distinct(key)
        return values[0] if len(values) == 1 else None

    def distinct(self, key: str) -> list[Any]:
        """The different values of a field, in order of appearance; None is no value."""
        return _distinct(self.done, key)


def _distinct(runs: Sequence[RunEntry], key: str) -> list[Any]:
    found: list[Any] = []
    for run in runs:
        value = run.get(key)
        if value is not None and value not in found:
            found.append(value)
    return found


def disagreements(runs: Sequence[RunEntry], keys: Sequence[str]) -> dict[str, list[Any]]:
    """The fields among `keys` in which runs differ, with their values; runs without a field are ignored."""
    return {key: values for key in keys if len(values := _distinct(runs, key)) > 1}


def branched(groups: Sequence[Group]) -> list[Group]:
    """Groups with several branches (with one, EKD is plain distillation); all groups if none has several."""
    return [one for one in groups if (one.num_branches or 1) > 1] or list(groups)


def group(collection: Collection) -> list[Group]:
    """Groups runs that differ only in their seed.

    Two runs belong together if protocol, method, student, teachers, every weight and every setting of recipe and
    method agree. Of runs with the same seed the newest counts (by the time in status.json, then by name); the
    others become duplicates. A run without a result joins the group with its configuration, or else forms a group of
    its own. Runs from files of records are grouped by the row that their study names.
    """
    runs = sorted((run for run in collection.runs if run.row is None), key=lambda run: run.name)
    members: dict[Any, list[RunEntry]] = defaultdict(list)
    whole: dict[Any, Any] = {}
    for run in runs:
        if run.result is not None:
            key = setups.key(run)
            members[key].append(run)
            whole.setdefault(setups.whole_key(run), key)
    for run in runs:
        if run.result is None:
            words = setups.whole_key(run)
            members[whole.get(words, ("without a result", words))].append(run)
    labels = setups.labels(list(members.values()))
    made = [
        make_group(own, *labels[position], decides=any(run.decides for run in own))
        for position, own in enumerate(members.values())
    ]
    return sorted([*made, *_rows(collection)], key=_order)


def _rows(collection: Collection) -> list[Group]:
    """The groups of studies' rows; labels name the study if two studies have a row of one name and protocol."""
    rows: dict[tuple[Protocol, str], dict[str | None, list[RunEntry]]] = defaultdict(lambda: defaultdict(list))
    for run in collection.runs:
        if run.row is not None:
            rows[Protocol.of(run), run.row][run.study].append(run)
    return [
        make_group(runs, row if len(own) == 1 else f"{row} ({study})", decides=runs[0].decides)
        for (_, row), own in rows.items()
        for study, runs in own.items()
    ]


def make_group(
    members: Sequence[RunEntry], label: str, varied: Mapping[str, Any] | None = None, *, decides: bool = True
) -> Group:
    """One group of runs that differ only in their seed."""
    newest: dict[int, RunEntry] = {}
    duplicates: list[RunEntry] = []
    for run in sorted(members, key=lambda run: (run.time or "", run.name)):
        if run.state == "done":
            seed = int(run.get("seed"))
            duplicates += [newest[seed]] if seed in newest else []
            newest[seed] = run
    done = [newest[seed] for seed in sorted(newest)]
    others = [run for run in members if run.state != "done"]
    first = next((run for run in [*done, *others] if run.result is not None), members[0])
    taught = dict.fromkeys(sha for run in members for sha in taught_by(run.result or {}))
    return Group(
        label=label,
        method=str(first.get("method") or "unknown"),
        protocol=Protocol.of(first),
        student=first.get("student"),
        num_teachers=first.get("num_teachers"),
        num_branches=first.get("num_branches"),
        taught_by=tuple(taught),
        runs=(*done, *others),
        duplicates=tuple(duplicates),
        varied=varied or {},
        decides=decides,
    )


def one_branch(whole: Group) -> Group | None:
    """The same students cut to one branch each, the most accurate one on validation images, at the cost of this branch.

    Only test accuracy and costs are known of it. None where a run has not evaluated its branches.
    """
    runs = []
    for run in whole.done:
        result = run.result
        if result is None or not result.test_branch_accuracy or (alone := result.branch_alone) is None:
            return None
        costs = {name: alone.get(name) for name in ("macs", "num_parameters")}
        accuracy = _at(result.test_branch_accuracy, alone["branches"])
        if accuracy is None or None in costs.values():
            return None
        known = {name: result[name] for name in ("method", "data", "seed", "fraction")}
        # The accuracy of the pass, and so the precision, in which that of the whole student was measured.
        runs.append(run.having(result=Result.of({**known, **costs, "test_accuracy": accuracy})))
    return replace(whole, label=f"{whole.label}, one branch", runs=tuple(runs), duplicates=()) if runs else None


def differences(groups: Sequence[Group], reference: str) -> dict[str, Difference]:
    """Every other group minus the reference, with p values as in `corrected_by_row`.

    Raises:
        ValueError: If the groups differ in protocol, or none has the label.
    """
    if len({one.protocol for one in groups if one.n}) > 1:
        raise ValueError("groups of different protocols are not compared")
    to = next((one for one in groups if one.label == reference), None)
    if to is None:
        raise ValueError(f"no group {reference!r}")
    return corrected_by_row(groups, {one.label: one.minus(to) for one in groups if one is not to})


def corrected_by_row(groups: Iterable[Group], found: Mapping[str, Difference | None]) -> dict[str, Difference]:
    """The differences by label that are not None, with p values corrected by Holm's method.

    p values of deciding groups are corrected for the comparisons of deciding groups, those of other groups for the
    comparisons of all groups.
    """
    decide = {one.label for one in groups if one.decides}
    return {**corrected(found), **corrected({label: one for label, one in found.items() if label in decide})}


def _order(one: Group) -> tuple[Any, ...]:
    numbers = [one.protocol.fraction or 0.0, one.num_branches or 0, one.num_teachers or 0]
    return (one.protocol.data, numbers[0], one.method, *numbers[1:], one.label, repr(one.protocol), one.runs[0].name)


def _at(value: Any, path: Sequence[int | str]) -> float | None:
    """A number inside nested lists and mappings; None if there is none."""
    for step in path:
        if isinstance(step, str):
            value = value.get(step) if isinstance(value, Mapping) else None
        else:
            value = value[step] if isinstance(value, list) and -len(value) <= step < len(value) else None
    return float(value) if is_finite(value) else None
