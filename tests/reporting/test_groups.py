"""Runs that differ in their seed alone are one group, whatever their order; statistics are those of scipy."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_runs import ACCURACIES, TEACHERS, collection, entry, result, study
from scipy import stats

from ekd_lightning.errors import UserError
from ekd_lightning.reporting.blocks import blocks, check_comparable
from ekd_lightning.reporting.estimates import holm
from ekd_lightning.reporting.groups import differences, group
from ekd_lightning.reporting.report import make_report

METHODS = ("ce", "kd_mean", "ekd")
WAYS = st.fixed_dictionaries(
    {
        "method": st.sampled_from(METHODS),
        "seed": st.integers(0, 2),
        "K": st.sampled_from([1, 3]),
        "M": st.sampled_from([1, 3]),
        "fraction": st.sampled_from([0.1, 1.0]),
        "lr": st.sampled_from([0.1, 0.2]),
        "steps": st.sampled_from([100, 200]),
        "state": st.sampled_from(["done", "done", "done", "partial", "failed", "running"]),
        "time": st.sampled_from(["2026-01-01", "2026-01-02"]),
    }
)


def make(position, way):
    way = dict(way)
    lr, state, time = way.pop("lr"), way.pop("state"), way.pop("time")
    return entry(result(accuracy=0.5 + position / 100, **way), f"run{position:02d}", state, time, recipe__lr=lr)


def what(run, way):
    """What tells groups apart, by an independent rule; runs without teachers have no M."""
    return (way["method"], way["K"], 0 if way["method"] == "ce" else way["M"], way["fraction"], way["lr"], way["steps"])


def seen(groups):
    return [(one.label, one.protocol, one.runs, one.duplicates) for one in groups]


@settings(max_examples=60, deadline=None)
@given(st.lists(WAYS, min_size=1, max_size=14), st.randoms())
def test_any_order_of_runs_gives_the_same_groups_and_each_run_is_in_one(ways, random):
    runs = [make(position, way) for position, way in enumerate(ways)]
    groups = group(collection(*runs))
    shuffled = list(runs)
    random.shuffle(shuffled)
    assert seen(group(collection(*shuffled))) == seen(groups)

    members = [run.name for one in groups for run in (*one.runs, *one.duplicates)]
    assert sorted(members) == [run.name for run in runs]
    expected = defaultdict(set)
    for run, way in zip(runs, ways, strict=True):
        if run.result is not None:
            expected[what(run, way)].add(run.name)
    found = [{run.name for run in (*one.runs, *one.duplicates) if run.result} for one in groups]
    assert sorted(map(sorted, filter(None, found))) == sorted(map(sorted, expected.values()))

    for one in groups:
        seeds = [run.get("seed") for run in one.done]
        assert seeds == sorted(set(seeds))
        newest = {run.get("seed"): run for run in one.done}
        assert all(
            (old.time, old.name) <= (newest[old.get("seed")].time, newest[old.get("seed")].name)
            for old in one.duplicates
        )


@settings(max_examples=60, deadline=None)
@given(st.lists(WAYS, min_size=1, max_size=14))
def test_blocks_hold_every_group_share_the_protocol_and_tell_groups_apart(ways):
    groups = group(collection(*(make(position, way) for position, way in enumerate(ways))))
    made = blocks(groups)
    assert {id(one) for block in made for one in block.groups} == {id(one) for one in groups}
    assert len({block.key for block in made}) == len(made) == len({block.title for block in made})
    for block in made:
        labels = [one.label for one in block.groups]
        assert len(set(labels)) == len(labels)
        known = [one for one in block.groups if any(run.result for run in one.runs)]
        assert {one.protocol for one in known} <= {block.protocol}
        pool = {teacher["sha256"] for teacher in block.teachers}
        assert all(set(one.taught_by) <= pool for one in known if one.n)


def labels(*runs):
    return [one.label for one in group(collection(*runs))]


def test_labels_tell_what_varies_within_the_method_and_no_more():
    assert labels(entry(result("ce")), entry(result("ekd"))) == ["ce", "ekd"]
    assert labels(entry(result("ekd", K=2), "a"), entry(result("ekd", K=3), "b")) == ["ekd, K=2", "ekd, K=3"]
    assert labels(entry(result("ekd", K=2, M=1), "a"), entry(result("ekd", K=3, M=2), "b")) == [
        "ekd, K=2, M=1",
        "ekd, K=3, M=2",
    ]
    assert labels(entry(result(), "a"), entry(result(split_after="stem"), "b")) == [
        "ekd, split=stage1",
        "ekd, split=stem",
    ]
    assert labels(entry(result(), "a"), entry(result(weight_ce_ensemble=1.0), "b")) == [
        "ekd, ce_ensemble=0.1",
        "ekd, ce_ensemble=1",
    ]
    assert labels(entry(result(), "a"), entry(result(), "b", recipe__lr=0.5)) == ["ekd, lr=0.1", "ekd, lr=0.5"]
    assert labels(entry(result(), "a"), entry(result(), "b", student__options={"width": 0.5})) == [
        "ekd",
        "ekd, width=0.5",
    ]


MORE = {f"recipe__{name}": 1.5 for name in ("momentum", "gamma", "warmup")}


def test_names_of_many_settings_are_short_unique_and_told_in_full_once():
    ours = {"weight_ce_ensemble": 0.5, "weight_kd_branch": 0.5, "weight_maps1": 50.0}
    plain = {"weight_ce_ensemble": 0.1, "weight_kd_branch": 0.9}
    runs = [
        entry(result(K=3, student="resnet14", **ours), "a", **MORE),
        entry(result(K=3, **ours), "b", **MORE),
        entry(result(K=3, split_after="stem", **plain), "c"),
        entry(result("kd_mean"), "d"),
    ]
    groups = group(collection(*runs))
    assert [one.label for one in groups] == ["ekd", "ekd, resnet14", "ekd, split=stem, …", "kd_mean"]
    full = [one.setting for one in groups]
    assert full[2] == "resnet8, split=stem, ce_ensemble=0.1, kd_branch=0.9"
    assert full[1].startswith("resnet14, split=stage1, ce_ensemble=0.5, kd_branch=0.5, maps1=50, ")
    assert full[1].endswith("momentum=1.5, gamma=1.5, warmup=1.5")
    assert full[3] == ""


def test_ablations_name_what_each_changes():
    weights = ("ce_ensemble", "ce_branch", "kd_ensemble", "kd_branch")
    runs = [
        entry(result(**{f"weight_{one}": float(one != off) for one in weights}), str(off)) for off in (*weights, None)
    ]
    assert labels(*runs) == ["ekd", *sorted(f"ekd, {off}=0" for off in weights)]


def test_a_tie_between_students_names_both():
    assert labels(*(entry(result(student=name), name) for name in ("resnet8", "resnet14"))) == [
        "ekd, resnet14",
        "ekd, resnet8",
    ]


def test_the_usual_student_goes_without_saying():
    runs = [*study(), entry(result("kd_mean", student="resnet14"), "m")]
    assert labels(*runs) == ["branched_ce", "ce", "ekd", "ekd_mean", "kd_mean", "kd_mean, resnet14"]


def test_a_label_means_the_same_in_every_block():
    runs = [entry(result(K=K, fraction=f), f"{K}{f}") for K, f in ((2, 0.1), (3, 0.1), (3, 1.0))]
    assert labels(*runs) == ["ekd, K=2", "ekd, K=3", "ekd, K=3"]


def test_a_sweep_over_teachers_leaves_runs_without_teachers_one_group():
    runs = [entry(result("ce", seed=m), f"ce{m}", teachers__count=m) for m in (1, 2, 3)]
    (one,) = group(collection(*runs))
    assert one.n == 3


def test_places_and_loggers_do_not_tell_groups_apart():
    runs = [entry(result(), "a"), entry(result(seed=1), "b", data__root="/elsewhere", trainer__accelerator="gpu")]
    assert len(group(collection(*runs))) == 1


def test_the_newest_of_two_runs_with_one_seed_counts():
    old, new = (
        entry(result(accuracy=0.5), "a", time="2026-01-02"),
        entry(result(accuracy=0.6), "b", time="2026-01-03"),
    )
    (one,) = group(collection(new, old))
    assert (one.done, one.duplicates) == ((new,), (old,))
    assert one.accuracy.mean == 0.6


def test_a_failed_run_goes_to_the_group_with_its_settings():
    runs = [entry(result(K=K, seed=s), f"{K}{s}") for K in (2, 3) for s in (0, 1)]
    failed = entry(result(K=3, seed=2), "f", "failed")
    groups = {one.label: one for one in group(collection(*runs, failed))}
    assert groups["ekd, K=3"].others == (failed,)
    assert groups["ekd, K=3"].n == 2
    assert groups["ekd, K=2"].others == ()


def test_a_method_of_which_every_run_failed_has_a_row_where_it_fits():
    runs = [*study(), entry(result("fitnet"), "f", "failed")]
    (block,) = blocks(group(collection(*runs)))
    row = next(one for one in block.groups if one.label == "fitnet")
    assert (row.n, row.accuracy, row.num_teachers, len(row.others)) == (0, None, None, 1)
    assert "fitnet" not in differences(block.groups, "ce")


def test_no_two_blocks_have_the_same_key():
    made = blocks(group(collection(*study(), *study(steps=5), *study(fraction=0.1000001))))
    assert [block.key for block in made] == ["cifar10-f0.1", "cifar10-f0.1-2", "cifar10-f0.1-3"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 5),
        ("subset_sha256", "t" * 64),
        ("epochs", 9),
        ("batch_size", 32),
        ("views", "none"),
        ("precision", "16"),
    ],
)
def test_another_protocol_is_another_block(field, value):
    groups = group(collection(*study(), *study(**{field: value})))
    made = blocks(groups)
    assert [len(block.groups) for block in made] == [5, 5]
    assert [block.key for block in made] == ["cifar10-f0.1", "cifar10-f0.1-2"]
    assert all(one.n == 3 for one in groups)
    words = field.removesuffix("_sha256").replace("_", " ")
    assert all(f", {words} " in block.title for block in made)
    with pytest.raises(ValueError, match="different protocols"):
        differences(groups, "ce")


def test_data_sets_and_fractions_are_blocks():
    groups = group(collection(*study(), *study(fraction=0.05), *study(data="cifar100")))
    assert [block.title for block in blocks(groups)] == [
        "cifar10, 5 % of the training images (2,500)",
        "cifar10, 10 % of the training images (5,000)",
        "cifar100, 10 % of the training images (5,000)",
    ]


def test_a_sweep_over_teachers_is_one_block_and_other_teachers_another():
    runs = [entry(result(M=m), f"m{m}") for m in (1, 2, 3)]
    ce = entry(result("ce"), "ce")
    (block,) = blocks(group(collection(*runs, ce)))
    assert [teacher["id"] for teacher in block.teachers] == ["teacher0", "teacher1", "teacher2"]
    other = entry(result(M=1, teachers=[TEACHERS[3]]), "other")
    first, second = blocks(group(collection(*runs, ce, other)))
    assert [one.label for one in first.groups] == ["ce", "ekd, M=1", "ekd, M=2", "ekd, M=3"]
    assert [one.label for one in second.groups] == ["ce", "ekd, M=1"]
    assert "teachers" in first.title


def test_a_chosen_teacher_comes_from_the_pool():
    more = {"teacher_choice": "best", "pool_teachers": ["teacher0", "teacher1", "teacher2"]}
    runs = [entry(result("kd", s, M=1, teachers=[TEACHERS[s]], **more), f"kd{s}") for s in (0, 1)]
    groups = group(collection(*runs, entry(result("ekd"), "ekd")))
    assert [(one.label, one.n) for one in groups] == [("ekd", 1), ("kd", 2)]
    assert len(blocks(groups)) == 1


def test_settings_that_nothing_records_are_not_invented():
    one, other = entry(result(seed=0), "a"), entry(result(seed=1), "b")
    vars(other)["config"] = {}
    assert labels(one, other) == ["ekd", "ekd, settings not recorded"]


def test_figures_of_a_group_against_scipy():
    values = [0.61, 0.64, 0.6, 0.7]
    runs = [entry(result(accuracy=v, seed=s), f"{s}") for s, v in enumerate(values)]
    (one,) = group(collection(*runs))
    assert (one.accuracy.mean, one.accuracy.std) == pytest.approx((np.mean(values), np.std(values, ddof=1)))
    expected = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert (one.accuracy.low, one.accuracy.high) == pytest.approx(expected)
    assert one.values("test_branch_accuracy", 1).mean == pytest.approx(np.mean(values) - 0.02)
    branches = [branch.mean for branch in one.per_item("test_branch_accuracy")]
    assert branches == pytest.approx(np.mean(values) - np.array([0.01, 0.02, 0.03]))
    assert one.only("num_branches") == 3
    assert one.only("train_seconds") is None


@pytest.mark.parametrize(
    ("key", "values", "ends"),
    [
        ("test_nll", [1.5, 2.5, 4.3], (0, None)),
        ("test_nll_calibrated", [1.5, 2.5, 4.3], (0, None)),
        ("test_ambiguity", [0.1, 0.2, 0.9], (0, None)),
        ("test_teacher_kl", [0.1, 0.2, 0.9], (0, None)),
        ("test_pairwise_js", [0.1, 0.2, 0.6], (0, np.log(2))),
        ("test_brier", [0.1, 1.0, 1.9], (0, 2)),
        ("test_ece", [0.05, 0.5, 0.9], (0, 1)),
        ("test_adaptive_ece_calibrated", [0.05, 0.5, 0.9], (0, 1)),
        ("test_overconfidence", [0.05, 0.5, 0.9], (0, 1)),
        ("test_accuracy_ema", [0.1, 0.5, 0.9], (0, 1)),
        ("corruption_mce", [0.1, 0.5, 0.9], (0, 1)),
        ("test_q_statistic", [-0.9, 0.1, 0.9], (-1, 1)),
        ("test_gain_over_mean_branch", [-0.9, 0.1, 0.9], (-1, 1)),
        ("test_own_teacher_agreement_margin", [-0.9, 0.1, 0.9], (-1, 1)),
        ("gap_accuracy", [-0.9, 0.1, 0.9], (-1, 1)),
        ("gap_nll", [-3.0, 0.1, 3.0], (None, None)),
        ("sharpness_sam", [-3.0, 0.1, 3.0], (None, None)),
        ("train_seconds", [1.0, 2.0, 90.0], (0, None)),
        ("latency_ms_batch1", [1.0, 2.0, 90.0], (0, None)),
    ],
)
def test_intervals_are_cut_to_the_possible_range(key, values, ends):
    runs = [entry(result(seed=seed) | {key: value}, f"{seed}") for seed, value in enumerate(values)]
    (one,) = group(collection(*runs))
    low, high = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    found = one.values(key)
    assert found.low == pytest.approx(low if ends[0] is None else ends[0])
    assert found.high == pytest.approx(high if ends[1] is None else ends[1])


@pytest.mark.parametrize("key", ["nothing", "method", "test_branch_accuracy", "partial", "teacher"])
def test_what_is_no_number_has_no_cell(key):
    (one,) = group(collection(entry(result())))
    assert one.values(key) is None
    assert one.values(key, 7) is None
    assert one.values(key, "x") is None


def test_null_and_nan_are_left_out():
    runs = [entry(result(seed=s, sharpness_sam=v), f"{s}") for s, v in enumerate([None, float("nan"), 0.5])]
    (one,) = group(collection(*runs))
    found = one.values("sharpness_sam")
    assert (found.n, found.half) == (1, None)


def test_differences_are_paired_by_seed_and_corrected_over_the_block():
    (block,) = blocks(group(collection(*study())))
    found = differences(block.groups, "ce")
    others = [one.label for one in block.groups if one.label != "ce"]
    raw = [stats.ttest_rel(ACCURACIES[label], ACCURACIES["ce"]).pvalue for label in others]
    assert [found[label].p for label in others] == pytest.approx(raw)
    assert [found[label].p_holm for label in others] == pytest.approx(holm(raw))
    assert "ce" not in found
    difference = np.subtract(ACCURACIES["ekd"], ACCURACIES["ce"])
    half = stats.t.ppf(0.975, 2) * stats.sem(difference)
    assert (found["ekd"].mean, found["ekd"].half) == pytest.approx((difference.mean(), half))
    with pytest.raises(ValueError, match="no group 'nobody'"):
        differences(block.groups, "nobody")


def measured(seed, source, value, **more):
    made = result("ekd", seed, 0.7 + seed / 100, corruption_source=source, corruption_mce=value, **more)
    return entry({**made, "corruption_accuracy_by_severity": [1 - value] * 5}, f"{source}{seed}")


def test_figures_that_were_measured_in_different_ways_have_no_mean():
    (mixed,) = group(collection(measured(0, "official", 0.3), measured(1, "regenerated", 0.5)))
    assert mixed.values("corruption_mce") is None
    assert mixed.by_seed("corruption_accuracy_by_severity", 0) == {}
    assert mixed.accuracy.n == 2
    (same,) = group(collection(measured(0, "official", 0.3), measured(1, "official", 0.5)))
    assert same.values("corruption_mce").mean == pytest.approx(0.4)
    left = [measured(s, "official", 0.3, corruption_left_out=["snow"] * s) for s in range(2)]
    assert group(collection(*left))[0].values("corruption_mce") is None
    unknown = [measured(0, "official", 0.3), measured(1, "official", 0.5, corruption_images=10_000)]
    assert group(collection(*unknown))[0].values("corruption_mce").n == 2
    machines = [
        entry(result("ekd", s, 0.7, latency_ms_batch1=1.0 + s, efficiency_threads=1 + s), f"{s}") for s in range(2)
    ]
    assert group(collection(*machines))[0].values("latency_ms_batch1") is None


def test_a_note_names_what_was_measured_differently():
    other = {**measured(0, "regenerated", 0.5).result, "method": "ce"}
    told = make_report(collection(measured(0, "official", 0.3), entry(other, "ce"))).notes
    assert [note for note in told if "(corruption source regenerated, official) and are not comparable" in note]
    alike = make_report(collection(measured(0, "official", 0.3), measured(1, "official", 0.3))).notes
    assert not [note for note in alike if "measured differently" in note]


def test_titles_of_blocks_say_as_little_as_tells_them_apart():
    longer = {"epochs": 4, "epochs_done": 4, "steps": 280}
    other = {"subset_seed": 1, "subset_sha256": "t" * 64}
    never = entry(result(epochs=9), "never", "failed")
    runs = [*study(subset_seed=0), *study(subset_seed=0, **longer), *study(**longer, **other), never]
    made = blocks(group(collection(*runs)))
    first = "cifar10, 10 % of the training images"
    assert sorted(block.title for block in made) == [
        f"{first} (5,000), subset seed 0, epochs 2",
        f"{first} (5,000), subset seed 0, epochs 4",
        f"{first} (5,000), subset seed 1, epochs 4",
        f"{first}, subset seed unknown, epochs 9",
    ]
    more = [*study(), *study(num_train_images=4000)]
    assert {block.title for block in blocks(group(collection(*more)))} == {
        f"{first} (5,000), train images 4500",
        f"{first} (4,500), train images 4000",
    }


def test_a_row_may_have_runs_from_before_a_setting_was_recorded():
    old, new = result("ce", 0), {**result("ce", 1), "epoch_over": "labelled"}
    check_comparable({"ce": [entry(old), entry(new)]})
    with pytest.raises(UserError, match=r"differ in epoch_over \(labelled, unlabelled\)"):
        check_comparable({"ce": [entry(old), entry({**new, "epoch_over": "unlabelled"})]})
