"""What one command leaves in its directory."""

from __future__ import annotations

import csv
import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from torch import no_grad
from whole_runs import called

from ekd_lightning.evaluation.scores import ClassificationScores
from ekd_lightning.networks import load_student
from ekd_lightning.pipeline.prepare import prepare


@pytest.fixture(scope="module")
def run(train, tmp_path_factory):
    directory = tmp_path_factory.mktemp("record") / "run"
    outcome = train(directory, "trainer.limit_test_batches=null", "tags=[a,b]", "evaluation=standard")
    assert outcome.code == 0, outcome.err
    return outcome


def test_the_files(run):
    names = {path.relative_to(run.directory).as_posix() for path in run.directory.rglob("*") if path.is_file()}
    assert names >= {
        "config.yaml",
        "provenance.json",
        "status.json",
        "metrics.csv",
        "result.json",
        "student.safetensors",
        "arrays.npz",
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
        "train.log",
        ".hydra/overrides.yaml",
    }
    assert not [name for name in names if ".part" in name or name.startswith(".status")]
    assert run.status["state"] == "done"


def test_the_result_has_every_field(run):
    result = run.result
    expected = {
        "method": "ekd_pooled",
        "data": "digits",
        "num_teachers": 2,
        "num_branches": 3,
        "split_after": "stage1",
        "num_train_images": 134,
        "seed": 0,
        "epochs": 1,
        "epochs_done": 1,
        "steps": 4,
        "num_devices": 1,
        "precision": "32-true",
        "tags": ["a", "b"],
        "partial": False,
    }
    assert {name: result[name] for name in expected} == expected
    assert result["fraction"] == pytest.approx(0.1, abs=0.01)
    numbers = ["test_accuracy", "test_accuracy_best", "test_accuracy_last", "val_accuracy", "val_accuracy_best"]
    numbers += ["test_nll", "test_ece", "test_brier", "test_disagreement", "test_ambiguity"]
    numbers += ["num_parameters", "macs", "train_seconds", "images_per_second"]
    assert [name for name in numbers if not isinstance(result[name], (int, float))] == []
    assert result["test_accuracy"] == result["test_accuracy_last"]
    assert len(result["test_branch_accuracy"]) == 3
    assert len(result["subset_sha256"]) == 64


def test_the_result_is_flat_but_for_lists_of_networks_and_the_evaluation(run):
    """Numbers, words and lists of them; matrices and points of curves are lists of equal rows."""
    for name, value in run.result.items():
        if name in ("teachers", "teacher_candidates", "chain", "evaluation_seconds"):
            continue
        assert not isinstance(value, dict), name
        if isinstance(value, list):
            kinds = {type(item) if isinstance(item, (list, dict)) else None for item in value}
            assert len(kinds) <= 1, name
            rows = [tuple(item) if isinstance(item, dict) else len(item) for item in value if kinds - {None}]
            assert len(set(rows)) <= 1, name


def test_the_evaluation_is_in_the_record(run):
    assert run.result["evaluated"] == ["predictions", "generalisation"]
    assert run.result["evaluation_error"] is None
    subsets = run.result["test_subsets"]
    assert subsets[-1]["branches"] == [0, 1, 2]
    assert subsets[-1]["accuracy"] == pytest.approx(run.result["test_accuracy"], abs=1e-7)
    assert (subsets[-1]["macs"], subsets[-1]["num_parameters"]) == (run.result["macs"], run.result["num_parameters"])
    assert [row["accuracy"] for row in subsets[:3]] == pytest.approx(run.result["test_branch_accuracy"], abs=1e-7)


def test_the_printed_table_has_the_branch_that_validation_chose_and_its_cost(run):
    validated = run.result["val_branch_accuracy"]
    branch = validated.index(max(validated))
    alone = run.result["test_subsets"][branch]
    (line,) = [line for line in run.out.splitlines() if line.split()[:3] == ["student:", "branch", str(branch)]]
    accuracy, parameters, macs = f"{100 * alone['accuracy']:.2f}", f"{alone['num_parameters']:,}", alone["macs"]
    assert line.split()[3:] == ["alone,", "chosen", "by", "validation", accuracy, parameters, f"{macs / 1e6:.1f}", "M"]


def test_teachers_are_recorded_with_hash_and_accuracy(run):
    teachers = run.result["teachers"]
    assert [t["id"] for t in teachers] == ["resnet8-s0", "resnet8-s1"]
    assert [t["trained_on"] for t in teachers] == ["subset", "subset"]
    assert all(len(t["sha256"]) == 64 and 0 <= t["test_accuracy"] <= 1 for t in teachers)
    origin = run.json("provenance.json")["teachers"]
    assert [t["sha256"] for t in origin] == [t["sha256"] for t in teachers]
    assert all(t["trained_on"] == "subset" and len(t["store_key"]) == 64 for t in origin)


def test_test_scores_are_those_of_the_saved_student(run, tiny_settings):
    dataset = prepare(tiny_settings(), "cpu").dataset
    student, scores = load_student(run.directory / "student.safetensors"), ClassificationScores(10, 3)
    for images, labels in zip(dataset.test.images.split(77), dataset.test.labels.split(77), strict=True):
        with no_grad():
            output = student.outputs(images.float() / 255)
        scores.update(output.logits, labels, None, output.branch_logits)
    expected = scores.compute()
    assert run.result["test_accuracy"] == pytest.approx(expected["accuracy"], abs=1e-7)
    assert run.result["test_branch_accuracy"] == pytest.approx(expected["branch_accuracy"], abs=1e-7)
    for name in ("nll", "ece", "brier", "disagreement", "ambiguity"):
        assert run.result[f"test_{name}"] == pytest.approx(expected[name], rel=1e-5, abs=1e-7)


def test_the_configuration_is_resolved(run):
    config = yaml.safe_load((run.directory / "config.yaml").read_text())
    assert config["trainer"]["max_epochs"] == 1
    assert config["data"]["fraction"] == 0.1
    assert "${" not in (run.directory / "config.yaml").read_text()


def test_provenance_matches_the_result(run):
    provenance = run.json("provenance.json")
    assert provenance["data"]["subset_sha256"] == run.result["subset_sha256"]
    assert json.dumps(provenance["command"]).count("data.fraction=0.1") == 1


@pytest.mark.parametrize("debug", ["fdr", "limit", "overfit", "anomaly", "profiler"])
def test_debug_presets_run(train, tmp_path, debug):
    outcome = train(tmp_path / "run", f"debug={debug}", "recipe.epochs=1", "method=ce")
    assert outcome.code == 0, outcome.err
    assert outcome.result["steps"] <= 4


@pytest.mark.parametrize("words", [("callbacks=early_stopping",), ("callbacks=rich_progress",), ("method=ekd_random",)])
def test_options_run(train, tmp_path, words):
    outcome = train(tmp_path / "run", *words, "trainer.limit_train_batches=1")
    assert outcome.code == 0, outcome.err


@pytest.mark.parametrize(
    ("limit", "partial"), [("null", False), ("1.0", False), ("1", True), ("0.5", True), ("2", True)]
)
def test_a_result_from_a_part_of_the_test_set_says_so(train, tmp_path, limit, partial):
    """One batch (1) is not all of them (1.0)."""
    outcome = train(tmp_path / "run", "method=ce", f"trainer.limit_test_batches={limit}")
    assert outcome.result["partial"] is partial


def test_a_run_ends_with_a_table_and_commands_that_can_be_pasted(run, monkeypatch):
    from ekd_lightning.cli import compare, evaluate, export

    monkeypatch.chdir(run.directory.parent)
    lines = run.out.splitlines()
    table = [line.split() for line in lines if line.startswith((" student", " teacher"))]
    teachers = [[f"{100 * one['test_accuracy']:.2f}", f"{one['num_parameters']:,}"] for one in run.result["teachers"]]
    assert table[0][-5] == f"{100 * run.result['test_accuracy']:.2f}"
    assert [row[-2:] for row in table if row[0] == "teacher:"] == teachers
    commands = [shlex.split(line) for line in lines[lines.index("next:") + 1 :]]
    assert [words[0] for words in commands] == ["ekd-report", "ekd-evaluate", "ekd-export", "ekd-compare"]
    assert {Path(word).absolute() for words in commands[:3] for word in words[1:2]} == {run.directory}
    assert called(export.main, *commands[2][1:])[0] == 0
    assert (run.directory / "export" / "student.safetensors").is_file()
    assert called(evaluate.main, *commands[1][1:3], "predictions")[0] == 0
    code, out, err = called(compare.main, *commands[3][1:], "--print-jobs", "--no-controls")
    assert (code, out.count("ekd-train")) == (0, 3), err


def test_the_last_epoch_is_validated_whatever_the_interval(train, tmp_path):
    """Accuracy on the validation images is that of the weights that are tested, as without an interval."""
    words = ("method=ce", "recipe.epochs=5", "data.val_fraction=0.25")
    often, seldom = (
        train(tmp_path / "often", *words),
        train(tmp_path / "seldom", *words, "trainer.check_val_every_n_epoch=3"),
    )
    assert seldom.code == 0, seldom.err
    assert seldom.result["student_sha256"] == often.result["student_sha256"]
    for name in ("val_accuracy", "val_nll", "val_brier"):
        assert seldom.result[name] == often.result[name]
    with (tmp_path / "seldom/metrics.csv").open() as file:
        validated = [row["epoch"] for row in csv.DictReader(file) if row["val/nll"]]
    assert validated == ["2.0", "4.0"]
    lines = re.findall(r"epoch \d/5 .*", (tmp_path / "seldom/train.log").read_text())
    assert ["val/accuracy" in line for line in lines] == [False, False, True, False, True]  # the fourth repeats none
