from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from ekd_lightning.errors import UserError
from ekd_lightning.reporting.comparison import Run, check_protocol, compare
from ekd_lightning.reporting.comparison_table import csv_text, json_text, markdown, records, rich_table
from ekd_lightning.reporting.estimates import holm

POOL = [{"id": "a", "sha256": "a" * 64}, {"id": "b", "sha256": "b" * 64}]


def run(row, seed, accuracy, fraction=0.1, **more):
    teachers = more.pop("teachers", [] if row == "ce" else POOL)
    result = {
        "data": "digits",
        "seed": seed,
        "fraction": fraction,
        "subset_sha256": "s" * 64,
        "epochs": 1,
        "epochs_done": 1,
        "batch_size": 32,
        "steps": 4,
        "student": "resnet8",
        "num_branches": 1 if row in ("ce", "kd_mean") else 3,
        "num_teachers": len(teachers),
        "teachers": teachers,
        "test_accuracy": accuracy,
        "num_parameters": 1234567,
        "num_adapter_parameters": 0,
        "macs": 12_340_000,
        "train_seconds": 10.0 + seed,
        **more,
    }
    return Run(row, fraction, seed, "done", result)


ACCURACIES = {
    "ce": [0.70, 0.72, 0.71, 0.69],
    "kd_mean": [0.75, 0.76, 0.75, 0.75],
    "ekd": [0.76, 0.79, 0.75, 0.77],
}
RUNS = [run(row, seed, value) for row, values in ACCURACIES.items() for seed, value in enumerate(values)]


def row_of(runs, name):
    (block,) = compare(runs, "digits")
    return next(row for row in block.rows if row.name == name)


def test_differences_are_paired_by_seed_and_corrected_over_the_block():
    row = row_of(RUNS, "kd_mean")
    differences = np.array(ACCURACIES["kd_mean"]) - np.array(ACCURACIES["ce"])
    raw = [stats.ttest_rel(ACCURACIES[name], ACCURACIES["ce"]).pvalue for name in ("kd_mean", "ekd")]
    found = row.differences["ce"]
    assert found.mean == pytest.approx(differences.mean())
    assert found.p == pytest.approx(raw[0])
    assert found.p_holm == pytest.approx(holm(raw)[0])
    assert set(row.differences) == {"ce", "ekd"}
    assert set(row_of(RUNS, "ekd").differences) == {"ce"}


def test_only_common_seeds_are_paired():
    found = row_of(RUNS[:2] + [r for r in RUNS if r.row == "ekd"], "ekd").differences["ce"]
    assert found.n == 2
    assert found.mean == pytest.approx((0.06 + 0.07) / 2)


def test_failed_and_missing_runs_stay_in_the_table():
    runs = [
        *RUNS[:-2],
        Run("ekd", 0.1, 2, "failed", error="no such stage | x"),
        Run("ekd", 0.1, 3, "missing"),
    ]
    row = row_of(runs, "ekd")
    assert row.problems == "failed 1 of 4: no such stage | x; missing 1 of 4"
    assert row.accuracy.n == 2
    nothing = row_of([*RUNS[:4], Run("ekd", 0.1, 0, "failed", error="e")], "ekd")
    assert (nothing.accuracy, nothing.differences, nothing.problems) == (
        None,
        {"ce": None},
        "failed 1 of 1: e",
    )
    page = markdown(compare(runs, "digits"))
    assert "failed 1 of 4: no such stage \\| x; missing 1 of 4" in page


def test_a_run_that_saw_a_part_of_the_data_does_not_count():
    runs = [*RUNS[:-1], Run("ekd", 0.1, 3, "partial", RUNS[-1].result)]
    assert row_of(runs, "ekd").accuracy.n == 3
    assert row_of(runs, "ekd").problems == "partial 1 of 4"


@pytest.mark.parametrize(
    ("field", "value"),
    [("steps", 5), ("subset_sha256", "t" * 64), ("epochs", 2), ("batch_size", 64), ("views", "none")],
)
def test_runs_that_went_different_ways_are_refused_by_name(field, value):
    other = run("ekd", 0, 0.7, **{field: value})
    with pytest.raises(UserError, match=rf"ce-f0.1-s0 and ekd-f0.1-s0 differ in {field} \("):
        compare([*RUNS[:4], other], "digits")


def test_rows_may_have_other_students_but_a_row_only_one():
    compare([*RUNS, run("kd_mean_macs", 0, 0.7, student="resnet14", num_parameters=9)], "digits")
    with pytest.raises(UserError, match=r"ce-f0\.1-s0 and ce-f0.1-s9 differ in num_parameters"):
        compare([*RUNS[:4], run("ce", 9, 0.7, num_parameters=9)], "digits")


def test_pools_of_teachers_must_agree_unless_the_method_chose_one_of_them():
    chosen = run("kd_best", 0, 0.7, teachers=POOL[1:], teacher_choice="best", teacher="b")
    check_protocol([*RUNS, chosen])
    fewer = run("kd_mean_b", 0, 0.7, teachers=POOL[1:])
    with pytest.raises(UserError, match="differ in teachers"):
        check_protocol([*RUNS, fewer])
    foreign = run("kd_best", 0, 0.7, teachers=[{"sha256": "c"}], teacher_choice="best")
    with pytest.raises(UserError, match=r"kd_best-f0\.1-s0 and kd_mean-f0.1-s0 differ in teachers"):
        check_protocol([*RUNS, foreign])


def test_fractions_are_blocks_of_their_own():
    other = [run(r.row, r.seed, 0.5, fraction=0.05, steps=2) for r in RUNS]
    assert [block.fraction for block in compare([*RUNS, *other], "digits")] == [0.05, 0.1]


def test_all_forms_of_the_table_say_the_same():
    blocks = compare(RUNS, "digits")
    flat = {record["row"]: record for record in records(blocks)}
    assert flat["kd_mean"]["test_accuracy"] == pytest.approx(0.7525)
    read = {row["row"]: row for row in csv.DictReader(io.StringIO(csv_text(blocks)))}
    assert float(read["ekd"]["minus_ce"]) == flat["ekd"]["minus_ce"] == pytest.approx(0.0625)
    data = {record["row"]: record for record in json.loads(json_text(blocks))}
    assert data["ekd"]["by_seed"] == {"0": 0.76, "1": 0.79, "2": 0.75, "3": 0.77}
    line = next(line for line in markdown(blocks).splitlines() if line.startswith("| `kd_mean`"))
    assert "75.25 ± 0.50" in line
    assert "12.3 M" in line
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(rich_table(blocks[0]))
    assert "75.25 ± 0.50" in console.export_text()
    heads = [line.count(" | ") for line in markdown(blocks).splitlines() if line.startswith("| ")]
    assert len(set(heads)) == 1


def test_one_seed_says_not_enough_runs():
    page = markdown(compare([r for r in RUNS if r.seed == 0], "digits"))
    assert page.count("not enough runs") == 4


def test_a_chosen_teacher_is_named():
    chosen = run("kd_best", 0, 0.7, teachers=POOL[1:], teacher_choice="best", teacher="b")
    flat = {record["row"]: record["teacher"] for record in records(compare([*RUNS, chosen], "digits"))}
    assert flat == {"ce": None, "kd_mean": "all", "ekd": "all", "kd_best": "b"}


def test_of_a_chain_the_pool_counts_and_the_assistants_time_is_shown():
    links = [{"teachers_sha256": ["a" * 64]}, {"teachers_sha256": ["x"]}]
    more = {
        "teachers": [{"sha256": "x"}],
        "teacher_choice": "best",
        "teacher": "a",
        "chain_stored_seconds": 42.0,
    }
    row = row_of([*RUNS, run("takd", 0, 0.7, chain=links, **more)], "takd")
    assert "+ 42 for assistants" in markdown(compare([*RUNS, *row.runs], "digits"))
    with pytest.raises(UserError, match="differ in teachers"):
        compare([*RUNS, run("takd", 0, 0.7, chain=[{"teachers_sha256": ["c"]}], **more)], "digits")


def test_the_same_difference_in_every_pair_counts_among_the_tests():
    """It has no p value to show, but it was tested: the others are corrected for it."""
    accuracies = {"ce": (0.5, 0.6, 0.7), "ekd": (0.6, 0.7, 0.8), "kd_mean": (0.52, 0.66, 0.74)}
    runs = [run(row, seed, value) for row, values in accuracies.items() for seed, value in enumerate(values)]
    (block,) = compare(runs, "digits")
    rows = {row.name: row.differences["ce"] for row in block.rows if row.name != "ce"}
    assert rows["ekd"].p is None
    assert rows["ekd"].p_holm is None
    alone = rows["kd_mean"].p
    assert rows["kd_mean"].p_holm == pytest.approx(
        alone
    )  # the smallest p of 2 is the other's; this one is times 1
    third = [run("kd", seed, value) for seed, value in enumerate((0.53, 0.61, 0.72))]
    (block,) = compare([*runs, *third], "digits")
    found = {row.name: row.differences["ce"] for row in block.rows if row.name in ("kd", "kd_mean")}
    smallest = min(found.values(), key=lambda one: one.p)
    assert smallest.p_holm == pytest.approx(min(1.0, 2 * smallest.p))
