from __future__ import annotations

import json

import pytest

from ekd_lightning.reporting.tables import (
    Cell,
    half_width,
    methods_table,
    paired_difference,
    percent,
    read_results,
    short_table,
    summarise,
)


def result(method, seed, accuracy, best=None, branches=(0.5,), **more):
    return {
        "method": method,
        "seed": seed,
        "test_accuracy": accuracy,
        "test_accuracy_best": best,
        "test_branch_accuracy": list(branches),
        "num_branches": len(branches),
        "num_teachers": 3,
        "test_nll": 1.0,
        "test_ece": 0.1,
        "num_parameters": 1234567,
        "macs": 12_340_000,
        **more,
    }


RESULTS = [
    result("ekd", 0, 0.79, best=0.78, branches=(0.7, 0.8), test_nll=0.5),
    result("ekd", 1, 0.81, best=0.80, branches=(0.6, 0.7), test_nll=0.7),
    result("ekd", 2, 0.80, branches=(0.7, 0.7), test_nll=0.6),
    result("kd", 2, 0.77),
    result("kd", 0, 0.78),
    result("ce", 7, 0.70),
]


def test_mean_and_sample_deviation():
    assert summarise([1.0, 2.0, 4.0]) == Cell(pytest.approx(7 / 3), pytest.approx((7 / 3) ** 0.5), 3)
    assert summarise(iter([5.0])) == Cell(5.0, None, 1)
    with pytest.raises(ValueError, match="no values"):
        summarise([])


def test_differences_are_paired_by_seed():
    cell = paired_difference(RESULTS, "ekd", "kd")  # seeds 0 and 2: 0.01 and 0.03
    assert (cell.mean, cell.n) == (pytest.approx(0.02), 2)
    assert cell.std == pytest.approx(0.02 / 2**0.5)
    assert paired_difference(RESULTS, "ekd", "ce") is None
    assert paired_difference(RESULTS, "ekd", "none") is None


@pytest.mark.parametrize(
    ("cell", "signed", "text"),
    [
        (Cell(0.78021, 0.00312, 3), False, "78.02 ± 0.31"),
        (Cell(0.78, None, 1), False, "78.00"),
        (Cell(0.0123, None, 1), True, "+1.23"),
        (Cell(-0.0123, 0.001, 2), True, "-1.23 ± 0.10"),
        (None, True, "–"),
    ],
)
def test_percent(cell, signed, text):
    assert percent(cell, signed=signed) == text


def test_the_table_against_numbers_by_hand():
    lines = methods_table(RESULTS, ["kd", "ekd", "gone", "ce"], "kd").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert {len(row) for row in rows} == {12}
    assert rows[2] == [
        "`kd`",
        "1",
        "3",
        "77.50 ± 0.71",
        "–",
        "–",
        "50.00 ± 0.00",
        "1.000",
        "0.100",
        "1,234,567",
        "12.3 M",
        "2",
    ]
    assert rows[3][:8] == [
        "`ekd`",
        "2",
        "3",
        "80.00 ± 1.00",
        "+2.00 ± 1.41",
        "79.00 ± 1.41",
        "70.00 ± 5.00",
        "0.600",
    ]
    assert rows[3][-1] == "3"
    assert rows[4] == ["`gone`", "", "", "missing", "", "", "", "", "", "", "", "0"]
    assert rows[5][4] == "–"  # no common seed


def test_only_results_of_runs_that_are_done_are_read(tmp_path):
    for name, state in (("b", "done"), ("a", "done"), ("c", "failed"), ("d", "running"), ("e", None)):
        folder = tmp_path / "deep" / name
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps({"name": name}))
        if state:
            (folder / "status.json").write_text(json.dumps({"state": state}))
    assert [r["name"] for r in read_results(tmp_path)] == ["a", "b"]


def test_runs_on_a_part_of_the_data_are_left_out(tmp_path):
    for name, partial in (("a", True), ("b", False)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "status.json").write_text('{"state": "done"}')
        (tmp_path / name / "result.json").write_text(json.dumps({"name": name, "partial": partial}))
    assert [r["name"] for r in read_results(tmp_path)] == ["b"]


def test_two_runs_with_one_seed_are_not_mixed():
    rows = [result("ekd", 0, 0.5), result("ekd", 0, 0.6), result("ce", 0, 0.4)]
    with pytest.raises(ValueError, match="more than one run with seed 0"):
        paired_difference(rows, "ekd", "ce")


def test_the_short_table_shows_what_is_missing():
    lines = short_table(
        [result("ekd", 0, 0.5, num_parameters=1000, macs=2_000_000)], ["ce", "ekd"]
    ).splitlines()
    assert lines[2] == "| `ce` | missing | | | 0 |"
    assert lines[3] == "| `ekd` | 50.00 | 1,000 | 2.0 M | 1 |"


def test_the_interval_is_students():
    # t(0.975, 2 degrees of freedom) = 4.302653 and t(0.95, 4) = 2.131847, from any table
    assert half_width(Cell(5.0, 1.0, 3)) == pytest.approx(4.302653 / 3**0.5, rel=1e-6)
    assert half_width(Cell(5.0, 2.0, 5), level=0.9) == pytest.approx(2 * 2.131847 / 5**0.5, rel=1e-6)
    assert half_width(Cell(5.0, None, 1)) is None
