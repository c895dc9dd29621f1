"""Runs whose folders are not at hand, but their records are, put together with those of a study that goes on elsewhere.

The file of the earlier runs holds `protocol` (what is known of how they were made), `machine`, and `rows`, as
`ekd-compare` writes them to comparison.json. Of a run an accuracy is left, of a row its cost and teacher.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ekd_lightning.reporting.blocks import SAME_IN_A_ROW
from ekd_lightning.reporting.tables import STATE_NAMES
from ekd_lightning.runs.collection import RunEntry
from ekd_lightning.runs.directory import RunState
from ekd_lightning.runs.protocol import Protocol
from ekd_lightning.runs.result import Result
from ekd_lightning.studies.comparison import Runs

COST = ("num_branches", "num_teachers", "num_parameters", "num_adapter_parameters", "macs", "steps")
NEEDED = ("data", "fraction", "subset_sha256", "epochs", "batch_size", "precision")
"""What must be known of earlier runs, and be the same."""
_STATES = {name: state for state, name in STATE_NAMES.items()}


@dataclass(frozen=True)
class Repeat:
    """A run that was made twice, on two machines.

    Attributes:
        row: Its row.
        seed: Its seed.
        earlier: Test accuracy in [0, 1].
        again: The same of the second run, or what became of it.
    """

    row: str
    seed: int
    earlier: float
    again: float | str


def merged(runs: Runs, earlier: Mapping[str, Any]) -> tuple[Runs, list[Repeat]]:
    """The earlier runs, and those of the study that are not among them.

    Args:
        runs: Of the study at one fraction, from `page_parts.read_study_runs`.
        earlier: Content of the earlier runs' file.

    Returns:
        All runs, and those that were made a second time. Whatever came out then, the first counts.

    Raises:
        ValueError: If the file does not say how its runs were made, or they went another way than those of the study.
    """
    every = [run for own in runs.values() for run in own.values()]
    done = [run.result for run in every if run.state is RunState.DONE and run.result]
    if not done:
        raise ValueError("the study has no finished run")
    for key in NEEDED:
        if key not in earlier.get("protocol", {}):
            raise ValueError(f"the earlier runs' file does not know their {key}")
    for key, value in earlier["protocol"].items():
        for result in done:
            _same(key, value, result.get(key))
    known = {row: dict(own) for row, own in runs.items()}
    made = {key: earlier["protocol"].get(key) for key in ("threads", "torch")}
    repeats = []
    for record in earlier["rows"]:
        row = known.setdefault(record["row"], {})
        base = made | _result(record, done, [run.result for run in row.values() if run.result])
        for number, outcome in record["by_seed"].items():
            seed, name = int(number), f"{record['row']}-f{record['fraction']:g}-s{number}"
            place = Path("earlier") / name
            if not isinstance(outcome, float):  # what failed then is not hidden, unless it was made up for
                row.setdefault(seed, RunEntry(place, name, _STATES[outcome]))
                continue
            again = row.get(seed)
            if again and again.state is not RunState.PLANNED:
                second = again.get("test_accuracy") if again.state is RunState.DONE else again.state.value
                repeats.append(Repeat(record["row"], seed, outcome, second))
            result = {**base, "seed": seed, "test_accuracy": outcome, "machine": earlier["machine"]}
            row[seed] = RunEntry(place, name, RunState.DONE, Result.of(result))
    return known, repeats


def _result(
    record: Mapping[str, Any], done: Sequence[Mapping[str, Any]], own: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """What the runs of an earlier row have in common; of its method only what the study's runs of the row know."""
    _same("fraction", record["fraction"], done[0]["fraction"])
    _same("data", record["data"], done[0]["data"])
    for key in COST if own else ("steps",):
        if record[key] is not None:
            _same(f"{key} of {record['row']}", record[key], (own or done)[0][key])
    first = own[0] if own else {}
    kept = {key: value for key, value in first.items() if key in SAME_IN_A_ROW or key.startswith("weight_")}
    teacher = None if record["teacher"] == "all" else record["teacher"]
    return {
        **{part.name: done[0].get(part.name) for part in fields(Protocol)},
        "method": record["row"],
        **kept,
        **{key: record[key] for key in (*COST, "train_seconds")},
        "teacher": teacher,
        "teachers": [],
        "chain_stored_seconds": record["assistants_seconds"],
    }


def _same(what: str, earlier: Any, now: Any) -> None:
    """Hashes may be known by their first digits."""
    if earlier != now and not (what.endswith("sha256") and earlier and str(now).startswith(str(earlier))):
        raise ValueError(f"{what} was {earlier}, is {now}")
