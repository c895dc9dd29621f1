"""The saved W&B workspace and report, built without a network; the W&B sweep file; `make wandb-sync`."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_module
from whole_runs import called

from ekd_lightning.cli.dashboard import main
from ekd_lightning.config.config import register_schema, to_settings
from ekd_lightning.settings import RETURNABLE
from ekd_lightning.tracking.panels import scalars

ROOT = Path(__file__).resolve().parents[2]
SWEEP = yaml.safe_load((ROOT / "docs" / "wandb_sweep.yaml").read_text())

# -- workspace and report -------------------------------------------------------------------------------


@pytest.fixture
def views(monkeypatch):
    """The builders; what W&B's package asks its server while a report is built is answered here."""
    interface = pytest.importorskip("wandb_workspaces.reports.v2.interface")
    monkeypatch.setattr(interface, "_get_api", lambda: None)
    monkeypatch.setattr(interface, "execute_graphql", lambda *_: {"project": {"internalId": "id"}})
    from ekd_lightning.reporting import wandb_views

    return wandb_views


def model(view) -> dict:
    return json.loads(view._to_model().model_dump_json(by_alias=True))


def under(node, key: str) -> list:
    """Every value that stands under a key, anywhere."""
    if isinstance(node, dict):
        found = [node[key]] if key in node else []
        return found + [value for item in node.values() for value in under(item, key)]
    return [value for item in node for value in under(item, key)] if isinstance(node, list) else []


def test_the_workspace_shows_students_of_a_sweep_grouped_by_what_was_compared(views):
    spec = model(views.build_workspace("me", "p", "a view", "day/time"))
    assert (spec["entity"], spec["project"], spec["displayName"]) == ("me", "p", "a view")
    text = json.dumps(spec)
    assert '"name": "jobType"' in text
    assert '"value": "student"' in text
    assert '"value": "day/time"' in text
    groups = [item["name"] for grouping in under(spec, "grouping") for item in grouping]
    assert groups == ["data_name.value", "fraction.value", "method_name.value"]
    sections = [item["name"] for bank in under(spec, "panelBankConfig") for item in bank["sections"]]
    assert sections == list(views.panel_sections())


def test_without_a_group_all_sweeps_are_shown(views):
    assert '"name": "group"' not in json.dumps(model(views.build_workspace("me", "p", "n")))


def test_the_report_has_the_same_panels_under_headings(views):
    blocks = views.build_report("me", "p", "a report", "day/time").blocks
    headings = [block.text for block in blocks if type(block).__name__ == "H2"]
    assert headings == list(views.panel_sections())
    grids = [block for block in blocks if type(block).__name__ == "PanelGrid"]
    assert [len(grid.panels) for grid in grids] == [len(panels) for panels in views.panel_sections().values()]
    text = json.dumps(model(views.build_report("me", "p", "a report", "day/time")))
    assert '"jobType"' in text
    assert "day/time" in text


def listed(value: object) -> list[str]:
    return [name for name in value if isinstance(name, str)] if isinstance(value, list) else []


def test_panels_name_what_runs_log(views):
    panels = [panel for panels in views.panel_sections().values() for panel in panels]
    named = [name for panel in panels for key in ("metrics", "y") for name in listed(getattr(panel, key, None))]
    sections = [name for name in named if "/" in name and not name.startswith(("train/", "val/"))]
    assert len(sections) > 10
    for name in sections:
        field = name.replace("/", "_") if name.startswith("test/") else name.partition("/")[2]
        assert scalars({field: 1.0}) == {name: 1.0}
    assert set(named) - set(sections) <= {"train/loss", "val/accuracy", "val/nll", "lr", *RETURNABLE}


def test_a_dry_run_says_what_would_be_saved(views):
    _, out, _ = called(main, "--entity", "me", "--group", "a day/time", "--dry-run")
    assert "not sent" in out
    name = "'Ensemble distillation'"
    assert out.splitlines()[-2:] == [
        "next:",
        f"  ekd-dashboard --entity me --project ekd-lightning --group 'a day/time' --name {name}",
    ]


def test_saving_is_one_call_and_prints_the_address(views, monkeypatch):
    workspaces = pytest.importorskip("wandb_workspaces.workspaces")
    sent = []
    monkeypatch.setattr(workspaces.Workspace, "save", lambda view: sent.append(view.project))
    monkeypatch.setattr(workspaces.Workspace, "url", "https://wandb.example/me/p")
    code, out, err = called(main, "--entity", "me", "--project", "p", "--name", "n", "--group", "g")
    assert (code, err, sent) == (0, "", ["p"])
    assert out.splitlines() == [
        "https://wandb.example/me/p",
        "",
        "next:",
        "  ekd-train logger=wandb logger.wandb.entity=me logger.wandb.project=p logger.wandb.group=g",
        "  ekd-dashboard --entity me --project p --group g --name n --report",
    ]


def refused(*words: str) -> str:
    code, _, err = called(main, *words)
    assert code == 2
    (line,) = err.splitlines()
    assert line.startswith("ekd-dashboard: error: ")
    return line


@pytest.mark.parametrize("more", [[], ["--report"]])
def test_without_a_login_it_is_one_line(views, monkeypatch, more):
    interface = pytest.importorskip("wandb_workspaces.reports.v2.interface")

    def nobody(*_, **__):
        raise Exception("not logged in to W&B, try `wandb login --relogin`")

    monkeypatch.setattr(interface, "_get_api", nobody)
    monkeypatch.setattr("wandb_workspaces.workspaces.internal.wandb.Api", nobody)
    assert "wandb login" in refused("--entity", "me", *more)


def test_without_the_package_the_extra_is_named(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *_: None if name == "wandb_workspaces" else find(name)
    )
    assert "ekd-lightning[dashboards]" in refused("--entity", "me")


def test_an_empty_name():
    assert "--project: must not be empty" in refused("--entity", "me", "--project", " ")


# -- the sweep of W&B -----------------------------------------------------------------------------------


def combinations(every: bool) -> list[dict[str, object]]:
    """The grid; or as few of its points as have each value of each parameter."""
    values = {name: parameter["values"] for name, parameter in SWEEP["parameters"].items()}
    points = itertools.product(*values.values()) if every else itertools.zip_longest(*values.values())
    return [dict(zip(values, chosen, strict=True)) for chosen in points]


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_every_combination_composes_as_the_agent_would_start_it(monkeypatch, every):
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    monkeypatch.setenv("WANDB_RUN_ID", "abc")
    assert all(None not in chosen.values() for chosen in combinations(every))
    register_schema()
    with initialize_config_module("ekd_lightning.conf", version_base="1.3"):
        for chosen in combinations(every):
            command = utils.create_sweep_command(list(SWEEP["command"]))
            args = utils.create_sweep_command_args({"args": {n: {"value": v} for n, v in chosen.items()}})
            words = [w for c in command for w in (args["args_no_hyphens"] if c == "${args_no_hyphens}" else [c])]
            assert words[0] == SWEEP["program"] == "ekd-train"
            cfg = compose("train", overrides=words[1:], return_hydra_config=True)
            assert cfg.hydra.run.dir == "outputs/wandb/abc"
            del cfg._content["hydra"]
            settings = to_settings(cfg)
            settings.check()
            found = {
                "teachers.count": settings.teachers.count,
                "student.branches": settings.student.branches,
                "data.fraction": settings.data.fraction,
                "seed": settings.seed,
            }
            assert found == chosen
            assert settings.logger.wandb.enabled


def test_the_sweep_is_chosen_by_validation():
    assert SWEEP["metric"] == {"name": "val_accuracy", "goal": "maximize"}
    assert SWEEP["metric"]["name"] in RETURNABLE


# -- make wandb-sync ------------------------------------------------------------------------------------


@pytest.fixture
def sync(tmp_path):
    """Calls `make wandb-sync` where `wandb` only writes down what it is given."""
    make = shutil.which("make")
    if make is None:
        pytest.skip("make is not installed")
    program = tmp_path / ".venv" / "bin" / "wandb"
    program.parent.mkdir(parents=True)
    program.write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done >> asked.txt\n')
    program.chmod(0o755)
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / ".venv" / ".ready").touch()

    def call(*words: str) -> tuple[str, list[str]]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
        command = [make, "-f", str(ROOT / "Makefile"), "wandb-sync", *words]
        done = subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        asked = tmp_path / "asked.txt"
        return done.stdout, asked.read_text().splitlines() if asked.exists() else []

    return call


def test_nothing_to_upload_is_no_failure(sync, tmp_path):
    assert sync() == ("no offline runs below outputs multirun\n", [])
    (tmp_path / "outputs" / "run").mkdir(parents=True)
    assert sync() == ("no offline runs below outputs multirun\n", [])


def test_all_offline_runs_are_uploaded_whatever_their_path(sync, tmp_path):
    runs = [
        "outputs/a run/wandb/offline-run-1",
        "outputs/a run/teachers/resnet8-s0/wandb/offline-run-2",
        "multirun/it's/0/wandb/offline-run-3",
    ]
    for run in runs:
        (tmp_path / run).mkdir(parents=True)
    (tmp_path / "outputs" / "b" / "wandb" / "run-4").mkdir(parents=True)  # was online
    said, asked = sync()
    assert "no offline runs" not in said
    assert asked[0] == "sync"
    assert sorted(asked[1:]) == sorted(runs)


def test_runs_may_be_elsewhere(sync, tmp_path):
    (tmp_path / "my compare" / "wandb" / "offline-run-5").mkdir(parents=True)
    assert sync('RUNS="my compare"')[1] == ["sync", "my compare/wandb/offline-run-5"]


def test_the_documented_file_is_the_tested_one():
    page = (ROOT / "docs" / "dashboards.md").read_text()
    assert re.search(r"wandb sweep .*docs/wandb_sweep\.yaml", page)
