"""The rows of a study as one block: paired differences, what may not be compared, and all forms of the table."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from made_runs import entry, result
from omegaconf import DictConfig
from rich.console import Console
from scipy import stats

from ekd_lightning.config import output
from ekd_lightning.errors import UserError
from ekd_lightning.files import read_json, write_json
from ekd_lightning.reporting import tables
from ekd_lightning.reporting.blocks import block_of_rows, check_comparable
from ekd_lightning.reporting.estimates import holm
from ekd_lightning.runs.collection import RunEntry
from ekd_lightning.runs.directory import RunState
from ekd_lightning.studies.comparison import records, study_rows
from ekd_lightning.studies.rows import with_tuned
from ekd_lightning.studies.study import RowPlan, Study, read_study, write_study

POOL = [{"id": "a", "sha256": "a" * 64}, {"id": "b", "sha256": "b" * 64}]


def run(row, seed, accuracy, fraction=0.1, state="done", error=None, **more):
    name = f"{row}-f{fraction:g}-s{seed}"
    if accuracy is None:
        return RunEntry(Path("/nowhere") / name, name, RunState(state), error=error)
    teachers = more.pop("teachers", [] if row == "ce" else POOL)
    size = {"num_parameters": 1234567, "macs": 12_340_000, "epochs": 1, "epochs_done": 1, "batch_size": 32, "steps": 4}
    told = {
        "data": "digits",
        "fraction": fraction,
        "M": len(teachers),
        "teachers": teachers,
        "train_seconds": 10 + seed,
    }
    return entry(result(row, seed, accuracy, **{**size, **told, **more}), name, state)


ACCURACIES = {"ce": [0.70, 0.72, 0.71, 0.69], "kd_mean": [0.75, 0.76, 0.75, 0.75], "ekd": [0.76, 0.79, 0.75, 0.77]}


def study(accuracies=ACCURACIES, **more):
    """Row -> seed -> run; a row may also be given as the run of seed 0."""
    found = {
        row: {seed: run(row, seed, value) for seed, value in enumerate(values)} for row, values in accuracies.items()
    }
    return found | {row: {0: one} for row, one in more.items()}


def block(runs):
    return block_of_rows("digits", 0.1, {row: list(own.values()) for row, own in runs.items()})


def rows(runs):
    return {row.group.label: row for row in study_rows(block(runs))}


def flat(runs):
    found = block(runs)
    return {record["row"]: record for record in records(found, study_rows(found), runs, {})}


def page(runs):
    return tables.markdown(study_rows(block(runs)), tables.STUDY)


def test_differences_are_paired_by_seed_and_corrected_over_the_block():
    found = rows(study())
    differences = np.array(ACCURACIES["kd_mean"]) - np.array(ACCURACIES["ce"])
    raw = [stats.ttest_rel(ACCURACIES[name], ACCURACIES["ce"]).pvalue for name in ("kd_mean", "ekd")]
    minus = found["kd_mean"].differences["ce"]
    assert minus.mean == pytest.approx(differences.mean())
    assert minus.p == pytest.approx(raw[0])
    assert minus.p_holm == pytest.approx(holm(raw)[0])
    assert set(found["kd_mean"].differences) == {"ce", "ekd"}
    assert found["ekd"].differences["ekd"] is None


def test_only_common_seeds_are_paired():
    runs = study({"ce": ACCURACIES["ce"][:2], "ekd": ACCURACIES["ekd"]})
    minus = rows(runs)["ekd"].differences["ce"]
    assert (minus.n, minus.mean) == (2, pytest.approx((0.06 + 0.07) / 2))


def test_failed_and_missing_runs_stay_in_the_table():
    runs = study()
    runs["ekd"][2] = run("ekd", 2, None, state="failed", error="no such stage | x")
    runs["ekd"][3] = run("ekd", 3, None, state="planned")
    told = "failed 1 of 4: no such stage | x; missing 1 of 4"
    record = flat(runs)["ekd"]
    assert (record["problems"], record["n"], record["failed"], record["missing"]) == (told, 2, 1, 1)
    assert record["by_seed"] == {"0": 0.76, "1": 0.79, "2": "failed", "3": "missing"}
    nothing = study({"ce": ACCURACIES["ce"]}, ekd=run("ekd", 0, None, state="failed", error="e"))
    record = flat(nothing)["ekd"]
    assert (record["test_accuracy"], record["minus_ce"], record["problems"]) == (None, None, "failed 1 of 1: e")
    assert "failed 1 of 4: no such stage \\| x; missing 1 of 4" in page(runs)


def test_a_run_that_saw_a_part_of_the_data_does_not_count():
    runs = study()
    runs["ekd"][3] = run("ekd", 3, 0.77, state="partial")
    record = flat(runs)["ekd"]
    assert (record["n"], record["problems"]) == (3, "partial 1 of 4")


@pytest.mark.parametrize(
    ("field", "value"),
    [("steps", 5), ("subset_sha256", "t" * 64), ("epochs", 2), ("batch_size", 64), ("views", "none")],
)
def test_runs_that_went_different_ways_are_refused_by_name(field, value):
    runs = study({"ce": ACCURACIES["ce"]}, ekd=run("ekd", 0, 0.7, **{field: value}))
    with pytest.raises(UserError, match=rf"ce-f0.1-s0 and ekd-f0.1-s0 differ in {field} \("):
        block(runs)


def test_rows_may_have_other_students_but_a_row_only_one():
    block(study(kd_mean_macs=run("kd_mean_macs", 0, 0.7, student="resnet14", num_parameters=9)))
    runs = study({"ce": ACCURACIES["ce"]})
    runs["ce"][9] = run("ce", 9, 0.7, num_parameters=9)
    with pytest.raises(UserError, match=r"ce-f0\.1-s0 and ce-f0.1-s9 differ in num_parameters"):
        block(runs)


def check(runs):
    check_comparable({row: list(own.values()) for row, own in runs.items()})


def test_pools_of_teachers_must_agree_unless_the_method_chose_one_of_them():
    check(study(kd_best=run("kd_best", 0, 0.7, teachers=POOL[1:], teacher_choice="best", teacher="b")))
    with pytest.raises(UserError, match="differ in teachers"):
        check(study(kd_mean_b=run("kd_mean_b", 0, 0.7, teachers=POOL[1:])))
    foreign = run("kd_best", 0, 0.7, teachers=[{"sha256": "c"}], teacher_choice="best")
    with pytest.raises(UserError, match=r"kd_best-f0\.1-s0 and kd_mean-f0.1-s0 differ in teachers"):
        check(study(kd_best=foreign))


def test_all_forms_of_the_table_say_the_same():
    runs = study()
    found = flat(runs)
    assert found["kd_mean"]["test_accuracy"] == pytest.approx(0.7525)
    read = {row["row"]: row for row in csv.DictReader(io.StringIO(tables.csv_text(list(found.values()))))}
    assert float(read["ekd"]["minus_ce"]) == found["ekd"]["minus_ce"] == pytest.approx(0.0625)
    assert found["ekd"]["by_seed"] == {"0": 0.76, "1": 0.79, "2": 0.75, "3": 0.77}
    line = next(line for line in page(runs).splitlines() if line.startswith("| `kd_mean`"))
    assert "75.25 ± 0.50" in line
    assert "12.3 M" in line
    heads = [line.count(" | ") for line in page(runs).splitlines() if line.startswith("| ")]
    assert len(set(heads)) == 1


def test_in_a_pipe_a_row_is_a_line_with_its_whole_error(capsys):
    runs, error = study(), "no such stage " * 30 + "[x]"
    runs["ekd"][2] = run("ekd", 2, None, state="failed", error=error)
    found = study_rows(block(runs))
    output.print_wide(tables.printed_table("digits", found, output.terminal_width()))
    lines = capsys.readouterr().out.splitlines()
    assert all(line == line.rstrip() for line in lines)
    title, heads, _, *told = filter(None, lines)
    assert (title, len(told)) == ("digits", len(found))
    expected_heads, expected = tables.texts(found, tables.STUDY)
    for line, cells in zip([heads, *told], [expected_heads, *expected], strict=True):
        assert all(cell in line for cell in cells)
    assert sum(error in line for line in told) == 1


@pytest.mark.parametrize(("width", "left_out"), [(170, ""), (130, "adapters, steps"), (90, "adapters, steps")])
def test_on_a_terminal_intervals_stay_whole_and_an_error_is_short(width, left_out):
    runs = study()
    runs["ekd"][2] = run("ekd", 2, None, state="failed", error="no such stage " * 30)
    printed = io.StringIO()
    Console(width=width, file=printed).print(tables.printed_table("digits", study_rows(block(runs)), width))
    told = printed.getvalue()
    whole = re.findall(r"\[.*?\]", page(runs).partition("| `")[2])
    assert whole
    assert all(interval in told for interval in whole)
    assert ("No room for: " in told, f"No room for: {left_out}" in told) == (bool(left_out), bool(left_out))
    assert told.count("no such") < 5
    assert "…" in told


def test_one_seed_says_not_enough_runs():
    text = page(study({row: values[:1] for row, values in ACCURACIES.items()}))
    assert text.count("too few runs") == 3 + 4  # accuracies, and differences


@pytest.mark.parametrize(
    ("word", "named"),
    [
        ("student.network=resnet20", "all rows of a study must share this setting"),
        ("seed=3", "all rows of a study must share this setting"),
        ("trainer.gradient_clip_val=1", "all rows of a study must share this setting"),
        ("recipe.epochs=9", "all rows of a study must share this setting"),
        ("method.name=../../x", "all rows of a study must share this setting"),
        ("data.root=/x", "not a setting that ekd-tune searches"),
        ("teachers.store=/x", "not a setting that ekd-tune searches"),
        ("logger.wandb.enabled=true", "not a setting that ekd-tune searches"),
        ("callbacks.x._target_=y", "not a setting that ekd-tune searches"),
        ("imports=[x]", "not a setting that ekd-tune searches"),
        ("hydra.run.dir=/x", "a record may set only settings of a run"),
        ("hydra.callbacks.x._target_=y", "a record may set only settings of a run"),
        ("+x@hydra.callbacks=y", "a record may set only settings of a run"),
    ],
)
def test_a_tuned_file_sets_its_methods_own_settings_alone(tmp_path, word, named):
    (tmp_path / "ekd.yaml").write_text(yaml.safe_dump({"overrides": ["method.temperature=2", "recipe.lr=0.1"]}))
    (row,) = with_tuned([RowPlan("ekd", ("method=ekd",))], tmp_path, DictConfig)
    assert row.settings == "method.temperature=2 recipe.lr=0.1"
    (tmp_path / "ekd.yaml").write_text(yaml.safe_dump({"overrides": ["recipe.lr=0.1", word]}))
    with pytest.raises(UserError, match=re.escape(named)):
        with_tuned([row], tmp_path, DictConfig)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"format": 9}, r"study\.json: written by a newer version \(format 9; 1 to 2 are read\)"),
        (
            {"rows": {"../x": {"overrides": ["method=ce"], "without": []}}},
            r"study\.json: row '../x': folders are named",
        ),
        (
            {"rows": {"a\nb": {"overrides": ["method=ce"], "without": []}}},
            r"study\.json: row 'a\\nb': folders are named",
        ),
        ({"rows": {"ce": {"overrides": ["method=ce", "data.root=/x"], "without": []}}}, "may set only its method"),
        ({"common": ["hydra.run.dir=/x"]}, "a record may set only settings of a run"),
        ({"seeds": [0, "../1"]}, r"study\.json: damaged \(seeds\): give different whole numbers"),
        ({"fractions": [2]}, r"study\.json: damaged \(fractions\): give different shares"),
    ],
)
def test_a_foreign_study_is_named(tmp_path, change, named):
    written = Study((RowPlan("ce", ("method=ce",)),), (0.1, 1.0), (0, 3), ("recipe.lr=0.1",), "digits")
    write_study(written, tmp_path)
    content = read_json(tmp_path / "study.json")
    assert content.pop("format") == 2
    write_json(tmp_path / "study.json", content)
    assert read_study(tmp_path) == written  # as versions before wrote it
    write_json(tmp_path / "study.json", {**content, **change})
    with pytest.raises(UserError, match=named):
        read_study(tmp_path)


def test_a_chosen_teacher_is_named():
    chosen = run("kd_best", 0, 0.7, teachers=POOL[1:], teacher_choice="best", teacher="b")
    told = {name: record["teacher"] for name, record in flat(study(kd_best=chosen)).items()}
    assert told == {"ce": None, "kd_mean": "all", "ekd": "all", "kd_best": "b"}


def test_of_a_chain_the_pool_counts_and_the_assistants_time_is_shown():
    links = [{"teachers_sha256": ["a" * 64]}, {"teachers_sha256": ["x"]}]
    more = {"teachers": [{"sha256": "x"}], "teacher_choice": "best", "teacher": "a", "chain_stored_seconds": 42.0}
    runs = study(takd=run("takd", 0, 0.7, chain=links, **more))
    assert "+ 42 for assistants" in page(runs)
    assert flat(runs)["takd"]["assistants_seconds"] == 42.0
    with pytest.raises(UserError, match="differ in teachers"):
        block(study(takd=run("takd", 0, 0.7, chain=[{"teachers_sha256": ["c"]}], **more)))


def test_the_same_difference_in_every_pair_counts_among_the_tests():
    """It has no p value to show, but it was tested: the others are corrected for it."""
    accuracies = {"ce": (0.5, 0.6, 0.7), "ekd": (0.6, 0.7, 0.8), "kd_mean": (0.52, 0.66, 0.74)}
    found = {name: row.differences["ce"] for name, row in rows(study(accuracies)).items()}
    assert found["ekd"].p is None
    assert found["ekd"].p_holm is None
    # The smallest p of 2 is the other's; this one is times 1.
    assert found["kd_mean"].p_holm == pytest.approx(found["kd_mean"].p)
    found = {name: row.differences["ce"] for name, row in rows(study(accuracies | {"kd": (0.53, 0.61, 0.72)})).items()}
    smallest = min((found["kd"], found["kd_mean"]), key=lambda one: one.p)
    assert smallest.p_holm == pytest.approx(min(1.0, 2 * smallest.p))
