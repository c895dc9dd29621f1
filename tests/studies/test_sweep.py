"""A sweep on disk: its plan, how jobs stand, the lines it says on its way, its summary and its tables."""

from __future__ import annotations

import contextlib
import io
import json
import statistics
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from ekd_lightning.config import output
from ekd_lightning.config.config import register_schema, to_plain, warn_of_idle_terms, write_config
from ekd_lightning.errors import UserError
from ekd_lightning.files import read_json, write_json
from ekd_lightning.progress import readable
from ekd_lightning.runs.collection import RunEntry
from ekd_lightning.runs.directory import RunState
from ekd_lightning.runs.lock import DirectoryLock
from ekd_lightning.runs.result import Result
from ekd_lightning.studies import checking, launching, multirun
from ekd_lightning.studies.launching import Progress, is_queued, seconds_left, stopped
from ekd_lightning.studies.multirun import lost_job, planned_sweep
from ekd_lightning.studies.sweep import (
    MOST_ROWS,
    Job,
    JobState,
    Sweep,
    found_sweep,
    job_state,
    read_sweep,
    seed_groups,
    show_summary,
    sweep_of,
    sweep_tables,
    varied_keys,
    varied_values,
    write_sweep,
)

START = datetime(2026, 1, 31, 12, tzinfo=timezone.utc)


def at(seconds: float) -> str:
    return (START + timedelta(seconds=seconds)).isoformat(timespec="seconds")


def job(folder: Path, name: str, *overrides: str) -> Job:
    return Job(folder / name, overrides)


def leave(directory: Path, state: str, *, since: float = 0, end: float = 0, error=None, **result) -> None:
    """What a run leaves in its directory."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "provenance.json").write_text(json.dumps({"started": at(since)}))
    (directory / "status.json").write_text(json.dumps({"state": state, "error": error, "time": at(end)}))
    if state == "done":
        whole = {"method": "ekd", "data": "digits", "seed": 0, "fraction": 0.1, "test_accuracy": 0.5, **result}
        (directory / "result.json").write_text(json.dumps(whole))


@pytest.fixture
def sweep(tmp_path) -> Sweep:
    jobs = tuple(job(tmp_path, str(n), "data=digits", f"seed={n}", "lr=1") for n in range(4))
    return Sweep(tmp_path, jobs, ("hydra/launcher=basic",), ("data=digits", "lr=1"), "train", None, at(0))


# -- the plan -------------------------------------------------------------------------------------------


def test_a_plan_survives_writing_and_reading_and_moving(sweep, tmp_path):
    write_sweep(sweep)
    assert read_sweep(tmp_path) == sweep
    moved = tmp_path.with_name(f"{tmp_path.name} moved")
    tmp_path.rename(moved)
    assert [j.directory for j in read_sweep(moved).jobs] == [moved / str(n) for n in range(4)]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"jobs": 3}'])
def test_a_damaged_plan_is_named(tmp_path, text):
    assert read_sweep(tmp_path) is None
    (tmp_path / "sweep.json").write_text(text)
    with pytest.raises(UserError, match=r"sweep\.json: damaged"):
        read_sweep(tmp_path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"format": 9}, r"sweep\.json: written by a newer version \(format 9; 1 to 2 are read\)"),
        ({"format": "x"}, r"sweep\.json: not a record of this package \(format 'x'\)"),
        ({"jobs": [{"directory": "../x", "overrides": []}]}, "is outside the sweep's folder"),
        ({"jobs": [{"directory": "/x", "overrides": []}]}, "is outside the sweep's folder"),
        ({"jobs": [{"directory": "link", "overrides": []}]}, "is outside the sweep's folder"),
        ({"jobs": [{"directory": "0", "overrides": ["method.name=a\nb", 3]}]}, "settings of a run"),
    ],
)
def test_a_foreign_plan_is_named(sweep, change, named):
    write_sweep(sweep)
    (sweep.folder / "link").symlink_to(sweep.folder.parent)
    path = sweep.folder / "sweep.json"
    content = read_json(path)
    assert content.pop("format") == 2
    write_json(path, content)
    assert read_sweep(sweep.folder) == sweep  # as versions before wrote it
    write_json(path, {**content, **change})
    with pytest.raises(UserError, match=named):
        read_sweep(sweep.folder)


def test_folders_of_hydras_search_path_are_those_of_where_they_were_typed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    word = "hydra.searchpath=[file://my conf,pkg://other.conf,/abs]"
    with initialize_config_module("ekd_lightning.conf", version_base="1.3"):
        found = planned_sweep(composed("seed=0,1", word), tmp_path)
    (typed_word,) = [word for word in found.hydra if word.startswith("hydra.searchpath")]
    value = OverridesParser.create().parse_override(typed_word).value()
    assert [str(place) for place in value] == [f"file://{tmp_path}/my conf", "pkg://other.conf", "file:///abs"]


def composed(*words: str):
    register_schema()
    return GlobalHydra.instance().hydra.compose_config(
        "train", list(words), run_mode=RunMode.MULTIRUN, with_log_configuration=False
    )


def planned(folder: Path, *words: str) -> list[tuple[str, dict[str, str]]]:
    with initialize_config_module("ekd_lightning.conf", version_base="1.3"):
        jobs = planned_sweep(composed(*words), folder).jobs
    keys = varied_keys(jobs)
    return [(j.directory.relative_to(folder).as_posix(), varied_values(j, keys)) for j in jobs]


def test_the_plan_is_the_product_in_hydras_order_with_its_directories(tmp_path):
    found = planned(tmp_path, "method=ce,ekd", "seed=range(2)", "data.fraction=0.1")
    runs = [{"method": method, "seed": seed} for method in ("ce", "ekd") for seed in ("0", "1")]
    assert found == [(str(number), values) for number, values in enumerate(runs)]
    subdir = "hydra.sweep.subdir=${method.name}/s${seed}_${hydra:job.num}"
    found = planned(tmp_path, "method=ce,ekd", "seed=3", subdir)
    assert [name for name, _ in found] == ["ce/s3_0", "ekd/s3_1"]
    found = planned(tmp_path, "experiment=sweep_counts", "seed=7,8")  # what is varied is stored there
    assert len(found) == 3 * 3 * 2
    assert found[0][1] == {"teachers.count": "1", "student.branches": "1", "seed": "7"}


def test_an_interpolation_is_resolved_by_each_job(tmp_path):
    with initialize_config_module("ekd_lightning.conf", version_base="1.3"):
        config = composed("seed=3,4", "data.subset_seed=${seed}", "recipe.momentum=${recipe.ema}")
        jobs = planned_sweep(config, tmp_path).jobs
        for number, job in enumerate(jobs):
            with checking.composed(config, job.overrides, number) as found:
                assert (found.seed, found.data.subset_seed, found.recipe.momentum) == (3 + number, 3 + number, 0)


def test_other_sweepers_decide_as_they_go(tmp_path):
    with initialize_config_module("ekd_lightning.conf", version_base="1.3"):
        cfg = composed("seed=1")
        cfg.hydra.sweeper._target_ = "hydra_plugins.hydra_optuna_sweeper.optuna_sweeper.OptunaSweeper"
        assert planned_sweep(cfg, tmp_path) is None


def test_runs_of_an_unplanned_sweep_are_found_with_their_overrides(tmp_path):
    (tmp_path / "a" / ".hydra").mkdir(parents=True)
    (tmp_path / "a" / ".hydra" / "overrides.yaml").write_text("- seed=1\n- resume=x\n")
    leave(tmp_path / "b" / "c", "done")
    assert found_sweep(tmp_path).jobs == (job(tmp_path, "a", "seed=1"), job(tmp_path, "b/c"))


def test_the_sweep_of_a_run_is_named_as_dashboards_do(tmp_path):
    run = tmp_path / "day" / "time" / "ekd" / "0"
    run.mkdir(parents=True)
    assert sweep_of(run) is None
    (tmp_path / "day" / "time" / "multirun.yaml").touch()
    assert sweep_of(run) == "day/time"


# -- how jobs stand -------------------------------------------------------------------------------------


def test_every_state_is_told_apart(tmp_path):
    cases = {
        "planned": lambda d: None,
        "stopped": lambda d: leave(d, "running", since=3),
        "done": lambda d: leave(d, "done", since=10, end=45, test_accuracy=0.5),
        "partial": lambda d: leave(d, "done", partial=True),
        "interrupted": lambda d: leave(d, "failed", error="interrupted"),
        "failed": lambda d: leave(d, "failed", error="x=1: no\nsecond line"),
    }
    for state, write in cases.items():
        write(tmp_path / state)
        found = job_state(job(tmp_path, state)).run
        assert found.state == ("stopped" if state == "interrupted" else state)
        assert found.is_over == (state in ("done", "partial"))
    done = job_state(job(tmp_path, "done")).run
    assert (done.seconds, done.result.test_accuracy) == (35, 0.5)
    assert job_state(job(tmp_path, "failed")).run.error == "x=1: no"
    with DirectoryLock(tmp_path / "stopped"):
        running = job_state(job(tmp_path, "stopped"), at(1e6)).run
    assert (running.state, running.since) == ("running", START + timedelta(seconds=3))


@pytest.mark.parametrize("name", ["status.json", "result.json"])
@pytest.mark.parametrize("text", ["", "{", "3", "\x00"])
def test_damaged_files_are_failures(tmp_path, name, text):
    leave(tmp_path / "0", "done")
    (tmp_path / "0" / name).write_text(text)
    found = job_state(job(tmp_path, "0")).run
    assert found.state == "failed"
    assert f"{name}: damaged" in found.error


def test_what_an_earlier_sweep_left_in_the_folder_does_not_count(tmp_path):
    leave(tmp_path / "0", "done", end=-10)
    assert job_state(job(tmp_path, "0"), at(0)).run.state == "planned"


def test_a_resumed_job_took_its_last_part(tmp_path):
    leave(tmp_path / "0", "done", since=0, end=100)
    first = {"started": at(0), "resumed": [{"started": at(30)}, {"started": at(80)}]}
    (tmp_path / "0" / "provenance.json").write_text(json.dumps(first))
    assert job_state(job(tmp_path, "0")).run.seconds == 20


def leave_part(directory: Path, *overrides: str, **status) -> None:
    """What a run leaves that was stopped after its first epoch."""
    leave(directory, "running", **status)
    for folder in (".hydra", "checkpoints"):
        (directory / folder).mkdir()
    (directory / ".hydra" / "overrides.yaml").write_text("".join(f"- {word}\n" for word in overrides))
    (directory / "checkpoints" / "last.ckpt").touch()


def resumed_jobs(sweep: Sweep, monkeypatch, *words: str) -> list[Job]:
    """The jobs that resuming a sweep launches."""
    write_sweep(sweep)
    launched: list[Job] = []
    monkeypatch.setattr(multirun, "launch", lambda jobs, *_, **__: launched.extend(jobs))
    monkeypatch.setattr(multirun, "without_mistakes", lambda jobs, *_: jobs)  # `lr` is no setting
    multirun.resume_sweep(sweep.folder, ["ekd-train", *words], lambda cfg: None)
    return launched


def test_what_an_earlier_sweep_left_is_not_resumed_as_a_job_of_the_new_one(sweep, monkeypatch):
    """Neither done nor stopped runs, whether their status is older or the new job has not said a word yet."""
    leave_part(sweep.folder / "0", "data=digits", "seed=0", "lr=9", since=-20, end=-10)
    leave_part(sweep.folder / "1", "data=digits", "seed=1", "lr=9", since=10, end=20)
    leave(sweep.folder / "2", "done", since=-20, end=-10)
    (sweep.folder / "2" / ".hydra").mkdir()
    assert resumed_jobs(sweep, monkeypatch) == list(sweep.jobs)


def test_jobs_that_have_not_started_do_so_where_the_sweep_was_first_started(sweep, tmp_path, monkeypatch):
    (home := tmp_path / "home").mkdir()
    (elsewhere := tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(elsewhere)
    write_sweep(replace(sweep, working_directory=str(home), common=()))
    seen: list[tuple[Path, list[str]]] = []
    monkeypatch.setattr(
        launching.internals, "launch", lambda _, jobs, __: seen.extend((Path.cwd(), job) for job in jobs)
    )
    monkeypatch.setattr(multirun, "without_mistakes", lambda jobs, *_: jobs)
    register_schema()
    multirun.resume_sweep(sweep.folder, ["ekd-train", "++data.root=new"], lambda cfg: None)
    assert [place for place, _ in seen] == 4 * [home]
    assert all(f"++data.root={elsewhere / 'new'}" in words for _, words in seen)
    assert Path.cwd() == elsewhere


def test_a_planned_sweep_says_where_its_relative_places_begin(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with initialize_config_module("ekd_lightning.conf", version_base="1.3"):
        described = planned_sweep(composed("seed=0,1"), tmp_path)
    assert described.working_directory == str(tmp_path)


def test_a_stopped_job_goes_on_whatever_may_change_has_changed(sweep, monkeypatch):
    recorded = ("data=digits", "data.root=/old", "seed=0", "lr=1", "tags=[a]")
    leave_part(sweep.folder / "0", *recorded, since=10, end=20)
    first, *others = resumed_jobs(sweep, monkeypatch, "data.root=/new", "trainer.max_epochs=3")
    extra = ("data.root=/new", "trainer.max_epochs=3")
    assert first == Job(sweep.folder / "0", ("data=digits", "seed=0", "lr=1", "tags=[a]", *extra), True)
    assert others == [Job(j.directory, (*j.overrides, *extra)) for j in sweep.jobs[1:]]


def test_a_term_of_weight_0_that_no_job_has_is_told(recwarn):
    register_schema()
    told = "method.terms.{}.weight={} has no effect: {} has no term {}; its terms are {}"
    kd, idle = "ce_ensemble, kd_ensemble", ("method.terms.fsp.weight=.0", "method.terms.feature_branch.weight=0")
    with initialize_config_module("ekd_lightning.conf", version_base="1.3"):
        for jobs, lines in (
            (
                [("method=kd", *idle)],
                [
                    told.format("fsp", ".0", "kd", "fsp", kd),
                    told.format("feature_branch", "0", "kd", "feature_branch", kd),
                ],
            ),
            (
                [("method=kd", *idle), ("method=ekd_pooled", *idle)],
                [
                    told.format(
                        "fsp",
                        ".0",
                        "ekd_pooled",
                        "fsp",
                        ", ".join(compose("train", overrides=["method=ekd_pooled"]).method.terms),
                    )
                ],
            ),
            ([("method=kd", "method.terms.kd_ensemble.weight=0", "method.terms.feature_branch.weight=0.1")], []),
            ([("method=kd", "+method.terms.y.type=kd_ensemble", "method.terms.y.weight=0")], []),
        ):
            recwarn.clear()
            warn_of_idle_terms(jobs, lambda words: compose("train", overrides=words))
            assert [str(one.message) for one in recwarn] == lines


def test_a_new_sweep_tells_terms_of_weight_0_that_no_job_has(tmp_path, monkeypatch):
    monkeypatch.setattr(multirun, "JobChecks", lambda _: SimpleNamespace(mistakes=lambda jobs: {}, settings=[]))
    with initialize_config_module("ekd_lightning.conf", version_base="1.3"):
        config = composed("method=kd,kd_mean", "method.terms.fsp.weight=0", "seed=0,1")
        with pytest.warns(
            UserWarning, match=r"fsp\.weight=0 has no effect: kd_mean has no term fsp; its terms are ce_ensemble, kd_"
        ):
            multirun._check(config, planned_sweep(config, tmp_path))


FORMER = "method=ekd_pooled method.name=ekd student.branch_gradients=mean"
"""What `method=ekd` was in version 0.1."""


GRADIENTS = "student.branch_gradients=mean"


def recorded(folder: Path, *own: tuple[str, ...], record: str) -> Sweep:
    """A sweep on the digits whose first job is done, with the settings that it and further overrides compose to."""
    register_schema()
    jobs = tuple(job(folder, str(number), "data=digits", *words) for number, words in enumerate(own))
    leave(folder / "0", "done", since=10, end=20)
    with initialize_config_module("ekd_lightning.conf", version_base="1.3"):
        write_config(to_plain(compose("train", overrides=[*jobs[0].overrides, *record.split()])), folder / "0")
    return Sweep(folder, jobs, (), ("data=digits",), "train", None, at(0))


@pytest.mark.parametrize(
    ("record", "restoring"),
    [
        (FORMER, FORMER),
        ("recipe.lr=0.3 recipe.nesterov=false", "recipe.lr=0.3 recipe.nesterov=false"),
        ("trainer.max_epochs=1 evaluation=full tags=[a] data.root=there", ""),  # these may change
    ],
)
def test_a_sweep_does_not_go_on_with_other_settings_than_its_runs_had(tmp_path, monkeypatch, record, restoring):
    """As when a file of the configuration has changed since."""
    sweep = recorded(tmp_path, ("seed=0",), ("seed=1", "method.temperature=2"), record=record)
    if restoring:
        named = r"job 0 \(seed=0\): was run with other settings than it would have now \(.+ differ\); "
        with pytest.raises(UserError, match=f"^{named}a sweep keeps its settings, so add {restoring}$"):
            resumed_jobs(sweep, monkeypatch)
    left = resumed_jobs(sweep, monkeypatch, *restoring.split())
    assert left == [Job(tmp_path / "1", (*sweep.jobs[1].overrides, *restoring.split()))]


@pytest.mark.parametrize(
    ("own", "record", "words", "told"),
    [
        ((("method=ekd",), ("method=kd",)), FORMER, "", "jobs that are left as a new swe"),
        (
            (("method=ekd",), ("method=kd",)),
            "",
            "method=ekd_pooled",
            "method=ekd_pooled: a resumed sweep keeps its set",
        ),
        (
            (("seed=0",), ("seed=1",)),
            "",
            "recipe.lr=0.3",
            r"job 0 \(seed=0\): was run .* \(recipe.lr differ\); .* add reci",
        ),
        ((("experiment=quick",), ("experiment=cifar10_limited",)), "recipe.momentum=0.1", "recipe.momentum=0.1", ""),
        (
            (("experiment=quick",), ("experiment=cifar10_limited",)),
            "recipe.epochs=3",
            "recipe.epochs=3",
            "recipe.epochs=3: a resumed sw",
        ),
        # Without effect in the job that has no branches.
        ((("method=ekd",), ("method=ce",)), GRADIENTS, GRADIENTS, ""),
        ((("method=ce",), ("method=ekd",)), "", GRADIENTS, f"{GRADIENTS}: a resumed sw"),
        ((("seed=0",), ("seed=1",)), "", "imports=[json]", ""),
        ((("seed=0",),), "", "recipe.lr=0.3", "recipe.lr differ"),  # nothing is left to run
    ],
)
def test_what_is_added_to_a_sweep_restores_what_is_on_record_and_changes_all_jobs_alike(
    tmp_path, monkeypatch, own, record, words, told
):
    sweep = recorded(tmp_path, *own, record=record)
    with pytest.raises(UserError, match=told) if told else contextlib.nullcontext():
        assert len(resumed_jobs(sweep, monkeypatch, *words.split())) == 1


@pytest.mark.parametrize("state", ["failed", "running"])
def test_a_started_job_with_a_mistake_does_not_keep_the_others_from_going_on(sweep, monkeypatch, caplog, state):
    leave(sweep.jobs[1].directory, state, error="lost")
    states = [job_state(one) for one in sweep.jobs]
    monkeypatch.setattr(checking, "multirun_config", lambda *_: None)
    checks = SimpleNamespace(mistakes=lambda jobs: {1: "seed=1: no"})
    monkeypatch.setattr(checking, "JobChecks", lambda _: checks)
    left = checking.without_mistakes(sweep.jobs, states, sweep, ())
    assert left == [sweep.jobs[n] for n in (0, 2, 3)]
    said = "stopped" if state == "running" else state
    assert f"job 1 {said} before and is left out: seed=1: no" in caplog.messages
    assert job_state(sweep.jobs[1]).run.state == said
    checks.mistakes = lambda jobs: {1: "seed=1: no", 2: "seed=2: no"}  # the latter never started
    with pytest.raises(UserError, match=r"job 2 \(seed=2\): seed=2: no; the same command runs the other jobs"):
        checking.without_mistakes(sweep.jobs, states, sweep, ())


def test_a_resumed_sweep_leaves_alone_what_runs_elsewhere(sweep, monkeypatch, capsys):
    write_sweep(sweep)
    leave(sweep.jobs[0].directory, "done")
    leave(sweep.jobs[1].directory, "running")
    launched = []
    monkeypatch.setattr(multirun, "launch", lambda jobs, *_, **__: launched.extend(jobs))
    monkeypatch.setattr(multirun, "without_mistakes", lambda jobs, *_: jobs)
    monkeypatch.setattr(multirun.internals, "initialized", lambda _: contextlib.nullcontext())
    with DirectoryLock(sweep.jobs[1].directory):
        assert not multirun.resume_sweep(sweep.folder, ["ekd-train", f"resume={sweep.folder}"], print)
    assert [job.directory.name for job in launched] == ["2", "3"]
    assert "1 of 4 runs are done; 1 running in other processes; 2 to be run" in capsys.readouterr().out


def test_an_interrupted_sweep_says_how_it_stands(sweep, monkeypatch):
    for name, state in zip("012", ("done", "running", "failed"), strict=True):
        leave(sweep.folder / name, state, error="x")
    monkeypatch.chdir(sweep.folder.parent)
    expected = "1 of 4 runs done, 1 failed, 1 stopped, 1 not started"
    assert stopped(sweep) == f"{expected}; to continue: ekd-train resume={sweep.folder.name}"
    assert stopped(sweep, "ekd-compare --output x").endswith("; to continue: ekd-compare --output x")


def test_jobs_of_a_cluster_go_on_without_us(sweep):
    leave(sweep.folder / "0", "running")
    with DirectoryLock(sweep.folder / "0"):
        said = stopped(sweep, queued=True)
    assert said.startswith("0 of 4 runs done, 1 running, 3 not started; to continue, once the queue is empty: ")
    with initialize_config_module("ekd_lightning.conf", version_base="1.3"):
        for launcher, queued in (("basic", False), ("slurm", True)):
            if queued:
                pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
            cfg = compose("train", overrides=[f"hydra/launcher={launcher}"], return_hydra_config=True)
            assert is_queued(cfg) == queued


# -- progress -------------------------------------------------------------------------------------------


@given(st.floats(1, 1e4), st.integers(1, 5), st.integers(1, 8), st.integers(0, 20))
def test_time_left_of_equal_jobs_is_that_of_a_schedule(duration, done, workers, waiting):
    # Workers that just began, and whole rounds of waiting jobs: the schedule is rounds × duration.
    rounds = -(-waiting // workers)
    left = seconds_left([duration] * done, [0.0] * workers, rounds * workers, workers)
    assert left == pytest.approx((rounds + 1) * duration)


def test_time_left_counts_what_runs_and_never_goes_below_nothing():
    assert seconds_left([], [1.0], 3, 1) is None
    assert seconds_left([10.0, 20.0], [5.0], 2, 1) == 15 + 15 + 10
    assert seconds_left([10.0], [99.0], 0, 1) == 0
    assert seconds_left([10.0], [], 2, 0) == 20


@pytest.mark.parametrize(
    ("seconds", "words"), [(0, "0 s"), (99.4, "99 s"), (120, "2 min"), (3599, "1 h 00 min"), (12_000, "3 h 20 min")]
)
def test_durations_are_readable(seconds, words):
    assert readable(seconds) == words


def test_each_job_that_ends_is_a_line_and_no_job_is_told_twice(sweep):
    leave(sweep.folder / "0", "done", since=0, end=5, test_accuracy=0.25)
    lines: list[str] = []
    progress = Progress(sweep, lambda text: lines.append(text.plain))
    progress.update()
    assert lines == []  # done before
    leave(sweep.folder / "1", "done", since=10, end=40, test_accuracy=0.7155)
    progress.update()
    progress.update()
    assert lines == ["sweep 2/4 ━━━━━━────── seed=1: test accuracy 71.55 %, 30 s  (2 waiting, about 60 s left)"]
    leave(sweep.folder / "2", "failed", since=41, end=42, error="lr=1: no" + 99 * " way")
    leave(sweep.folder / "3", "running", since=-1e6)
    with DirectoryLock(sweep.folder / "3"):
        progress.update()
    shortened = "lr=1: no" + 22 * " way" + " …"  # of an error that its log has in full, 100 characters at most
    assert lines[1] == f"sweep 3/4 ━━━━━━━━━─── seed=2: failed: {shortened}  (1 failed, 1 running, about 0 s left)"
    leave(sweep.folder / "3", "done", since=43, end=44, test_accuracy=1)
    progress.update()
    assert lines[2] == "sweep 4/4 ━━━━━━━━━━━━ seed=3: test accuracy 100.00 %, 1 s  (1 failed)"


def test_a_failed_job_that_is_tried_again_is_told_when_it_ends_again(sweep):
    leave(sweep.folder / "0", "failed", end=5, error="x")
    lines: list[str] = []
    progress = Progress(sweep, lambda text: lines.append(text.plain), since=at(10))
    progress.update()
    assert lines == []
    leave(sweep.folder / "0", "done", since=11, end=12, test_accuracy=0.5)
    progress.update()
    assert len(lines) == 1


# -- the end --------------------------------------------------------------------------------------------


def test_the_summary_names_failures_and_what_to_do_next(sweep, capsys, monkeypatch):
    monkeypatch.chdir(sweep.folder.parent)
    write_sweep(sweep)
    leave(sweep.folder / "0", "done", test_accuracy=0.5, val_accuracy=0.4, train_seconds=12.3)
    leave(sweep.folder / "1", "failed", error="lr=1: no")
    leave(sweep.folder / "2", "running")
    show_summary(found_sweep(sweep.folder))
    name, lines = sweep.folder.name, capsys.readouterr().out.splitlines()
    assert lines[-6:] == [
        f"{name}: 1 of 4 runs done, 1 failed",
        "  failed: 1  lr=1: no",
        "",
        "next:",
        f"  ekd-train resume={name}",
        f"  ekd-report {name} -o {name}/report",
    ]
    (sweep.folder / "report").mkdir()
    (sweep.folder / "report" / "summary.json").write_text("{}")
    show_summary(found_sweep(sweep.folder))
    assert capsys.readouterr().out.splitlines()[-1] == f"  ekd-report {name} -o {name}/report --force"
    assert any(line.split() == ["0", "0", "50.00", "40.00", "12", "done"] for line in lines)
    assert any(line.split()[-2:] == ["not", "started"] for line in lines)


def test_a_sweep_that_was_refused_at_once_says_nothing_and_jobs_without_a_record_failed(sweep, capsys):
    write_sweep(sweep)
    show_summary(found_sweep(sweep.folder))
    assert capsys.readouterr().out == ""
    (sweep.folder / "sweep.json").unlink()
    (sweep.folder / "0" / ".hydra").mkdir(parents=True)
    show_summary(found_sweep(sweep.folder))
    told = capsys.readouterr().out
    assert "0 of 1 runs done, 1 failed" in told
    assert "ended before it wrote a record" in told


def test_a_killed_worker_is_one_line_and_our_own_mistakes_are_not():
    class TerminatedWorkerError(Exception):
        pass

    TerminatedWorkerError.__module__ = "joblib.externals.loky.process_executor"
    assert lost_job(TerminatedWorkerError("ended\n  unexpectedly")) == "a job was killed: ended"
    assert lost_job(TerminatedWorkerError()) == "a job was killed: TerminatedWorkerError"
    assert lost_job(ValueError("ours")) is None


def test_nobody_elses_process_is_taken_for_a_job(tmp_path):
    (tmp_path / ".submitit" / "1").mkdir(parents=True)
    (tmp_path / ".submitit" / "%j").mkdir()
    (tmp_path / ".submitit" / "99999999999999999999").mkdir()
    launching.stop_local_queue(tmp_path)
    launching.wait_for_local_queue(tmp_path)


@pytest.mark.parametrize("text", ["", "first\nsecond"])
def test_a_launcher_that_ends_without_a_word_is_one_line(tmp_path, monkeypatch, caplog, text):
    def ends(*_):
        raise RuntimeError(text)

    monkeypatch.setattr(launching.internals, "launch", ends)
    with initialize_config_module("ekd_lightning.conf", version_base="1.3"):
        register_schema()
        launching.launch([], Sweep(tmp_path, ()), [], lambda cfg: None)
    (line,) = [r.getMessage() for r in caplog.records if "launcher ended" in r.getMessage()]
    assert line == f"the launcher ended early: RuntimeError: {text.splitlines()[0] if text else 'no message'}"


# -- its tables -----------------------------------------------------------------------------------------

FOLDER = Path("/sweep")


def row(name: str, accuracy: float | None, state: str = "done", **varied: str) -> JobState:
    result = None
    if accuracy is not None:
        result = Result("ekd", "digits", 0, 0.1, accuracy, val_accuracy=0.5, train_seconds=4.25)
    job = Job(FOLDER / name, tuple(f"{key}={value}" for key, value in varied.items()))
    return JobState(job, RunEntry(job.directory, name, RunState(state), result))


def text(*tables) -> list[list[str]]:
    out = io.StringIO()
    console = Console(file=out, width=200)
    for table in tables:
        console.print(table)
    return [line.split() for line in out.getvalue().splitlines() if line.strip()]


def test_a_row_per_run_with_the_highest_accuracy_marked():
    rows = [row("0", 0.5, method="ce"), row("1", 0.7123, method="ekd"), row("2", None, "failed", method="kd")]
    lines = text(*sweep_tables(rows, FOLDER))
    assert ["0", "ce", "50.00", "50.00", "4.2", "done"] in lines
    assert ["1", "ekd", "★", "71.23", "50.00", "4.2", "done"] in lines
    assert ["2", "kd", "–", "–", "–", "failed"] in lines


def test_lists_and_paths_in_brackets_are_shown_as_they_are(capsys):
    rows = [row(f"[{end}]", 0.5, x=value) for end, value in (("red", "[a,b]"), ("/x", "[/data/x]"))]
    output.print_wide(*sweep_tables(rows, FOLDER))
    lines = [line.split()[:2] for line in capsys.readouterr().out.splitlines()]
    assert ["[red]", "[a,b]"] in lines
    assert ["[/x]", "[/data/x]"] in lines


def test_equal_runs_are_equally_high_and_a_single_one_is_not_the_best_of_anything():
    lines = text(*sweep_tables([row("0", 0.5, a="1"), row("1", 0.5, a="2"), row("2", 0.1, a="3")], FOLDER))
    assert sum("★" in line for line in lines) == 2
    assert not any("★" in line for line in text(*sweep_tables([row("0", 0.5)], FOLDER)))


def test_means_over_seeds_and_the_mark_goes_there():
    values = {"ce": [0.5, 0.52, 0.57], "ekd": [0.6, 0.62]}
    rows = [
        row(f"{method}{seed}", value, method=method, seed=str(seed))
        for method, found in values.items()
        for seed, value in enumerate(found)
    ]
    rows.append(row("ekd2", None, "stopped", method="ekd", seed="2"))
    runs, means = sweep_tables(rows, FOLDER)
    assert not any("★" in line for line in text(runs))
    lines = text(means)
    for method, found in values.items():
        spread = f"{100 * statistics.stdev(found):.2f}"
        mark = ["★"] if method == "ekd" else []
        expected = [method, *mark, f"{100 * statistics.fmean(found):.2f}", "±", spread, str(len(found)), "4.2"]
        assert expected in lines


def test_where_only_seeds_vary_there_is_one_mean_and_one_seed_has_no_spread():
    _, means = sweep_tables([row("0", 0.5, seed="0"), row("1", 0.7, seed="1")], FOLDER)
    assert ["60.00", "±", "14.14", "2", "4.2"] in text(means)
    _, means = sweep_tables([row("0", 0.5, seed="0"), row("1", None, "failed", seed="1")], FOLDER)
    assert ["50.00", "1", "4.2"] in text(means)


def test_a_key_that_a_run_does_not_set_is_its_own_group():
    rows = [row("0", 0.5, seed="0"), row("1", 0.6, seed="0", lr="1")]
    assert list(seed_groups(rows)) == [("–",), ("1",)]


@pytest.mark.parametrize("number", [MOST_ROWS, MOST_ROWS + 7])
def test_long_tables_are_cut_but_not_what_went_wrong(number):
    rows = [row(str(i), 0.5, a=str(i)) for i in range(number)] + [row("bad", None, "failed", a="x")]
    (table,) = sweep_tables(rows, FOLDER)
    assert table.row_count == MOST_ROWS + 1
    assert ["bad", "x", "–", "–", "–", "failed"] in text(table)
    said = " ".join(word for line in text(table) for word in line)
    assert ("7 more runs are done" in said) == (number > MOST_ROWS)
