"""Runs that an earlier page recorded in its .json, put together with those of a study that goes on elsewhere.

An accuracy and the cost of its row are all that is left of such a run; the study's own runs say the rest.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ekd_lightning.cli.study_runs import RUNS
from ekd_lightning.reporting.comparison import PROTOCOL, Run

COST = ("num_branches", "num_teachers", "num_parameters", "num_adapter_parameters", "macs", "steps")
AVERAGED = ("train_seconds",)


@dataclass(frozen=True)
class Repeat:
    """A run that was made twice, on two machines; accuracies in [0, 1]."""

    row: str
    seed: int
    earlier: float
    again: float


def machine(provenance: dict[str, Any]) -> str:
    """The processor a run was made on."""
    return f"{provenance['hardware']['cpu']} ({provenance['hardware']['cpu_capability']})"


def with_machines(runs: Iterable[Run], folder: Path) -> list[Run]:
    """The runs of a study, each with the key `machine` in its result."""

    def told(run: Run) -> Run:
        if run.result is None:
            return run
        provenance = json.loads((folder / RUNS / run.name / "provenance.json").read_text())
        return replace(run, result={**run.result, "machine": machine(provenance)})

    return [told(run) for run in runs]


def merged(runs: Sequence[Run], records: Sequence[dict[str, Any]]) -> tuple[list[Run], list[Repeat]]:
    """The earlier runs, and those of the study that are not among them.

    Args:
        runs: Of the study; at least one is done.
        records: Of the earlier page, one per row, with `by_seed` and `machines`.

    Returns:
        All runs, and those of the study that repeat an earlier one. Whatever came out, the earlier one counts.

    Raises:
        ValueError: If a row cost something else then, or took other steps.
    """
    done = [run for run in runs if run.state == "done" and run.result]
    known = {(run.row, run.fraction, run.seed): run for run in runs}
    repeats = []
    for record in records:
        made = {seed: value for seed, value in record["by_seed"].items() if isinstance(value, float)}
        if not made:
            continue
        own = next((run.result for run in done if run.row == record["row"]), None)
        common = {key: (done[0].result or {}).get(key) for key in PROTOCOL}
        for key in COST:
            there = own.get(key) if own else common.get(key, record[key])
            if there != record[key]:
                raise ValueError(f"{record['row']}: {key} was {record[key]}, is {there}")
        cost = {key: record[key] for key in (*COST, *AVERAGED)}
        for seed, accuracy in made.items():
            place = (record["row"], record["fraction"], int(seed))
            again = known.get(place)
            if again and again.state == "done" and again.result:
                repeats.append(Repeat(place[0], place[2], accuracy, float(again.result["test_accuracy"])))
            result = {"teachers": [], **common, **(own or {}), **cost}
            result |= {"seed": int(seed), "test_accuracy": accuracy, "machine": record["machines"][seed]}
            known[place] = Run(*place, "done", result)
    return list(known.values()), repeats
