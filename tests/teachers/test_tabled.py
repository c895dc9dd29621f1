"""Tabled teachers: the same answers as live ones, batch by batch or an epoch ahead."""

from __future__ import annotations

import errno
import os
import threading
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from tutors import PLAIN, C, N, V, gather, make_batch, same, tabled, tutors

from ekd_lightning.data.loader import Batch
from ekd_lightning.errors import UserError
from ekd_lightning.networks import NetworkSpec, TeacherEnsemble, TeacherIdentity, build_network, normalization
from ekd_lightning.teachers import rows
from ekd_lightning.teachers import source as frozen_teachers
from ekd_lightning.teachers.source import FrozenTeachers, LiveTeachers, TeacherFormat
from ekd_lightning.teachers.table import TeacherTable


@pytest.fixture
def ensemble() -> TeacherEnsemble:
    return tutors("resnet8", "resnet8")


def test_cold_and_warm_are_bit_identical_and_counted(ensemble, tmp_path):
    cold, batch = tabled(ensemble, tmp_path), make_batch([1, 5, 1, 39], [0, 17, 3, 2])
    assert cold.hit_rate is None
    first = cold.outputs(batch)
    assert (cold.hits, cold.misses, cold.hit_rate) == (0, 8, 0.0)
    assert same(first, cold.outputs(batch))
    assert (cold.hits, cold.misses, cold.hit_rate) == (8, 8, 0.5)
    warm = tabled(ensemble, tmp_path)
    assert same(first, warm.outputs(batch))
    assert (warm.hits, warm.misses, warm.hit_rate) == (8, 0, 1.0)
    assert min(warm._stored.disk_bytes()) > 0


def test_rows_agree_with_live_teachers_up_to_float16(ensemble, tmp_path):
    batch = make_batch(list(range(20)), [i % V for i in range(20)])
    live, known = LiveTeachers(ensemble, PLAIN).outputs(batch), tabled(ensemble, tmp_path).outputs(batch)
    assert live.logits.shape == known.logits.shape == (2, 20, C)
    assert known.logits.dtype == torch.float32
    assert [p.shape for p in known.pooled] == [p.shape for p in live.pooled]
    assert known.stages == ({}, {})
    torch.testing.assert_close(known.logits, live.logits, rtol=1e-3, atol=1e-4)
    for a, b in zip(known.pooled, live.pooled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert torch.equal(known.logits, known.logits.half().float())


@pytest.mark.parametrize("include_pooled", [False, True])
def test_a_teacher_without_a_linear_end_has_tables(tmp_path, include_pooled):
    layers = torch.nn.Sequential(torch.nn.Conv2d(3, C, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    ensemble = TeacherEnsemble([layers, tutors("resnet8").members[0]], normalization="unit", num_classes=C)
    batch = make_batch([3, 1], [0, 5])
    cold = tabled(ensemble, tmp_path, include_pooled=include_pooled)
    found, live = cold.outputs(batch), LiveTeachers(ensemble, PLAIN).outputs(batch)
    cold.flush()
    torch.testing.assert_close(found.logits, live.logits, rtol=1e-3, atol=1e-4)
    for known, own in zip(found.pooled, live.pooled if include_pooled else (), strict=True):
        torch.testing.assert_close(known, own, rtol=1e-3, atol=1e-4)
    warm = tabled(ensemble, tmp_path, include_pooled=include_pooled)
    assert same(warm.outputs(batch), found)
    assert warm.misses == 0


def test_two_image_sets_have_tables_of_their_own(ensemble, tmp_path):
    """Rows of either set are those of a table of it alone, whatever the other one is; and serve such a table."""
    shown = make_batch([3, 30, 7, 39, 3], [0, 17, 5, 2, 1])
    reference = tabled(ensemble, tmp_path / "one").outputs(shown)
    joined = tabled(ensemble, tmp_path / "two", image_sets=[("b" * 64, 25), ("c" * 64, 15)])
    assert same(joined.outputs(shown), reference)
    joined.prepare_epoch(shown.index, shown.view, gather, {(): 5})
    assert same(joined.outputs(shown), reference)
    assert joined.misses == 2 * 5
    second = make_batch([30, 39], [17, 2])._replace(index=torch.tensor([5, 14]))
    alone = tabled(ensemble, tmp_path / "two", image_sets=[("c" * 64, 15)])
    answers = alone.outputs(second)
    assert (alone.hits, alone.misses) == (4, 0)
    assert torch.equal(answers.logits, reference.logits[:, [1, 3]])
    with pytest.raises(IndexError):
        joined.outputs(make_batch([3], [0])._replace(index=torch.tensor([40])))


def test_an_epoch_with_several_views_of_an_image(ensemble, tmp_path, monkeypatch):
    """Where memory holds one view of each image, rows are read batch by batch; the answers are the same."""
    shown = make_batch([3, 3, 7], [0, 4, 5])
    roomy = tabled(ensemble, tmp_path)
    roomy.prepare_epoch(shown.index, shown.view, gather, {(): 3})
    assert roomy.captured()
    monkeypatch.setattr("ekd_lightning.teachers.rows.memory_for_rows", lambda device: 0)
    narrow = tabled(ensemble, tmp_path)
    narrow.prepare_epoch(shown.index, shown.view, gather, {(): 3})
    assert same(narrow.outputs(shown), roomy.outputs(shown))
    assert not narrow.captured()


@pytest.fixture
def asked(monkeypatch) -> list[tuple[int, int]]:
    """(teacher, number of images) of every question to a teacher."""
    questions = []
    genuine = FrozenTeachers.outputs

    def outputs(self, m, images, *rest):
        questions.append((m, len(images)))
        return genuine(self, m, images, *rest)

    monkeypatch.setattr(FrozenTeachers, "outputs", outputs)
    return questions


def test_only_missing_images_pass_through_a_teacher(ensemble, tmp_path, asked):
    source = tabled(ensemble, tmp_path)
    source.outputs(make_batch([0, 1, 2], [0, 0, 0]))
    mixed = source.outputs(make_batch([2, 3, 0, 3], [0, 1, 0, 1]))
    assert asked == [(0, 3), (1, 3), (0, 1), (1, 1)]  # the repeated image is computed once
    assert torch.equal(mixed.logits[:, 1], mixed.logits[:, 3])
    assert same(mixed, source.outputs(make_batch([2, 3, 0, 3], [0, 1, 0, 1])))
    assert len(asked) == 4


def test_without_pooled_there_are_none(ensemble, tmp_path):
    source, batch = tabled(ensemble, tmp_path, include_pooled=False), make_batch([1], [1])
    for _ in range(2):
        assert source.outputs(batch).pooled == ()


def test_another_image_set_or_format_shares_nothing(ensemble, tmp_path):
    batch = make_batch([1, 2], [0, 1])
    tabled(ensemble, tmp_path).outputs(batch)
    for change in ({"image_sets": [("c" * 64, N)]}, {"how": TeacherFormat(precision="bfloat16")}):
        other = tabled(ensemble, tmp_path, **change)
        other.outputs(batch)
        assert other.hits == 0


def test_the_students_autocast_does_not_reach_the_teachers(ensemble, tmp_path):
    batch = make_batch([1, 2, 3], [0, 1, 2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = tabled(ensemble, tmp_path / "a").outputs(batch)
        live = LiveTeachers(ensemble, PLAIN).outputs(batch)
    assert same(inside, tabled(ensemble, tmp_path / "b").outputs(batch))
    assert torch.equal(live.logits, LiveTeachers(ensemble, PLAIN).outputs(batch).logits)


def test_stages_without_a_table_come_from_live_teachers(ensemble, tmp_path):
    source, batch = tabled(ensemble, tmp_path), make_batch([1, 2], [0, 1])
    output, live = source.outputs(batch, ("stage2",)), LiveTeachers(ensemble, PLAIN).outputs(batch, ("stage2",))
    for found, expected in zip(output.stages, live.stages, strict=True):
        assert set(found) == {"stage2"}
        assert torch.equal(found["stage2"], expected["stage2"])
    assert source.hit_rate == 0.0


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("stages", [(), ("stage2",)])
def test_an_unwritable_folder_costs_one_warning(ensemble, tmp_path, ahead, stages):
    (tmp_path / "file").write_text("not a folder")
    batch = make_batch([1, 2], [0, 1])
    with pytest.warns(RuntimeWarning, match="teachers run live") as caught:
        source = tabled(ensemble, tmp_path / "file" / "tables", keep_stages=stages)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if ahead:
            source.prepare_epoch(batch.index, batch.view, gather, {stages: 2})
        results = [source.outputs(batch, stages) for _ in range(2)]
    assert same(results[0], results[1])
    assert same(results[0], tabled(ensemble, tmp_path / "tables", keep_stages=stages).outputs(batch, stages))
    assert (source.hits, source.misses) == (0, 4 if ahead else 8)


@pytest.fixture
def full_disk(monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    return lambda: monkeypatch.setattr(os, "pwrite", full)


def test_a_full_disk_costs_one_warning_and_known_rows_stay(ensemble, tmp_path, full_disk):
    source, known, unknown = tabled(ensemble, tmp_path), make_batch([1], [0]), make_batch([2], [0])
    source.outputs(known)
    full_disk()
    with pytest.warns(RuntimeWarning, match="No space left") as caught:
        results = [source.outputs(unknown) for _ in range(2)]
    assert len(caught) == 1
    assert same(results[0], results[1])
    hits = source.hits
    source.outputs(known)
    assert source.hits == hits + 2


def test_a_table_cut_short_during_the_run_costs_one_warning(ensemble, tmp_path):
    source, batch = tabled(ensemble, tmp_path), make_batch([1, 2], [0, 1])
    first = source.outputs(batch)
    for path in tmp_path.glob("*.rows"):
        os.truncate(path, 0)
    with pytest.warns(RuntimeWarning, match="cut short") as caught:
        again = source.outputs(batch)
    assert len(caught) == 1
    assert same(first, again)


def test_a_teacher_that_is_not_finite_is_named(ensemble, tmp_path):
    with torch.no_grad():
        ensemble.members[1].head.bias[0] = float("nan")
    with pytest.raises(UserError, match="tutor1"):
        tabled(ensemble, tmp_path).outputs(make_batch([1], [0]))


def test_a_table_with_pooled_features_serves_runs_that_need_logits_only(ensemble, tmp_path):
    batch = make_batch([1, 5, 2, 39], [0, 17, 3, 2])
    expected = tabled(ensemble, tmp_path).outputs(batch)
    narrow = tabled(ensemble, tmp_path, include_pooled=False)
    found = narrow.outputs(batch)
    assert (narrow.hits, narrow.misses, found.pooled) == (8, 0, ())
    assert torch.equal(found.logits, expected.logits)
    fresh = narrow.outputs(make_batch([7], [1]))  # what it adds must serve the runs that need features
    wide = tabled(ensemble, tmp_path)
    assert torch.equal(wide.outputs(make_batch([7], [1])).logits, fresh.logits)
    assert (wide.hits, wide.misses) == (2, 0)


# --- an epoch ahead


@settings(max_examples=20, deadline=None)
@given(
    st.permutations(range(N)),
    st.integers(0, N),
    st.integers(1, 50),
    st.integers(0, 2**31),
    st.sampled_from([0, 1 << 30]),
    st.sampled_from([0, N * V]),
)
def test_an_epoch_ahead_says_what_batches_would_say(tmp_path_factory, order, known, chunk, seed, memory, planned):
    """However many rows there is memory for, and whether all are read at the start."""
    torch.manual_seed(0)
    ensemble = TeacherEnsemble(
        [build_network(NetworkSpec("resnet8", C, normalization("unit"), {"width": 0.25})) for _ in range(2)],
        [TeacherIdentity(f"t{m}", f"{m}" * 64, "file", "resnet8") for m in range(2)],
    ).eval()
    folder = tmp_path_factory.mktemp("tables")
    index = torch.tensor(order)
    view = torch.randint(V, (N,), generator=torch.Generator().manual_seed(seed))
    expected = LiveTeachers(ensemble, PLAIN).outputs(make_batch(order, view.tolist()))
    source = tabled(ensemble, folder)
    if known:
        source.outputs(make_batch(order[:known], view[:known].tolist()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(frozen_teachers.CHUNK, "cpu", chunk)
        patch.setitem(rows.HELD_BYTES, "cpu", memory)
        source = tabled(ensemble, folder)
        source.plan(planned)
        source.prepare_epoch(index, view, gather, {(): N})
        assert (source.hits, source.misses) == (2 * known, 2 * (N - known))
        whole = source.outputs(make_batch(order, view.tolist()))
        source.flush()
        warm = tabled(ensemble, folder)
        warm.plan(planned)
        warm.prepare_epoch(index, view, gather, {(): N})
        again = warm.outputs(make_batch(order, view.tolist()))
    assert (warm.hits, warm.misses) == (2 * N, 0)
    assert same(whole, again)
    torch.testing.assert_close(whole.logits, expected.logits, rtol=1e-3, atol=1e-3)
    for one, other in zip(whole.pooled, expected.pooled, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_a_row_that_was_not_prepared_is_nan(ensemble, tmp_path):
    source = tabled(ensemble, tmp_path)
    source.prepare_epoch(torch.tensor([3, 1]), torch.tensor([0, 2]), gather, {(): 2})
    found = source.outputs(make_batch([1, 3, 3, 5], [2, 0, 1, 0]))
    known = torch.tensor([True, True, False, False])
    assert torch.equal(found.logits.isfinite().all(dim=(0, 2)), known)
    for pooled in found.pooled:
        assert torch.equal(pooled.isfinite().all(dim=1), known)


def test_a_recorded_question_is_answered_with_the_rows_of_a_later_epoch(ensemble, tmp_path):
    """What a CUDA graph records: operations without a value's influence, on tensors that stay where they are."""
    source = tabled(ensemble, tmp_path)
    index = torch.arange(N)

    def ask(batch: Batch):
        return source.outputs(batch)

    for view, size in ((torch.zeros_like(index), N), (index % V, N), (index % 5, N - 3)):
        source.prepare_epoch(index[:size], view[:size], gather, {(): size})
        assert source.captured()
        if not view.any():
            recorded = make_fx(ask)(make_batch([1, 2], [0, 0]))
        batch = make_batch([5, 30], view[[5, 30]].tolist())
        assert same(recorded(batch), source.outputs(batch))
        assert recorded(batch).logits.isfinite().all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", ["never", "always"])
@pytest.mark.parametrize(("live", "stages"), [(False, ()), (True, ()), (True, ("stage2",)), (False, ("stage2",))])
def test_a_cuda_graph_answers_for_a_later_epoch(ensemble, tmp_path, live, stages, compiled):
    how = TeacherFormat(precision="float32", compile=compiled)
    ensemble = ensemble.cuda()
    source = LiveTeachers(ensemble, how) if live else tabled(ensemble, tmp_path, how=how, keep_stages=stages)
    index, graph = torch.arange(N), torch.cuda.CUDAGraph()
    static = on_gpu(make_batch([0, 1], [0, 0]))
    for view in (torch.zeros_like(index), index % V, index % 5):
        source.prepare_epoch(index, view, lambda i, v: gather(i, v).cuda(), {stages: N})
        assert source.captured(stages)
        if not view.any():
            with torch.cuda.stream(torch.cuda.Stream()):
                source.outputs(static, stages)
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                answer = source.outputs(static, stages)
        batch = on_gpu(make_batch([5, 30], view[[5, 30]].tolist()))
        for place, values in zip(static[:5], batch[:5], strict=True):
            place.copy_(values)
        graph.replay()
        expected = source.outputs(batch, stages)
        torch.testing.assert_close(answer.logits, expected.logits, rtol=1e-4, atol=1e-4)
        assert answer.logits.isfinite().all()
        for m in range(2):
            for name in stages:
                torch.testing.assert_close(answer.stages[m][name], expected.stages[m][name], rtol=1e-3, atol=1e-3)


def on_gpu(batch: Batch) -> Batch:
    return Batch(*(part.cuda() for part in batch[:5]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_rows_computed_on_the_gpu_are_what_the_disk_gives_back(ensemble, tmp_path):
    ensemble, index = ensemble.cuda(), torch.arange(N)
    batch = on_gpu(make_batch([5, 30], [5, 12]))
    answers = []
    for misses in (2 * N, 0):
        source = tabled(ensemble, tmp_path)
        source.prepare_epoch(index, index % V, lambda i, v: gather(i, v).cuda(), {(): N})
        assert source.misses == misses
        answers.append(source.outputs(batch))
        source.flush()
    assert same(*answers)


@pytest.mark.parametrize("stages", [(), ("stage2",)])
def test_what_may_be_recorded_asks_no_value(ensemble, tmp_path, stages):
    sources = tabled(ensemble, tmp_path), LiveTeachers(ensemble, PLAIN)
    batch = make_batch([1, 2], [0, 0])
    for source in sources:
        source.prepare_epoch(batch.index, batch.view, gather, {stages: 2})
        source.outputs(batch, stages)
        assert source.captured(stages)
        with FakeTensorMode(allow_non_fake_inputs=True) as fakes:
            fake = Batch(*(fakes.from_tensor(part) for part in batch[:5]))
            answer = source.outputs(fake, stages)
        assert answer.logits.shape == (2, 2, C)
        assert set(answer.stages[1]) == set(stages)


@pytest.mark.parametrize("memory", [0, 1 << 30])
def test_a_row_is_read_or_computed_once_where_memory_holds_it(ensemble, tmp_path, monkeypatch, memory):
    monkeypatch.setitem(rows.HELD_BYTES, "cpu", memory)
    lines: list[int] = []
    genuine = TeacherTable.read

    def read(self, index, view):
        lines.append(len(index))
        return genuine(self, index, view)

    monkeypatch.setattr(TeacherTable, "read", read)
    source, index = tabled(ensemble, tmp_path, images=torch.arange(3, 30)), torch.arange(3, 30)
    for view in (index % V, index % 5, index % V):
        source.prepare_epoch(index, view, gather, {(): len(index)})
        assert same(
            source.outputs(make_batch([7, 29], view[[4, 26]].tolist())),
            tabled(ensemble, tmp_path / "other").outputs(make_batch([7, 29], view[[4, 26]].tolist())),
        )
    changed = int((index % V != index % 5).sum())
    assert (source.hits, source.misses) == (2 * (2 * 27 - changed), 2 * (27 + changed))
    own = [count for count in lines if count != 2]
    assert own == [27, 27, changed, changed, *([] if memory else [changed, changed])]
    places, width = 27 * V if memory else 27, 2 * (C + 64)
    assert source.held_bytes == (places + 1) * (2 * width + 4) + 8 * N
    with pytest.raises(IndexError, match="rows may be held"):
        source.prepare_epoch(index - 1, index % V, gather, {(): len(index)})


def test_rows_are_written_behind_and_all_of_them_before_the_end(ensemble, tmp_path, monkeypatch):
    may_write = threading.Event()
    genuine = TeacherTable.write

    def write(*args):
        may_write.wait(60)
        genuine(*args)

    monkeypatch.setattr(TeacherTable, "write", write)
    source, index = tabled(ensemble, tmp_path), torch.arange(N)
    source.prepare_epoch(index, index % V, gather, {(): N})
    assert source.outputs(make_batch([1, 2], [1, 2])).logits.isfinite().all()
    assert not tabled(ensemble, tmp_path)._stored.read(0, 0, index.numpy(), (index % V).numpy())[1].any()
    may_write.set()
    source.flush()
    warm = tabled(ensemble, tmp_path)
    warm.prepare_epoch(index, index % V, gather, {(): N})
    assert warm.hit_rate == 1.0


def test_a_disk_that_fills_behind_the_training_costs_one_warning(ensemble, tmp_path, full_disk):
    batch = make_batch([9], [4])
    expected = tabled(ensemble, tmp_path / "other").outputs(batch)
    source, index = tabled(ensemble, tmp_path), torch.arange(N)

    def two_epochs():
        for view in (index % V, index % 5):
            source.prepare_epoch(index, view, gather, {(): N})
            source.flush()

    full_disk()
    with pytest.warns(RuntimeWarning, match="No space left") as caught:
        two_epochs()
    assert len(caught) == 1
    assert not source.keeping
    assert same(source.outputs(batch), expected)


def test_mixed_images_are_refused(ensemble, tmp_path):
    batch = make_batch([1], [0])
    with pytest.raises(ValueError, match="mixed"):
        tabled(ensemble, tmp_path).outputs(batch._replace(soft_labels=torch.ones(1, C) / C))


def test_a_table_compiles_for_one_size_whatever_is_missing(ensemble, tmp_path, monkeypatch):
    """What a killed run left in the table must not decide how the rest is rounded."""
    sizes = []

    def compiled(module, **_):
        def call(images):
            sizes.append(len(images))
            return module(images)

        return call

    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setitem(frozen_teachers.CHUNK, "cpu", 16)
    source = tabled(ensemble, tmp_path, how=TeacherFormat(precision="float32", compile="always"))
    source.outputs(make_batch([1, 2], [0, 0]))  # the first question is about two images
    source.prepare_epoch(torch.arange(N), torch.zeros(N, dtype=torch.int64), gather, {(): N})
    assert set(sizes) == {16}
