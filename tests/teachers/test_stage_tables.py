"""Stage outputs of teachers: kept in tables of their own where a run asks for it."""

from __future__ import annotations

import json
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from tutors import PLAIN, VIEWS, N, gather, make_batch, same, tutors
from tutors import tabled as plain_tabled

from ekd_lightning.networks import TeacherEnsemble
from ekd_lightning.networks.staged import on_grid, stage_and_grid
from ekd_lightning.pipeline.prepare import prepare
from ekd_lightning.teachers import plan, rows
from ekd_lightning.teachers.plan import present_bytes, table_bytes
from ekd_lightning.teachers.source import LiveTeachers
from ekd_lightning.teachers.tabled import TabledTeachers

STAGES = ("stage2", "stage3")
FITNET = "+method.terms.feature_branch={weight: 1.0, feature: stage2}"
tabled = partial(plain_tabled, keep_stages=STAGES)


@pytest.fixture(scope="module")
def ensemble() -> TeacherEnsemble:
    return tutors("resnet8", "resnet14")


def test_cold_and_warm_are_the_live_outputs_rounded_to_float16(ensemble, tmp_path):
    batch = make_batch([3, 0, 3, 29], [1, 7, 1, 17])
    live = LiveTeachers(ensemble, PLAIN).outputs(batch, STAGES)
    cold, warm = tabled(ensemble, tmp_path), tabled(ensemble, tmp_path)
    first, second = cold.outputs(batch, STAGES), warm.outputs(batch, STAGES)
    assert same(first, second)
    assert (warm.hits, warm.misses) == (8, 0)
    for found, expected in zip(first.stages, live.stages, strict=True):
        assert set(found) == set(STAGES)
        for name in STAGES:
            torch.testing.assert_close(found[name], expected[name].half().float(), rtol=1e-3, atol=1e-3)
            assert found[name].shape == expected[name].shape
    torch.testing.assert_close(first.logits, live.logits, rtol=1e-3, atol=2e-3)


def test_a_part_of_the_stages_can_be_asked_for(ensemble, tmp_path):
    batch = make_batch([1, 2], [0, 1])
    found = tabled(ensemble, tmp_path).outputs(batch, ("stage3",))
    assert [set(stages) for stages in found.stages] == [{"stage3"}, {"stage3"}]


def test_outputs_too_large_for_the_memory_are_read_step_by_step(ensemble, tmp_path, monkeypatch):
    batch = make_batch([1, 2], [0, 1])
    expected = tabled(ensemble, tmp_path / "roomy")
    monkeypatch.setitem(rows.HELD_BYTES, "cpu", 1000)
    source = tabled(ensemble, tmp_path)
    for one in (expected, source):
        one.prepare_epoch(batch.index, batch.view, gather, {STAGES: 2})
    assert not source.captured(STAGES)
    with monkeypatch.context() as patch:
        patch.setitem(rows.HELD_BYTES, "cpu", 1 << 30)
        assert same(source.outputs(batch, STAGES), expected.outputs(batch, STAGES))
    assert (source.hits, source.misses) == (0, 4)


def test_an_epoch_ahead_computes_every_row_once(ensemble, tmp_path, monkeypatch):
    source = tabled(ensemble, tmp_path)
    index, view = torch.arange(N), torch.arange(N) % VIEWS.num_views
    asked = []
    frozen = source._live.frozen
    original = type(frozen(STAGES)).outputs

    def outputs(self, m, images, batch_size=None):
        asked.append(len(images))
        return original(self, m, images, batch_size)

    monkeypatch.setattr(type(frozen(STAGES)), "outputs", outputs)
    source.prepare_epoch(index, view, gather, {STAGES: 2})
    assert sum(asked) == 2 * N  # logits, pooled features and stages in one pass
    assert (source.hits, source.misses) == (0, 2 * N)
    batch = make_batch([4, 5], [4, 5])
    output = source.outputs(batch, STAGES)
    assert sum(asked) == 2 * N
    assert same(output, tabled(ensemble, tmp_path).outputs(batch, STAGES))


def test_tables_of_stages_and_of_logits_have_names_of_their_own(ensemble, tmp_path):
    tabled(ensemble, tmp_path)
    assert len(list(tmp_path.glob("*.rows"))) == 2 * (1 + len(STAGES))
    before = set(tmp_path.glob("*.rows"))
    plain_tabled(ensemble, tmp_path)
    assert set(tmp_path.glob("*.rows")) == before


def test_a_damaged_stage_row_is_computed_again(ensemble, tmp_path):
    batch = make_batch([2, 9], [3, 3])
    first = tabled(ensemble, tmp_path).outputs(batch, STAGES)
    for path in tmp_path.glob("*.rows"):
        blob = bytearray(path.read_bytes())
        blob[:] = bytes(b ^ 0xFF if b else 0 for b in blob)
        path.write_bytes(bytes(blob))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        assert same(tabled(ensemble, tmp_path).outputs(batch, STAGES), first)
    assert same(tabled(ensemble, tmp_path).outputs(batch, STAGES), first)


def test_a_run_keeps_stages_only_where_asked(train, tiny_settings, tmp_path):
    live = prepare(tiny_settings(FITNET), "cpu")
    assert not live.source.tables
    kept = prepare(tiny_settings(FITNET, "teachers.table_stages=true"), "cpu")
    assert kept.source.tables
    runs = [
        train(tmp_path / f"run{i}", FITNET, "teachers.table_stages=true", f"teachers.store={tmp_path / 's'}")
        for i in range(2)
    ]
    assert [run.code for run in runs] == [0, 0], runs[0].err
    assert [run.result["teacher_table_hit_rate"] for run in runs] == [0.0, 1.0]
    assert runs[0].result["test_nll"] == runs[1].result["test_nll"]


def test_a_method_that_needs_stages_for_a_while_reads_tables_afterwards(train, tmp_path):
    hint = "{weight: 1.0, feature: stage2, schedule: {linear: [[0, 1], [0.5, 1], [0.5, 0]]}}"
    words = (f"+method.terms.feature_branch={hint}", "method.terms.kd_branch.weight=1", "recipe.epochs=2")
    first, second = (train(tmp_path / f"run{i}", *words, f"teachers.store={tmp_path / 's'}") for i in range(2))
    assert (first.code, second.code) == (0, 0), first.err
    # 4 steps an epoch, none in tables in the first: two teachers × 128 images live, then 128 looked up.
    assert first.result["teacher_table_hit_rate"] < second.result["teacher_table_hit_rate"] == 0.5
    assert first.result["test_nll"] == second.result["test_nll"]


def test_kept_stages_are_made_ready_for_the_epoch_that_asks_for_them(train, tmp_path, monkeypatch):
    """An epoch finds its own rows, not those of the one before."""
    prepared = []

    def prepare_epoch(self, index, view, *rest):
        prepared.append(len(index))
        return whole(self, index, view, *rest)

    whole = TabledTeachers.prepare_epoch
    monkeypatch.setattr(TabledTeachers, "prepare_epoch", prepare_epoch)
    late = "{weight: 1.0, feature: stage2, schedule: {linear: [[0, 0], [0.5, 0], [0.5, 1]]}}"
    words = (f"+method.terms.feature_branch={late}", "method.terms.kd_branch.weight=1", "recipe.epochs=2")
    run = train(tmp_path / "run", *words, "teachers.table_stages=true", f"teachers.store={tmp_path / 's'}")
    assert run.code == 0, run.err
    assert prepared == [128, 128]


def test_only_tables_of_the_same_images_and_views_count_as_present(ensemble, tmp_path):
    batch = make_batch([2, 9], [3, 3])
    tabled(ensemble, tmp_path).outputs(batch, STAGES)
    tabled(ensemble, tmp_path, image_sets=[("c" * 64, N)]).outputs(batch, STAGES)
    assert present_bytes(tmp_path, "d" * 64, VIEWS.key, 2) == 0
    assert present_bytes(tmp_path, "b" * 64, "another", 2) == 0
    own = {
        path: json.loads(path.with_suffix(".json").read_text())["content"].removeprefix("logits+pooled")
        for path in tmp_path.glob("*.rows")
        if '"' + "b" * 64 + '"' in path.with_suffix(".json").read_text()
    }
    blocks = {path: path.stat().st_blocks * 512 for path in own}
    ordinary = sum(size for path, size in blocks.items() if not own[path])
    assert present_bytes(tmp_path, "b" * 64, VIEWS.key, 2) == ordinary > 0
    assert present_bytes(tmp_path, "b" * 64, VIEWS.key, 2, STAGES) == sum(blocks.values()) > ordinary
    smallest = min(size for path, size in blocks.items() if not own[path])
    assert present_bytes(tmp_path, "b" * 64, VIEWS.key, 1) == smallest
    (tmp_path / "broken.json").write_text("{")
    assert present_bytes(tmp_path, "b" * 64, VIEWS.key, 100, STAGES) == sum(blocks.values())


def test_rows_that_are_known_stay_as_they_are_when_stages_are_added(ensemble, tmp_path):
    batch = make_batch([4, 5], [4, 5])
    first = plain_tabled(ensemble, tmp_path).outputs(batch)
    before = {path: path.read_bytes() for path in tmp_path.glob("*.rows")}
    source = tabled(ensemble, tmp_path)
    source.prepare_epoch(batch.index, batch.view, gather, {STAGES: 2})
    source.flush()
    assert {path: path.read_bytes() for path in before} == before
    assert torch.equal(source.outputs(batch, STAGES).logits, first.logits)


def cell_means(maps, grid):
    """Adaptive average pooling as it is defined: cell i holds rows floor(i·H / grid) up to ceil((i + 1)·H / grid)."""
    H, W = maps.shape[2:]
    cells = np.empty((*maps.shape[:2], grid, grid))
    for i in range(grid):
        for j in range(grid):
            rows, columns = (slice(n * side // grid, -(-(n + 1) * side // grid)) for n, side in ((i, H), (j, W)))
            cells[:, :, i, j] = maps[:, :, rows, columns].mean((2, 3))
    return cells


@pytest.mark.parametrize("grid", [1, 2, 3])
def test_grid_columns_are_the_means_of_the_maps_cells(ensemble, tmp_path, grid):
    batch = make_batch([3, 0, 3, 29], [1, 7, 1, 17])
    names = tuple(on_grid(stage, grid) for stage in ("stage1", "stage2"))  # maps of 8 × 8 and 4 × 4
    assert [stage_and_grid(name) for name in names] == [("stage1", grid), ("stage2", grid)]
    live = LiveTeachers(ensemble, PLAIN).outputs(batch, names)
    source = plain_tabled(ensemble, tmp_path, keep_stages=names)
    kept, plain = source.outputs(batch, names), ensemble(batch.images, names)
    for m, member in enumerate(ensemble.members):
        maps = member.outputs(batch.images).stages
        for name in names:
            expected = cell_means(maps[stage_and_grid(name)[0]].double().numpy(), grid)
            for found, rounding in ((live, 1e-5), (plain, 1e-6), (kept, 2**-11)):
                np.testing.assert_allclose(found.stages[m][name].numpy(), expected, rtol=rounding, atol=1e-5)
    source.flush()
    written = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    widths = {one["content"]: one["width"] for one in written if "width" in one}
    assert widths == {names[0]: 16 * grid**2, names[1]: 32 * grid**2}


def test_a_stage_and_its_grids_can_be_asked_for_in_any_order(ensemble):
    batch, names = make_batch([1, 2], [0, 1]), ("stage3", "stage2.2x2", "stage1.4x4", "stage2")
    found = LiveTeachers(ensemble, PLAIN).outputs(batch, names)
    for m, member in enumerate(ensemble.members):
        maps = member.outputs(batch.images).stages
        assert [tuple(found.stages[m][name].shape[1:]) for name in names] == [
            (64, 2, 2), (32, 2, 2), (16, 4, 4), (32, 4, 4)
        ]  # fmt: skip
        torch.testing.assert_close(found.stages[m]["stage2"], maps["stage2"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("width", "used", "blocks"), [(16, 3, 3), (256, 3, 6), (16, 500, 3), (4096, 3, 9), (4094, 3, 6)]
)
def test_bound_of_rows_asked_for_one_by_one(width, used, blocks):
    """Rows of 36, 516, 8196 and 8192 bytes: in how many blocks one may lie, and all of an image's together."""
    assert table_bytes(10, 162, (("stage2.2x2", width),), used_views=used) == 10 * blocks * 4096


GRID = "+method.terms.feature_branch={weight: 1.0, feature: stage2, grid: 2}"


def test_a_run_reads_grids_from_tables_and_trains_as_from_live_teachers(train, tiny_settings, tmp_path):
    kept = prepare(tiny_settings(GRID), "cpu")
    assert (kept.source.tables, kept.source.stages) == (True, ("stage2.2x2",))
    store = f"teachers.store={tmp_path / 's'}"
    first, second = (train(tmp_path / f"run{i}", GRID, store) for i in range(2))
    live = train(tmp_path / "live", GRID, store, "teachers.table=off")
    assert [run.code for run in (first, second, live)] == [0, 0, 0], first.err
    assert [run.result["teacher_table_hit_rate"] for run in (first, second)] == [0.0, 1.0]
    assert first.result["test_nll"] == second.result["test_nll"] == pytest.approx(live.result["test_nll"], rel=1e-2)


@pytest.mark.parametrize(
    ("words", "all_views"), [(("data.unlabelled=rest", "data.epoch=unlabelled"), True), ((), False)]
)
def test_all_views_may_be_needed_where_an_epoch_contains_several_of_an_image(
    tiny_settings, monkeypatch, words, all_views
):
    bounds = []
    monkeypatch.setattr(plan, "check_disk", lambda folder, needed, *_: bounds.append(needed))
    for epochs in (1, 99):
        few = ("data.fraction=0.1", "recipe.batch_size=16", f"recipe.epochs={epochs}")
        prepare(tiny_settings(GRID.replace("grid: 2", "grid: 4"), *few, *words), "cpu")
    assert (bounds[0] == bounds[1]) == all_views


def test_whole_maps_beside_a_grid_leave_the_teachers_live(tiny_settings):
    both = prepare(tiny_settings(GRID, "+method.terms.maps={type: feature_branch, weight: 1.0, feature: last}"), "cpu")
    assert not both.source.tables
