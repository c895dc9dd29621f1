"""The report on many runs as one value, from which tables, figures and page are made."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from ekd_lightning.errors import unknown_name
from ekd_lightning.reporting.answer import Answer, answer, lead, strongest
from ekd_lightning.reporting.blocks import Block, blocks
from ekd_lightning.reporting.details import damage
from ekd_lightning.reporting.estimates import listed, plural
from ekd_lightning.reporting.groups import MEASURED, Group, disagreements, group
from ekd_lightning.reporting.tables import Row, correction, difference_record, record, rows
from ekd_lightning.runs.collection import STATES, Collection, RunEntry

_FIRST = ("ekd", "ce", "kd_mean", "branched_ce", "ekd_mean", "ekd_permuted")
"""Methods that get the first colours, because others are compared with them."""
DEFAULT_TITLE = "Ensemble knowledge distillation: results"


@dataclass(frozen=True)
class Report:
    """Everything a report says.

    Attributes:
        title: Of the page.
        collection: The runs, and problems with their files.
        groups: Runs that differ only in their seed, by data set, fraction and label.
        blocks: Groups that may be compared.
        reference: By block key, the label of the group that others are compared with; blocks without one are absent.
        answers: The answer in words for each block with a finished run.
        notes: One line each on files left out, duplicates, separate blocks.
    """

    title: str
    collection: Collection
    groups: tuple[Group, ...]
    blocks: tuple[Block, ...]
    reference: dict[str, str]
    answers: tuple[Answer, ...]
    notes: tuple[str, ...]

    @property
    def lead(self) -> str:
        """The answer over all blocks, in a sentence or two."""
        return lead(self.answers) if self.answers else "No run is done yet."

    @cached_property
    def machines(self) -> tuple[str, ...]:
        """The machines of the finished runs, each with its number of runs; the most frequent first."""
        counts = Counter(machine(run.provenance) for run in self.collection.runs if run.state == "done")
        return tuple(f"{machine} ({plural(count, 'run')})" for machine, count in counts.most_common())

    @cached_property
    def ordered_labels(self) -> list[str]:
        """All labels in the order in which they get colours: references and usual controls first."""
        labels = {group.label: group.method for block in self.blocks for group in block.groups}
        named = [label for block in self.blocks for label in self.references(block)]
        rank = {method: position for position, method in enumerate(_FIRST)}

        def order(label: str) -> tuple[bool, int]:
            method = labels[label]
            first = label in named or (label == method and method in rank)
            return (not first, rank.get(method, len(rank)))

        return sorted(labels, key=order)

    @cached_property
    def rows(self) -> dict[str, list[Row]]:
        """The rows of each block's table, by the block's key."""
        return {block.key: rows(block, self.references(block)) for block in self.blocks}

    @property
    def not_counted(self) -> list[tuple[RunEntry, Group]]:
        """Runs that failed, are not done or used part of the data only, with their groups."""
        return [(run, group) for group in self.groups for run in group.others]

    def references(self, block: Block) -> tuple[str, ...]:
        """Labels of the groups that a block's table compares with: its reference, and the group that represents EKD."""
        found = self.answer(block)
        subject = found.subject.label if found and found.subject else None
        return tuple(dict.fromkeys(filter(None, [self.reference.get(block.key), subject])))

    def answer(self, block: Block) -> Answer | None:
        """The answer of a block; None if no run of it is done."""
        return next((answer for answer in self.answers if answer.block.key == block.key), None)


def make_report(collection: Collection, title: str = DEFAULT_TITLE, reference: str | None = None) -> Report:
    """Groups the runs, compares them, and puts the answer into words.

    `reference` is the label of a group or the name of a method that the others are compared with: by default the plain
    student (`ce`), else EKD, else the first group with a finished run.

    Raises:
        UserError: If no block has the reference.
    """
    groups = group(collection)
    found = blocks(groups)
    chosen = {block.key: one.label for block in found if (one := _reference(block, reference)) is not None}
    if reference is not None and not chosen:
        labels = {one.label for one in groups if one.n}
        raise unknown_name("--reference", reference, labels | {one.method for one in groups if one.n})
    damaged = [line for run in collection.runs for line in damage(run)]
    notes = (*collection.problems, *damaged, *_notes(groups, found))
    answers = tuple(answer(block) for block in found if block.done)
    return Report(title, collection, tuple(groups), tuple(found), chosen, answers, notes)


def machine(provenance: Mapping[str, Any]) -> str:
    """E.g. `AMD EPYC (AVX512), 1 thread, torch 2.14.1`."""
    hardware, packages = provenance.get("hardware") or {}, provenance.get("packages") or {}
    if not hardware:
        return kind_of_machine(provenance)
    threads = plural(hardware.get("threads") or 0, "thread")
    return ", ".join((kind_of_machine(provenance), threads, f"torch {packages.get('torch')}"))


def kind_of_machine(provenance: Mapping[str, Any]) -> str:
    """The processor and the GPUs, which determine rounding, e.g. `1 × NVIDIA H100, AMD EPYC (AVX512)`.

    A run that was resumed on another kind of machine names both: `A, then B`.
    """
    starts = (provenance, *(provenance.get("resumed") or ()))
    return ", then ".join(dict.fromkeys(_kind(one.get("hardware") or {}) for one in starts))


def _kind(hardware: Mapping[str, Any]) -> str:
    if not hardware:
        return "unknown hardware"
    gpus = Counter(hardware.get("gpus") or [])
    processor = f"{hardware.get('cpu')} ({hardware.get('cpu_capability')})"
    return ", ".join([*(f"{count} × {gpu}" for gpu, count in gpus.items()), processor])


def _reference(block: Block, name: str | None) -> Group | None:
    """The group with this label or method; without a name the plain student, EKD, or the first finished group."""
    if name is not None:
        exact = [one for one in block.done if one.label == name]
        return exact[0] if exact else strongest([one for one in block.done if one.method == name])
    for method in ("ce", "ekd"):
        own = [one for one in block.done if one.method == method]
        if own:
            return min(own, key=lambda one: (len(one.label), one.label))
    return next(iter(block.done), None)


def _notes(groups: Sequence[Group], found: Sequence[Block]) -> list[str]:
    notes = []
    for one in groups:
        for run in one.duplicates:
            seed = int(run.get("seed"))
            newest = next(other.name for other in one.done if int(other.get("seed")) == seed)
            notes.append(f"{run.name} and {newest}: {one.label}, seed {seed}, twice; the newer one, {newest}, counts")
    alike: dict[tuple[str, float | None], list[Block]] = defaultdict(list)
    for block in found:
        alike[block.data, block.fraction].append(block)
    for (data, fraction), same in alike.items():
        if len(same) > 1:
            share = "" if fraction is None else f", {100 * fraction:.4g} %"
            notes.append(
                f"{data}{share}: the runs follow {len(same)} protocols, which are neither averaged nor compared with "
                f"each other: {'; '.join(block.title for block in same)}"
            )
    for block in found:
        if correction(block.groups):
            others = listed([one.label for one in block.groups if not one.decides])
            notes.append(
                f"{block.title}: rows that do not decide the study's question: {others}; their p values are corrected "
                "for the comparisons of all rows, those of deciding rows for the comparisons of deciding rows only"
            )
    notes += [note for block in found for note in _measured(block)]
    partial = [run for one in groups for run in one.others if run.state == "partial"]
    broken = [run for one in groups for run in one.done if run.get("evaluation_error")]
    for runs, text in (
        (partial, "used part of the data only, left out of all means"),
        (broken, "part of the evaluation failed ({}); its figures are missing"),
    ):
        if runs:
            more = f" (and {len(runs) - 1} more)" if len(runs) > 1 else ""
            notes.append(f"{runs[0].name}{more}: {text.format(runs[0].get('evaluation_error'))}")
    return notes


def _measured(block: Block) -> list[str]:
    """Notes on figures that the runs of a block measured differently."""
    notes = []
    for what, (starts, conditions) in MEASURED.items():
        runs = [
            run
            for one in block.groups
            for run in one.done
            if any(key.startswith(starts) and value is not None for key, value in (run.result or {}).items())
        ]
        found = disagreements(runs, conditions)
        if found:
            words = [f"{key.replace('_', ' ')} {', '.join(map(_words, found[key]))}" for key in found]
            notes.append(
                f"{block.title}: {what} were measured differently ({'; '.join(words)}) and are not comparable "
                "between settings; settings whose own runs differ show none"
            )
    return notes


def _words(value: Any) -> str:
    return (" ".join(map(str, value)) or "none") if isinstance(value, list) else str(value)


def summary(report: Report) -> dict[str, Any]:
    """The content of the page as JSON: answers, rows and differences of every block, runs that do not count."""
    return {
        "title": report.title,
        "lead": report.lead,
        "machines": list(report.machines),
        "runs": {state: report.collection.count(state) for state in STATES},
        "blocks": [
            {
                "key": block.key,
                "title": block.title,
                "protocol": asdict(block.protocol),
                "teachers": [dict(teacher) for teacher in block.teachers],
                "reference": report.reference.get(block.key),
                "answer": _answer(told) if (told := report.answer(block)) else None,
                "rows": [record(row) for row in report.rows[block.key]],
            }
            for block in report.blocks
        ],
        "not_done": [
            {"run": run.name, "setting": one.label, "seed": run.get("seed"), "state": run.state, "error": run.error}
            for run, one in report.not_counted
        ],
        "notes": list(report.notes),
    }


def _answer(answer: Answer) -> dict[str, Any]:
    return {
        "subject": answer.subject.label if answer.subject else None,
        "headline": answer.headline,
        "findings": [
            {
                "role": finding.role,
                "other": finding.other.label,
                "verdict": finding.verdict,
                "difference": difference_record(finding.difference) if finding.difference else None,
                "sentence": finding.sentence,
            }
            for finding in answer.findings
        ],
        "remarks": list(answer.remarks),
    }
