"""`ekd-compare` on tiny runs: a study from start to table, and each way in which it goes on."""

from __future__ import annotations

import json
import logging
import shlex
import shutil
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hydra import initialize_config_module
from whole_runs import TINY, call_train, called

from ekd_lightning.cli import compare
from ekd_lightning.cli.compare import main
from ekd_lightning.config.config import register_schema
from ekd_lightning.config.overrides import key_of
from ekd_lightning.errors import UserError
from ekd_lightning.files import read_json, write_json, write_yaml
from ekd_lightning.networks.registry import Match
from ekd_lightning.networks.zoo import zoo
from ekd_lightning.runs.collection import RunEntry
from ekd_lightning.runs.directory import RunDirectory, RunState
from ekd_lightning.runs.writer import RunWriter
from ekd_lightning.settings import DataSettings, Settings
from ekd_lightning.studies import launching, planning
from ekd_lightning.studies import study as studies
from ekd_lightning.studies.rows import make_row, match_overrides, matched_row

WHOLE_TEST = tuple(w for w in TINY if not w.startswith(("method=", "data.fraction", "trainer.limit_test")))
ROWS = ("--methods", "ce,kd_mean,ekd", "--no-controls", "--fractions", "0.1")


call = partial(called, main, level=logging.INFO)


def table(folder):
    return {row["row"]: row for row in json.loads((folder / "comparison.json").read_text())}


@pytest.fixture(scope="module")
def words(store):
    return (*WHOLE_TEST, f"teachers.store={store}")


@pytest.fixture(scope="module")
def finished(words, tmp_path_factory):
    """A study of three rows and two seeds."""
    folder = tmp_path_factory.mktemp("study") / "c"
    code, out, err = call(*ROWS, "--seeds", "0,1", "--output", folder, *words)
    assert code == 0, err
    return folder, out, err


@pytest.fixture
def study(finished, tmp_path):
    """A copy of the finished study, to be changed."""
    return shutil.copytree(finished[0], tmp_path / "c")


def stamps(folder):
    return {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/result.json")}


def test_a_study_runs_all_rows_and_leaves_ordinary_run_directories(finished):
    folder, out, err = finished
    names = {path.name for path in (folder / "runs").iterdir() if (path / "result.json").is_file()}
    assert names == {f"{row}-f0.1-s{seed}" for row in ("ce", "kd_mean", "ekd") for seed in (0, 1)}
    for name in names:
        files = {path.name for path in (folder / "runs" / name).iterdir()}
        assert {"config.yaml", "provenance.json", "status.json", "metrics.csv", ".hydra"} <= files
    assert "6 runs in the study, 6 to be run" in err
    assert "6 done" in out


def test_the_table_holds_what_the_runs_found(finished):
    folder, out, _ = finished
    rows = table(folder)
    for name, row in rows.items():
        found = [json.loads((folder / "runs" / f"{name}-f0.1-s{s}" / "result.json").read_text()) for s in (0, 1)]
        assert row["by_seed"] == {"0": found[0]["test_accuracy"], "1": found[1]["test_accuracy"]}
        assert (row["num_branches"], row["steps"]) == (3 if name == "ekd" else 1, found[0]["steps"])
        assert name in out
    assert (rows["ce"]["num_teachers"], rows["ekd"]["num_teachers"]) == (0, 2)
    assert "comparison.csv" in {path.name for path in folder.iterdir()}
    assert (folder / "comparison.md").read_text().count("| `") == 3


def test_calling_again_runs_nothing_and_the_report_alone_needs_the_folder_only(study):
    before = stamps(study)
    code, _, err = call("--output", study)
    assert code == 0
    assert "6 runs in the study, 0 to be run" in err
    assert stamps(study) == before
    (study / "comparison.json").unlink()
    assert call("--output", study, "--report-only")[0] == 0
    assert set(table(study)) == {"ce", "kd_mean", "ekd"}


def test_more_seeds_are_asked_for_with_the_code_that_the_study_needs(study, monkeypatch):
    monkeypatch.chdir(study.parent)
    monkeypatch.setattr(planning._Runs, "_check", lambda *_: {})
    found = studies.read_study(study)
    studies.write_study(replace(found, common=(*found.common, "imports=[json]")), study)
    for path in study.glob("runs/*/"):
        config = {**RunDirectory(path).config(), "imports": ["json"]}
        RunWriter(path).write_yaml("config.yaml", yaml.safe_dump(config))
    (study / "report").mkdir()
    (study / "report" / "summary.json").write_text("{}")
    code, out, err = call("--output", study, "imports=[json]", f"hydra.searchpath=[{study.parent}]")
    assert code == 0, err
    assert out.splitlines()[-2] == "  ekd-report c -o c/report --force"
    printed = shlex.split(out.splitlines()[-1])
    search = f"hydra.searchpath=['file://{study.parent}']"
    assert printed == ["ekd-compare", "--output", "c", search, "imports=[json]", "--seeds", "2,3"]
    code, out, err = call(*printed[1:], "--print-jobs")
    assert (code, len(out.splitlines())) == (0, 6), err
    assert {tuple(shlex.split(line)[:2]) for line in out.splitlines()} == {("ekd-train", search)}


def test_a_stopped_run_goes_on_in_place_and_a_lost_one_starts_anew(study, finished):
    stopped, lost = study / "runs" / "ekd-f0.1-s0", study / "runs" / "ce-f0.1-s1"
    was = table(study)
    (stopped / "result.json").unlink()
    (stopped / "status.json").write_text(json.dumps({"state": "running", "error": None}))
    shutil.rmtree(lost)
    # The directory moved: what it says of itself must not matter.
    code, _, err = call("--output", study)
    assert code == 0, err
    assert "2 to be run (1 of them resumed)" in err
    assert "resumed" in json.loads((stopped / "provenance.json").read_text())
    assert table(study)["ce"]["by_seed"] == was["ce"]["by_seed"]
    assert table(study)["ekd"]["by_seed"] == was["ekd"]["by_seed"]
    assert call("--output", study)[0] == 0  # `resume` in its configuration is no difference


def test_more_seeds_train_on_the_images_that_the_study_has_on_record(study, tmp_path):
    record = study / "runs" / "ekd-f0.1-s1" / "provenance.json"
    content = read_json(record)
    content["data"]["train_sha256"] = "0" * 64
    record.write_text(json.dumps(content))
    code, out, err = call("--output", study, "--seeds", "2", "--print-jobs", f"data.root={tmp_path}")
    assert (code, out) == (2, "")
    assert f"data.root={tmp_path}: its train images are not those of the run {record.parent}" in err
    assert studies.read_study(study).seeds == (0, 1)


@pytest.mark.parametrize(
    ("kind", "fraction", "refused"), [("own", 0.5, True), ("rest", 0.5, False), ("rest", 0.1, True)]
)
def test_unlabelled_images_are_those_on_record_where_they_must_be(tmp_path, kind, fraction, refused):
    write_json(tmp_path / "provenance.json", {"data": {"train_sha256": "a", "unlabelled": {"sha256": "u"}}})
    write_yaml(tmp_path / "config.yaml", {"data": {"fraction": 0.1}})
    one = SimpleNamespace(sha256="a")
    settings = Settings(data=DataSettings(fraction=fraction, unlabelled="there"))
    unlabelled: Any = SimpleNamespace(sha256="v", kind=kind)
    dataset: Any = SimpleNamespace(train=one, test=one)
    runs = [RunEntry(tmp_path, "ekd-f0.1-s0", RunState.DONE)]
    message = r"data\.unlabelled=there: its unlabelled images are not those of the run"
    with pytest.raises(UserError, match=message) if refused else nullcontext():
        planning._refuse_other_images([(settings, dataset, unlabelled)], runs)


def test_places_that_changed_reach_a_run_that_goes_on(study, tmp_path):
    stopped = study / "runs" / "ekd-f0.1-s0"
    (stopped / "result.json").unlink()
    (stopped / "status.json").write_text(json.dumps({"state": "failed", "error": "interrupted"}))
    code, out, _ = call("--output", study, "--print-jobs", f"data.root={tmp_path}/moved")
    assert code == 0
    (line,) = out.splitlines()
    assert line.startswith(f"ekd-train resume={stopped} ")
    assert f"data.root={tmp_path}/moved" in line
    code, _, err = call("--output", study, f"data.root={tmp_path}/moved")
    assert code == 0, err
    assert f"root: {tmp_path}/moved" in (stopped / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--tuned", "."), "--tuned: applies to rows that are added; name them with --methods"),
        (("--match", "macs"), "--match: applies to rows that are added; name them with --methods"),
        (("--no-controls",), "--no-controls: applies to rows that are added; name them with --methods"),
        (("--report-only", "--seeds", "0"), "--seeds: has no effect with --report-only"),
        (("--report-only", "recipe.lr=1"), "recipe.lr=1: has no effect with --report-only"),
    ],
)
def test_words_that_would_be_ignored_are_refused(finished, given, message):
    code, _, err = call("--output", finished[0], *given)
    assert code == 2
    assert message in err.splitlines()[-1]


def test_a_failed_run_stays_in_the_table_until_it_is_retried(study):
    failed = study / "runs" / "ekd-f0.1-s1"
    shutil.rmtree(failed / "checkpoints")
    (failed / "result.json").unlink()
    (failed / "status.json").write_text(json.dumps({"state": "failed", "error": "the disk was full"}))
    code, out, err = call("--output", study)
    assert code == 1
    assert out.splitlines()[-1].strip() == f"ekd-compare --output {study} --retry-failed"  # not itself
    assert "ekd-f0.1-s1 failed earlier and is skipped: the disk was full (--retry-failed runs it again)" in err
    assert table(study)["ekd"]["problems"] == "failed 1 of 2: the disk was full"
    assert table(study)["ekd"]["n"] == 1
    code, _, err = call("--output", study, "--retry-failed")
    assert code == 0
    assert "1 to be run" in err
    assert table(study)["ekd"]["failed"] == 0


def test_published_weights_that_are_missing_end_the_study_before_any_run(tmp_path, monkeypatch):
    entry = replace(zoo()["cifar10_resnet20_chenyaofo"], id="mine", data="digits")
    monkeypatch.setitem(zoo(), "mine", entry)
    rows = ("--methods", "ce,kd_mean,ekd", "--no-controls", "--seeds", "0,1", "--fractions", "0.1")
    pool = ("teachers.pool=[{zoo: mine}]", f"teachers.weights_dir={tmp_path}/nowhere", "teachers.download=false")
    words = [word for word in WHOLE_TEST if not word.startswith("teachers.pool")]
    code, out, err = call(*rows, "--output", tmp_path / "c", *words, *pool)
    assert (code, out) == (2, "")
    assert err.count("nowhere") == 1
    assert err.splitlines()[-1].startswith(f"ekd-compare: error: row kd_mean: teacher 'mine': {entry.file} is not in ")
    assert not list(tmp_path.glob("c/runs/*"))
    words += [f"hydra.sweep.dir={tmp_path}/s", *pool]
    sweep = call_train("-m", "method=kd_mean,ekd", *words, directory=tmp_path / "s")
    assert (sweep.code, sweep.err.count("nowhere")) == (2, 1), sweep.err
    assert not list(tmp_path.glob("s/*/*"))


def test_a_failing_row_does_not_stop_the_others(words, tmp_path):
    folder = tmp_path / "c"
    rows = ("--methods", "ekd,ce", "--no-controls", "--seeds", "0", "--fractions", "0.1")
    fails = ("imports=[whole_runs]", "+callbacks.fails._target_=whole_runs.FailsIfTaught")
    code, out, _ = call(*rows, "--output", folder, *words, *fails)
    assert code == 1
    assert table(folder)["ce"]["n"] == 1
    assert table(folder)["ekd"]["problems"].startswith("failed 1 of 1: RuntimeError: out of chalk")
    assert "1 done, 1 failed" in out or "1 failed, 1 done" in out


@pytest.mark.parametrize(
    ("rows", "word", "message"),
    [
        ("ce,fsp", "teachers.count=2", "row fsp: "),  # needs equal channels
        ("ce,okddip", "+method.terms.leader.temperature=0", "row okddip: "),
        (
            "ce,ekd",
            "student.split_after=stage9",
            "row ekd: unknown split_after for network 'resnet8': 'stage9'; did you mean 'stage3'",
        ),
    ],
)
def test_a_row_that_cannot_be_is_refused_before_any_other_trains(words, tmp_path, rows, word, message):
    asked = ("--methods", rows, "--no-controls", "--seeds", "0", "--fractions", "0.1")
    code, _, err = call(*asked, "--output", tmp_path / "c", *words, word)
    assert code == 2
    assert message in err.splitlines()[-1]
    assert not list(tmp_path.rglob("config.yaml"))


def test_rows_and_seeds_can_be_added(study, words):
    before = stamps(study)
    more = ("--methods", "kd_mean@resnet14", "--no-controls")
    code, _, err = call(*more, "--output", study, "--seeds", "0", *words)
    assert code == 0, err
    assert "8 runs in the study, 2 to be run" in err
    now = stamps(study)
    assert {path: now[path] for path in before} == before
    result = json.loads((study / "runs" / "kd_mean@resnet14-f0.1-s0" / "result.json").read_text())
    assert (result["student"], result["num_branches"]) == ("resnet14", 1)


def test_other_common_overrides_are_refused_but_places_may_change(study, words):
    before = stamps(study)
    code, _, err = call("--output", study, *words, "recipe.lr=0.3")
    assert code == 2
    assert err.splitlines()[-1].startswith("ekd-compare: error: recipe.lr: the study in this folder has ")
    assert call("--output", study, "data.root=elsewhere")[0] == 0
    assert stamps(study) == before


def test_a_run_with_another_configuration_is_refused_by_the_keys(study):
    path = study / "runs" / "ce-f0.1-s0" / "config.yaml"
    write_yaml(path, path.read_text().partition("\n")[2].replace("schedule: cosine", "schedule: step"))
    code, _, err = call("--output", study)
    assert code == 2
    assert (
        "ce-f0.1-s0: holds a run with another configuration (teachers.recipe.schedule, recipe.schedule differ)"
        in err.splitlines()[-1]
    )


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("steps", 99, "ekd-f0.1-s1 differ in steps (4, 99)"),
        ("method", "ekd_mean", "ekd-f0.1-s0 and ekd-f0.1-s1 differ in method "),
        ("weight_kd_branch", 0.25, "ekd-f0.1-s0 and ekd-f0.1-s1 differ in weight_kd_branch "),
    ],
)
def test_runs_that_went_different_ways_are_refused(study, key, value, told):
    path = study / "runs" / "ekd-f0.1-s1" / "result.json"
    write_json(path, {**read_json(path), key: value})
    code, _, err = call("--output", study, "--report-only")
    assert code == 2
    assert told in err


def test_the_jobs_can_be_printed_instead(study):
    shutil.rmtree(study / "runs" / "ce-f0.1-s1")
    code, out, _ = call("--output", study, "--print-jobs")
    assert code == 0
    (line,) = out.splitlines()
    assert line.startswith("ekd-train ")
    assert "method=ce data.fraction=0.1 seed=1" in line
    assert line.endswith(f"hydra.run.dir={study / 'runs' / 'ce-f0.1-s1'}")


def test_controls_and_students_of_equal_cost_are_added_and_said(tmp_path, words):
    folder = tmp_path / "c"
    early = ("student.split_after=stage1", "--seeds", "0", "--output", folder, "--print-jobs")
    code, out, err = call("--methods", "ekd", *early, *words)
    assert code == 0, err
    assert "added as controls: ce, branched_ce, kd_mean, kd_mean_maps, ekd_mean" in err
    assert "kd_mean_macs, kd_mean_maps_macs: resnet14, width 0.5" in err
    assert "%)" in err
    lines = out.splitlines()
    assert len(lines) == 10
    for method in ("kd_mean", "kd_mean_maps"):
        (macs,) = [line for line in lines if line.endswith(f"/{method}_macs-f1-s0")]
        assert f"method={method} student.network=resnet14" in macs
        assert "++student.options.width=0.5" in macs
        assert "+student.options={width" not in macs
    # Once the jobs have run elsewhere, the folder's table can be made.
    assert len(studies.read_study(folder).rows) == 10
    code, out, _ = call("--output", folder, "--report-only")
    assert code == 1
    assert "10 missing" in out


def test_controls_have_the_features_the_split_and_the_cost_of_the_first_branched_row(tmp_path, words):
    """Those of the default student would be no controls of early branches."""
    pooled = ("--methods", "ce,ekd_pooled", "--match", "macs", "--seeds", "0", "--output", tmp_path / "c")
    code, out, err = call(*pooled, "--print-jobs", *words)
    assert code == 0, err
    assert "added as controls: branched_ce, kd_mean, kd_mean_feature, ekd_mean" in err
    assert "kd_mean_macs, kd_mean_feature_macs: resnet14, width 0.5" in err
    rows = {line.rsplit("/", 1)[1].removesuffix("-f1-s0"): line for line in out.splitlines()}
    assert {name for name, line in rows.items() if "student.split_after=stage1" in line} == {"branched_ce", "ekd_mean"}
    assert {name for name, line in rows.items() if "student.network=resnet14" in line} == {
        "kd_mean_macs",
        "kd_mean_feature_macs",
    }


def test_a_plain_student_that_would_be_its_own_control_is_left_out(tmp_path, words):
    """Networks of libraries have no relatives of other depth or width."""
    own = ("student.network=torchvision:mobilenet_v3_small", "student.split_after=stage2")
    asked = ("--methods", "ekd", "--seeds", "0", "--no-controls", "--match", "macs", "--output", tmp_path / "c")
    code, out, err = call(*asked, "--print-jobs", *(word for word in words if "student" not in word), *own)
    assert code == 0, err
    assert "no plain torchvision:mobilenet_v3_small has the macs of the study's student; the nearest is " in err
    assert "kd_mean_maps_macs: left out, because the match is the student's own network unchanged" in err
    assert len(out.splitlines()) == 1


@pytest.mark.parametrize("common", [(), ("+student.options.stem=plain",)])
def test_another_network_has_its_own_options_whoever_set_those_of_the_study(tmp_path, common):
    (tmp_path / "student").mkdir()
    (tmp_path / "student/narrow.yaml").write_text("defaults: [resnet8]\noptions: {width: 0.5}\n")
    common = ("student=narrow", *common)
    register_schema()
    with initialize_config_module("ekd_lightning.conf", version_base="1.3"):
        composed = partial(compare._compose, [f"hydra.searchpath=[file://{tmp_path}]"])
        plain = make_row("kd_mean@resnet14", composed, common)
        network = match_overrides(Match("resnet14", {"width": 0.75}, 1, 1), common, composed)
        found = []
        for row in (plain, matched_row("kd_mean_macs", make_row("kd_mean", composed), "macs", network)):
            words = studies.Study((row,), (1.0,), (0,), common).words(row, 1.0, 0)
            student = composed(words).student
            found.append((student.network, dict(student.options)))
    assert found == [("resnet14", {}), ("resnet14", {"width": 0.75})]


def test_rows_that_a_study_gets_later_bring_no_controls(tmp_path, words):
    asked = ("--seeds", "0", "--output", tmp_path / "c", "--print-jobs")
    assert call("--methods", "ekd", "--no-controls", *asked, *words)[0] == 0
    code, out, err = call("--methods", "camkd", *asked)
    assert code == 0, err
    assert "controls" not in err
    assert len(out.splitlines()) == 2


def test_controls_beside_unlabelled_images_have_a_use_for_them(tmp_path, words):
    asked = ("--methods", "ekd", "--seeds", "0", "--match", "none", "--output", tmp_path / "c", "--print-jobs")
    code, out, err = call(*asked, "--fractions", "0.1", *words, "data.unlabelled=rest")
    assert code == 0, err
    assert "added as controls: pseudo_labels, kd_mean, kd_mean_maps, ekd_mean" in err
    assert len(out.splitlines()) == 5


def test_the_branching_that_makes_a_method_stays_its_own(tmp_path, words):
    """That of the study is not forced on plain students either."""
    rows = ("--methods", "ce,one,dml,okddip,hydra_heads,ekd_permuted", "--no-controls", "--seeds", "0")
    branching = ("student.branches=2", "student.split_after=stem", "student.ensemble=mean_probs")
    _, out, err = call(*rows, "--output", tmp_path / "c", "--print-jobs", *words, *branching)
    found = {
        line.split("method=")[1].split()[0]: [word for word in branching if word in line] for line in out.splitlines()
    }
    assert found == {
        "ce": [],
        "one": [],
        "dml": [branching[2]],
        "okddip": [branching[2]],
        "hydra_heads": [branching[0]],  # as many heads as there are teachers
        "ekd_permuted": list(branching),
    }
    assert f"one sets its own branching, so {' '.join(branching)} does not apply to it" in err


def test_settings_of_terms_apply_to_the_methods_that_have_them(tmp_path, words):
    """Or a control would get the term, and be no control."""
    weight, temperature = "method.terms.kd_branch.weight=0.3", "method.temperature=2"
    rows = ("--methods", "ekd,kd_mean,ce", "--no-controls", "--match", "macs", "--seeds", "0")
    early = ("student.split_after=stage1", "--output", tmp_path / "c", "--print-jobs")
    _, out, err = call(*rows, *early, *words, weight, temperature)
    assert [weight in line for line in out.splitlines()] == ["method=ekd " in line for line in out.splitlines()]
    assert all(temperature in line for line in out.splitlines())
    assert len(out.splitlines()) == 5
    for name in ("ce", "kd_mean", "kd_mean_maps"):
        assert f"{name} has no such term, so {weight} does not apply to it" in err
    code, again, err = call("--output", tmp_path / "c", "--print-jobs")
    assert (code, again) == (0, out), err


def test_tuned_overrides_are_appended_and_missing_ones_told(tmp_path, words):
    folder = tmp_path / "tuned"
    folder.mkdir()
    (folder / "ekd.yaml").write_text(yaml.safe_dump({"overrides": ["method.temperature=2"]}))
    options = ("--tuned", folder, "--output", tmp_path / "c", "--seeds", "0", "--print-jobs")
    code, out, err = call(*ROWS, *options, *words)
    assert code == 0
    assert "ce: no ce.yaml in" in err
    assert [line for line in out.splitlines() if "method=ekd method.temperature=2 " in line]
    protocol = {"data": "cifar10", "fraction": 0.02}
    (folder / "ekd.yaml").write_text(yaml.safe_dump({"overrides": [], "protocol": protocol}))
    err = call(*ROWS, *options, *words)[2]
    assert "was tuned on cifar10; the study uses digits" in err
    assert "was tuned at fraction 0.02; the study uses it at 0.1" in err
    # What `data.fraction=0.1` gives of a data set that ten does not divide.
    (folder / "ekd.yaml").write_text(yaml.safe_dump({"overrides": [], "protocol": {**protocol, "fraction": 0.1002}}))
    assert "was tuned at fraction" not in call(*ROWS, *options, *words)[2]
    foreign = "method.terms.feature_branch.weight=20"
    (folder / "ekd.yaml").write_text(yaml.safe_dump({"overrides": [foreign, "method.terms.maps1.weight=2"]}))
    assert f"ekd.yaml: ekd has no such term, so {foreign} adds one" in call(*ROWS, *options, *words)[2]
    (folder / "ekd.yaml").write_text("overrides: [recipe.epochs=9]")
    code, _, err = call(*ROWS, *options, *words)
    assert code == 2
    assert "recipe.epochs=9: all rows of a study must share this setting" in err
    (folder / "ekd.yaml").write_text("temperature: 2")
    assert "must hold `overrides:`" in call(*ROWS, *options, *words)[2]
    (folder / "ekd.yaml").write_bytes(b"overrides: [\xff]")
    assert "ekd.yaml: damaged, not YAML" in call(*ROWS, *options, *words)[2].splitlines()[-1]
    (folder / "ekd.yaml").write_text("overrides: [method=ce]")
    assert "method=ce: all rows of a study must share this setting" in call(*ROWS, *options, *words)[2]
    (folder / "ekd.yaml").write_text("{method: ce, overrides: []}")
    assert "was tuned for the method ce; the row ekd uses ekd" in call(*ROWS, *options, *words)[2]


def test_rows_of_other_networks_are_tuned_too_and_the_tables_say_it(tmp_path, words):
    folder, study = tmp_path / "tuned", tmp_path / "c"
    folder.mkdir()
    (folder / "kd_mean.yaml").write_text(yaml.safe_dump({"overrides": ["method.temperature=2"]}))
    own = {"method": "kd_mean@resnet20", "overrides": ["method.temperature=3"]}
    (folder / "kd_mean@resnet20.yaml").write_text(yaml.safe_dump(own))
    rows = ("--methods", "ce,kd_mean@resnet14,kd_mean@resnet20", "--no-controls", "--fractions", "0.1")
    options = ("--tuned", folder, "--output", study, "--seeds", "0", "--print-jobs")
    _, out, err = call(*rows, *options, *words)
    assert "method.temperature=2 " in next(line for line in out.splitlines() if "resnet14" in line)
    assert "method.temperature=3 " in next(line for line in out.splitlines() if "resnet20" in line)
    assert "kd_mean@resnet14: takes the settings of kd_mean.yaml, which were tuned for another network" in err
    call("--output", study, "--report-only")
    said = {name: row["settings"] for name, row in table(study).items()}
    assert said == {
        "ce": "defaults",
        "kd_mean@resnet14": "student.network=resnet14 method.temperature=2",
        "kd_mean@resnet20": "student.network=resnet20 method.temperature=3",
    }
    assert "| student.network=resnet14 method.temperature=2 |" in (study / "comparison.md").read_text()


MISTAKES = [
    (("--methods", "ekdd"), "unknown method 'ekdd'; did you mean 'ekd'"),
    (("--methods", "ekd@resnet9"), "unknown network 'resnet9'; did you mean 'resnet8'"),
    (("--methods", "ekd@timm:hub/net"), "--methods: row 'ekd@timm:hub/net': folders are named after it"),
    (("--methods", "ekd", "--seeds", "0,x"), "--seeds 0,x: "),
    (("--methods", "ekd", "--seeds", "1,1"), "--seeds 1,1: "),
    (("--methods", "ekd", "--seeds", "-1"), "--seeds -1: "),
    (("--methods", "ekd", "--fractions", "0"), "--fractions 0: "),
    (("--methods", "ekd", "--fractions", "0.1,two"), "--fractions 0.1,two: "),
    (("--methods", "ekd", "--match", "mac"), "unknown --match 'mac'; did you mean 'macs'"),
    (("--methods", "ekd", "--tuned", "nowhere"), "--tuned nowhere: no such folder"),
    (("--methods", ","), "--methods ,: must name different rows, e.g. ce,kd_mean,ekd"),
    ((), "--methods: must be given"),
    (("--report-only",), "holds no study to report on"),
    (("--methods", "ekd", "seed=3"), "seed=3: a study varies this setting; give it with --seeds"),
    (("--methods", "ekd", "method=ce"), "method=ce: a study varies this setting; give it with --methods"),
    (("--methods", "ekd", "digits"), "digits: not an override"),
    (("--methods", "ekd", "recipe.lrr=1"), "unknown key 'recipe.lrr'; did you mean 'recipe.lr'"),
    (("--methods", "ekd", "recipe.lr=-1"), "recipe.lr=-1.0: must be positive"),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES, ids=[message[:30] for _, message in MISTAKES])
def test_a_mistake_is_one_line_before_anything_runs(words, message, tmp_path):
    match = () if "--match" in words or not words else ("--match", "none")
    code, _, err = call(*words, *match, "--output", tmp_path / "c")
    assert code == 2
    assert err.splitlines()[-1].startswith("ekd-compare: error: ")
    assert message in err.splitlines()[-1]
    assert "Traceback" not in err
    assert not list(tmp_path.rglob("config.yaml"))


def test_a_folder_that_is_no_study_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").touch()
    code, _, err = call("--methods", "ekd", "--output", tmp_path)
    assert code == 2
    assert "not a study (it has no study.json) and not empty" in err


@pytest.mark.parametrize("damage", ["lost", "cut", "changed"])
def test_a_lost_study_is_planned_again_by_its_command(study, words, damage):
    path, before, was = study / "study.json", stamps(study), studies.read_study(study)
    text = {"cut": path.read_text()[:50], "changed": path.read_text().replace("0.1", "0.2")}.get(damage)
    path.unlink() if text is None else path.write_text(text)
    for asked in (("--report-only",), ()):
        code, _, err = call("--output", study, *asked)
        assert (code, "; repeat the command that began the study, with its --methods, " in err) == (2, True)
    shutil.copytree(study / "runs" / "ce-f0.1-s0", study / "runs" / "ce-f0.1-s7")
    code, _, err = call("--output", study, *ROWS, "--seeds", "0,1", *words)
    assert code == 0, err
    assert f"{path}: lost or damaged; this command plans the study again" in err
    assert f"{study / 'runs'}: holds runs that are not in the study: ce-f0.1-s7" in err
    assert "0 to be run" in err
    assert stamps(study).items() >= before.items()
    assert studies.read_study(study) == was
    assert (study / "study.json.damaged").exists() == (text is not None)


def test_a_damaged_study_without_runs_is_one_line(tmp_path):
    (tmp_path / "study.json").write_text("{")
    for words in ((), ("--methods", "nothing"), ("--methods", "nothing")):
        code, _, err = call("--output", tmp_path, *words)
        assert (code, ("unknown method" if words else "study.json: damaged") in err.splitlines()[-1]) == (2, True)


def test_a_lost_study_is_not_planned_again_as_another(study, words):
    (study / "study.json").unlink()
    before = stamps(study)
    code, _, err = call(*ROWS, "--seeds", "0,1", "--output", study, *words, "recipe.lr=0.5")
    assert code == 2
    assert "holds a run with another configuration (recipe.lr differ)" in err
    assert (stamps(study).items() >= before.items(), (study / "study.json").exists()) == (True, False)


def test_a_study_file_reads_as_it_was_written(tmp_path):
    rows = (
        studies.RowPlan("ce", ("method=ce",), ("student.branches",)),
        studies.RowPlan("ekd@timm:resnet18.a1_in1k", ("method=ekd", "student.network='timm:resnet18.a1_in1k'")),
    )
    study = studies.Study(rows, (0.1, 1.0), (0, 2), ("recipe.lr=0.1",), "digits")
    studies.write_study(study, tmp_path)
    assert studies.read_study(tmp_path) == study
    (tmp_path / "study.json").write_text("{}")
    with pytest.raises(UserError, match="damaged"):
        studies.read_study(tmp_path)


@pytest.mark.parametrize(
    ("word", "key"),
    [("a.b=1", "a.b"), ("+a.b={c: 1}", "a.b"), ("++a.b=x=y", "a.b"), ("~a", "a"), ("+recipe@a.b=x@y", "a.b")],
)
def test_keys_of_overrides(word, key):
    assert key_of(word) == key


def test_rows_of_a_study_keep_their_way():
    old = studies.Study((studies.RowPlan("ekd", ("method=ekd",)),), (0.1,), (0,), (), "digits")
    new = studies.Study((studies.RowPlan("ekd", ("method=ekd", "x=1")),), (0.2,), (1,), (), "digits")
    words = "row ekd: the study in this folder has method=ekd, the command asks for method=ekd x=1"
    with pytest.raises(UserError, match=words):
        studies.union(old, new)
    added = studies.union(old, studies.Study(old.rows, (0.2,), (1,), (), "digits"))
    assert (added.fractions, added.seeds) == ((0.1, 0.2), (0, 1))


@pytest.mark.parametrize("word", ["data.unlabelled=there", "data.unlabelled=rest"])
def test_unlabelled_images_of_a_study_may_move_but_not_come_or_become_others(word):
    def study(*common):
        return studies.Study((studies.RowPlan("ekd", ("method=ekd",)),), (0.1,), (0,), common, "digits")

    alone, beside = study("recipe.epochs=3"), study("recipe.epochs=3", "data.unlabelled=here")
    with pytest.raises(UserError, match=r"data\.unlabelled.*: the study in this folder has the common overrides"):
        studies.union(alone, study(*studies.continued(alone, (word,))))
    goes_on = study(*studies.continued(beside, (word,)))
    if word == "data.unlabelled=rest":
        with pytest.raises(UserError, match=r"the study in this folder has the common overrides"):
            studies.union(beside, goes_on)
    else:
        assert studies.union(beside, goes_on).common == ("recipe.epochs=3", word)


def test_only_the_override_that_contradicts_a_study_is_named():
    common = ("experiment=quick", "recipe.epochs=3", "teachers.store=here")
    old = studies.Study((studies.RowPlan("ekd", ("method=ekd",)),), (0.1,), (0,), common, "digits")
    new = studies.Study(old.rows, (0.1,), (0,), studies.continued(old, ("recipe.epochs=4",)), "digits")
    with pytest.raises(UserError, match=r"^recipe\.epochs: the study in this folder has the common overrides"):
        studies.union(old, new)
    assert studies.continued(old, ("teachers.store=there", "recipe.epochs=3")) == (*common[:2], "teachers.store=there")


def test_runs_can_go_side_by_side(words, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    folder = tmp_path / "c"
    rows = ("--methods", "ekd,ce", "--no-controls", "--seeds", "0", "--fractions", "0.1")
    code, _, err = call(*rows, "--output", folder, *words, "hydra/launcher=parallel")
    assert code == 0, err
    assert {name: row["n"] for name, row in table(folder).items()} == {"ekd": 1, "ce": 1}


def test_a_study_goes_on_from_what_another_process_has_made_of_it(study, monkeypatch):
    """Between its first look at the study and its turn to change it."""

    class SlowLock(compare.DirectoryLock):
        def acquire(self):
            super().acquire()
            now = studies.read_study(self.directory)
            studies.write_study(replace(now, seeds=(*now.seeds, 7)), self.directory)

    monkeypatch.setattr(compare, "DirectoryLock", SlowLock)
    code, out, err = call("--output", study, "--seeds", "8", "--print-jobs")
    assert code == 0, err
    assert studies.read_study(study).seeds == (0, 1, 7, 8)
    assert len(out.splitlines()) == 2 * 3


def test_a_study_is_continued_where_it_was_first_started(study, tmp_path, monkeypatch):
    (elsewhere := tmp_path / "elsewhere").mkdir()
    (home := tmp_path / "home").mkdir()
    studies.write_study(replace(studies.read_study(study), working_directory=str(home)), study)
    seen = []
    monkeypatch.setattr(planning._Runs, "_check", lambda *_: {})
    monkeypatch.setattr(launching.internals, "launch", lambda *_: seen.append(Path.cwd()))
    monkeypatch.chdir(elsewhere)
    call("--output", study, "--seeds", "9", "++data.root=new")
    assert seen == [home]
    after = studies.read_study(study)
    assert (after.working_directory, after.common[-1]) == (str(home), f"++data.root={elsewhere / 'new'}")
