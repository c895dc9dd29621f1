"""Sweeps that real processes run, interrupted by a real Ctrl-C, and continued; and the launchers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from whole_runs import TINY, Outcome, call_train

LONG = ("method=branched_ce", "student.branches=2", "recipe.epochs=300", "trainer.limit_train_batches=1")
SEEDS = ("seed=0,1,2", "trainer.limit_val_batches=1")
TIMEOUT = 120  # seconds, for the test to fail instead of hanging


def states(folder: Path) -> list[str]:
    """One word per job: how its status.json has it."""
    found = []
    for number in range(3):
        path = folder / str(number) / "status.json"
        status = json.loads(path.read_text()) if path.is_file() else {"state": "absent", "error": None}
        found.append(status["error"] or status["state"])
    return found


@contextmanager
def started(folder: Path, store: Path, *words: str) -> Iterator[subprocess.Popen]:
    """`ekd-train -m` as a terminal would start it: the leader of a process group."""
    own = (f"teachers.store={store}", f"hydra.sweep.dir={folder}")
    command = [sys.executable, "-m", "ekd_lightning.cli.train", "-m", *TINY, *LONG, *SEEDS, *own, *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    pipe = subprocess.PIPE
    # A shell starts background jobs with Ctrl-C ignored, and children inherit that; a handler they do not.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        command, cwd=folder.parent, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_for_epochs(process: subprocess.Popen, wanted: set[str]) -> None:
    """Reads the log until runs have told of these epochs; each starts its first epochs with the same words."""
    assert process.stdout is not None
    for line in process.stdout:
        wanted -= {epoch for epoch in wanted if f"epoch {epoch}/" in line}
        if not wanted:
            return
    raise AssertionError("the sweep ended before it was interrupted")


def interrupt(process: subprocess.Popen, *, whole_group: bool) -> str:
    """Ctrl-C; returns standard error once the process has ended with the exit code that shells expect.

    It is read to its end, so no process is left that could write there: jobs have ended, too.
    """
    (os.killpg if whole_group else os.kill)(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 130, err
    return err


def resumed(folder: Path, *words: str) -> Outcome:
    return call_train(f"resume={folder}", "trainer.max_epochs=3", *words, directory=folder)


@pytest.fixture(scope="module")
def interrupted(store, tmp_path_factory):
    """A sweep of three jobs, interrupted in the first."""
    folder = tmp_path_factory.mktemp("interrupted") / "a sweep"
    with started(folder, store) as process:
        wait_for_epochs(process, {"2"})
        err = interrupt(process, whole_group=True)
    return folder, err


@pytest.fixture
def stopped(interrupted, tmp_path):
    """A copy of it, to be continued; a moved sweep is the same sweep."""
    return shutil.copytree(interrupted[0], tmp_path / "copied sweep")


def test_an_interrupted_sweep_is_one_line_and_says_how_to_go_on(interrupted):
    folder, err = interrupted
    (line,) = err.splitlines()
    assert line == (
        "ekd-train: interrupted: 0 of 3 runs done, 1 stopped, 2 not started; to continue: ekd-train resume='a sweep'"
    )
    assert states(folder) == ["interrupted", "absent", "absent"]
    assert not (folder / "0" / "result.json").exists()


def test_a_continued_sweep_resumes_and_starts_what_is_left(stopped):
    (stopped / "2").mkdir()
    outcome = resumed(stopped)
    assert outcome.code == 0, outcome.err
    assert states(stopped) == ["done"] * 3
    assert "0 of 3 runs are done; 3 to be run, 1 of them from their last checkpoint" in outcome.out
    assert "3 of 3 runs done, 0 failed" in outcome.out
    seeds = [json.loads((stopped / str(n) / "result.json").read_text())["seed"] for n in range(3)]
    assert seeds == [0, 1, 2]
    first = json.loads((stopped / "0" / "provenance.json").read_text())
    assert len(first["resumed"]) == 1
    stamps = [(stopped / str(n) / "result.json").stat().st_mtime_ns for n in range(3)]
    again = resumed(stopped)
    assert again.code == 0
    assert "3 of 3 runs are done; 0 to be run" in again.out
    assert [(stopped / str(n) / "result.json").stat().st_mtime_ns for n in range(3)] == stamps


def test_a_failed_job_is_tried_again_and_a_done_one_is_not(stopped):
    (stopped / "1").mkdir()
    error = {"state": "failed", "error": "the disk was full", "time": "2100-01-01T00:00:00+00:00"}
    (stopped / "1" / "status.json").write_text(json.dumps(error))
    done = {"state": "done", "error": None, "time": "2100-01-01T00:00:00+00:00"}
    (stopped / "2").mkdir()
    (stopped / "2" / "status.json").write_text(json.dumps(done))
    result = {"method": "ce", "data": "digits", "seed": 2, "fraction": 0.1, "test_accuracy": 0.5}
    (stopped / "2" / "result.json").write_text(json.dumps(result))
    outcome = resumed(stopped, "-m")
    assert outcome.code == 0, outcome.err
    assert "1 of 3 runs are done; 2 to be run, 1 of them" in outcome.out
    assert states(stopped) == ["done"] * 3
    assert json.loads((stopped / "1" / "result.json").read_text())["seed"] == 1
    assert json.loads((stopped / "2" / "result.json").read_text()) == result


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["seed=7"], ["seed=7", "keeps its settings"]),
        (["--cfg", "job"], ["--cfg"]),
        (["hydra/launcher=procesess"], ["hydra/launcher", "procesess", "did you mean 'processes'"]),
    ],
)
def test_what_a_continued_sweep_does_not_take(stopped, words, named):
    outcome = call_train(f"resume={stopped}", *words, directory=stopped)
    assert outcome.code == 2
    (line,) = outcome.err.splitlines()
    assert [part for part in named if part not in line] == [], line
    assert states(stopped) == ["interrupted", "absent", "absent"]


def test_a_sweep_is_not_continued_while_it_runs(stopped):
    from ekd_lightning.runs.lock import DirectoryLock

    with DirectoryLock(stopped):
        outcome = resumed(stopped)
    assert outcome.code == 2
    assert "in use by process" in outcome.err


def test_two_sweeps_do_not_share_a_folder(store, tmp_path):
    from ekd_lightning.runs.lock import DirectoryLock

    folder = tmp_path / "sweep"
    folder.mkdir()
    with DirectoryLock(folder):
        outcome = call_train(
            "-m", *TINY, *LONG, f"teachers.store={store}", f"hydra.sweep.dir={folder}", directory=folder
        )
    assert outcome.code == 2
    (line,) = outcome.err.splitlines()
    assert "another sweep is running in this folder" in line
    assert not list(folder.rglob("status.json"))
    assert not (folder / "sweep.json").exists()


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda folder: folder.mkdir(), "not the directory of a run"),
        (lambda folder: (folder.mkdir(), (folder / "multirun.yaml").touch()), "has no plan"),
        (lambda folder: (folder.mkdir(), (folder / "sweep.json").write_text("{")), "sweep.json: damaged"),
    ],
)
def test_a_folder_that_is_no_sweep(tmp_path, make, named):
    make(tmp_path / "x")
    outcome = call_train(f"resume={tmp_path / 'x'}", directory=tmp_path / "x")
    assert outcome.code == 2
    (line,) = outcome.err.splitlines()
    assert named in line


@pytest.mark.slow
@pytest.mark.parametrize("whole_group", [True, False])
def test_jobs_of_joblib_end_with_the_sweep(store, tmp_path, whole_group):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    folder = tmp_path / "sweep"
    with started(folder, store, "hydra/launcher=parallel") as process:
        wait_for_epochs(process, {"2"})
        err = interrupt(process, whole_group=whole_group)
    (line,) = err.splitlines()
    assert line.startswith("ekd-train: interrupted: 0 of 3 runs done, ")
    assert "running" not in states(folder)
    assert "interrupted" in states(folder)
    outcome = resumed(folder, "hydra/launcher=basic")
    assert outcome.code == 0, outcome.err
    assert states(folder) == ["done"] * 3


@pytest.mark.slow
def test_jobs_in_processes_of_their_own_end_with_the_sweep(store, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    folder = tmp_path / "sweep"
    with started(folder, store, "hydra/launcher=processes") as process:
        first = folder / "0" / "status.json"
        follow_until_running(process, first)
        err = interrupt(process, whole_group=False)
    assert err.splitlines()[-1].startswith("ekd-train: interrupted: 0 of 3 runs done, ")
    assert "running" not in states(folder)


def follow_until_running(process: subprocess.Popen, path: Path) -> None:
    """Waits until a job of another process has its record, or the sweep has ended."""
    while process.poll() is None and not path.is_file():
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.1)


@pytest.mark.slow
def test_a_sweep_through_processes_of_their_own(store, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    folder = tmp_path / "sweep"
    few = ("method=branched_ce", "student.branches=2,0", "hydra/launcher=processes")
    own = (f"teachers.store={store}", f"hydra.sweep.dir={folder}")
    outcome = call_train("-m", *TINY, *few, *own, directory=folder)
    assert outcome.code == 2
    assert [json.loads((folder / n / "status.json").read_text())["state"] for n in "01"] == ["done", "failed"]
    lines = [line for line in outcome.out.splitlines() if line.startswith("sweep ")]
    assert len(lines) == 2
    assert lines[1].startswith("sweep 2/2 ")
    assert "1 of 2 runs done, 1 failed" in outcome.out
    assert outcome.err.splitlines()[-1] == "ekd-train: error: student.branches=0: must be at least 1"


@pytest.mark.slow
def test_a_study_through_processes_of_their_own(store, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    command = [sys.executable, "-m", "ekd_lightning.cli.compare", "--methods", "ce,ekd", "--no-controls"]
    command += ["--match", "none", "--seeds", "0", "--fractions", "0.1", "--output", str(tmp_path / "c")]
    command += [
        *(word for word in TINY if not word.startswith(("method=", "data.fraction"))),
        f"teachers.store={store}",
    ]
    command += ["hydra/launcher=processes", "hydra.sweeper.max_batch_size=1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
    assert {row["row"]: row["n"] for row in json.loads((tmp_path / "c" / "comparison.json").read_text())} == {
        "ce": 1,
        "ekd": 1,
    }
    assert sum(line.startswith("sweep ") for line in done.stdout.splitlines()) == 2
