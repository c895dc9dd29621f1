"""The answer in words, sentence by sentence: each number in it is computed from the runs, by a rule told here."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_runs import TEACHERS, collection, entry, result, study
from scipy import stats

from ekd_lightning.reporting.answer import answer, comparison, judge, lead, representative
from ekd_lightning.reporting.blocks import blocks
from ekd_lightning.reporting.estimates import SIGNIFICANCE, holm, listed, p_text, paired, plural
from ekd_lightning.reporting.groups import group
from ekd_lightning.reporting.remarks import NO_EQUAL_COST
from ekd_lightning.reporting.report import make_report
from ekd_lightning.runs.collection import read_records

REAL = Path(__file__).resolve().parents[2] / "docs" / "results" / "study" / "cifar10.jsonl"
EKD = (0.72, 0.73, 0.76)


def told(*runs):
    (block,) = blocks(group(collection(*runs)))
    return answer(block)


def of(found, role):
    return next(finding for finding in found.findings if finding.role == role)


def against(method, values, ekd=EKD, **more):
    """EKD against one other method."""
    runs = study({"ekd": ekd})
    return told(*runs, *(entry(result(method, s, v, **more), f"o{s}") for s, v in enumerate(values)))


SENTENCES = [  # seeds of the other's runs are 0, 1, ...
    (
        "plain_taught", "kd_mean", (0.80, 0.82, 0.83), "behind",
        "EKD loses to the plain student taught by the mean of the teachers (kd_mean) by 8.00 points: 73.67 against "
        "81.67 % (95 % interval −10.48 to −5.52, n = 3 pairs of runs, p 0.005",
    ),
    (
        "plain", "ce", (0.75, 0.71, 0.74), "undecided",
        "EKD does not differ significantly from the plain student (ce): +0.33 points, 73.67 against 73.33 % (95 % "
        "interval ",
    ),
    (
        "plain", "ce", (0.62,), "not_enough",
        "Too few runs to compare EKD with the plain student (ce): n = 1 pair of runs, which differ by +10.00 points "
        "(72.00 against 62.00 %).",
    ),
    (
        "plain", "ce", (0.71, 0.72, 0.75), "not_enough",
        "EKD and the plain student (ce) differ by +1.00 points in each of n = 3 pairs of runs (73.67 against 72.67 %); "
        "a difference without spread cannot be tested.",
    ),
    (  # means are those of the common seeds; two pairs have no interval
        "plain", "ce", (0.60, 0.62), "not_enough",
        "Too few runs to compare EKD with the plain student (ce): n = 2 pairs of runs, which differ by +11.50 points "
        "(72.50 against 61.00 %).",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("role", "method", "values", "verdict", "said"), SENTENCES)
def test_a_comparison_in_words(role, method, values, verdict, said):
    found = of(against(method, values), role)
    assert (found.verdict, found.sentence[: len(said)]) == (verdict, said)


def test_ahead_with_the_numbers_of_scipy():
    found = of(against("ce", (0.60, 0.62, 0.62)), "plain")
    test = stats.ttest_rel(EKD, (0.60, 0.62, 0.62))
    low, high = test.confidence_interval(0.95)
    assert found.verdict == "ahead"
    assert found.sentence == (
        f"EKD beats the plain student (ce) by 12.33 points: 73.67 against 61.33 % (95 % interval +{100 * low:.2f} to "
        f"+{100 * high:.2f}, n = 3 pairs of runs, p {test.pvalue:.3f})."
    )


def test_undecided_mentions_an_uncorrected_interval_that_excludes_0():
    controls = {"ce": (0.70, 0.70, 0.72), "kd_mean": (0.70, 0.72, 0.75), "ekd_mean": (0.70, 0.71, 0.75)}
    found = of(told(*study({"ekd": EKD, **controls})), "plain")
    raw = stats.ttest_rel(EKD, controls["ce"]).pvalue
    assert raw < SIGNIFICANCE < found.difference.p_holm
    assert found.sentence.endswith(
        f"p {found.difference.p_holm:.3f} corrected for 3 comparisons; the uncorrected interval excludes 0, as one in "
        "20 does by chance)."
    )


def test_no_seed_in_common():
    found = told(entry(result("ekd", 0), "a"), entry(result("ce", 1), "b"))
    assert (of(found, "plain").verdict, of(found, "plain").difference) == ("not_enough", None)
    assert of(found, "plain").sentence == (
        "Too few runs to compare EKD with the plain student (ce): they have no seed in common."
    )


REACHES = "EKD reaches {} % test accuracy ({}) at 27.2 M MACs; "
HELPS = "is done, so whether it helps is open."
HEADLINES = [
    ({"ce": (0.6, 0.7)}, "no run of EKD is done, so there is nothing to compare."),
    ({"ekd": EKD}, REACHES.format(73.67, "mean of 3 runs") + f"no run of another method {HELPS}"),
    ({"ekd": (0.7,), "ce": (0.6,)}, REACHES.format("70.00", "one run") + "too few runs to say whether it helps."),
]


@pytest.mark.parametrize(("runs", "said"), HEADLINES)
def test_headlines_without_a_comparison(runs, said):
    found = told(*study(runs))
    assert found.headline == f"cifar10, 10 % of the training images (5,000): {said}"
    assert (found.subject is None) == (found.findings == () and "ekd" not in runs)


def test_methods_of_higher_cost_are_named_where_nothing_is_compared():
    branched = [entry(result("kd_mean", s, 0.7 + s / 50, K=5), f"k{s}") for s in range(2)]
    found = told(*study({"ekd": EKD}), *branched)
    assert found.findings == ()
    assert found.headline.endswith(
        "; none of the other methods (kd_mean, 71.00 %) is of comparable cost, so whether it helps is open."
    )


def test_two_runs_have_no_interval_and_no_verdict():
    found = of(told(*study({"ekd": (0.6, 0.7), "ce": (0.1, 0.2)})), "plain")
    assert (found.verdict, found.difference.half, found.difference.p) == ("not_enough", None, None)
    assert (found.difference.mean, found.difference.std) == (pytest.approx(0.5), pytest.approx(0.0))


def test_every_control_is_named_by_its_role():
    accuracies = {
        "ekd": (0.72, 0.73, 0.76, 0.74, 0.75),
        "ce": (0.60, 0.61, 0.62, 0.60, 0.61),
        "kd_mean": (0.70, 0.71, 0.73, 0.71, 0.74),
        "branched_ce": (0.62, 0.61, 0.63, 0.60, 0.62),
        "ekd_mean": (0.72, 0.74, 0.75, 0.73, 0.76),
    }
    big = (0.75, 0.77, 0.78, 0.78, 0.78)
    runs = [entry(result("kd_mean", s, v, student="resnet14"), f"big{s}") for s, v in enumerate(big)]
    found = told(*study(accuracies), *runs)
    assert [(finding.role, finding.other.label, finding.verdict) for finding in found.findings] == [
        ("plain", "ce", "ahead"),
        ("plain_taught", "kd_mean", "ahead"),
        ("equal_cost", "kd_mean, resnet14", "behind"),
        ("branched_untaught", "branched_ce", "ahead"),
        ("mean_teacher", "ekd_mean", "undecided"),
        ("best", "kd_mean, resnet14", "behind"),
    ]
    assert found.headline == (
        "cifar10, 10 % of the training images (5,000): EKD reaches 74.00 % test accuracy (mean of 5 runs) at 27.2 M "
        "MACs. It beats the plain student (ce, 60.80 %: +13.20 points), the plain student taught by the mean of the "
        "teachers (kd_mean, 71.80 %: +2.20 points) and the branched student without teachers (branched_ce, 61.60 %: "
        "+12.40 points); it loses to the plain student of equal cost, which is also the best other method "
        "(kd_mean, resnet14, 77.20 %: −3.20 points); it does not differ significantly from the branched student "
        "whose branches all imitate the mean teacher (ekd_mean, 74.00 %: +0.00 points)."
    )
    controls = {**accuracies, "big": big}
    names = ("ce", "kd_mean", "big", "branched_ce", "ekd_mean")
    raw = [stats.ttest_rel(accuracies["ekd"], controls[name]).pvalue for name in names]
    assert [finding.difference.p_holm for finding in found.findings[:5]] == pytest.approx(holm(raw))
    assert "corrected for 5 comparisons" in found.findings[0].sentence
    others = ("ce", "kd_mean", "big", "branched_ce")  # ekd_mean is a control of EKD, no other method
    among = [stats.ttest_rel(accuracies["ekd"], controls[name]).pvalue for name in others]
    assert found.findings[5].difference.p_holm == pytest.approx(holm(among)[2])
    assert found.findings[5].sentence == (
        "kd_mean, resnet14 is also the best of 4 other settings at no more cost "
        f"({p_text(holm(among)[2])} corrected for 4 comparisons)."
    )


@pytest.mark.parametrize(("weight", "named"), [(100.0, True), (0.0, False), (None, False)])
def test_ekd_with_features_is_held_against_a_plain_student_with_them(weight, named):
    runs = [entry(result("kd_mean_feature", s, 0.7 + s / 100, K=1), f"f{s}") for s in range(3)]
    ours = [entry(result("ekd", s, 0.6 + s / 50, weight_feature_branch=weight), f"e{s}") for s in range(3)]
    found = told(*ours, *runs)
    assert ("same_features" in {finding.role for finding in found.findings}) is named
    if named:
        assert (
            "the plain student that imitates the same features (kd_mean_feature)" in of(found, "same_features").sentence
        )


def test_a_larger_network_is_no_competitor_and_equal_cost_means_macs():
    runs = [entry(result("kd_mean", s, 0.9 + s / 100, student="resnet20"), f"big{s}") for s in range(3)]
    found = told(*study(), *runs)
    assert "equal_cost" not in {finding.role for finding in found.findings}
    assert of(found, "best").other.label == "kd_mean"
    assert NO_EQUAL_COST in found.remarks
    without_teachers = [entry(result("ce", s, 0.9, student="resnet14"), f"ce{s}") for s in range(3)]
    assert "equal_cost" not in {finding.role for finding in told(*study(), *without_teachers).findings}


def test_a_plain_student_of_another_width_is_no_control():
    narrow = [entry(result("ekd", s, v), f"e{s}", student__options={"width": 0.5}) for s, v in enumerate(EKD)]
    wide = [entry(result("ce", s, 0.6 + s / 50), f"c{s}") for s in range(3)]
    assert "plain" not in {finding.role for finding in told(*narrow, *wide).findings}
    same = [entry(result("ce", s, 0.5 + s / 50), f"n{s}", student__options={"width": 0.5}) for s in range(3)]
    assert of(told(*narrow, *wide, *same), "plain").other.label == "ce, width=0.5"


def grid(accuracy):
    return [
        entry(result("ekd", s, accuracy(K, M, s), K=K, M=M, val_accuracy=0.5 + K / 100 + M / 50), f"{K}{M}{s}")
        for K in (1, 2, 3)
        for M in (1, 2)
        for s in range(3)
    ]


def test_of_several_settings_the_one_that_is_best_on_validation_is_representative():
    found = told(*grid(lambda K, M, s: 0.9 - K / 100 - M / 50 + s / 500))
    assert found.subject.label == "ekd, K=3, M=2"
    assert found.headline.startswith(
        "cifar10, 10 % of the training images (5,000): EKD (ekd, K=3, M=2) reaches 83.20 %"
    )
    assert (
        "Of 4 settings of EKD with this student and several branches, ekd, K=3, M=2 represents it: it has the highest "
        "validation accuracy. "
        "Test accuracies played no part in the choice."
    ) in found.remarks


def test_with_one_branch_it_is_plain_distillation_and_speaks_only_where_there_is_nothing_else():
    runs = [entry(result("ekd", s, 0.6, K=K, val_accuracy=0.9 - K / 10), f"{K}{s}") for K in (1, 2) for s in (0, 1)]
    assert told(*runs).subject.label == "ekd, K=2"
    assert told(*runs[:2]).subject.num_branches == 1


def test_a_single_run_is_not_representative_where_others_have_more():
    lucky = entry(result("ekd", 0, 0.99, K=2), "lucky")
    assert told(lucky, *study({"ekd": EKD})).subject.label == "ekd, K=3"
    controls = [*study({"ce": (0.6, 0.61, 0.6)}), entry(result("ce", 0, 0.9, temperature=1.0), "once")]
    assert of(told(*study({"ekd": EKD}), *controls), "plain").other.label == "ce, T=4"
    (block,) = blocks(group(collection(lucky)))
    assert representative(block).label == "ekd"


def test_accuracy_over_branches_and_teachers():
    noise = {(1, 0): 0.001, (2, 1): 0.002, (3, 2): 0.001}
    found = told(*grid(lambda K, M, s: 0.70 + (0.05 if K > 1 else 0) + 0.001 * M + s / 100 + noise.get((K, s), 0)))
    (over_k,) = [remark for remark in found.remarks if remark.startswith("Number of branches")]
    assert over_k.startswith(
        "Number of branches: K = 1: 71.23 % (n = 3), K = 2: 76.27 % (n = 3), K = 3: 76.23 % (n = 3);"
    )
    assert over_k.endswith("; K = 2 is highest; significantly lower: K = 1; not significantly lower: K = 3.")
    assert any(remark.startswith("Number of teachers: M = 1: 76.13 % (n = 3), M = 2: ") for remark in found.remarks)


def test_the_best_number_is_picked_by_its_result_so_p_is_corrected_for_every_pair():
    values = {1: (0.701, 0.712, 0.721), 2: (0.696, 0.713, 0.721), 3: (0.704, 0.718, 0.727)}
    runs = [
        entry(result("ekd", s, v, K=K, val_accuracy=0.5), f"{K}{s}")
        for K, row in values.items()
        for s, v in enumerate(row)
    ]
    p = [stats.ttest_rel(values[a], values[b]).pvalue for a, b in ((1, 3), (2, 3), (1, 2))]
    assert max(holm(p[:2])) < SIGNIFICANCE < min(holm(p)[:2])
    (over_k,) = [remark for remark in told(*runs).remarks if remark.startswith("Number of branches")]
    assert over_k.endswith("K = 3 is highest; not significantly lower: K = 1 and K = 2.")


def test_a_number_of_teachers_that_several_settings_have_says_nothing():
    runs = study({"ekd": EKD}, val_accuracy=0.9)
    for m in range(2):
        runs += study({"ekd": (0.5, 0.52, 0.51)}, M=1, teachers=TEACHERS[m : m + 1])
    assert not [remark for remark in told(*runs).remarks if remark.startswith("Number of teachers")]
    assert [remark for remark in told(*runs[:6]).remarks if remark.startswith("Number of teachers")]


def test_another_with_a_single_run_is_not_passed_over_in_silence():
    found = told(*study({"ekd": EKD, "kd_mean": (0.6, 0.62, 0.62)}), entry(result("dkd", 0, 0.95, K=1), "lucky"))
    best = of(found, "best")
    assert best.sentence == "kd_mean is also the only other setting with enough runs at no more cost."
    assert found.headline.endswith(" dkd (95.00 %) has a higher test accuracy, but too few runs to compare.")
    below = told(*study({"ekd": EKD, "kd_mean": (0.6, 0.62, 0.62)}), entry(result("dkd", 0, 0.3, K=1), "poor"))
    assert "dkd" not in below.headline


def test_how_ekd_was_chosen_is_told_as_it_was():
    lucky = entry(result("ekd", 0, 0.99, K=2), "lucky")
    (chosen,) = [remark for remark in told(*study({"ekd": EKD}), lucky).remarks if "represents it" in remark]
    assert "it has the highest validation accuracy of those with 3 runs or more." in chosen
    silent = [*study({"ekd": EKD}, val_accuracy=None), *study({"ekd": EKD}, val_accuracy=None, K=2)]
    (chosen,) = [remark for remark in told(*silent).remarks if "represents it" in remark]
    assert "validation accuracies are not recorded" in chosen
    assert "highest" not in chosen


def test_chance_is_measured_with_the_same_settings():
    runs = [entry(result("ekd", s, v), f"e{s}") for s, v in enumerate(EKD)]
    for lr, drop in ((0.01, 0.4), (0.1, 0.0)):
        runs += [entry(result("ekd_permuted", s, v - drop), f"{lr}-{s}", recipe__lr=lr) for s, v in enumerate(EKD)]
    (chance,) = [remark for remark in told(*runs).remarks if "Size of chance" in remark]
    assert "(ekd_permuted, lr=0.1)" in chance
    assert (
        "Size of chance: EKD minus EKD with its teachers shifted by one branch (ekd_permuted), which should change "
        "nothing, is +0.00 ± 1.00 points (n = 3 pairs of runs)."
    ) in told(*study({"ekd": EKD, "ekd_permuted": (0.73, 0.72, 0.76)})).remarks
    assert not [remark for remark in told(*runs[:6]).remarks if "Size of chance" in remark and "lr=0.01" in remark]


def test_costs_are_told_against_the_plain_student():
    (cost,) = [remark for remark in told(*study()).remarks if remark.startswith("Cost")]
    assert cost == (
        "Cost: 223,854 parameters (2.9 × the plain student), 27.2 M MACs (2.2 × the plain student), 101 s of training "
        "(1.0 × the plain student); seconds depend on the machine's load."
    )
    (alone,) = [remark for remark in told(*study({"ekd": EKD})).remarks if remark.startswith("Cost")]
    assert "×" not in alone


def test_heterogeneity():
    runs = [
        entry(
            result("ekd", s, v, test_disagreement=0.2 + s / 100, test_gain_over_mean_branch=0.01 + s / 1000,
                   test_own_teacher_cka_margin=0.03 + s / 100),
            f"e{s}",
        )
        for s, v in enumerate(EKD)
    ]  # fmt: skip
    control = study({"ekd_mean": EKD}, test_disagreement=0.15, test_one_to_one_cka_margin=-0.002)
    remarks = told(*runs, *control).remarks
    half = 100 * stats.t.ppf(0.975, 2) * 0.001 / np.sqrt(3)
    assert (
        f"Ensemble accuracy minus the mean of the branches: +1.10 points (95 % interval +{1.1 - half:.2f} to "
        f"+{1.1 + half:.2f}, n = 3)."
    ) in remarks
    assert (
        "Two branches of EKD disagree on 21.00 % of the test images (n = 3 runs); if all branches imitate the mean "
        "teacher, on 15.00 % (n = 3 runs)."
    ) in remarks
    half = stats.t.ppf(0.975, 2) * 0.01 / np.sqrt(3)
    assert (
        "Linear CKA between a branch's features and its own teacher's, minus that with the other teachers': +0.040 "
        f"(95 % interval {0.04 - half:+.3f} to {0.04 + half:+.3f}, n = 3 runs); for the same pairs, if all branches "
        "imitate the mean teacher, −0.002 (n = 3 runs)."
    ) in remarks


def test_few_runs_and_runs_that_do_not_count_are_told():
    failed = [entry(result("ekd", 9), "f", "failed"), entry(result("ce", 9), "g", "stopped")]
    remarks = told(*study(), *failed).remarks
    assert any(one.startswith("Some of these comparisons have only n = 3 pairs (fewer than 5)") for one in remarks)
    assert "Runs of this block that do not count: 1 failed and 1 interrupted or killed." in remarks
    many = {"ekd": np.linspace(0.7, 0.75, 5).tolist(), "ce": [0.6, 0.62, 0.6, 0.61, 0.63]}
    assert not [remark for remark in told(*study(many)).remarks if "Some of these" in remark]


def test_over_several_blocks_the_lead_counts():
    runs = [*study(), *study(fraction=0.05), *study({"ekd": (0.6,)}, data="digits")]
    found = make_report(collection(*runs)).answers
    assert lead(found) == (
        "EKD in 3 settings of data and protocol: better in 2 of 2 against the best other method; better in 2 of 2 "
        "against the plain student."
    )
    assert lead(found[:1]) == found[0].headline
    nothing = make_report(collection(*study({"ce": (0.5,)}), *study({"ce": (0.5,)}, data="digits"))).answers
    assert lead(nothing) == "EKD cannot be compared in any of 2 settings of data and protocol."


def test_blocks_without_a_finished_run_have_no_answer():
    assert make_report(collection(entry(result(), "f", "failed"))).answers == ()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-0.3, 0.3), min_size=1, max_size=6))
def test_a_verdict_needs_a_significant_difference(values):
    difference = paired(values)
    verdict = judge(difference)
    if len(values) < 2 or difference.p is None:
        assert verdict == "not_enough"
    elif difference.p < SIGNIFICANCE:
        assert verdict == ("ahead" if difference.mean > 0 else "behind")
        assert abs(difference.mean) > difference.half  # the two agree before correction
    else:
        assert verdict == "undecided"
    sentence = comparison("x", difference, (0.5, 0.5), 1)
    assert sentence.endswith(".")
    starts = {
        "ahead": "EKD beats x",
        "behind": "EKD loses to x",
        "undecided": "EKD does not differ significantly from x",
        "not_enough": ("Too few runs to compare EKD with x", "EKD and x differ"),
    }
    assert sentence.startswith(starts[verdict])
    assert f"n = {len(values)}" in sentence


def test_small_words():
    assert [listed(words) for words in ([], ["a"], ["a", "b", "c"])] == ["", "a", "a, b and c"]
    assert plural(1, "run") == "1 run"
    assert p_text(0.0004) == "p < 0.001"


def test_the_published_first_result_is_told_as_its_numbers_are():
    """Real runs: verdicts and numbers are those of scipy on the accuracies, corrected by Holm."""
    recorded = [dict(run.result) for run in read_records(REAL) if run.study == "first"]
    for r in recorded:
        r["method"] = r["method"].replace("_pooled", "")  # the names of EKD and its variants
    runs = [
        entry({**result(r["method"], K=r["num_branches"], M=r["num_teachers"], student=r["student"]), **r}, f"r{i}")
        for i, r in enumerate(recorded)
    ]
    found = told(*runs)
    values = {}
    for r in recorded:
        key = (r["method"], r["student"])
        values.setdefault(key, {})[r["seed"]] = r["test_accuracy"]
    keys = {
        "plain": ("ce", "resnet8"),
        "plain_taught": ("kd_mean", "resnet8"),
        "equal_cost": ("kd_mean", "resnet14"),
        "branched_untaught": ("branched_ce", "resnet8"),
        "mean_teacher": ("ekd_mean", "resnet8"),
    }
    by_role = {role: [values[key][seed] for seed in sorted(values[key])] for role, key in keys.items()}
    ours = [values["ekd", "resnet8"][seed] for seed in sorted(values["ekd", "resnet8"])]
    p = dict(zip(by_role, holm([stats.ttest_rel(ours, other).pvalue for other in by_role.values()]), strict=True))
    assert {finding.role for finding in found.findings} == {*keys, "best"}
    for role, other in by_role.items():
        mean = np.mean(ours) - np.mean(other)
        expected = "undecided" if p[role] >= SIGNIFICANCE else "ahead" if mean > 0 else "behind"
        finding = of(found, role)
        assert (finding.verdict, finding.difference.p_holm) == (expected, pytest.approx(p[role])), role
        assert re.search(rf"\b{abs(100 * mean):.2f} points", finding.sentence)


@pytest.mark.parametrize("seeds", [3, 2])
def test_one_branch_is_compared_with_the_best_other_method_of_its_cost(seeds):
    """The branch is that of the highest validation accuracy; a method that costs more does not count."""
    best, cheap, dear = (0.70, 0.72, 0.73), (0.66, 0.67, 0.70), (0.9, 0.91, 0.93)
    runs = []
    for seed in range(seeds):
        alone = {"branches": [1], "accuracy": best[seed], "nll": 1.0, "macs": 12_000_000, "num_parameters": 80_000}
        other = {**alone, "branches": [0], "accuracy": 0.95}
        branches = {"test_subsets": [other, alone], "val_branch_accuracy": [0.5, 0.6], "macs": 30_000_000}
        branches["test_branch_accuracy"] = [0.95, best[seed]]
        runs.append(entry(result("ekd", seed, 0.95, **branches), f"e{seed}"))
        runs.append(entry(result("kd_mean", seed, cheap[seed], macs=12_000_000), f"k{seed}"))
        runs.append(entry(result("camkd", seed, dear[seed], macs=25_000_000), f"c{seed}"))
    (remark,) = [line for line in told(*runs).remarks if line.startswith("One branch alone")]
    expected = f"has {100 * np.mean(best[:seeds]):.2f} % at 12.0 M MACs"
    if seeds > 2:
        test = stats.ttest_rel(best, cheap)
        low, high = (f"{100 * end:+.2f}".replace("-", "−") for end in test.confidence_interval(0.95))
        by = f"{100 * np.mean(np.subtract(best, cheap)):.2f} points"
        assert f"MACs. Minus kd_mean, the only other method at no more cost, this is +{by} (95 %" in remark
        assert f"{low} to {high}" in remark
        assert expected in remark
    else:
        assert remark == f"One branch alone, chosen on validation images, {expected}."
