"""The table at the end of a sweep, against statistics' own figures."""

from __future__ import annotations

import io
import statistics
from pathlib import Path

import pytest
from rich.console import Console

from ekd_lightning.runs.collection import RunEntry
from ekd_lightning.runs.directory import RunState
from ekd_lightning.runs.result import Result
from ekd_lightning.studies.sweep import MOST_ROWS, Job, Standing, seed_groups, sweep_tables

FOLDER = Path("/sweep")


def row(name: str, accuracy: float | None, state: str = "done", **varied: str) -> Standing:
    result = None
    if accuracy is not None:
        result = Result("ekd", "digits", 0, 0.1, accuracy, val_accuracy=0.5, train_seconds=4.25)
    job = Job(FOLDER / name, tuple(f"{key}={value}" for key, value in varied.items()))
    return Standing(job, RunEntry(job.directory, name, RunState(state), result))


def text(*tables) -> list[list[str]]:
    out = io.StringIO()
    console = Console(file=out, width=200)
    for table in tables:
        console.print(table)
    return [line.split() for line in out.getvalue().splitlines() if line.strip()]


def test_a_row_per_run_with_the_highest_accuracy_marked():
    rows = [row("0", 0.5, method="ce"), row("1", 0.7123, method="ekd"), row("2", None, "failed", method="kd")]
    lines = text(*sweep_tables(rows, FOLDER))
    assert ["0", "ce", "50.00", "50.00", "4.2", "done"] in lines
    assert ["1", "ekd", "★", "71.23", "50.00", "4.2", "done"] in lines
    assert ["2", "kd", "–", "–", "–", "failed"] in lines


def test_equal_runs_are_equally_high():
    lines = text(*sweep_tables([row("0", 0.5, a="1"), row("1", 0.5, a="2"), row("2", 0.1, a="3")], FOLDER))
    assert sum("★" in line for line in lines) == 2


def test_a_single_run_is_not_the_best_of_anything():
    assert not any("★" in line for line in text(*sweep_tables([row("0", 0.5)], FOLDER)))


def test_means_over_seeds_and_the_mark_goes_there():
    values = {"ce": [0.5, 0.52, 0.57], "ekd": [0.6, 0.62]}
    rows = [
        row(f"{method}{seed}", value, method=method, seed=str(seed))
        for method, found in values.items()
        for seed, value in enumerate(found)
    ]
    rows.append(row("ekd2", None, "stopped", method="ekd", seed="2"))
    runs, means = sweep_tables(rows, FOLDER)
    assert not any("★" in line for line in text(runs))
    lines = text(means)
    for method, found in values.items():
        spread = f"{100 * statistics.stdev(found):.2f}"
        mark = ["★"] if method == "ekd" else []
        expected = [method, *mark, f"{100 * statistics.fmean(found):.2f}", "±", spread, str(len(found)), "4.2"]
        assert expected in lines


def test_where_only_seeds_vary_there_is_one_mean():
    _, means = sweep_tables([row("0", 0.5, seed="0"), row("1", 0.7, seed="1")], FOLDER)
    assert ["60.00", "±", "14.14", "2", "4.2"] in text(means)


def test_one_seed_has_no_spread():
    _, means = sweep_tables([row("0", 0.5, seed="0"), row("1", None, "failed", seed="1")], FOLDER)
    assert ["50.00", "1", "4.2"] in text(means)


def test_a_key_that_a_run_does_not_set_is_its_own_group():
    rows = [row("0", 0.5, seed="0"), row("1", 0.6, seed="0", lr="1")]
    assert list(seed_groups(rows)) == [("–",), ("1",)]


@pytest.mark.parametrize("number", [MOST_ROWS, MOST_ROWS + 7])
def test_long_tables_are_cut_but_not_what_went_wrong(number):
    rows = [row(str(i), 0.5, a=str(i)) for i in range(number)] + [row("bad", None, "failed", a="x")]
    (table,) = sweep_tables(rows, FOLDER)
    assert table.row_count == MOST_ROWS + 1
    assert ["bad", "x", "–", "–", "–", "failed"] in text(table)
    said = " ".join(word for line in text(table) for word in line)
    assert ("7 more runs are done" in said) == (number > MOST_ROWS)
