"""Live teachers: frozen copies in every format give the same answers."""

from __future__ import annotations

import shutil

import pytest
import torch
from tutors import PLAIN, POOL, SIDE, C, make_batch, tutors

from ekd_lightning.errors import UserError
from ekd_lightning.networks import TeacherEnsemble
from ekd_lightning.teachers import source as frozen_teachers
from ekd_lightning.teachers.source import FrozenTeachers, LiveTeachers, TeacherFormat


@pytest.fixture
def ensemble() -> TeacherEnsemble:
    return tutors("resnet8", "resnet8")


def test_live_teachers_have_no_hit_rate(ensemble):
    live = LiveTeachers(ensemble, PLAIN)
    output = live.outputs(make_batch([1], [0]), ("stage1",))
    assert not output.logits.requires_grad
    assert (live.hits, live.misses, live.hit_rate) == (0, 0, None)


def ready(ensemble: TeacherEnsemble, images: torch.Tensor, **how):
    teachers = FrozenTeachers(ensemble, TeacherFormat(**how))
    return [teachers.outputs(m, images) for m in range(2)]


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("channels_last", [True, False])
def test_formats_agree(ensemble, fold, channels_last):
    with torch.no_grad():
        expected = ensemble(POOL)
    found = ready(ensemble, POOL, precision="float32", fold=fold, channels_last=channels_last)
    for m, output in enumerate(found):
        torch.testing.assert_close(output.logits, expected.logits[m], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(output.pooled, expected.pooled[m], rtol=1e-4, atol=1e-5)
    half = ready(ensemble, POOL, precision="bfloat16", fold=fold, channels_last=channels_last)
    for m, output in enumerate(half):
        assert (output.logits.log_softmax(-1) - expected.logits[m].log_softmax(-1)).abs().max() < 0.05


@pytest.mark.filterwarnings("error:torch.compile does not work")
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler")
def test_compiled_teachers_agree_for_any_batch(ensemble):
    teachers = FrozenTeachers(ensemble, TeacherFormat(precision="float32", compile="always"))
    with torch.no_grad():
        expected = ensemble(POOL).logits[0]
    for size in (16, 3, 40, 1):  # the first is compiled; others are filled up or cut
        logits = teachers.outputs(0, POOL[:size]).logits
        assert logits.shape == (size, C)
        torch.testing.assert_close(logits, expected[:size], rtol=1e-4, atol=1e-5)


def test_without_a_compiler_teachers_are_asked_uncompiled(ensemble, monkeypatch):
    def broken(*args, **kwargs):
        def call(images):
            raise RuntimeError("No working C++ compiler found")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    teachers = FrozenTeachers(ensemble, TeacherFormat(precision="float32", compile="always"))
    with pytest.warns(RuntimeWarning, match=r"torch.compile does not work here.*No working C\+\+ compiler") as caught:
        answers = [teachers.outputs(m, POOL) for m in (0, 1, 0)]
    assert len(caught) == 2  # one for each teacher
    expected = ready(ensemble, POOL, precision="float32", compile="never")
    assert torch.equal(answers[0].logits, expected[0].logits)
    assert torch.equal(answers[1].logits, expected[1].logits)


def test_only_long_work_is_compiled(ensemble, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda module, **_: (compiled.append(module), module)[1])
    teachers = FrozenTeachers(ensemble, TeacherFormat(precision="float32"))
    macs = frozen_teachers.count_macs(ensemble.members[0], SIDE)
    teachers.planned_rows = int(frozen_teachers.COMPILE_MACS["cpu"] / macs) - 1
    teachers.outputs(0, POOL)
    assert compiled == []
    teachers.planned_rows = int(frozen_teachers.COMPILE_MACS["cpu"] / macs) + 1
    teachers.outputs(0, POOL)
    teachers.outputs(0, POOL)
    assert len(compiled) == 1
    never = FrozenTeachers(ensemble, TeacherFormat(precision="float32", compile="never"))
    never.planned_rows = 10**12
    never.outputs(0, POOL)
    assert len(compiled) == 1


def test_a_stage_that_a_teacher_lacks_is_refused(ensemble):
    with pytest.raises(UserError, match=r"stage of teacher 'tutor0'.*stage9"):
        LiveTeachers(ensemble, PLAIN).outputs(make_batch([1], [0]), ("stage9",))
