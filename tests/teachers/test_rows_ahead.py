"""Rows of the next epoch, read in a thread while the present one trains: the same rows, and nothing waits for them."""

from __future__ import annotations

import os
import shutil
import threading

import pytest
import torch
from safetensors.torch import load_file
from tutors import N, V, gather, make_batch, same, tabled, tutors

from ekd_lightning.networks import TeacherEnsemble
from ekd_lightning.teachers import rows
from ekd_lightning.teachers.rows import StoredRows
from ekd_lightning.teachers.table import TeacherTable
from ekd_lightning.teachers.tabled import TabledTeachers
from ekd_lightning.training.distiller import Distiller


@pytest.fixture
def ensemble() -> TeacherEnsemble:
    return tutors("resnet8", "resnet8")


@pytest.fixture
def readers(monkeypatch) -> list[str]:
    """The threads in which rows were read."""
    names: list[str] = []
    genuine = TeacherTable.read

    def read(self, index, view):
        names.append(threading.current_thread().name.split("_")[0])
        return genuine(self, index, view)

    monkeypatch.setattr(TeacherTable, "read", read)
    return names


def epochs() -> list[torch.Tensor]:
    index = torch.arange(N)
    return [index % V, index % 5, (index * 7) % V]


def three_epochs(source, *, ahead: bool, stages=()) -> list:
    """What three epochs are told, each of which hears of the next one where `ahead`."""
    index, views, found = torch.arange(N), epochs(), []
    for number, view in enumerate(views):
        source.prepare_epoch(index, view, gather, {stages: N})
        if ahead and number + 1 < len(views):
            source.prefetch_epoch(index, views[number + 1], {stages: N})
        found.append(source.outputs(make_batch(index.tolist(), view.tolist()), stages))
    source.flush()
    return found


@pytest.mark.parametrize("memory", [300_000, 1 << 30])
@pytest.mark.parametrize("stages", [(), ("stage3",)])
@pytest.mark.parametrize("known", [0, 1, 3])
def test_rows_that_are_read_ahead_are_the_rows(ensemble, tmp_path, monkeypatch, readers, memory, stages, known):
    """With room for one view of each image and for all; of a table in which some epochs are known already."""
    table = {"keep_stages": stages}
    for view in epochs()[:known]:
        filling = tabled(ensemble, tmp_path / "ahead", **table)
        filling.prepare_epoch(torch.arange(N), view, gather, {stages: N})
        filling.flush()
    shutil.copytree(tmp_path / "ahead", tmp_path / "behind") if known else None
    monkeypatch.setitem(rows.HELD_BYTES, "cpu", memory)
    behind = tabled(ensemble, tmp_path / "behind", **table)
    expected = three_epochs(behind, ahead=False, stages=stages)
    readers.clear()
    source = tabled(ensemble, tmp_path / "ahead", **table)
    assert all(map(same, three_epochs(source, ahead=True, stages=stages), expected))
    assert (source.hits, source.misses, source.held_bytes) == (behind.hits, behind.misses, behind.held_bytes)
    tables = 2 * (1 + len(stages))
    assert readers.count("teacher-rows") == 2 * tables
    if known == 3:  # then the steps wait for the first epoch's alone
        assert readers.count("MainThread") == tables


def test_rows_that_are_held_are_not_read_ahead(ensemble, tmp_path, readers):
    for planned in (0, N * V):
        source = tabled(ensemble, tmp_path)
        source.plan(planned)
        for view in epochs():
            source.prepare_epoch(torch.arange(N), view, gather, {(): N})
        source.flush()
        readers.clear()
        for view in epochs():
            source.prefetch_epoch(torch.arange(N), view, {(): N})
        assert readers == []


def test_more_rows_than_the_memory_may_hold_are_not_read_ahead(ensemble, tmp_path, monkeypatch, readers):
    source = tabled(ensemble, tmp_path)
    source.prepare_epoch(torch.arange(N), epochs()[0], gather, {(): N})
    monkeypatch.setitem(rows.HELD_BYTES, "cpu", 1000)
    readers.clear()
    source.prefetch_epoch(torch.arange(N), epochs()[1], {(): N})
    assert readers == []


def test_a_table_that_is_cut_while_it_is_read_ahead_costs_one_warning(ensemble, tmp_path):
    expected = three_epochs(tabled(ensemble, tmp_path / "whole"), ahead=False)
    three_epochs(tabled(ensemble, tmp_path / "cut"), ahead=False)
    source, index, (first, second, _) = tabled(ensemble, tmp_path / "cut"), torch.arange(N), epochs()
    source.prepare_epoch(index, first, gather, {(): N})
    for path in (tmp_path / "cut").glob("*.rows"):
        os.truncate(path, 0)

    def next_epoch():
        source.prefetch_epoch(index, second, {(): N})
        source.prepare_epoch(index, second, gather, {(): N})

    with pytest.warns(RuntimeWarning, match="cut short") as caught:
        next_epoch()
    assert len(caught) == 1
    assert same(source.outputs(make_batch(index.tolist(), second.tolist())), expected[1])


def test_an_error_of_the_thread_reaches_the_training(ensemble, tmp_path, monkeypatch):
    source, index = tabled(ensemble, tmp_path), torch.arange(N)
    source.prepare_epoch(index, index % V, gather, {(): N})
    monkeypatch.setattr(TeacherTable, "read", lambda *_: 1 / 0)
    source.prefetch_epoch(index, index % 5, {(): N})
    with pytest.raises(ZeroDivisionError):
        source.prepare_epoch(index, index % 5, gather, {(): N})


def test_a_run_reads_ahead_and_ends_alike(train, tmp_path, monkeypatch):
    """Every epoch but the first finds its rows read; what is never asked for is not waited for."""
    read, expected = [], []
    genuine, expect = StoredRows.read_all, TabledTeachers.prefetch_epoch

    def read_all(self, index, view, stages):
        read.append((threading.current_thread().name.split("_")[0], len(index)))
        return genuine(self, index, view, stages)

    monkeypatch.setattr(StoredRows, "read_all", read_all)
    monkeypatch.setattr(TabledTeachers, "prefetch_epoch", lambda self, *asked: expected.append(asked))
    words = ("recipe.epochs=3", "teachers.pool=[{train: resnet8, options: {width: 0.5}, seed: 0}]")
    assert train(tmp_path / "first", *words).code == 0
    assert len(expected) == 2
    read.clear()
    behind = train(tmp_path / "behind", *words)
    assert [name for name, _ in read] == ["MainThread"] * 3
    monkeypatch.setattr(TabledTeachers, "prefetch_epoch", expect)
    read.clear()
    ahead = train(tmp_path / "ahead", *words)
    assert [name for name, _ in read] == ["MainThread", "teacher-rows", "teacher-rows"]
    assert ahead.result["teacher_table_hit_rate"] == behind.result["teacher_table_hit_rate"] == 1.0
    ours, theirs = (load_file(run.directory / "student.safetensors") for run in (ahead, behind))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("error", [SystemError, KeyboardInterrupt])
def test_a_run_that_ends_early_does_not_wait_for_what_is_read_ahead(train, tmp_path, monkeypatch, error):
    may_read, genuine, losses = threading.Event(), StoredRows.read_all, Distiller.losses
    steps = []

    def read_all(self, *rows):
        if threading.current_thread() is not threading.main_thread():
            may_read.wait(60)
        return genuine(self, *rows)

    def third_fails(self, *batch):
        steps.append(batch)
        if len(steps) == 3:
            raise error
        return losses(self, *batch)

    words = ("recipe.epochs=2", "teachers.pool=[{train: resnet8, options: {width: 0.5}, seed: 0}]")
    assert train(tmp_path / "first", *words).code == 0
    monkeypatch.setattr(StoredRows, "read_all", read_all)
    monkeypatch.setattr(Distiller, "losses", third_fails)
    assert train(tmp_path / "run", *words).code != 0
    assert not may_read.is_set()
    may_read.set()


def test_repeats_that_only_later_epochs_show(ensemble, tmp_path, monkeypatch):
    """As with several passes in an epoch of many processes: one of them may see an image twice later on."""
    monkeypatch.setitem(rows.HELD_BYTES, "cpu", 0)  # room for one view of each image
    source = tabled(ensemble, tmp_path)
    source.plan(2 * N, repeats=True)
    first, twice, view = torch.arange(N), torch.arange(N) % 10, torch.arange(N) // 10
    source.prepare_epoch(first, first % V, gather, {(): N})
    source.prepare_epoch(twice, view, gather, {(): N})
    found = source.outputs(make_batch(twice.tolist(), view.tolist()))
    assert found.logits.isfinite().all()
    assert same(found, tabled(ensemble, tmp_path).outputs(make_batch(twice.tolist(), view.tolist())))
