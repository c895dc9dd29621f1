"""Methods compared over seeds: paired differences with intervals and corrected p values, block by block.

A block holds the runs of one data set and fraction. Runs that did not go the same way (other images, steps or
teachers) are refused, failed and missing ones are counted and kept in sight.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ekd_lightning.errors import UserError
from ekd_lightning.reporting.estimates import Difference, Estimate, estimate, paired_by_seed
from ekd_lightning.reporting.setups import taught_by

REFERENCES = ("ce", "ekd")
"""Rows that differences are taken to, where a study has them."""

PROTOCOL = (
    "data",
    "fraction",
    "subset_sha256",
    "num_train_images",
    "num_val_images",
    "views",
    "mixup",
    "cutmix",
    "epochs",
    "epochs_done",
    "batch_size",
    "steps",
    "precision",
    "num_devices",
)
"""Fields of a result that runs must share to be compared."""
ROW = (
    "method",
    "student",
    "num_branches",
    "split_after",
    "ensemble",
    "temperature",
    "assignment",
    "assistants",
    "num_teachers",
    "num_parameters",
    "macs",
    "teacher_choice",
)
"""Fields of a result that runs of one row must share."""


@dataclass(frozen=True)
class Run:
    """One run of a study.

    Attributes:
        row: Name of its row.
        fraction: Share of the training images.
        seed: Its seed.
        state: `done`, `failed`, `partial` (saw a part of the data only), `stopped` or `missing`.
        result: Content of result.json; None unless done or partial.
        error: First line of what went wrong; None unless failed.
    """

    row: str
    fraction: float
    seed: int
    state: str
    result: Mapping[str, Any] | None = None
    error: str | None = None

    @property
    def name(self) -> str:
        """Name of the run's directory."""
        return f"{self.row}-f{self.fraction:g}-s{self.seed}"


@dataclass(frozen=True)
class Row:
    """One line of a block; figures are None where no run is done."""

    name: str
    runs: tuple[Run, ...]
    accuracy: Estimate | None
    differences: Mapping[str, Difference | None] = field(default_factory=dict)

    @property
    def done(self) -> tuple[Mapping[str, Any], ...]:
        """Results of the runs that are done, by seed."""
        return tuple(run.result for run in self.runs if run.state == "done" and run.result is not None)

    def distinct(self, key: str) -> list[Any]:
        """The different values of a field of the results, in order of appearance; None is no value."""
        return list(dict.fromkeys(value for r in self.done if (value := r.get(key)) is not None))

    def mean(self, key: str) -> float | None:
        """Mean of a field over the runs that have it."""
        found = estimate(float(r[key]) for r in self.done if r.get(key) is not None)
        return found.mean if found else None

    @property
    def problems(self) -> str:
        """What became of the runs that are not done, in words; empty if all are."""
        told = []
        for state in ("failed", "partial", "stopped", "missing"):
            those = [run for run in self.runs if run.state == state]
            if those:
                error = next((f": {run.error}" for run in those if run.error), "")
                told.append(f"{state} {len(those)} of {len(self.runs)}{error}")
        return "; ".join(told)


@dataclass(frozen=True)
class Block:
    """All rows at one data set and fraction."""

    data: str
    fraction: float
    rows: tuple[Row, ...]
    references: tuple[str, ...]


def compare(runs: Sequence[Run], data: str) -> list[Block]:
    """Puts the runs of a study into blocks and tests the differences in each.

    Args:
        runs: All runs that the study asks for, done or not; rows keep the order of their first appearance.
        data: Name of the data set.

    Returns:
        One block per fraction, ascending.

    Raises:
        UserError: If two runs of a block went different ways.
    """
    blocks = []
    for fraction in sorted({run.fraction for run in runs}):
        inside = [run for run in runs if run.fraction == fraction]
        check_protocol(inside)
        names = list(dict.fromkeys(run.row for run in inside))
        references = tuple(name for name in REFERENCES if name in names)
        rows = {name: _row(name, inside) for name in names}
        tested = {reference: _differences(rows, reference) for reference in references}
        whole = [
            Row(row.name, row.runs, row.accuracy, {r: tested[r].get(name) for r in references if r != name})
            for name, row in rows.items()
        ]
        blocks.append(Block(data, fraction, tuple(whole), references))
    return blocks


def _row(name: str, runs: Iterable[Run]) -> Row:
    own = tuple(sorted((run for run in runs if run.row == name), key=lambda run: run.seed))
    row = Row(name, own, None)
    return Row(name, own, estimate(float(result["test_accuracy"]) for result in row.done))


def _accuracies(row: Row) -> dict[int, float]:
    return {r.seed: float(r.result["test_accuracy"]) for r in row.runs if r.state == "done" and r.result}


def _differences(rows: Mapping[str, Row], reference: str) -> dict[str, Difference]:
    """Every other row against the reference; rows without a common seed are left out."""
    return paired_by_seed({name: _accuracies(row) for name, row in rows.items()}, reference)


def check_protocol(runs: Sequence[Run]) -> None:
    """Refuses a block whose runs went different ways.

    Images, views, epochs, batch size and steps must be the same for all of them. The pool of teachers must be the
    same for all that were taught by all of it; a method that was given one teacher must have it from this pool.
    Within a row, method, weights of the terms and networks must be the same, too.

    Raises:
        UserError: Naming the field and two runs.
    """
    done = [run for run in runs if run.state == "done" and run.result is not None]
    for field_name in PROTOCOL:
        _same(done, field_name, [(run.result or {}).get(field_name) for run in done])
    for name in dict.fromkeys(run.row for run in done):
        own = [run for run in done if run.row == name]
        weights = {key for run in own for key in run.result or {} if key.startswith("weight_")}
        for field_name in (*ROW, *sorted(weights)):
            _same(own, field_name, [(run.result or {}).get(field_name) for run in own])
    taught = [(run, hashes) for run in done if (hashes := taught_by(run.result or {}))]
    whole = [(run, hashes) for run, hashes in taught if not _chose(run)]
    _same([run for run, _ in whole], "teachers", [hashes for _, hashes in whole])
    for run, hashes in taught:
        if whole and not set(hashes) <= set(whole[0][1]):
            _refuse("teachers", run, whole[0][0], hashes, whole[0][1])


def _chose(run: Run) -> bool:
    """Whether the method was given one teacher of the pool."""
    return (run.result or {}).get("teacher_choice") in ("best", "first")


def _same(runs: Sequence[Run], field_name: str, values: Sequence[Any]) -> None:
    for run, value in zip(runs, values, strict=True):
        if value != values[0]:
            _refuse(field_name, runs[0], run, values[0], value)


def _refuse(field_name: str, one: Run, other: Run, value: Any, different: Any) -> None:
    def short(what: Any) -> str:
        if isinstance(what, list):
            return "[" + ", ".join(short(item) for item in what) + "]"
        return str(what)[:12]

    raise UserError(
        f"{one.name} and {other.name} differ in {field_name} ({short(value)}, {short(different)}): "
        "runs that went different ways are not compared in one table"
    )
