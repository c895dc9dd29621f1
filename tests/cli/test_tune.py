"""`ekd-tune` as the console calls it, on a tiny task."""

from __future__ import annotations

import builtins
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from whole_runs import TINY, Outcome, _call

pytest.importorskip("optuna")

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "tuning.md"
VAL = "data.val_fraction=0.3"  # the tiny subset's tenth would be 10 images


@pytest.fixture
def tune(store: Path, tmp_path: Path) -> Callable[..., Outcome]:
    """`tune(*words)` calls `ekd-tune` on the tiny task; the outcome's directory is the output."""
    from ekd_lightning.cli.tune import main

    def call(*words: str) -> Outcome:
        own = ("--output", str(tmp_path / "tuned"), f"teachers.store={store}")
        return _call(main, ["ekd-tune", *TINY, VAL, *own, *words], tmp_path / "tuned")

    return call


def result(outcome: Outcome, method: str = "kd_mean") -> dict[str, Any]:
    assert outcome.code == 0, outcome.err
    return yaml.safe_load((outcome.directory / f"{method}.yaml").read_text())


def refused(outcome: Outcome) -> str:
    assert outcome.code == 2, outcome.err
    lines = [line for line in outcome.err.splitlines() if line.startswith("ekd-tune: error: ")]
    assert len(lines) == 1
    assert outcome.err.rstrip().endswith(lines[0])
    assert "Traceback" not in outcome.err
    return lines[0].removeprefix("ekd-tune: error: ")


def test_a_study_leaves_its_result_and_goes_on_where_it_stopped(tune, tmp_path, caplog):
    caplog.set_level("INFO", "ekd_lightning.studies.search")
    first = tune("--trials", "2", "method=kd_mean")
    found = result(first)
    assert (found["trials"], found["budget"], found["seeds"], found["pruned"]) == (2, 2, [0], 0)
    assert found["default_value"] <= found["value"]
    assert found["protocol"]["epochs"] == 1
    assert len(found["protocol"]["subset_sha256"]) == 64
    assert list(found["space"]) == ["method.terms.kd_ensemble.weight", "method.temperature"]
    n, p = found["validation_images"], found["value"]
    assert n == 40
    assert found["standard_error"] == pytest.approx((p * (1 - p) / n) ** 0.5)
    assert "settings as given" in first.out
    assert f"with {n} validation images the standard error" in first.out

    caplog.clear()
    second = tune("method=kd_mean", "--trials", "4")
    assert result(second)["trials"] == 4
    told = [record.message for record in caplog.records if record.name == "ekd_lightning.studies.search"]
    assert sum(line.startswith("trial ") for line in told) == 2  # the two that were missing
    assert result(tune("method=kd_mean", "--trials", "4")) == result(second)
    folder = tmp_path / "tuned"
    assert sorted(path.name for path in folder.iterdir()) == ["kd_mean", "kd_mean.yaml"]
    assert list((folder / "kd_mean" / "trials").iterdir()) == []


def test_the_result_is_a_command_line(tune, train, store, tmp_path):
    from ekd_lightning.cli.tune import main

    space = tmp_path / "space.yaml"
    space.write_text(
        "recipe.lr: {choices: [1.0e-6, 0.05]}\nmethod.terms.ce_ensemble.label_smoothing: {low: 0.0, high: 0.2}\n"
    )
    base = ("method=ce", "recipe.lr=1e-6", "recipe.epochs=4", "data.fraction=0.5")
    outcome = tune("--space", str(space), "--trials", "4", "--seeds", "3", *base)
    found = result(outcome, "ce")
    assert found["overrides"]  # a learning rate of 1e-6 learns nothing
    printed = _call(main, ["ekd-tune", "--print", str(tmp_path / "tuned" / "ce.yaml")], tmp_path / "x")
    assert printed.out.split() == found["overrides"]
    run = train(tmp_path / "run", VAL, *base, "seed=3", *printed.out.split())
    assert run.code == 0, run.err
    assert run.result["val_accuracy"] == pytest.approx(found["value"], abs=1e-6)
    kept = [*TINY, VAL, f"teachers.store={store}", *base]
    chosen = {"method", *(word.partition("=")[0] for word in found["overrides"])}
    kept = [word for word in kept if word.partition("=")[0] not in chosen]
    train_line, compare_line = (line.strip() for line in outcome.out.splitlines()[-2:])
    train_line, _, best = train_line.partition(" $(")
    assert best == "ekd-tune --print tuned/ce.yaml)"
    assert shlex.split(train_line) == ["ekd-train", "method=ce", *kept]
    own = ["--methods", "ce", "--output", "tuned/compare", "--tuned", "tuned", "--fractions", "0.5"]
    rest = [word for word in kept if not word.startswith("data.fraction=")]
    assert shlex.split(compare_line) == ["ekd-compare", *own, *rest]


def test_what_the_command_line_sets_is_not_searched(tune):
    found = result(tune("--trials", "2", "method=kd_mean", "method.temperature=2"))
    assert list(found["space"]) == ["method.terms.kd_ensemble.weight"]


def test_a_method_without_anything_to_search_takes_one_trial(tune, caplog):
    found = result(tune("--trials", "5", "method=ce"), "ce")
    assert (found["overrides"], found["trials"], found["value"]) == ([], 1, found["default_value"])
    assert "method=ce: nothing to search" in caplog.text


def test_another_configuration_or_budget_is_not_mixed_in(tune, caplog):
    result(tune("--trials", "1", "method=kd_mean"))
    assert result(tune("--trials", "1", "method=kd_mean", "tags=[x]", "teachers.table=off"))["trials"] == 1
    message = refused(tune("--trials", "2", "method=kd_mean", "recipe.lr=0.03"))
    assert "another configuration (config.recipe.lr differ)" in message
    assert "seeds differ" in refused(tune("--trials", "2", "--seeds", "0,1", "method=kd_mean"))
    result(tune("--trials", "2", "method=ce"), "ce")
    assert "kd_mean.yaml was tuned with another budget" in caplog.text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--trials", "0"], "--trials=0: must be at least 1"),
        (["--epochs", "0"], "--epochs=0: must be at least 1"),
        (["--timeout", "0"], "--timeout=0.0: must be positive"),
        (["--seeds", "0,x"], "--seeds 0,x: give different whole numbers"),
        (["--seeds", "1,1"], "--seeds 1,1: give different whole numbers"),
        (["data.val_fraction=0"], "data.val_fraction=0: leaves no validation images"),
        (["trainer.devices=2"], "trainer.devices=2: a trial has one device"),
        (["trainer.devices=auto"], "trainer.devices=auto: a trial has one device"),
        (["resume=somewhere"], "resume=somewhere: has no effect in ekd-tune"),
        (["method.name=a/b"], "method.name=a/b: files are named after it"),
        (["method=kd_maen"], "did you mean 'kd_mean'"),
        (["recipe.lrr=1"], "did you mean 'recipe.lr'"),
        (["--print", "nothing.yaml"], "nothing.yaml: not a result of ekd-tune"),
        (["--print", "."], "is a folder; name a method's file in it"),
    ],
)
def test_mistakes_are_one_line_before_anything_starts(tune, tmp_path, words, message):
    assert message in refused(tune(*words))
    assert not (tmp_path / "tuned").exists()


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ("recipe.lrr: {low: 0.1, high: 0.2}", "did you mean 'recipe.lr'"),
        ("method.terms.kd.weight: {low: 0.1, high: 0.2}", "method.terms.kd"),
        ("method.terms.kd_ensemble.tempo: {choices: [1]}", "option of term 'kd_ensemble': 'tempo'"),
        ("recipe.momentum: {low: 0.5, high: 1.5}", "recipe.momentum=1.5: must be in [0, 1)"),
        ("student.split_after: {choices: [none, stage7]}", "stage7"),
        ("recipe.batch_size: {low: 1.5, high: 8.0}", "recipe.batch_size"),
        ("student: {choices: [resnet8, resnet9]}", "did you mean 'resnet"),
        ("recipe.epochs: {choices: [1, 2]}", "recipe.epochs: cannot be searched"),
    ],
)
def test_a_space_that_does_not_fit_is_refused_before_anything_starts(tune, tmp_path, space, message):
    path = tmp_path / "space.yaml"
    path.write_text(space)
    assert message in refused(tune("--space", str(path), "method=kd_mean"))
    assert not (tmp_path / "tuned").exists()


def test_without_an_output_or_optuna(tune, tmp_path, monkeypatch):
    from ekd_lightning.cli.tune import main

    assert "--output: must be given" in refused(_call(main, ["ekd-tune"], tmp_path / "x"))
    imported = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] == "optuna":
            raise ModuleNotFoundError("No module named 'optuna'", name="optuna")
        return imported(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    assert "pip install 'ekd-lightning[tune]'" in refused(tune("method=kd_mean"))


def test_a_study_without_a_complete_trial_says_so(tune):
    message = refused(tune("--timeout", "1e-9", "method=kd_mean"))
    assert "no trial is complete" in message


def test_the_page_is_true(tmp_path):
    from ekd_lightning.cli import tune as command
    from ekd_lightning.studies.search import check_space
    from ekd_lightning.studies.space import read_space

    text = PAGE.read_text()
    spaces = re.findall(r"```yaml\n(# space.*?)```", text, re.DOTALL)
    assert spaces
    three = "teachers.pool=[{train: resnet8, seed: 0}, {train: resnet8, seed: 1}, {train: resnet8, seed: 2}]"
    for space in spaces:
        (tmp_path / "space.yaml").write_text(space)
        check_space([*TINY, three], read_space(tmp_path / "space.yaml"))
    flags = {action.option_strings[-1] for action in command._parser()._actions if action.option_strings}
    assert {flag for flag in flags - {"--help", "--version"} if f"`{flag}" not in text} == set()
