"""Estimates that figures and page draw, against scipy, NumPy and brute force."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_runs import collection, entry, result, write_run
from rich_runs import arrays
from scipy import stats

from ekd_lightning.methods.assignment import make_assignment
from ekd_lightning.reporting import details
from ekd_lightning.reporting.blocks import blocks
from ekd_lightning.reporting.estimates import SHARE, Estimate, estimate, holm, paired, percent
from ekd_lightning.reporting.groups import group
from ekd_lightning.runs.collection import collect

NUMBERS = st.floats(-1e3, 1e3, allow_nan=False)


@given(st.lists(NUMBERS, min_size=1, max_size=8))
def test_an_estimate_is_the_t_interval(values):
    found = estimate(values)
    assert found.n == len(values)
    assert found.mean == pytest.approx(np.mean(values), abs=1e-9)
    if len(values) < 3:
        assert found.half is None
        assert found.low == found.high == found.mean
    elif np.ptp(values) > 1e-6:
        low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
        assert (found.low, found.high) == pytest.approx((low, high), rel=1e-6, abs=1e-9)


@given(st.lists(st.floats(0, 1), min_size=3, max_size=8), st.lists(st.floats(0, 1), min_size=3, max_size=8))
def test_intervals_of_shares_and_of_their_differences_stay_in_range(ours, theirs):
    found = estimate(ours, SHARE)
    assert 0 <= found.low <= found.mean + 1e-12
    assert found.mean - 1e-12 <= found.high <= 1
    difference = paired([a - b for a, b in zip(ours, theirs, strict=False)])
    assert -1 <= difference.low <= difference.high <= 1


def test_what_is_not_finite_does_not_count():
    assert estimate([np.nan, np.inf]) is None
    assert estimate([np.nan, 2.0]).n == 1
    assert estimate([]) is None


def test_mean_and_sample_deviation():
    assert estimate([1.0, 2.0, 4.0]) == Estimate(pytest.approx(7 / 3), pytest.approx((7 / 3) ** 0.5), 3)
    assert estimate(iter([5.0])) == Estimate(5.0, None, 1)


def test_percent():
    assert percent(Estimate(0.78021, 0.00312, 3)) == "78.02 ± 0.31"
    assert percent(Estimate(0.78, None, 1)) == "78.00"
    assert percent(None) == "–"


def test_holm_against_a_worked_example():
    # Sorted .005 .01 .03 .04, times 4 3 2 1: .02 .03 .06 .04, and the last is raised to the one before it.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2]
    assert holm([]) == []


P_VALUES = st.lists(st.floats(0, 1), max_size=8)


@given(P_VALUES, st.randoms())
def test_holm_never_lowers_stays_within_bonferroni_and_keeps_the_order_whatever_it_is(p, random):
    found = holm(p)
    assert all(raw <= new <= min(1, len(p) * raw) + 1e-12 for raw, new in zip(p, found, strict=True))
    assert all(np.diff(np.array(found)[np.argsort(p, kind="stable")]) >= 0)
    order = list(range(len(p)))
    random.shuffle(order)
    assert holm([p[i] for i in order]) == pytest.approx([found[i] for i in order])


@given(st.lists(st.floats(-0.2, 0.2).filter(lambda x: abs(x) > 1e-3), min_size=3, max_size=8, unique=True))
def test_the_paired_test_is_that_of_the_formula(values):
    found = paired(values)
    n, mean = len(values), math.fsum(values) / len(values)
    error = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n)
    if error < 1e-9:
        return
    p = 2 * stats.t.sf(abs(mean / error), n - 1)
    assert found.mean == pytest.approx(mean, abs=1e-12)
    assert found.half == pytest.approx(stats.t.ppf(0.975, n - 1) * error)
    assert found.p == pytest.approx(p, abs=1e-9)


def test_fewer_than_three_pairs_are_too_few_and_no_spread_has_no_p():
    assert (paired([0.1, 0.3]).half, paired([0.1, 0.3]).p) == (None, None)
    assert (paired([0.1]).half, paired([0.1]).p) == (None, None)
    assert paired([0.0, 0.0, 0.0]).p == 1.0
    assert paired([0.1, 0.1, 0.1]).p is None


@pytest.mark.parametrize("images", [360, 10_000])
def test_equal_counts_of_images_have_no_spread_though_recorded_in_float32(images):
    """Accuracies come from float32: the same three images more are not the same number in every pair."""
    ours, theirs = ([np.float32((c + d) / images) for c in (287, 301, 294)] for d in (3, 0))
    found = paired([float(a) - float(b) for a, b in zip(ours, theirs, strict=True)])
    assert found.p is None
    none = paired([float(a) - float(np.float32(float(a) + 1e-8)) for a in ours])
    assert none.p == 1.0


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=12))
def test_the_front_holds_exactly_what_nothing_beats(points):
    def beaten(point):
        cost, gain = point
        return any(c <= cost and g >= gain and (c, g) != point for c, g in points)

    assert details.pareto(points) == sorted({point for point in points if not beaten(point)})


def only_group(folder: Path):
    (block,) = blocks(group(collect([folder])))
    (found,) = block.groups
    return found


@pytest.mark.parametrize(("K", "M"), [(1, 1), (2, 3), (3, 3), (4, 3), (3, 1)])
@pytest.mark.parametrize("kind", ["one_to_one", "permuted", "mean", "random"])
@pytest.mark.filterwarnings("ignore:assignment=")
def test_own_teachers_are_those_of_the_assignment(tmp_path, kind, K, M):
    write_run(tmp_path / "run", result(K=K, M=M, assignment=kind))
    rows = make_assignment(kind, K, M).tolist() if kind != "random" else [[1 / M] * M] * K
    expected = [row.index(1.0) if 1.0 in row else None for row in rows]
    assert details.own_teachers(only_group(tmp_path)) == expected


@pytest.mark.parametrize(
    ("spec", "own"),
    [
        ([[0.5, 0.5], [0.0, 1.0]], [None, 1]),
        ([1, 0], [1, 0]),
        ("1,0", [1, 0]),
        ({"schedule": [[0, "mean"], [0.5, [1, 1]]]}, [1, 1]),
        ({"schedule": [[0, "one_to_one"], [0.5, "mean"]]}, [None, None]),
    ],
)
def test_rows_lists_and_the_end_of_a_schedule_have_own_teachers_where_they_name_one(tmp_path, spec, own):
    write_run(tmp_path / "run", result(K=2, M=2, assignment=spec))
    assert details.own_teachers(only_group(tmp_path)) == own


def test_curves_are_means_over_the_runs_that_reached_an_epoch(tmp_path):
    lengths, made = (5, 5, 3), {}
    for seed, length in enumerate(lengths):
        folder = write_run(tmp_path / f"s{seed}", result(seed=seed))
        made[seed] = [0.1 * epoch + 0.01 * seed**2 for epoch in range(length)]
        with (folder / "metrics.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["step", "val/accuracy", "epoch", "test/accuracy"])
            rows.writerows([7 * epoch, value, float(epoch), ""] for epoch, value in enumerate(made[seed]))
            rows.writerow([99, "", float(length), 0.9])  # the row of the test
    found = details.curves(only_group(tmp_path))
    assert set(found) == {"val/accuracy"}
    for epoch, one in found["val/accuracy"]:
        values = [line[epoch - 1] for line in made.values() if len(line) >= epoch]
        assert (one.mean, one.n) == (pytest.approx(np.mean(values)), len(values))
    assert [epoch for epoch, _ in found["val/accuracy"]] == [1, 2, 3, 4, 5]


@given(st.integers(1, 1000))
def test_thinned_curves_keep_their_end(length):
    epochs = list(range(1, length + 1))
    kept = details.thin(epochs)
    assert kept[-1] == length
    assert len(kept) <= details.MOST_EPOCHS
    assert set(kept) <= set(epochs)


def test_reliability_pools_the_runs(tmp_path):
    made = [arrays(seed) for seed in range(3)]
    found = details.reliability(made, "_calibrated")
    counts = np.stack([one["reliability_count_calibrated"] for one in made])
    total = counts.sum()
    full = [b for b in range(counts.shape[1]) if counts[:, b].sum()]
    assert len(found) == len(full)
    for one, b in zip(found, full, strict=True):
        confidence = [run["reliability_confidence_calibrated"][b] for run in made]
        accuracy = [run["reliability_accuracy_calibrated"][b] for run in made]
        assert one.share == pytest.approx(counts[:, b].sum() / total)
        assert one.confidence == pytest.approx(np.dot(confidence, counts[:, b]) / counts[:, b].sum())
        assert one.accuracy.mean == pytest.approx(np.mean(accuracy))
    assert sum(one.share for one in found) == pytest.approx(1)
    assert details.reliability([{}, {}]) == []


def test_prefixes_are_the_subsets_that_begin_with_the_first_branch(rich_report):
    found = next(one for one in rich_report.groups if one.label == "ekd, K=3, M=3")
    assert [point.name for point in details.prefixes(found)] == [(0,), (0, 1), (0, 1, 2)]
    recorded = [json.loads((run.directory / "result.json").read_text())["test_subsets"] for run in found.done]
    for point in details.subsets(found):
        values = [s["accuracy"] for one in recorded for s in one if tuple(s["branches"]) == point.name]
        assert point.accuracy.mean == pytest.approx(np.mean(values))


def test_a_branch_without_a_figure_leaves_its_run_out_of_the_mean_branch():
    runs = [
        entry(result("ekd", s, 0.7, test_branch_accuracy=row), f"{s}")
        for s, row in enumerate(([None, 0.5], [0.4, 0.6]))
    ]
    found = group(collection(*runs))[0].scalars()["test_mean_branch_accuracy"]
    assert (found.mean, found.n) == (0.5, 1)


def test_what_is_null_is_left_out(tmp_path):
    subsets = [{"branches": [0], "accuracy": None, "macs": 1}, {"branches": [0, 1], "accuracy": 0.7, "macs": 2}]
    made = result(K=2, test_branch_accuracy=[None, 0.5], test_subsets=subsets, test_early_exit=None)
    write_run(tmp_path / "run", made)
    found = only_group(tmp_path)
    assert [point.name for point in details.subsets(found)] == [(0, 1)]
    assert details.early_exits(found) == []
    assert "test_mean_branch_accuracy" not in found.scalars()
