"""What dashboards show of a run: taken from its record, and read back from the files that W&B and TensorBoard get."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of
from wandb_files import config_of, history_of, offline_runs, records, rows, run_of, summary_of

from ekd_lightning.data.catalog import read_digits
from ekd_lightning.tracking import dashboards
from ekd_lightning.tracking.dashboards import confusion_figure, examples_grid, markdown, result_columns
from ekd_lightning.tracking.loggers import flat_columns
from ekd_lightning.tracking.panels import branch_table, curves, make_panels, misclassified, scalars, tables

NAMES = ("cat", "dog", "frog")


# -- what is shown, without a dashboard -----------------------------------------------------------------


@given(
    arrays_of.arrays(np.float16, (12, 3), elements=st.floats(0, 1, width=16)),
    arrays_of.arrays(np.int64, 12, elements=st.integers(0, 2)),
    st.integers(0, 14),
)
def test_wrong_examples_are_the_most_confident_ones_by_a_plain_loop(probs, labels, most):
    images = np.arange(12 * 3 * 2 * 2, dtype=np.uint8).reshape(12, 3, 2, 2)
    found = misclassified({"ensemble_probs": probs, "labels": labels}, images, NAMES, most)
    wrong = []
    for i, row in enumerate(probs.tolist()):
        if max(row) > row[labels[i]]:
            wrong.append((-max(row), i, row.index(max(row))))
    assert [(e.place, e.predicted) for e in found] == [(i, NAMES[c]) for _, i, c in sorted(wrong)[:most]]
    for example in found:
        assert example.true == NAMES[labels[example.place]] != example.predicted
        assert example.confidence == probs[example.place].max()
        assert np.array_equal(example.image, np.moveaxis(images[example.place], 0, -1))


def test_without_arrays_there_are_no_examples_and_no_plots():
    assert misclassified({}, np.zeros((0, 3, 2, 2), np.uint8), NAMES) == []
    assert curves({}, {}) == {}
    assert set(tables({"test_accuracy": 0.5})) == {"evaluation/branches"}


def test_scalars_are_the_numbers_that_were_found():
    result = {
        "test_accuracy": 0.5,
        "test_accuracy_best": 0.6,
        "test_accuracy_last": 0.5,
        "test_nll_best": 1.0,
        "test_nll": None,
        "test_ece": float("nan"),
        "test_branch_accuracy": [0.25, 0.75],
        "test_class_accuracy": [0.1, 0.2],
        "corruption_mce": 0.3,
        "gap_nll": -1,
        "sharpness_sam": 2.0,
        "test_teacher_kl": 0.7,
        "test_q_statistic": 0.1,
        "val_accuracy": 0.4,
        "partial": False,
        "num_parameters": 7,
    }
    assert scalars(result) == {
        "test/accuracy": 0.5,
        "test_best/accuracy": 0.6,
        "test_best/nll": 1.0,
        "test/branch_accuracy_0": 0.25,
        "test/branch_accuracy_1": 0.75,
        "corruptions/corruption_mce": 0.3,
        "generalisation/gap_nll": -1.0,
        "flatness/sharpness_sam": 2.0,
        "fidelity/test_teacher_kl": 0.7,
        "diversity/test_q_statistic": 0.1,
        "validation/val_accuracy": 0.4,
    }


def test_branches_have_a_row_each_and_the_ensemble_one():
    result = {"test_branch_accuracy": [0.5, 0.6], "val_branch_accuracy": [0.4], "test_accuracy": 0.7}
    assert branch_table(result).rows == [["0", 0.5, 0.4], ["1", 0.6, None], ["ensemble", 0.7, None]]


def test_matrices_become_cells_with_the_names_of_the_teachers():
    result = {"test_branch_teacher_cka": [[0.1, 0.2]], "test_branch_cka": [[1.0]], "teachers": [{"id": "a"}]}
    made = tables(result)
    assert made["fidelity/branch_teacher_cka"].rows == [["branch 0", "a", 0.1], ["branch 0", "teacher 1", 0.2]]
    assert made["diversity/branch_cka"].rows == [["branch 0", "branch 0", 1.0]]


def test_curves_leave_empty_bins_out():
    arrays = {
        "reliability_confidence": np.array([0.1, np.nan, 0.9]),
        "reliability_accuracy": np.array([0.2, np.nan, 0.8]),
        "reliability_count": np.array([3, 0, 5]),
        "loss_curve_alpha": np.array([-1.0, 0.0, 1.0]),
        "loss_curve_loss": np.array([[3.0, 1.0, 2.0]]),
    }
    subsets = [{"branches": b, "macs": 10 * len(b), "accuracy": 0.5} for b in ([0], [1], [0, 1], [1, 2])]
    made = curves({"test_subsets": subsets, "corruption_accuracy_by_severity": [0.9, 0.8]}, arrays)
    assert made["calibration/reliability"].lines == {
        "as trained": ([0.1, 0.9], [0.2, 0.8]),
        "perfect": ([0.0, 1.0], [0.0, 1.0]),
    }
    assert made["evaluation/accuracy_against_macs"].lines == {"first branches": ([10.0, 20.0], [0.5, 0.5])}
    assert made["corruptions/accuracy_by_severity"].lines == {"mean over corruptions": ([1.0, 2.0], [0.9, 0.8])}
    assert made["flatness/loss_curve"].lines == {"direction 0": ([-1.0, 0.0, 1.0], [3.0, 1.0, 2.0])}


def test_columns_are_flat_and_hide_nothing_of_the_configuration():
    facts = {"method": "ekd", "fraction": 0.1, "seed": 3, "assignment": [[1, 0]], "temperature": None}
    config = {"method": {"name": "ekd"}, "seed": 3}
    assert flat_columns(facts, config) == {
        "method_name": "ekd",
        "fraction": 0.1,
        "assignment": "[[1, 0]]",
        "temperature": None,
    }


@pytest.mark.parametrize("number", [1, 8, 9])
def test_the_sheet_of_examples_has_room_for_all(number):
    probs = np.tile(np.array([[0.0, 0.0, 1.0]], np.float16), (number, 1))
    images = np.full((number, 3, 4, 4), 200, np.uint8)
    found = misclassified({"ensemble_probs": probs, "labels": np.zeros(number, int)}, images, NAMES)
    sheet = examples_grid(found)
    assert sheet.shape == ((96 + 28) * (2 if number > 8 else 1), 96 * min(number, 8), 3)
    assert (sheet == 200).all(-1).sum() >= number * 90 * 90


def test_a_table_is_markdown_with_four_digits():
    lines = markdown(branch_table({"test_branch_accuracy": [1 / 3], "test_accuracy": 1})).splitlines()
    assert lines[0] == "| branch | test accuracy | val accuracy |"
    assert lines[2:] == ["| 0 | 0.3333 | None |", "| ensemble | 1 | None |"]


def test_a_class_that_never_occurs_is_an_empty_row():
    pytest.importorskip("matplotlib")
    figure = confusion_figure(np.array([[2, 1, 0], [0, 0, 0], [0, 0, 4]]), NAMES)
    image = figure.axes[0].images[0].get_array()
    assert np.allclose(image, [[2 / 3, 1 / 3, 0], [0, 0, 0], [0, 0, 1]])


# -- a run, read back -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def panels(ran):
    result = json.loads((ran / "result.json").read_text())
    arrays = dict(np.load(ran / "arrays.npz"))
    test = read_digits().test
    return make_panels(result, arrays, test.images.numpy(), tuple(str(i) for i in range(10)))


def test_what_was_run_stands_in_flat_columns(ran):
    (folder,) = offline_runs(ran)
    config = config_of(folder)
    result = json.loads((ran / "result.json").read_text())
    wanted = ("fraction", "num_teachers", "num_branches", "num_parameters", "macs", "split_after")
    assert {name: config[name] for name in wanted} == {name: result[name] for name in wanted}
    names = ("method_name", "data_name", "student_network")
    assert [config[name] for name in names] == ["ekd_pooled", "digits", "resnet8"]
    columns = result_columns(result, {})
    assert (columns["method_name"], columns["num_branches"]) == ("ekd_pooled", 2)


def test_the_axis_is_the_epoch_and_summaries_are_the_better_value(ran):
    (folder,) = offline_runs(ran)
    defined = {item.name or item.glob_name: item for item in records(folder)["metric"]}
    assert defined["epoch"].options.hidden
    assert defined["*"].step_metric == "epoch"
    best = {name: item.summary for name, item in defined.items()}
    assert best["val/accuracy"].max
    assert best["val/nll"].min
    assert best["val/branch_accuracy_*"].max
    assert best["train/*"].min


def is_test_score(name: str) -> bool:
    return name.startswith(("test/", "test_best/"))


def test_scores_of_the_test_are_logged_once_with_best_and_last_apart(ran, panels):
    """In metrics.csv, W&B and TensorBoard alike, under names that tell whose weights they are of."""
    result = json.loads((ran / "result.json").read_text())
    expected = {name: value for name, value in panels.scalars.items() if is_test_score(name)}
    assert expected["test/accuracy"] == result["test_accuracy_last"]
    assert expected["test_best/accuracy"] == result["test_accuracy_best"]
    assert {name.removeprefix("test_best/") for name in expected if name.startswith("test_best/")} == {
        name.removeprefix("test/") for name in expected if name.startswith("test/")
    }
    logged = {"metrics.csv": [(n, float(v)) for row in rows(ran / "metrics.csv") for n, v in row.items() if v]}
    (folder,) = offline_runs(ran)
    logged["W&B"] = [pair for row in history_of(folder) for pair in row.items()]
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(ran / "tensorboard"))
    events.Reload()
    names = events.Tags()["scalars"]
    logged["TensorBoard"] = [(name, event.value) for name in names for event in events.Scalars(name)]
    for where, pairs in logged.items():
        found = sorted(pair for pair in pairs if is_test_score(pair[0]))
        assert [name for name, _ in found] == sorted(expected), where
        assert dict(found) == pytest.approx(expected, rel=1e-6), where
        assert not any(name.startswith("evaluation/test_accuracy") for name, _ in pairs), where


def test_the_last_row_of_the_history_holds_the_evaluation(ran, panels):
    (folder,) = offline_runs(ran)
    row = next(row for row in history_of(folder) if "evaluation/branches" in row)
    numbers = {name: value for name, value in panels.scalars.items() if not is_test_score(name)}
    assert {name: row[name] for name in numbers} == numbers
    assert row["epoch"] == 2
    for name, table in panels.tables.items():
        file = json.loads((folder / "files" / row[name]["path"]).read_text())
        assert (file["columns"], file["data"]) == (table.columns, table.rows)
    images = row["evaluation/misclassified"]
    assert images["captions"] == [example.caption for example in panels.examples]
    assert images["count"] == len(panels.examples) == len(images["filenames"]) <= 32
    assert all((folder / "files" / name).is_file() for name in images["filenames"])


def test_charts_hold_the_confusion_and_the_reliability(ran, panels):
    (folder,) = offline_runs(ran)
    row = next(row for row in history_of(folder) if "evaluation/branches" in row)
    confusion = json.loads((folder / "files" / row["evaluation/confusion_table"]["path"]).read_text())
    counts = np.array([n for *_, n in confusion["data"]]).reshape(10, 10)
    assert np.array_equal(counts, panels.confusion)
    assert counts.sum() == len(np.load(ran / "arrays.npz")["labels"])
    lines = json.loads((folder / "files" / row["calibration/reliability_table"]["path"]).read_text())
    made = panels.curves["calibration/reliability"].lines
    assert len(lines["data"]) == sum(len(x) for x, _ in made.values())
    shown = yaml.safe_dump(config_of(folder).get("_wandb", {}))
    assert "wandb/confusion_matrix/v1" in shown or "confusion" in shown


def test_tensorboard_holds_the_same_numbers_and_pictures(ran, panels):
    pytest.importorskip("matplotlib")
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(ran / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    tags = events.Tags()
    for name, value in panels.scalars.items():
        assert [event.value for event in events.Scalars(name)][-1] == pytest.approx(value, rel=1e-6)
    shown = {"evaluation/misclassified", "evaluation/confusion", "calibration/reliability"}
    assert shown <= set(tags["images"])
    assert {f"{name}/text_summary" for name in panels.tables} <= set(tags["tensors"])
    told = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    result = json.loads((ran / "result.json").read_text())
    assert all(name.encode() in told for name in result_columns(result, {}))
    assert b"test/accuracy" in events.SummaryMetadata("_hparams_/experiment").plugin_data.content


def test_a_later_evaluation_is_a_run_of_its_own_kind(ran, monkeypatch):
    from ekd_lightning.cli.evaluate import main

    monkeypatch.setenv("WANDB_MODE", "offline")
    main([str(ran), "--parts", "generalisation", "--force", "--device", "cpu"])
    (folder,) = offline_runs(ran / "evaluation")
    assert (run_of(folder).job_type, run_of(folder).run_group) == ("evaluation", "day/time")
    result = json.loads((ran / "result.json").read_text())
    (row,) = [row for row in history_of(folder) if "generalisation/gap_nll" in row]
    assert row["generalisation/gap_nll"] == result["gap_nll"]
    assert row["test/accuracy"] == result["test_accuracy"]
    assert summary_of(folder)["gap_nll"] == result["gap_nll"]


def test_a_dashboard_in_trouble_does_not_cost_the_result(train, tmp_path, monkeypatch, caplog):
    def fails(*args, **kwargs):
        raise RuntimeError("no such panel")

    monkeypatch.setattr(dashboards, "make_panels", fails)
    outcome = train(tmp_path / "run", "logger=tensorboard", "method=branched_ce", "student.branches=2")
    assert outcome.code == 0, outcome.err
    assert "the dashboard has no evaluation of this run" in outcome.out + outcome.err
