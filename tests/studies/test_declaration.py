"""Declared studies: what conf/study says, what is left of it, how long its runs are, and what they cost."""

from __future__ import annotations

import copy
import logging
import math
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from made_runs import entry, result
from omegaconf import DictConfig, OmegaConf
from scipy import stats
from whole_runs import called

from ekd_lightning.cli import train
from ekd_lightning.cli.compare import main
from ekd_lightning.data import catalog
from ekd_lightning.errors import UserError
from ekd_lightning.progress import phase, session
from ekd_lightning.reporting.blocks import block_of_rows
from ekd_lightning.reporting.groups import differences
from ekd_lightning.runs.directory import RunDirectory
from ekd_lightning.runs.lock import DirectoryLock
from ekd_lightning.settings import RecipeSettings, Settings
from ekd_lightning.studies import cost, launching, planning
from ekd_lightning.studies.cost import recorded_pace, seconds_of
from ekd_lightning.studies.declaration import Declaration, read_declaration
from ekd_lightning.studies.rows import read_tuned
from ekd_lightning.studies.study import RowPlan, Study, read_study, write_study
from ekd_lightning.studies.sweep import Job

call = partial(called, main, level=logging.INFO)
CODE = """
from ekd_lightning.data import register_dataset
from ekd_lightning.data.catalog import load_dataset

@register_dataset("own_digits")
def own_digits(root, download=False):
    return load_dataset("digits", root, download)
"""


def test_the_full_study_is_what_its_question_needs() -> None:
    full = read_declaration("full")
    assert [(part.data, part.fraction) for part in full.parts[:5]] == [
        ("cifar10", 0.1),
        ("cifar100", 0.1),
        ("cifar10", 0.05),
        ("cifar100", 0.2),
        ("cifar10", 1.0),
    ]
    deciding = {row.name for row in full.rows if row.decides}
    assert {"ce", "kd_mean", "camkd", "fitnet", "simkd", "crd", "dkd", "ekd", "ekd_mean", "ekd_permuted"} < deciding
    assert {row.seeds for row in full.rows if row.decides} == {(0, 1, 2, 3, 4)}
    assert {row.seeds for row in full.rows if not row.decides} == {(0, 1, 2)}
    assert full.epochs_of(4500, 128) * (4500 // 128) >= 4000
    assert full.epochs_of(45_000, 128) == 60


def test_the_example_of_the_page_is_a_declaration(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "comparing.md").read_text()
    (text,) = re.findall(r"```yaml\n(# few\.yaml.*?)```", page, re.DOTALL)
    (tmp_path / "few.yaml").write_text(text)
    found = read_declaration(str(tmp_path / "few.yaml"))
    assert [(row.name, row.method, row.match, row.decides) for row in found.rows] == [
        ("ekd", "ekd", None, True),
        ("ekd_heads", "ekd", None, True),
        ("kd_mean_macs", "kd_mean", "macs", True),
        ("ce", "ce", None, False),
    ]


@given(st.integers(0, 5000), st.integers(1, 100), st.integers(1, 50_000), st.integers(1, 512))
def test_a_run_is_as_short_as_both_rules_allow(steps: int, epochs: int, images: int, batch: int) -> None:
    if images < batch:
        return
    found = Declaration((), steps, epochs, (), ()).epochs_of(images, batch)
    assert found >= epochs
    assert found * (images // batch) >= steps
    assert found == epochs or (found - 1) * (images // batch) < steps


def test_parts_and_rows_are_chosen_by_name() -> None:
    full = read_declaration("full")
    left = full.only(["cifar100-20", "ekd", "kd"], [0, 4])
    assert [part.name for part in left.parts] == ["cifar100-20"]
    assert {row.name: row.seeds for row in left.rows} == {"ekd": (0, 4), "kd": (0,)}
    assert full.only([], []) == full
    with pytest.raises(UserError, match="did you mean 'cifar10-10'"):
        full.only(["cifar10-11"], [])
    with pytest.raises(UserError, match="the declared seeds are 0"):
        full.only([], [9])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"part": {}}, "unknown key 'part'; did you mean 'parts'"),
        ({"parts": {"a": {"data": "digits"}}}, "parts: a: the key fraction is missing"),
        ({"decide": {"seeds": [0]}}, "decide: the key rows is missing"),
        ({"decide": {"seeds": [0], "rows": {"ce": {"match": "size"}}}}, "match=size: must be macs or parameters"),
        ({"others": {"seeds": [0], "rows": {"ce": {}}}}, "the row ce is declared twice"),
        ({"overrides": ["a=1", {"b": 2}]}, "overrides=.*: must be list of str"),
        ({"overrides": ["recipe.epochs=7"]}, "overrides: recipe.epochs=7: the study sets this itself"),
        ({"overrides": ["data.fraction=0.5"]}, "overrides: data.fraction=0.5: the study sets this itself"),
        ({"overrides": ["hydra.run.dir=x"]}, "holds 'hydra.run.dir=x'"),
        ({"parts": {}}, "parts: is empty; declare at least one part"),
        (
            {"parts": {"../out": {"data": "digits", "fraction": 0.1}}},
            r"parts: \.\./out=\.\./out: folders are named after it",
        ),
        ({"parts": {"a": {"data": "digits", "fraction": 2.0}}}, r"parts: a: fraction=2.0: must be in \(0, 1\]"),
        ({"decide": {"seeds": [], "rows": {"ce": {}}}}, r"decide: seeds=\[\]: give different whole numbers"),
        ({"decide": {"seeds": [0, 0], "rows": {"ce": {}}}}, r"decide: seeds=\[0, 0\]: give different whole numbers"),
        ({"decide": {"seeds": [0], "rows": {}}}, "decide: rows: is empty; declare at least one row"),
        ({"decide": {"seeds": [0], "rows": {"ce": None}}}, "decide: rows: ce=None: must be METHOD: {} or NAME: {"),
        ({"decide": {"seeds": [0], "rows": {8: {}}}}, "decide: rows: 8={}: must be METHOD: {} or NAME: {"),
        ({"least": {"epochs": 0}}, "least: epochs=0: must be at least 1"),
        ({"least": {"steps": -4}}, "least: steps=-4: must be at least 0"),
        ({"decide": {"seeds": [0], "rows": {"a/b": {"method": "ce"}}}}, "row 'a/b': folders are named after it"),
        ({"decide": {"seeds": [0], "rows": {"ce": {"with": ["seed=5"]}}}}, "seed=5: the row ce may set only"),
        (
            {"decide": {"seeds": [0], "rows": {"ce": {"with": ["recipe.epochs=1"]}}}},
            "recipe.epochs=1: the study sets this itself",
        ),
        ({"decide": {"seeds": [0], "rows": {"ce": {"with": ["data.augmentation=none"]}}}}, "the row ce may set only"),
        (
            {"decide": {"seeds": [0], "rows": {"ce": {"match": "macs", "with": ["student.network=vgg8"]}}}},
            "student.network=vgg8: cannot be combined with match",
        ),
    ],
)
def test_a_declaration_of_another_form_is_refused_by_name(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    whole = {"parts": {"a": {"data": "digits", "fraction": 0.1}}, "decide": {"seeds": [0], "rows": {"ce": {}}}}
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump({**whole, **change}))
    with pytest.raises(UserError, match=words):
        read_declaration(str(path))


def test_a_row_that_is_written_twice_is_refused_with_its_line(tmp_path: Path) -> None:
    """YAML would take the last one silently."""
    path = tmp_path / "own.yaml"
    path.write_text(
        "parts: {1: {data: digits, fraction: 0.1}}\ndecide:\n  seeds: [0]\n  rows:\n    ce: {}\n    kd: {}\n"
    )
    assert [part.name for part in read_declaration(str(path)).parts] == ["1"]
    path.write_text(f"{path.read_text()}    ce: {{with: [recipe.lr=0.1]}}\n")
    with pytest.raises(UserError, match=r"own\.yaml: the key 'ce' is there twice \(line 7\); remove one"):
        read_declaration(str(path))


def test_the_cost_is_that_of_recorded_runs_by_row_and_by_size_elsewhere() -> None:
    seen = {"num_train_images": 100, "epochs_done": 2, "macs": 10}
    done = [entry(result("ekd", s, train_seconds=float(t), **seen), name=f"ekd-f0.1-s{s}") for s, t in ((0, 4), (1, 6))]
    pace, speed = recorded_pace(done)
    assert pace == {"ekd": pytest.approx(5 / 200)}
    assert speed == pytest.approx(3 * 10 * 400 / 10)
    jobs = [Job(Path("a"), (), row="ekd", images=1000), Job(Path("b"), (), row="ce", images=7, macs=2400)]
    assert seconds_of(jobs, pace, speed) == pytest.approx(1000 * 5 / 200 + 2400 / speed)
    assert recorded_pace([]) == ({}, 0.0)


def composed(overrides: Sequence[str]) -> DictConfig:
    return OmegaConf.create({**asdict(Settings(recipe=RecipeSettings(epochs=4))), "method": {"terms": {}}})


def test_the_progress_of_a_plan_counts_rows_as_further_seeds_of_a_row_take_no_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = []

    def check(*_: object) -> dict[str, int]:
        assert shown.at_work
        said.append(shown.at_work.words())
        return {"images": 1, "macs": 1}

    monkeypatch.setattr(planning._Runs, "_check", check)
    monkeypatch.setattr(planning, "to_settings", lambda _: Settings(recipe=RecipeSettings(epochs=4)))
    rows = tuple(RowPlan(name, (f"method={name}",)) for name in ("ce", "ekd"))
    with session() as shown, phase("plan"):
        jobs = planning.plan(Study(rows, (0.1, 1), (0, 1, 2)), tmp_path, composed, retry_failed=False)
    assert said == [f"checking {number} of 4 rows" for number in range(4)]
    names = [f"{row}-f{fraction}-s{seed}" for fraction in (0.1, 1) for seed in range(3) for row in ("ce", "ekd")]
    assert [job.directory.name for job in jobs] == names  # seed by seed nevertheless


def test_what_is_left_of_a_run_costs_the_epochs_that_are_not_in_its_curves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And a row's pace counts on its own data set alone: images of another may be of another size."""
    monkeypatch.setattr(planning._Runs, "_check", lambda *_: {"images": 400, "macs": 4000})
    study = Study((RowPlan("ce", ("method=ce",)),), (0.1,), (0, 1), (), "digits")
    stopped = tmp_path / "a/runs/ce-f0.1-s0"
    (stopped / ".hydra").mkdir(parents=True)
    (stopped / "checkpoints").mkdir()
    (stopped / "checkpoints/last.ckpt").touch()
    (stopped / "status.json").write_text('{"state": "stopped"}')
    (stopped / ".hydra/overrides.yaml").write_text("[method=ce]\n")
    (stopped / "metrics.csv").write_text("step,epoch\n3,0.0\n7,1.0\n11,2.0\n")

    monkeypatch.setattr(planning, "to_settings", lambda _: Settings(recipe=RecipeSettings(epochs=4)))
    jobs = planning.plan(study, tmp_path / "a", composed, retry_failed=False)
    assert [(job.resumed, job.images, job.macs) for job in jobs] == [(True, 100, 1000), (False, 400, 4000)]

    seen = {"num_train_images": 100, "epochs_done": 1, "macs": 10, "train_seconds": 3600.0}
    made = {"digits": entry(result("ce", 0, **seen), name="ce-f0.1-s0"), "cifar10": None}
    here = cost.kind_of_machine({})
    monkeypatch.setattr(cost, "kind_of_machine", lambda _: here)
    monkeypatch.setattr(
        cost, "read_runs", lambda study, _: {0.1: {"ce": {0: made[study.data]} if made[study.data] else {}}}
    )
    job = Job(Path("x"), (), row="ce", images=100, macs=30_000)
    planned = {tmp_path / data: (replace(study, data=data), [job]) for data in ("digits", "cifar10")}
    with caplog.at_level(logging.INFO):
        cost.log_cost(planned, composed)
    told = [line.rpartition(", ")[2] for line in caplog.messages[-4:-1]]
    assert told == ["about 1 h 00 min", "about 10 h 00 min", "about 11 h 00 min"]


def test_what_the_test_set_chose_it_cannot_confirm(tmp_path: Path) -> None:
    path = tmp_path / "ekd.yaml"
    found = {"overrides": ["method.temperature=8"], "scored_on": "validation images"}
    path.write_text(yaml.safe_dump(found))
    assert read_tuned(path) == found
    path.write_text(yaml.safe_dump({**found, "scored_on": "test images"}))
    with pytest.raises(UserError, match=r"ekd\.yaml: was scored on test images, not on validation images; settings"):
        read_tuned(path)


def test_rows_that_decide_are_corrected_for_their_number_alone() -> None:
    gains = {"a": (0.02, 0.01, 0.03, 0.02), "b": (0.01, 0.02, 0.00, 0.015), "c": (0.03, 0.05, 0.01, 0.02)}
    base = (0.5, 0.52, 0.49, 0.51)
    rows = {"ekd": [entry(result("ekd", s, value)) for s, value in enumerate(base)]}
    for name, own in gains.items():
        rows[name] = [entry(result("ekd", s, base[s] + gain, weight_x=name)) for s, gain in enumerate(own)]
    plain = {name: stats.ttest_1samp(own, 0).pvalue for name, own in gains.items()}

    def holm(names: tuple[str, ...]) -> dict[str, float]:
        found, least = {}, 0.0
        for rank, name in enumerate(sorted(names, key=plain.__getitem__)):
            least = max(least, min(1.0, (len(names) - rank) * plain[name]))
            found[name] = least
        return found

    found = differences(block_of_rows("cifar10", 0.1, rows, {"ekd", "a", "b"}).groups, "ekd")
    expected = {**holm(("a", "b", "c")), **holm(("a", "b"))}
    assert {name: one.p_holm for name, one in found.items()} == pytest.approx(expected)


def declared(path: Path, **change: Any) -> Path:
    """A declaration of one part and two rows, of one seed, for planning alone."""
    quick = yaml.safe_load((Path(str(resources.files("ekd_lightning.conf"))) / "study/quick.yaml").read_text())
    rows = {"ce": {}, "kd_mean_macs": {"method": "kd_mean", "match": "macs"}}
    whole = {
        **{key: quick[key] for key in ("overrides", "least")},
        "parts": {"a": {"data": "digits", "fraction": 0.1}},
        "decide": {"seeds": [0], "rows": rows},
    }
    path.write_text(yaml.safe_dump({**whole, **change}))
    return path


def planned(tmp_path: Path, *options: object, **change: Any) -> tuple[int, str, str]:
    path = declared(tmp_path / "own.yaml", **change)
    return call("--study", path, "--output", tmp_path / "o", "--print-jobs", *options)


@pytest.fixture
def quick_planning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what planning a run costs."""
    monkeypatch.setattr(planning._Runs, "_check", lambda *_: {})
    monkeypatch.setattr(cost, "log_cost", lambda *_: None)


@pytest.mark.usefixtures("quick_planning")
def test_a_study_with_tuned_settings_goes_on(tmp_path: Path) -> None:
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned/kd_mean.yaml").write_text("overrides: [method.temperature=8]\n")
    code, first, err = planned(tmp_path, "--tuned", tmp_path / "tuned")
    assert code == 0, err
    assert first.count("method.temperature=8") == 1
    code, again, err = planned(tmp_path, "--tuned", tmp_path / "tuned")
    assert (code, again) == (0, first), err
    study = read_study(tmp_path / "o/a")
    assert study is not None
    assert (study.declaration, [row.match for row in study.rows]) == ("own", [None, "macs"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"parts": {"a": {"data": "digits", "fraction": 0.2}}},
            "part a: .* fraction=0.1, the declaration now fraction=0.2",
        ),
        (
            {"decide": {"seeds": [0], "rows": {"kd_mean_macs": {"method": "camkd", "match": "macs"}}}},
            "method=kd_mean, the declaration now method=camkd",
        ),
        (
            {"decide": {"seeds": [0], "rows": {"kd_mean_macs": {"method": "kd_mean", "match": "parameters"}}}},
            "match=macs, .* match=parameters",
        ),
        (
            {"others": {"seeds": [0], "rows": {"ce": {}}}, "decide": {"seeds": [0], "rows": {"kd": {}}}},
            "decides=True, .* decides=False",
        ),
    ],
)
def test_a_changed_declaration_needs_a_folder_of_its_own(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    rows = (
        RowPlan("ce", ("method=ce",), (), (0,)),
        RowPlan("kd_mean_macs", ("method=kd_mean", "student.network=resnet14"), (), (0,), match="macs"),
    )
    write_study(Study(rows, (0.1,), (0,), (), "digits"), tmp_path / "o/a")
    for options in (("--print-jobs",), ("--report-only",)):
        study = declared(tmp_path / "own.yaml", **change)
        code, out, err = call("--study", study, "--output", tmp_path / "o", *options)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert re.search(words, err)
        assert "use another --output" in err


@pytest.mark.usefixtures("quick_planning")
def test_a_part_takes_more_seeds_for_all_rows_or_for_those_named(tmp_path: Path) -> None:
    rows = {"mine": {"method": "ce", "with": ["recipe.lr=0.01"]}, "kd_mean": {}}
    assert planned(tmp_path, decide={"seeds": [0], "rows": rows})[0] == 0
    part = ("--output", tmp_path / "o/a", "--print-jobs")

    def jobs(*options: str) -> set[str]:
        code, out, err = call(*part, *options)
        assert code == 0, err
        return set(re.findall(r"/runs/([\w.-]+)", out))

    assert jobs("--seeds", "2") == {"mine-f0.1-s2", "kd_mean-f0.1-s2"}
    assert jobs("--seeds", "3", "--methods", "mine,sp") == {"mine-f0.1-s3", "sp-f0.1-s3"}
    assert jobs("--methods", "mine") == {f"mine-f0.1-s{seed}" for seed in (0, 2, 3)}
    assert len(jobs()) == 6  # all that the part lacks
    study = read_study(tmp_path / "o/a")
    assert study is not None
    found = {row.name: (row.seeds, row.decides) for row in study.rows}
    assert found == {"mine": ((0, 2, 3), True), "kd_mean": ((0, 2), True), "sp": ((3,), False)}
    assert study.declaration == "own"


@pytest.mark.usefixtures("quick_planning")
def test_a_repeated_command_goes_on_with_its_plain_students_of_equal_cost(tmp_path: Path) -> None:
    rows = {"ekd_pooled": {"with": ["student.split_after=stage1"]}, "ce": {}}
    assert planned(tmp_path, decide={"seeds": [0], "rows": rows})[0] == 0
    words = ("--output", tmp_path / "o/a", "--print-jobs", "--methods", "ekd_pooled", "--match", "macs")
    first, second = (re.findall(r"/runs/([\w.-]+)", call(*words)[1]) for _ in range(2))
    assert first == second
    assert len(first) == 3


@pytest.mark.usefixtures("quick_planning")
def test_rows_and_seeds_that_are_asked_for_are_run_alone(tmp_path: Path) -> None:
    """The others of the folder stay in the study; a call without `--study` goes on with them, too."""
    rows = {"decide": {"seeds": [0, 1], "rows": {"ce": {}, "kd_mean": {}}}}
    assert planned(tmp_path, **rows)[0] == 0
    part = ("--output", tmp_path / "o/a", "--print-jobs")
    assert call(*part, "--methods", "sp", "--seeds", "0")[0] == 0
    before = read_study(tmp_path / "o/a")
    failed = tmp_path / "o/a/runs/kd_mean-f0.1-s0"
    failed.mkdir(parents=True)
    (failed / "status.json").write_text('{"state": "failed", "error": "x", "time": "2026-01-02"}')

    def jobs(*options: str) -> list[str]:
        code, out, err = planned(tmp_path, "--retry-failed", *options, **rows)
        assert code == 0, err
        assert f"5 runs in the study, {out.count(chr(10))} to be run (0 of them resumed)" in err
        assert f", {5 - out.count(chr(10))} not asked for" in err
        return re.findall(r"/runs/([\w.-]+)", out)

    assert jobs("--only", "ce", "--seeds", "1") == ["ce-f0.1-s1"]
    assert jobs("--only", "ce") == ["ce-f0.1-s0", "ce-f0.1-s1"]
    assert sorted(jobs("--seeds", "0")) == ["ce-f0.1-s0", "kd_mean-f0.1-s0"]
    assert len(jobs()) == 4
    _, _, err = planned(tmp_path, "--only", "ce", **rows)
    assert "failed earlier" not in err  # no word on rows that it does not ask for
    code, out, err = call(*part, "--retry-failed")
    assert (code, len(out.splitlines())) == (0, 5), err
    assert read_study(tmp_path / "o/a") == before


def test_a_student_with_a_teachers_classifier_has_a_cost_before_there_are_teachers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning._Runs, "_check", lambda *_: {"images": 1, "macs": 1})
    monkeypatch.setattr(cost, "_PROBE_SECONDS", 0.0)
    rows = {"simkd": {}, "kd_mean_macs": {"method": "kd_mean", "match": "macs"}}
    code, out, err = planned(tmp_path, "student.reuse_classifier=true", decide={"seeds": [0], "rows": rows})
    assert (code, len(out.splitlines())) == (0, 2), err
    assert "in all: 2 runs, 2 training images, about " in err


@pytest.mark.usefixtures("quick_planning")
def test_settings_are_checked_before_they_are_used_and_code_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = {"decide": {"seeds": [0], "rows": {"ce": {}}}}
    usual = yaml.safe_load(declared(tmp_path / "own.yaml").read_text())["overrides"]
    code, _, err = planned(tmp_path, **rows, overrides=[*usual, "recipe.batch_size=0"])
    assert code == 2
    assert "recipe.batch_size=0" in err
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(catalog, "DATASETS", copy.copy(catalog.DATASETS))  # what is registered ends with the test
    (tmp_path / "code_of_a_study.py").write_text(CODE)
    own = [*usual, "imports=[code_of_a_study]", "data.name=own_digits"]
    code, first, err = planned(tmp_path, **rows, overrides=own)
    assert code == 0, err
    assert planned(tmp_path, **rows, overrides=own)[:2] == (0, first)
    code, _, err = planned(tmp_path, "recipe.epochs=7", **rows)
    assert (code, "the command: recipe.epochs=7: the study sets this itself" in err) == (2, True)
    code, _, err = planned(tmp_path, **rows)
    assert (code, "modules are never imported because a record names them" in err) == (2, True)


@pytest.fixture(scope="module")
def words(store: Path) -> tuple[str, ...]:
    return (f"teachers.store={store}",)


@pytest.fixture(scope="module")
def finished(words: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """One part of the quick study, two of its rows."""
    folder = tmp_path_factory.mktemp("declared") / "quick"
    code, out, err = call("--study", "quick", "--only", "digits-10,ce,kd_mean_macs", "--output", folder, *words)
    assert code == 0, err
    return folder, out, err


def test_a_declared_study_says_its_cost_and_what_is_not_run(finished: tuple[Path, str, str]) -> None:
    folder, out, err = finished
    assert "in all: 4 runs, 1,072 training images, about" in err
    assert "estimated from one second of a student's eager training steps" in err
    assert "not run: digits-10: 3 of 7 runs (ekd 2, kd_mean_stage3 1)" in out
    assert "not run: digits-20: all 7 runs" in out
    study = read_study(folder / "digits-10")
    assert study is not None
    assert [(row.name, row.seeds, row.decides) for row in study.rows] == [
        ("ce", (0, 1), True),
        ("kd_mean_macs", (0, 1), True),
    ]
    assert "recipe.epochs=2" in study.common
    steps = RunDirectory(folder / "digits-10/runs/ce-f0.1-s0").read_result().get("steps")
    assert steps == 2 * math.floor(134 / 32) == 8


def test_a_part_that_lost_its_study_is_planned_again_as_declared(
    finished: tuple[Path, str, str], words: tuple[str, ...], tmp_path: Path
) -> None:
    folder = shutil.copytree(finished[0], tmp_path / "quick")
    place = folder / "digits-10"
    before = read_study(place)
    (place / "study.json").unlink()
    asked = ("--study", "quick", "--only", "digits-10,ce,kd_mean_macs", "--output", folder)
    code, _, err = call(*asked, *words)
    assert code == 0, err
    assert "4 runs in the study, 0 to be run" in err
    after = read_study(place)
    assert before is not None
    assert after is not None
    assert after.declaration == before.declaration == "quick"
    assert [(row.name, row.overrides, row.seeds, row.decides, row.match) for row in after.rows] == [
        (row.name, row.overrides, row.seeds, row.decides, row.match) for row in before.rows
    ]


def test_a_lost_part_without_its_declaration_is_refused_with_the_option_to_add(
    finished: tuple[Path, str, str], tmp_path: Path
) -> None:
    """The rows that decide are known to the declaration alone."""
    place = shutil.copytree(finished[0], tmp_path / "mine") / "digits-10"
    (place / "study.json").unlink()
    code, _, err = call("--output", place)
    assert (code, "lost; repeat the command that began the study, " in err, "or its --study" in err) == (2, True, True)
    assert not (place / "study.json").exists()


def test_the_same_command_goes_on_and_judges_by_what_is_there(
    finished: tuple[Path, str, str], words: tuple[str, ...], tmp_path: Path
) -> None:
    folder = shutil.copytree(finished[0], tmp_path / "quick")
    lost = folder / "digits-10/runs/ce-f0.1-s1"
    kept = RunDirectory(lost).read_result()["student_sha256"]
    shutil.rmtree(lost)
    other = folder / "digits-10/runs/kd_mean_macs-f0.1-s1/status.json"
    other.write_text('{"state": "failed", "error": "x", "time": "2026-01-02"}')
    asked = ("--study", "quick", "--only", "digits-10,ce", "--output", folder)
    with DirectoryLock(lost):  # another process is working on it
        code, out, err = call(*asked, *words)
    assert (code, "1 left to other processes" in err, "1 not asked for" in err) == (1, True, True)
    assert "not run: digits-10: 5 of 7 runs (ekd 2, ce 1, kd_mean_macs 1, kd_mean_stage3 1)" in out
    assert "--retry-failed" not in out  # it would change nothing for the row that is asked for
    code, out, err = call(*asked, *words)
    assert code == 0
    assert "estimated from 2 finished runs" in err
    assert re.search(r"kd_mean_macs .*failed", out)  # other rows stay in the table
    assert RunDirectory(lost).read_result()["student_sha256"] == kept


def test_a_job_that_another_process_took_or_made_is_left_to_it(
    finished: tuple[Path, str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    done, fresh = finished[0] / "digits-10/runs/ce-f0.1-s0", tmp_path / "fresh"
    failed = tmp_path / "failed"
    failed.mkdir()
    (failed / "status.json").write_text('{"state": "failed", "error": "x", "time": "2026-01-02"}')
    ran: list[Path] = []
    for place in (done, fresh, failed):
        monkeypatch.setattr(train, "JobOutput", lambda _, place=place: type("Output", (), {"directory": place}))
        monkeypatch.setattr(train, "run_job", lambda _, place=place: ran.append(place))
        train.run_shared_job(None, since="2026-01-01")
    assert ran == [fresh]
    train.run_shared_job(None, since="2026-01-03")
    assert ran == [fresh, failed]
    monkeypatch.setattr(train, "JobOutput", lambda _: type("Output", (), {"directory": fresh}))
    with DirectoryLock(fresh):
        train.run_shared_job(None)
    assert ran == [fresh, failed]


def test_a_run_that_another_process_began_and_left_goes_on(
    finished: tuple[Path, str, str], words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = shutil.copytree(finished[0], tmp_path / "quick")
    left = folder / "digits-10/runs/ce-f0.1-s1"
    known = RunDirectory(left).read_result()["student_sha256"]
    shutil.move(left, tmp_path / "left")
    for name in ("result.json", "student.safetensors"):
        (tmp_path / "left" / name).unlink()
    (tmp_path / "left/status.json").write_text('{"state": "running"}')
    launch = launching.launch

    def later(*args: Any, **options: Any) -> None:
        """Between the plan and the run another process makes two epochs, and is killed."""
        shutil.move(tmp_path / "left", left)
        launch(*args, **options)

    monkeypatch.setattr(launching, "launch", later)
    code, _, err = call("--study", "quick", "--only", "digits-10,ce", "--output", folder, *words)
    assert code == 0, err
    assert len(RunDirectory(left).provenance()["resumed"]) == 1
    assert RunDirectory(left).read_result()["student_sha256"] == known


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--study", "fulll"), "unknown study 'fulll'; did you mean 'full'"),
        (("--study", "quick", "--methods", "ce"), "--methods: has no effect with --study, which declares it"),
        (("--only", "ce"), "--only: has an effect only with --study"),
        (("--study", "quick", "--only", "x"), "unknown part or row 'x'"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(tmp_path: Path, options: tuple[str, ...], words: str) -> None:
    code, _, err = call(*options, "--output", tmp_path / "o")
    assert (code, err.count("\n")) == (2, 1)
    assert words in err
