"""Runs are found at any depth and classified by state; foreign and half-written files are reported in one line."""

from __future__ import annotations

import json

import pytest
from made_runs import result, write_run

from ekd_lightning.errors import UserError
from ekd_lightning.roles import is_finite
from ekd_lightning.runs.collection import collect


def states(found):
    return {run.name: run.state for run in found.runs}


def test_runs_are_found_at_any_depth_and_named_below_the_common_root(tmp_path):
    write_run(tmp_path / "a" / "0", result("ce"))
    write_run(tmp_path / "b" / "deep" / "er" / "1", result("ekd"))
    found = collect([tmp_path / "a", tmp_path / "b"])
    assert [run.name for run in found.runs] == ["a/0", "b/deep/er/1"]
    assert found.root == tmp_path
    assert found.problems == ()
    assert [run.get("method") for run in found.runs] == ["ce", "ekd"]


def test_a_run_itself_and_its_result_file_will_do_and_nothing_counts_twice(tmp_path):
    run = write_run(tmp_path / "a" / "run", result())
    assert [r.name for r in collect([run]).runs] == ["run"]
    assert [r.name for r in collect([run / "result.json"]).runs] == ["run"]
    assert len(collect([run, tmp_path, tmp_path / "a", run / "result.json"]).runs) == 1


def test_what_lies_below_a_run_is_its_own_affair(tmp_path):
    run = write_run(tmp_path / "run", result())
    write_run(run / "wandb" / "copy", result(seed=1))
    write_run(tmp_path / ".trash" / "old", result(seed=2))
    assert states(collect([tmp_path])) == {"run": "done"}


def test_states(tmp_path):
    write_run(tmp_path / "done", result())
    write_run(tmp_path / "failed", result(), "failed", error="no such stage\nmore")
    write_run(tmp_path / "running", result(), "running")
    write_run(tmp_path / "partial", result(partial=True))
    write_run(tmp_path / "lost", result())
    (tmp_path / "lost" / "result.json").unlink()
    hydra = tmp_path / "early" / ".hydra"
    hydra.mkdir(parents=True)
    (hydra / "config.yaml").write_text("data:\n  name: digits\nteachers: {}\nstudent: {}\nmethod:\n  name: ekd\n")
    found = collect([tmp_path])
    assert states(found) == {
        "done": "done",
        "early": "failed",
        "failed": "failed",
        "lost": "failed",
        "partial": "partial",
        "running": "stopped",  # killed: nobody holds its lock
    }
    errors = {run.name: run.error for run in found.runs if run.error}
    assert errors == {
        "failed": "no such stage",
        "lost": "done, but without a result.json",
        "early": "ended before it wrote a record",
    }
    assert found.count("failed") == 3
    early = found.runs[1]
    assert (early.get("method"), early.get("data"), early.get("seed")) == ("ekd", "digits", None)
    failed = found.runs[2]
    assert (failed.get("method"), failed.get("num_branches"), failed.get("test_accuracy")) == ("ekd", 3, None)


def test_a_result_without_a_status_is_done(tmp_path):
    """Someone collected the result files alone; a run withdraws its result when it starts again."""
    write_run(tmp_path / "run", result())
    for name in ("status.json", "config.yaml"):
        (tmp_path / "run" / name).unlink()
    (run,) = collect([tmp_path]).runs
    assert (run.state, run.time, run.config, run.on_disk.config_path) == ("done", None, {}, None)


def test_files_that_a_run_has_and_has_not(tmp_path):
    write_run(tmp_path / "run", result())
    (tmp_path / "run" / "metrics.csv").write_text("epoch\n0\n")
    (run,) = collect([tmp_path]).runs
    assert run.on_disk.file("metrics.csv") == tmp_path / "run" / "metrics.csv"
    assert run.on_disk.file("arrays.npz") is None
    assert run.setting("recipe.lr") == 0.1
    assert run.setting("recipe.lr.x") is None


FOREIGN = [
    # file, content, what the line says
    ("result.json", '{"method": "ekd", "da', "foreign/result.json: damaged, not JSON; counted as failed"),
    ("result.json", "", "foreign/result.json: damaged, not JSON; counted as failed"),
    ("result.json", "\xff", "foreign/result.json: damaged, not JSON; counted as failed"),
    ("result.json", "[1, 2]", "foreign/result.json: damaged, not a mapping but a list; counted as failed"),
    ("result.json", '{"acc": 1}', "foreign/result.json: not a result of this package (no 'method'); left out"),
    (
        "result.json",
        json.dumps(result(test_accuracy=77.5)),
        "foreign/result.json: not a result of this package ('test_accuracy' is 77.5, not in [0, 1]); left out",
    ),
    (
        "result.json",
        json.dumps(result(test_accuracy=None)),
        "foreign/result.json: not a result of this package ('test_accuracy' is None, not in [0, 1]); left out",
    ),
    (
        "result.json",
        json.dumps(result() | {"seed": "0"}),
        "foreign/result.json: not a result of this package ('seed' is '0')",
    ),
    (
        "status.json",
        '{"progress": 3}',
        "foreign/status.json: not the status of a run of this package (state=None); left out",
    ),
    ("status.json", "{", "foreign/status.json: damaged, not JSON; left out"),
]


@pytest.mark.parametrize(("name", "content", "line"), FOREIGN, ids=range(len(FOREIGN)))
def test_foreign_and_half_written_files_are_told_in_a_line_and_do_not_count(tmp_path, name, content, line):
    write_run(tmp_path / "good", result())
    write_run(tmp_path / "foreign", result(seed=1))
    (tmp_path / "foreign" / name).write_bytes(content.encode("latin-1"))
    found = collect([tmp_path])
    (problem,) = found.problems
    what, _, fate = line.partition(";")
    assert problem.startswith(what)
    assert problem.endswith(fate)
    assert [run.name for run in found.runs if run.state == "done"] == ["good"]
    assert len(found.runs) == (2 if "counted as failed" in line else 1)


def test_a_damaged_configuration_costs_the_settings_only(tmp_path):
    write_run(tmp_path / "run", result())
    (tmp_path / "run" / "config.yaml").write_text("a: [")
    (run,) = collect([tmp_path]).runs
    assert (run.config, run.get("method")) == ({}, "ekd")


def test_nothing_to_report_on_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=r"nowhere: no such folder"):
        collect([tmp_path / "nowhere"])
    with pytest.raises(UserError, match=r"no runs found \(no status.json or result.json\)"):
        collect([tmp_path])
    (tmp_path / "x.csv").write_text("")
    with pytest.raises(UserError, match="neither a folder of runs nor a result"):
        collect([tmp_path / "x.csv"])
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text("{}")
    with pytest.raises(UserError, match=r"^no run can be read: a/result.json: not a result .* \(and 1 more\)$"):
        collect([tmp_path])


def test_a_number_that_is_none_is_read_as_null(tmp_path):
    made = result("ekd") | {"test_nll": float("nan"), "test_branch_accuracy": [0.5, float("inf")]}
    write_run(tmp_path / "a", made)
    (run,) = collect([tmp_path]).runs
    assert run.get("test_nll") is None
    assert run.get("test_branch_accuracy") == [0.5, None]


@pytest.mark.parametrize(("value", "expected"), [(10**308, True), (10**309, False), (True, False), (None, False)])
def test_only_what_a_float_can_hold_is_a_score(value, expected):
    assert is_finite(value) is expected
