from __future__ import annotations

import csv
import os
from pathlib import Path

import pytest
import yaml
from wandb_files import offline_runs, records, unpacked
from whole_runs import TINY, call_train

from ekd_lightning.errors import UserError
from ekd_lightning.settings import LoggerSettings, WandbSettings
from ekd_lightning.tracking.loggers import MetricsCsv, check_loggers, make_loggers

FAST = ("method=branched_ce", "student.branches=2", "trainer.limit_train_batches=2")
OFFLINE = ("logger=wandb", "logger.wandb.mode=offline", *FAST)


SECTIONS = ("evaluation/", "validation/", "calibration/", "diversity/", "generalisation/")
"""What an evaluation found is in result.json and on dashboards, not among the curves."""


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


# -- metrics.csv ----------------------------------------------------------------------------------------


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
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_numbers_survive_writing_and_reading(tmp_path):
    first = MetricsCsv(tmp_path / "m.csv")
    first.log_metrics({"x": 0.1 + 0.2}, step=0)
    first.finalize("success")
    content = (tmp_path / "m.csv").read_bytes()
    second = MetricsCsv(tmp_path / "m.csv")
    second.finalize("success")
    assert (tmp_path / "m.csv").read_bytes() == content
    assert float(rows(tmp_path / "m.csv")[0]["x"]) == 0.1 + 0.2


def test_a_resumed_log_forgets_what_will_be_logged_again(tmp_path):
    log = MetricsCsv(tmp_path / "m.csv")
    for step, name in ((3, "loss"), (7, "loss"), (8, "test")):  # two epochs of four steps, then a final test
        log.log_metrics({name: step}, step)
    log.finalize("success")
    again = MetricsCsv(tmp_path / "m.csv")
    again.forget_from(8)
    again.log_metrics({"loss": 11.0}, 11)
    again.finalize("success")
    assert [row["step"] for row in rows(tmp_path / "m.csv")] == ["3", "7", "11"]
    assert "test" not in (tmp_path / "m.csv").read_text()


def test_an_empty_log_writes_nothing(tmp_path):
    MetricsCsv(tmp_path / "m.csv").finalize("failed")
    assert not (tmp_path / "m.csv").exists()


# -- selection ------------------------------------------------------------------------------------------


def test_metrics_csv_is_always_there(tmp_path):
    made = make_loggers(LoggerSettings(), tmp_path, name="n", sweep=None, config={})
    assert [type(logger).__name__ for logger in made] == ["MetricsCsv"]
    assert made[0].path == tmp_path / "metrics.csv"


@pytest.mark.parametrize("mode", [None, "online", "offline", "disabled"])
def test_known_modes(mode):
    check_loggers(LoggerSettings(wandb=WandbSettings(mode=mode)))


def test_an_unknown_mode():
    with pytest.raises(UserError, match="did you mean 'disabled'"):
        check_loggers(LoggerSettings(wandb=WandbSettings(enabled=True, mode="disable")))


# -- TensorBoard ----------------------------------------------------------------------------------------


def test_tensorboard_holds_the_same_scalars(train, tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    outcome = train(tmp_path / "run", "logger=tensorboard", "recipe.epochs=2", *FAST)
    assert outcome.code == 0, outcome.err
    events = reader.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    names = {name for name in events.Tags()["scalars"] if not name.startswith(SECTIONS)}
    table = rows(tmp_path / "run" / "metrics.csv")
    assert names == set(table[0]) - {"step"}
    for name in names - {"epoch"}:
        expected = {int(row["step"]): float(row[name]) for row in table if row[name]}
        found = {event.step: event.value for event in events.Scalars(name)}
        assert found == pytest.approx(expected, rel=1e-6)


# -- Weights & Biases, offline --------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _quiet_wandb(monkeypatch, tmp_path_factory):
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path_factory.mktemp("wandb")))


@pytest.fixture(scope="module")
def swept(store, tmp_path_factory):
    """Two jobs of a sweep in one process, the second of which fails."""
    folder = tmp_path_factory.mktemp("wandb") / "day" / "time"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_SILENT", "true")
        patch.delenv("WANDB_MODE", raising=False)
        words = (*OFFLINE, "recipe.lr=0.1,1e30", f"teachers.store={store}", f"hydra.sweep.dir={folder}")
        outcome = call_train("-m", *TINY, *words, directory=folder)
        assert "WANDB_MODE" not in os.environ
    return outcome


def test_every_job_is_a_run_of_its_own(swept):
    ids = [(swept.directory / job / "wandb_run_id.txt").read_text().strip() for job in ("0", "1")]
    assert ids[0] != ids[1]
    for job, run_id in zip(("0", "1"), ids, strict=True):
        (folder,) = offline_runs(swept.directory / job)
        (run, *_) = records(folder)["run"]
        assert run.run_id == run_id


def test_a_run_is_named_grouped_and_typed(swept):
    (folder,) = offline_runs(swept.directory / "0")
    (run, *_) = records(folder)["run"]
    assert run.run_group == "day/time"
    assert run.job_type == "student"
    assert run.project == "ekd-lightning"
    assert run.display_name.startswith("branched_ce-T0-B2-f")
    assert run.display_name.endswith("-s0")


def test_the_configuration_is_nested_and_resolved(swept):
    (folder,) = offline_runs(swept.directory / "0")
    (run, *_) = records(folder)["run"]
    config = unpacked(run.config.update)
    recorded = yaml.safe_load((swept.directory / "0" / "config.yaml").read_text())
    assert {key: config[key] for key in recorded} == recorded
    assert config["trainer"]["max_epochs"] == 1
    assert config["method"]["terms"]["ce_branch"] == {"weight": 1.0}


def test_curves_and_summary(swept):
    (folder,) = offline_runs(swept.directory / "0")
    found = records(folder)
    names = {name for item in found["history"] for name in unpacked(item.item)}
    assert names >= {"train/loss", "train/ce_ensemble", "train/ce_branch", "val/branch_accuracy_1", "lr", "epoch"}
    summary = {}
    for item in found["summary"]:
        summary.update(unpacked(item.update))
    result = yaml.safe_load((swept.directory / "0" / "result.json").read_text())
    assert summary["test_accuracy"] == result["test_accuracy"]
    assert summary["test_branch_accuracy_1"] == result["test_branch_accuracy"][1]
    assert summary["num_parameters"] == result["num_parameters"]


def test_a_failure_shows_as_a_failure(swept):
    codes = []
    for job in ("0", "1"):
        (folder,) = offline_runs(swept.directory / job)
        codes.append(records(folder)["exit"][0].exit_code)
    assert codes == [0, 1]


def test_a_resumed_run_keeps_its_id(train, resume, tmp_path):
    directory = tmp_path / "run"
    assert train(directory, *OFFLINE, "recipe.epochs=2", "trainer.max_epochs=1").code == 0
    run_id = (directory / "wandb_run_id.txt").read_text().strip()
    assert resume(directory, "trainer.max_epochs=2").code == 0
    assert {folder.name.rsplit("-", 1)[1] for folder in offline_runs(directory)} == {run_id}


def test_disabled_leaves_nothing(train, tmp_path):
    outcome = train(tmp_path / "run", "logger=wandb", "logger.wandb.mode=disabled", *FAST)
    assert outcome.code == 0, outcome.err
    assert offline_runs(tmp_path / "run") == []
