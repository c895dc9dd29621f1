from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import distributed

from ekd_lightning.errors import UserError
from ekd_lightning.methods import build_method, build_term
from ekd_lightning.methods.contrast_terms import MemoryBank, TrainingImages
from ekd_lightning.methods.losses import noise_contrastive

from .helpers import make_batch, make_student, make_teachers, sizes, step_context, term_context

INDEX = torch.tensor([2, 3, 5, 8, 13, 21, 34, 55, 89])
LABELS = torch.tensor([1, 0, 3, 1, 0, 3, 1, 1, 0])  # class 2 has no image
M_NEG, TAU, MOMENTUM, D_EMB, n = 7, 0.3, 0.4, 4, 9


def crd(K=1, M=1, seed=0, dtype=torch.float64, **options):
    torch.manual_seed(3)
    context = term_context(K, M, train_index=INDEX, train_labels=LABELS, seed=seed)
    options = {"features": D_EMB, "negatives": M_NEG, "tau": TAU, "momentum": MOMENTUM, **options}
    return build_term("crd", 1.0, context, **options).to(dtype)


def batch_of(*places: int):
    return make_batch(B=len(places))._replace(index=INDEX[list(places)], labels=LABELS[list(places)])


def step(term, places=(0, 4, 7), number=0, seed=0, K=1, M=1, dtype=torch.float64):
    B = len(places)
    student = make_student(K, B, seed=seed + 10, dtype=dtype)
    teachers = make_teachers(M, B, seed=seed + 20, dtype=dtype)
    value = term(step_context(student, teachers, batch_of(*places), step=number))
    return value, student, teachers


def unit(v):
    return v / np.sqrt((v * v).sum())


def embed(side, pooled):
    linear = side.embed.linear
    W, b = linear.weight.detach().numpy(), linear.bias.detach().numpy()
    return [unit(W @ row + b) for row in pooled.detach().numpy()]


def reference(anchors, bank, rows, negatives, z):
    """One direction with explicit negatives, and the z that it would set."""
    scores = [
        [np.exp(anchor @ bank[j] / TAU) for j in [row, *drawn]]
        for anchor, row, drawn in zip(anchors, rows, negatives, strict=True)
    ]
    z = n * np.mean(scores) if z is None else z
    total, noise, eps = 0.0, M_NEG / n, 1e-7
    for row in scores:
        p = [score / z for score in row]
        total -= np.log(p[0] / (p[0] + noise + eps))
        total -= sum(np.log(noise / (q + noise + eps)) for q in p[1:])
    return total / len(anchors), z


def moved(bank, rows, embeddings):
    bank = bank.copy()
    for row, v in zip(rows, embeddings, strict=True):
        bank[row] = unit(MOMENTUM * bank[row] + (1 - MOMENTUM) * v)
    return bank


@pytest.mark.parametrize("scores", ["whole", "gathered"])
def test_two_steps_against_loops_with_explicit_negatives(scores):
    term = crd(scores=scores)
    s_side, t_side = (sides["branch0_teacher0"] for sides in (term.student_sides, term.teacher_sides))
    z_s = z_t = None
    for number, places in enumerate([(0, 4, 7), (4, 1, 2, 8)]):
        rows = term.images.rows(INDEX[list(places)])
        negatives = term.images.negatives(rows, M_NEG, torch.tensor(number)).tolist()
        s_bank, t_bank = (side.memory.bank.numpy().copy() for side in (s_side, t_side))
        value, student, teachers = step(term, places, number, seed=number)
        v_s, v_t = embed(s_side, student.pooled[0]), embed(t_side, teachers.pooled[0])
        from_student, z_t = reference(v_s, t_bank, rows.tolist(), negatives, z_t)
        from_teacher, z_s = reference(v_t, s_bank, rows.tolist(), negatives, z_s)
        assert value.item() == pytest.approx(from_student + from_teacher, rel=1e-9)
        assert (s_side.z.item(), t_side.z.item()) == pytest.approx((z_s, z_t), rel=1e-9)
        np.testing.assert_allclose(s_side.memory.bank, moved(s_bank, rows.tolist(), v_s))
        np.testing.assert_allclose(t_side.memory.bank, moved(t_bank, rows.tolist(), v_t))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_ways_to_compute_scores_are_equal(dtype):
    whole, gathered = crd(scores="whole", dtype=dtype), crd(scores="gathered", dtype=dtype)
    for number in range(3):
        a, b = (step(term, number=number, dtype=dtype) for term in (whole, gathered))
        a[0].backward()
        b[0].backward()
        torch.testing.assert_close(a[0], b[0])
        torch.testing.assert_close(a[1].pooled.grad, b[1].pooled.grad)
    torch.testing.assert_close(whole.state_dict(), gathered.state_dict())
    assert crd().scores == "whole"
    assert crd(negatives=1).scores == "whole"


def test_negatives_are_of_other_classes_and_a_pure_function_of_seed_step_and_image():
    images = TrainingImages(INDEX, LABELS, seed=5)
    rows = images.rows(INDEX)
    drawn = images.negatives(rows, 501, step=torch.tensor(3))
    labels, whole = LABELS[torch.argsort(rows)], drawn.shape
    assert whole == (9, 501)
    assert (labels[drawn] != LABELS[:, None]).all()
    assert torch.equal(images.negatives(rows[[6, 1]], 501, step=torch.tensor(3)), drawn[[6, 1]])
    assert not torch.equal(images.negatives(rows, 501, step=torch.tensor(4)), drawn)
    assert not torch.equal(TrainingImages(INDEX, LABELS, seed=6).negatives(rows, 501, step=torch.tensor(3)), drawn)


def test_negatives_are_uniform():
    images = TrainingImages(INDEX, LABELS, seed=0)
    rows = images.rows(INDEX[:2])
    drawn = torch.cat([images.negatives(rows, 5001, torch.tensor(step)) for step in range(4)], dim=1)
    for row, own in zip(drawn, LABELS[:2], strict=True):
        counts = torch.bincount(row, minlength=n)
        others = counts[counts > 0].double()
        assert len(others) == int((own != LABELS).sum())
        expected = len(row) / len(others)
        chi_square = ((others - expected) ** 2 / expected).sum()
        assert chi_square < 22  # 0.1 % for at most 6 degrees of freedom


def test_rows_are_a_permutation_sorted_by_class():
    images = TrainingImages(INDEX, LABELS, seed=0)
    rows = images.rows(INDEX)
    assert sorted(rows.tolist()) == list(range(n))
    assert torch.equal(images.rows(INDEX.flip(0)), rows.flip(0))
    assert (LABELS[torch.argsort(rows)].diff() >= 0).all()


def test_the_first_view_of_an_image_counts_where_a_batch_has_it_twice():
    memory = MemoryBank(n, D_EMB, MOMENTUM, torch.Generator().manual_seed(0)).double()
    before, rows = memory.bank.numpy().copy(), [3, 6, 3, 1, 6]
    views = torch.nn.functional.normalize(torch.randn(5, D_EMB, dtype=torch.float64))
    memory.update(torch.tensor(rows), views)
    np.testing.assert_allclose(memory.bank, moved(before, [3, 6, 1], views[[0, 1, 3]].numpy()))


@pytest.mark.parametrize("stranger", [0, 4, 90, 10**9])
def test_images_that_are_not_trained_on_are_refused(stranger):
    term = crd()
    batch = batch_of(0, 1)._replace(index=torch.tensor([2, stranger]))
    with pytest.raises(ValueError, match=f"image {stranger} is not among the 9 training images"):
        term(step_context(make_student(1, 2), make_teachers(1, 2), batch))


def test_banks_and_z_change_in_training_only():
    term = crd().eval()
    before = copy.deepcopy(term.state_dict())
    value, *_ = step(term)
    torch.testing.assert_close(term.state_dict(), before, rtol=0, atol=0)
    torch.testing.assert_close(step(term.train())[0], value)
    changed = [key for key, v in term.state_dict().items() if not torch.equal(v, before[key])]
    pair = "branch0_teacher0"
    assert set(changed) == {
        f"{side}_sides.{pair}.{what}" for side in ("student", "teacher") for what in ("memory.bank", "z")
    }


def test_a_resumed_run_goes_on_as_if_nothing_had_happened():
    straight, first = crd(), crd()
    for number in range(2):
        step(straight, number=number, seed=number)
        step(first, number=number, seed=number)
    second = crd(seed=0)
    step(second, number=9, seed=9)  # a term that has its own z and banks already
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for number in range(2, 5):
        a, b = (step(term, (1, 4, 8), number, seed=number)[0] for term in (straight, second))
        assert torch.equal(a, b)
    fresh = crd().state_dict()
    second.load_state_dict(fresh)  # z is estimated anew where the state has none
    assert torch.equal(step(second)[0], step(crd())[0])


def test_banks_start_alike_whatever_was_drawn_before():
    torch.manual_seed(1)
    first = crd(seed=4).student_sides["branch0_teacher0"].memory.bank
    torch.manual_seed(2)
    assert torch.equal(first, crd(seed=4).student_sides["branch0_teacher0"].memory.bank)
    assert not torch.equal(first, crd(seed=5).student_sides["branch0_teacher0"].memory.bank)
    assert first.abs().max() <= np.sqrt(3 / D_EMB)


def test_every_step_trains_all_embeddings_and_no_teacher():
    term = crd(2, 3)
    for number in range(2):
        term.zero_grad()
        value, student, teachers = step(term, number=number, K=2, M=3)
        value.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in term.parameters())
        assert all(side.abs().sum() > 0 for side in student.pooled.grad)
        assert all(t.grad is None for t in teachers.pooled)
    assert len(term.student_sides) == len(term.teacher_sides) == 6


@pytest.mark.parametrize("scores", ["whole", "gathered"])
def test_gradients(scores):
    term = crd(scores=scores)
    step(term)
    term.eval()  # the banks stay
    teachers = make_teachers(1, 3, dtype=torch.float64)
    student = make_student(1, 3, dtype=torch.float64)

    def value(pooled):
        return term(step_context(student._replace(pooled=pooled), teachers, batch_of(0, 4, 7), step=1))

    assert torch.autograd.gradcheck(value, student.pooled.detach().requires_grad_())


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), shift=st.floats(-3, 3))
def test_only_the_ratio_of_scores_and_z_counts(seed, shift):
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(2, 5, generator=g, dtype=torch.float64)
    positive, times = torch.tensor([0, 3]), torch.tensor([[0.0, 1, 3, 0, 0], [2, 0, 0, 0, 2]]).double()
    z = torch.tensor(2.0, dtype=torch.float64)
    plain = noise_contrastive(scores, positive, times, z, 4, 9)
    moved_ = noise_contrastive(scores + shift, positive, times, z * np.exp(shift), 4, 9)
    torch.testing.assert_close(moved_, plain)


def test_autocast_changes_nothing():
    plain, mixed = crd(dtype=torch.float32), crd(dtype=torch.float32)
    expected, *_ = step(plain, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found, *_ = step(mixed, dtype=torch.float32)
        half, *_ = step(crd(dtype=torch.float32), dtype=torch.bfloat16)
    assert torch.equal(found, expected)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, expected, rtol=0.02, atol=0)


def test_only_banks_and_embeddings_and_z_are_state():
    names = {key.split(".", 2)[2] for key in crd().state_dict()}
    assert names == {"embed.linear.weight", "embed.linear.bias", "memory.bank", "z"}


def _process(rank, folder):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    term, values = crd(), []
    for number in range(2):
        student, teachers = (
            make_student(1, 4, seed=number, dtype=torch.float64),
            make_teachers(1, 4, seed=number, dtype=torch.float64),
        )
        own = slice(rank, None, 2)
        value = term(
            step_context(
                student._replace(pooled=student.pooled[:, own]),
                teachers._replace(pooled=(teachers.pooled[0][own],)),
                batch_of(*[0, 4, 7, 2][own]),
                step=number,
            )
        )
        values.append(float(value.detach()))
    torch.save((values, term.state_dict()), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.ddp
def test_two_processes_do_what_one_does(tmp_path):
    mp.spawn(_process, (str(tmp_path),), nprocs=2)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    term = crd()
    for number in range(2):
        student = make_student(1, 4, seed=number, dtype=torch.float64)
        teachers = make_teachers(1, 4, seed=number, dtype=torch.float64)
        value = term(step_context(student, teachers, batch_of(0, 4, 7, 2), step=number))
        assert np.mean([values[number] for values, _ in results]) == pytest.approx(value.item(), rel=1e-9)
    for _, state in results:
        torch.testing.assert_close(state, term.state_dict())


def test_training_images_must_be_known_and_of_two_classes():
    with pytest.raises(UserError, match="a TermContext that has train_index and train_labels"):
        build_term("crd", 1.0, term_context(1, 1))
    context = sizes(1, 1, train_index=INDEX, train_labels=torch.full((n,), 3))
    with pytest.raises(UserError, match=r"method.terms.crd: .*two classes"):
        build_method("x", {"crd": {"weight": 1}}, context)
