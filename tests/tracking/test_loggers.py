"""What loggers get: metrics.csv of any run; W&B and TensorBoard read back from the files of a sweep."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import wandb
import yaml
from wandb_files import config_of, history_of, offline_runs, records, rows, run_of, summary_of

from ekd_lightning.errors import UserError
from ekd_lightning.roles import check_values
from ekd_lightning.settings import LoggerSettings, WandbSettings
from ekd_lightning.tracking.loggers import MetricsCsv, describe_metrics, finish_loggers, make_loggers, wandb_run_id

FAST = ("method=branched_ce", "student.branches=2", "trainer.limit_train_batches=2")
SECTIONS = ("evaluation/", "validation/", "calibration/", "diversity/", "fidelity/", "generalisation/", "efficiency/")
"""What an evaluation found is in result.json and on dashboards, not among the curves."""


# -- metrics.csv ----------------------------------------------------------------------------------------


def test_a_missing_login_of_wandb_is_one_line(tmp_path, monkeypatch):
    def refused(**_):
        raise wandb.errors.UsageError("No API key configured.\nUse `wandb login`")

    monkeypatch.setattr(wandb, "init", refused)
    settings = LoggerSettings(wandb=WandbSettings(enabled=True))
    loggers = make_loggers(settings, tmp_path, name="run", sweep=None, config={})
    with pytest.raises(UserError, match=r"^logger.wandb: No API key configured. Use .*mode=offline needs no login\)$"):
        describe_metrics(loggers)


def test_values_of_one_step_share_a_row(tmp_path):
    log = MetricsCsv(tmp_path / "metrics.csv")
    log.log_metrics({"b": 1.0, "epoch": 0}, step=3)
    log.log_metrics({"a": 0.1}, step=3)
    log.log_metrics({"a": 0.2, "c": float("inf")}, step=7)
    log.finalize("success")
    header = (tmp_path / "metrics.csv").read_text().splitlines()[0]
    assert header == "step,b,epoch,a,c"
    assert rows(tmp_path / "metrics.csv") == [
        {"step": "3", "b": "1.0", "epoch": "0.0", "a": "0.1", "c": ""},
        {"step": "7", "b": "", "epoch": "", "a": "0.2", "c": "inf"},
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".metrics.json", "metrics.csv"]


def test_numbers_survive_writing_and_reading(tmp_path):
    first = MetricsCsv(tmp_path / "metrics.csv")
    first.log_metrics({"x": 0.1 + 0.2}, step=0)
    first.finalize("success")
    content = (tmp_path / "metrics.csv").read_bytes()
    second = MetricsCsv(tmp_path / "metrics.csv")
    second.finalize("success")
    assert (tmp_path / "metrics.csv").read_bytes() == content
    assert float(rows(tmp_path / "metrics.csv")[0]["x"]) == 0.1 + 0.2


def test_a_resumed_log_forgets_what_will_be_logged_again(tmp_path):
    log = MetricsCsv(tmp_path / "metrics.csv")
    for step, name in ((3, "loss"), (7, "loss"), (8, "test")):  # two epochs of four steps, then a final test
        log.log_metrics({name: step}, step)
    log.finalize("success")
    again = MetricsCsv(tmp_path / "metrics.csv")
    again.forget_from(8)
    again.log_metrics({"loss": 11.0}, 11)
    again.finalize("success")
    assert [row["step"] for row in rows(tmp_path / "metrics.csv")] == ["3", "7", "11"]
    assert "test" not in (tmp_path / "metrics.csv").read_text()


def test_an_empty_log_writes_nothing(tmp_path):
    MetricsCsv(tmp_path / "metrics.csv").finalize("failed")
    assert not (tmp_path / "metrics.csv").exists()


# -- selection ------------------------------------------------------------------------------------------


def test_metrics_csv_is_always_there(tmp_path):
    made: Any = make_loggers(LoggerSettings(), tmp_path, name="n", sweep=None, config={})
    assert [type(logger).__name__ for logger in made] == ["MetricsCsv"]
    assert made[0].path == tmp_path / "metrics.csv"


def test_modes_are_those_of_wandb():
    for mode in (None, "online", "offline", "disabled"):
        check_values(WandbSettings(mode=mode))
    with pytest.raises(UserError, match="did you mean 'disabled'"):
        check_values(LoggerSettings(wandb=WandbSettings(enabled=True, mode="disable")))


# -- a sweep, read back ---------------------------------------------------------------------------------


def test_tensorboard_holds_the_same_scalars(ran):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(ran / "tensorboard"))
    events.Reload()
    names = {name for name in events.Tags()["scalars"] if not name.startswith(SECTIONS)}
    table = rows(ran / "metrics.csv")
    assert names == set(table[0]) - {"step"}
    for name in names - {"epoch"}:
        expected = {int(row["step"]): float(row[name]) for row in table if row[name]}
        found = {event.step: event.value for event in events.Scalars(name)}
        assert found == pytest.approx(expected, rel=1e-6)


def test_every_job_is_a_run_of_its_own_and_a_failure_shows_as_a_failure(swept):
    folders = [offline_runs(swept.directory / job) for job in ("0", "1")]
    ids = [(swept.directory / job / "wandb_run_id.txt").read_text().strip() for job in ("0", "1")]
    assert ids[0] != ids[1]
    assert [[run_of(folder).run_id for folder in own] for own in folders] == [[one] for one in ids]
    assert [records(own[0])["exit"][0].exit_code for own in folders] == [0, 1]


def test_a_run_is_named_grouped_and_typed(ran):
    (student,) = offline_runs(ran)
    run = run_of(student)
    assert (run.run_group, run.job_type, run.project) == ("day/time", "student", "ekd-lightning")
    assert run.display_name == "ekd_pooled-T1-B2-f10-s0"
    (teacher,) = offline_runs(ran / "teachers" / "resnet8-s0")
    run = run_of(teacher)
    assert (run.run_group, run.job_type, run.display_name) == ("day/time", "teacher", "resnet8-s0")
    assert {"train/loss", "lr", "epoch"} <= set(history_of(teacher)[0])
    assert records(teacher)["exit"][0].exit_code == 0


def test_the_configuration_is_nested_and_resolved(ran):
    (folder,) = offline_runs(ran)
    config, recorded = config_of(folder), yaml.safe_load((ran / "config.yaml").read_text())
    assert {key: config[key] for key in recorded} == recorded
    assert config["trainer"]["max_epochs"] == 2
    assert config["method"]["terms"]["ce_branch"] == {"weight": 0.1}


def test_curves_and_summary(ran):
    (folder,) = offline_runs(ran)
    names = {name for row in history_of(folder) for name in row}
    assert names >= {"train/loss", "train/ce_ensemble", "train/ce_branch", "val/branch_accuracy_1", "lr", "epoch"}
    result, summary = yaml.safe_load((ran / "result.json").read_text()), summary_of(folder)
    wanted = ("test_accuracy", "num_parameters", "test_mean_branch_accuracy", "test_adaptive_ece", "train_seconds")
    assert {name: summary[name] for name in wanted} == {name: result[name] for name in wanted}
    assert summary["test_branch_accuracy_1"] == result["test_branch_accuracy"][1]


def test_the_best_checkpoint_alone_has_the_alias_best(train, tmp_path):
    words = ("logger=wandb", "logger.wandb.mode=offline", "logger.wandb.log_model=true", "recipe.epochs=2")
    assert train(tmp_path / "run", *FAST, *words).code == 0
    (folder,) = offline_runs(tmp_path / "run")
    models = [artifact for artifact in records(folder)["artifact"] if artifact.type == "model"]
    aliases = {json.loads(model.metadata)["original_filename"]: sorted(model.aliases) for model in models}
    assert aliases == {"best.ckpt": ["best", "latest"], "last.ckpt": ["latest"]}


def test_a_resumed_run_keeps_its_id(train, resume, tmp_path):
    directory = tmp_path / "run"
    offline = ("logger=wandb", "logger.wandb.mode=offline", *FAST)
    assert train(directory, *offline, "recipe.epochs=2", "trainer.max_epochs=1").code == 0
    run_id = (directory / "wandb_run_id.txt").read_text().strip()
    assert resume(directory, "trainer.max_epochs=2").code == 0
    names = [folder.name for folder in offline_runs(directory)]
    numbered = rf"offline-run-\d+_\d+-{run_id}(-\d+)?"  # W&B numbers folders of one second
    assert [re.fullmatch(numbered, name) is not None for name in names] == [True, True], names


def test_disabled_leaves_nothing(train, tmp_path):
    outcome = train(tmp_path / "run", "logger=wandb", "logger.wandb.mode=disabled", *FAST)
    assert outcome.code == 0, outcome.err
    assert offline_runs(tmp_path / "run") == []


VARIABLES = {"PROJECT": "theirs", "ENTITY": "team", "RUN_GROUP": "pack", "TAGS": "a,b", "NOTES": "why"}


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({}, ("theirs", "team", "pack", ["a", "b"], "why")),
        ({"project": "p", "entity": "e", "group": "g", "tags": ["t"], "notes": "n"}, ("p", "e", "g", ["t"], "n")),
    ],
)
def test_the_environment_says_what_the_configuration_does_not(tmp_path, monkeypatch, own, expected):
    for name, value in VARIABLES.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    wandb.teardown()  # a process reads them once
    settings = LoggerSettings(wandb=WandbSettings(enabled=True, mode="offline", **own))
    loggers: Any = make_loggers(settings, tmp_path, name="n", sweep="day/time", config={})
    assert loggers[1].experiment.project == expected[0]
    finish_loggers(loggers, result={})
    (folder,) = offline_runs(tmp_path)
    run = run_of(folder)
    assert (run.project, run.entity, run.run_group, [*run.tags], run.notes) == expected


def test_an_agent_of_a_sweep_decides_the_id(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SWEEP_ID", "s")
    monkeypatch.setenv("WANDB_RUN_ID", "given")
    assert wandb_run_id(tmp_path) == "given"
    monkeypatch.delenv("WANDB_SWEEP_ID")
    assert wandb_run_id(tmp_path) == "given"  # as it was, also when it is resumed by hand
