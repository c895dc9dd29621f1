"""Limits of the machine: memory, the size of a file, a full disk. One line says which, and nothing is lost."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pytorch_lightning import Callback
from whole_runs import Outcome, _call

from ekd_lightning.cli import evaluate, export
from ekd_lightning.pipeline import evaluation
from ekd_lightning.pipeline import run as pipeline_run
from ekd_lightning.runs.collection import collect
from ekd_lightning.runs.directory import RunDirectory

FEW = ("method=branched_ce", "student.branches=2")


def tree(directory: Path) -> dict[str, bytes]:
    """Content of every file but the lock of evaluations, which stays."""
    files = [path for path in directory.rglob("*") if path.is_file() and path.name != ".evaluation.lock"]
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


def on_host() -> None:
    torch.empty(1 << 55, dtype=torch.uint8)


def on_card() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1 GiB")


def in_python() -> None:
    raise MemoryError


@pytest.mark.parametrize("allocate", [on_host, on_card, in_python])
def test_a_run_that_is_out_of_memory_failed_and_says_so(train, tmp_path, monkeypatch, allocate):
    class Greedy(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            allocate()

    build = pipeline_run.build_trainer

    def greedy(flags, directory, loggers, callbacks, **others):
        return build(flags, directory, loggers, [*callbacks, Greedy()], **others)

    monkeypatch.setattr(pipeline_run, "build_trainer", greedy)
    outcome = train(tmp_path / "run", *FEW)
    assert outcome.code == 2
    (line,) = outcome.err.splitlines()
    assert line.startswith("ekd-train: error: out of memory (")
    (found,) = collect([tmp_path]).runs
    assert (found.state, found.result) == ("failed", None)
    assert f"ekd-train: error: {found.error}" == line


def test_an_evaluation_that_is_out_of_memory_failed_and_says_so(train, run, tmp_path, monkeypatch):
    monkeypatch.setitem(evaluation.PARTS, "efficiency", lambda _: on_host())
    before = tree(run)
    outcome = _call(evaluate.main, ["ekd-evaluate", str(run), "--parts", "efficiency"], run)
    assert outcome.code == 1
    assert "efficiency: out of memory (" in outcome.err
    assert "Traceback" not in outcome.err
    assert tree(run) == before
    after = train(tmp_path / "again", *FEW, "evaluation.parts=[efficiency,generalisation]")
    assert after.code == 0
    assert after.result["evaluation_error"].startswith("efficiency: out of memory (")
    assert after.result["evaluated"] == ["generalisation"]


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """As `ulimit -f` has it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", full)
        yield


def assert_named(outcome: Outcome, path: Path, why: str, code: int = 2) -> None:
    assert outcome.code == code, outcome.err
    assert "Traceback" not in outcome.err
    (line,) = [line for line in outcome.err.splitlines() if "error:" in line]
    assert f"{path}: cannot be written ({why}" in line


def test_a_run_whose_files_may_not_be_so_large_says_which(train, tmp_path):
    with largest_file(60_000):
        outcome = train(tmp_path / "run", *FEW)
    assert outcome.code == 2, outcome.err
    (line,) = outcome.err.splitlines()
    assert f"{tmp_path / 'run' / 'checkpoints'}/" in line
    assert "cannot be written (File too large)" in line
    record = RunDirectory(tmp_path / "run").record()
    assert (record.state, record.result) == ("failed", None)
    assert f"ekd-train: error: {record.error}" == line
    assert not [path for path in (tmp_path / "run").rglob("*") if path.name.startswith(".part-")]


@pytest.mark.parametrize(("limit", "why"), [(largest_file(2_000), "File too large"), (full_disk(), "No space left")])
def test_findings_that_cannot_be_written_leave_the_record_as_it_was(run, limit, why):
    before = tree(run)
    with limit:
        outcome = _call(evaluate.main, ["ekd-evaluate", str(run), "--parts", "generalisation"], run)
    assert_named(outcome, run / "result.json", why, code=1)
    assert tree(run) == before


@pytest.mark.parametrize(("limit", "why"), [(largest_file(60_000), "File too large"), (full_disk(), "No space left")])
def test_an_export_that_cannot_be_written_leaves_nothing(run, limit, why):
    before = tree(run)
    with limit:
        outcome = _call(export.main, ["ekd-export", str(run)], run)
    assert_named(outcome, run / "export" / "student.safetensors", why)
    assert tree(run) == before
    assert not (run / "export").exists()


def test_a_directory_that_may_not_be_written_is_named(run, monkeypatch):
    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    genuine = os.open
    monkeypatch.setattr(
        os,
        "open",
        lambda path, flags, *more, **words: (
            refused() if flags & os.O_CREAT and str(path).startswith(str(run)) else genuine(path, flags, *more, **words)
        ),
    )
    outcome = _call(evaluate.main, ["ekd-evaluate", str(run), "--parts", "generalisation"], run)
    assert_named(outcome, run, "Read-only file system", code=1)
