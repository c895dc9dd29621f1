"""A report as tables, CSV and JSON: all say the same, nothing is averaged over what may not be, all runs are in it."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from made_runs import ACCURACIES, collection, entry, result, study, write_run
from scipy import stats

from ekd_lightning.errors import UserError
from ekd_lightning.reporting.estimates import holm
from ekd_lightning.reporting.report import make_report, summary
from ekd_lightning.reporting.report_files import flatten, markdown, runs_csv
from ekd_lightning.runs.collection import RunEntry, collect
from ekd_lightning.runs.directory import RunState


def report(*runs, **more):
    return make_report(collection(*runs), **more)


def line(page, label):
    return next(row for row in page.splitlines() if row.startswith(f"| `{label}` |"))


def test_the_table_holds_the_statistics_of_scipy():
    page = markdown(report(*study()))
    ekd, ce = np.array(ACCURACIES["ekd"]), np.array(ACCURACIES["ce"])
    low, high = stats.t.interval(0.95, 2, loc=ekd.mean(), scale=stats.sem(ekd))
    others = [name for name in sorted(ACCURACIES) if name != "ce"]
    p = holm([stats.ttest_rel(ACCURACIES[name], ce).pvalue for name in others])[others.index("ekd")]
    between = stats.ttest_rel(ekd, ce).confidence_interval(0.95)
    cells = [cell.strip() for cell in line(page, "ekd").strip("|").split("|")]
    assert cells[1:4] == ["3", "3", "3"]
    assert cells[4] == f"{100 * ekd.mean():.2f} ± {100 * ekd.std(ddof=1):.2f} [{100 * low:.2f}, {100 * high:.2f}]"
    assert cells[5] == f"+12.67 [{100 * between.low:+.2f}, {100 * between.high:+.2f}], n 3, p {p:.3f}"
    assert cells[6] == ""  # EKD minus itself
    assert cells[7:] == ["0.263", "0.050", "+2.00", "223,854", "27.2 M", "101", ""]


def test_a_single_run_has_no_interval_and_says_so():
    page = markdown(report(*study({"ce": (0.6,), "ekd": (0.7,)})))
    assert "| 70.00 (too few runs) | +10.00 (too few runs) |" in line(page, "ekd")
    assert "±" not in line(page, "ekd")


def test_data_sets_and_protocols_have_tables_of_their_own_and_a_note_says_so():
    runs = [*study(), *study(data="digits"), *study({"ekd": (0.1, 0.1, 0.1)}, steps=9)]
    found = report(*runs)
    page = markdown(found)
    heads = [row for row in page.splitlines() if row.startswith("## ")]
    assert heads[:3] == [
        "## cifar10, 10 % of the training images (5,000), steps 140",
        "## cifar10, 10 % of the training images (5,000), steps 9",
        "## digits, 10 % of the training images (5,000)",
    ]
    assert found.notes == (
        "cifar10, 10 %: the runs follow 2 protocols, which are neither averaged nor compared with each other: "
        "cifar10, 10 % of the training images (5,000), steps 140; "
        "cifar10, 10 % of the training images (5,000), steps 9",
    )
    assert found.notes[0] in page
    assert [one["n"] for block in summary(found)["blocks"] for one in block["rows"]] == [3] * 11


def test_duplicates_partial_and_failed_runs_are_told():
    old = entry(result("ekd", 0, 0.1), "old", time="2025")
    half = entry(result("ekd", 5, 0.1), "half", "partial")
    broken = entry(result("ekd", 7), "broken", "failed")
    found = report(*study(), old, half, broken)
    # Without a time a run is older than any that has one.
    assert found.notes[0] == "ekd-{}-s0 and old: ekd, seed 0, twice; the newer one, old, counts"
    assert found.notes[1] == "half: used part of the data only, left out of all means"
    page = markdown(found)
    assert "| broken | `ekd` | 7 | failed | broke |" in page
    assert "| half | `ekd` | 5 | partial |  |" in page
    assert line(page, "ekd").endswith("| partial 1 of 5; failed 1 of 5: broke |")
    assert found.groups[2].n == 3


def test_a_failed_part_of_an_evaluation_is_told():
    runs = study({"ekd": (0.7, 0.8)}, evaluation_error="flatness: no memory")
    (note,) = report(*runs).notes
    assert note.endswith(" (and 1 more): part of the evaluation failed (flatness: no memory); its figures are missing")


def test_errors_do_not_break_the_table():
    broken = entry(result("ekd", 7), "broken", "failed")
    object.__setattr__(broken, "error", "a | b\nc")
    assert "| broken | `ekd` | 7 | failed | a \\| b c |" in markdown(report(broken))


def test_only_failed_runs_make_a_report_all_the_same():
    found = report(entry(result("ekd"), "f", "failed"))
    assert found.lead == "No run is done yet."
    assert "No run is done here." in markdown(found)
    assert summary(found)["runs"] == {"done": 0, "failed": 1, "partial": 0, "stopped": 0, "running": 0}
    assert len(list(csv.DictReader(io.StringIO(runs_csv(found))))) == 1


def test_the_reference_is_the_plain_student_unless_asked():
    assert report(*study()).reference == {"cifar10-f0.1": "ce"}
    assert report(*study({"kd": (0.5,), "ekd": (0.6,)})).reference == {"cifar10-f0.1": "ekd"}
    assert report(*study({"kd": (0.5,)})).reference == {"cifar10-f0.1": "kd"}
    both = [*study(), *study({"ekd": (0.5,)}, data="digits")]
    assert report(*both, reference="kd_mean").reference == {"cifar10-f0.1": "kd_mean"}
    grid = [entry(result(K=K, val_accuracy=K / 10), f"{K}") for K in (1, 2)]
    assert report(*grid, reference="ekd, K=1").reference == {"cifar10-f0.1": "ekd, K=1"}
    assert report(*grid, reference="ekd").reference == {"cifar10-f0.1": "ekd, K=2"}
    with pytest.raises(UserError, match=r"unknown --reference 'kd_men'; did you mean 'kd_mean'\? \(allowed: "):
        report(*study(), reference="kd_men")


def test_csv_has_a_row_for_every_run_and_a_column_for_every_field():
    subsets = [{"branches": [0], "accuracy": 0.6}, {"branches": [0, 2], "accuracy": 0.7}]
    early = [{"threshold": 0.9, "mean_branches": 1.5}]
    more = {"test_subsets": subsets, "test_early_exit": early, "corruption_accuracy": {"fog": [0.5, 0.4]}}
    found = report(entry(result(accuracy=0.75, tags=["a", "b"], **more), "one"), entry(result(seed=1), "two", "failed"))
    done, failed = csv.DictReader(io.StringIO(runs_csv(found)))
    assert (done["run"], done["state"], done["counts"], done["setting"]) == ("one", "done", "True", "ekd")
    assert float(done["test_accuracy"]) == 0.75
    assert float(done["test_branch_accuracy_2"]) == pytest.approx(0.72)
    assert float(done["test_subsets_0+2_accuracy"]) == 0.7
    assert float(done["test_early_exit_0.9_mean_branches"]) == 1.5
    assert float(done["corruption_accuracy_fog_1"]) == 0.4
    assert done["tags"] == "a b"
    assert done["teachers_1_id"] == "teacher1"
    assert float(done["recipe.lr"]) == 0.1
    assert (failed["state"], failed["error"], failed["test_accuracy"], failed["seed"]) == ("failed", "broke", "", "1")


def test_flatten_keeps_every_leaf():
    into = {}
    flatten({"a": [1, [2, None]], "b": {"c": "x"}}, "f", into)
    assert into == {"f_a_0": 1, "f_a_1_0": 2, "f_a_1_1": None, "f_b_c": "x"}


def test_summary_table_and_answer_say_the_same():
    found = report(*study(), title="Title")
    content = json.loads(json.dumps(summary(found), allow_nan=False))
    (block,) = content["blocks"]
    rows = {row["label"]: row for row in block["rows"]}
    assert content["title"] == "Title"
    assert content["lead"] == block["answer"]["headline"] == found.answers[0].headline
    assert rows["ekd"]["test_accuracy"] == pytest.approx(np.mean(ACCURACIES["ekd"]))
    assert rows["ekd"]["seeds"] == [0, 1, 2]
    assert rows["ekd"]["differences"]["ce"]["mean"] == pytest.approx(0.38 / 3)
    plain = block["answer"]["findings"][0]
    assert (plain["role"], plain["other"], plain["verdict"]) == ("plain", "ce", "ahead")
    assert plain["difference"]["mean"] == pytest.approx(rows["ekd"]["differences"]["ce"]["mean"])
    assert block["protocol"]["steps"] == 140
    assert content["lead"] in markdown(found)


def test_angle_brackets_of_errors_and_names_are_text():
    failed = RunEntry(Path("/nowhere/f"), "f", RunState.FAILED, error="expected <class 'int'> | None, p < 0.05")
    text = markdown(make_report(collection(*study(), failed), "A <b>title</b>"))
    assert "expected \\<class 'int'> \\| None, p < 0.05" in text
    assert text.startswith("# A \\<b>title\\</b>\n")


def test_how_much_seeds_disagree_is_told_where_runs_kept_their_predictions(tmp_path):
    labels = np.array([0, 1, 1, 0])
    probs = np.random.default_rng(0).dirichlet([1, 1], size=(3, 4)).astype(np.float16)
    for seed in range(3):
        write_run(tmp_path / f"ekd{seed}", result("ekd", seed))
        np.savez(tmp_path / f"ekd{seed}" / "arrays.npz", ensemble_probs=probs[seed], labels=labels)
        write_run(tmp_path / f"ce{seed}", result("ce", seed))
    found = make_report(collect([tmp_path]))
    predicted = probs.argmax(-1)
    pairs = [(predicted[i] != predicted[j]).mean() for i, j in ((0, 1), (0, 2), (1, 2))]
    cells = [cell.strip() for cell in line(markdown(found), "ekd").strip("|").split("|")]
    assert cells[-5] == f"{100 * np.mean(pairs):.1f}"
    rows = {row["label"]: row for row in summary(found)["blocks"][0]["rows"]}
    assert rows["ekd"]["seed_disagreement"] == pytest.approx(np.mean(pairs))
    assert rows["ekd"]["seed_variance"] == pytest.approx(probs.astype(float).var(0, ddof=1).sum(-1).mean())
    assert "seed_disagreement" not in rows["ce"]
    np.savez(tmp_path / "ekd0" / "arrays.npz", ensemble_probs=probs[0], labels=1 - labels)  # of other images
    assert "seeds disagree" not in markdown(make_report(collect([tmp_path]))).split("## How to read")[0]


def test_on_what_the_runs_were_made_is_told(tmp_path):
    hardware = {"cpu": "A <b> CPU", "cpu_capability": "AVX2", "threads": 1, "gpus": ["G", "G"]}
    for seed in range(3):
        write_run(tmp_path / str(seed), result("ekd", seed))
    for seed in range(2):
        told = {"hardware": hardware, "packages": {"torch": "2.14.1"}}
        (tmp_path / str(seed) / "provenance.json").write_text(json.dumps(told))
    (tmp_path / "2" / "provenance.json").write_text("{ half")
    found = make_report(collect([tmp_path]))
    one, other = "2 × G, A <b> CPU (AVX2), 1 thread, torch 2.14.1 (2 runs)", "unknown hardware (1 run)"
    assert found.machines == (one, other)
    assert summary(found)["machines"] == [one, other]
    assert "Runs made on: 2 × G, A \\<b> CPU (AVX2)" in markdown(found)
