from __future__ import annotations

import warnings
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ekd_lightning.errors import UserError
from ekd_lightning.methods import make_assignment
from ekd_lightning.methods.assignment import Assignment, RandomAssignment, build_assignment, last_kind

COUNTS = st.integers(1, 7)


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(["one_to_one", "mean", "permuted", "random"]), K=COUNTS, M=COUNTS)
def test_every_kind_is_row_stochastic(kind, K, M):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assignment = build_assignment(kind, K, M, seed=3)
    for step in range(3):
        A = assignment.matrix(step)
        assert A.shape == (K, M)
        assert A.dtype == torch.float32
        assert (A >= 0).all()
        torch.testing.assert_close(A.sum(1), torch.ones(K))
        assert {(k, m) for k, m in A.nonzero().tolist()} <= set(assignment.pairs())


@settings(max_examples=60, deadline=None)
@given(K=COUNTS, M=COUNTS)
def test_fixed_kinds_by_definition(K, M):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one, permuted = make_assignment("one_to_one", K, M), make_assignment("permuted", K, M)
        mean = make_assignment("mean", K, M)
    assert one.argmax(1).tolist() == [k % M for k in range(K)]
    assert permuted.argmax(1).tolist() == [(k + 1) % M for k in range(K)]
    assert ((one == 0) | (one == 1)).all()
    torch.testing.assert_close(mean, torch.full((K, M), 1 / M))
    if M > 1:
        assert not (one.argmax(1) == permuted.argmax(1)).any()


@settings(max_examples=60, deadline=None)
@given(K=COUNTS, M=COUNTS, seed=st.integers(0, 2**40), step=st.integers(0, 2**40))
def test_random_is_balanced_and_a_function_of_seed_and_step(K, M, seed, step):
    A = RandomAssignment(K, M, seed).matrix(step)
    assert torch.equal(A, RandomAssignment(K, M, seed).matrix(step))
    assert ((A == 0) | (A == 1)).all()
    uses = A.sum(0)
    assert uses.max() - uses.min() <= 1


@pytest.mark.parametrize(("K", "M"), [(3, 3), (2, 3), (4, 3)])
def test_random_visits_every_pair_equally_often(K, M):
    assignment, steps = RandomAssignment(K, M, seed=1), 3000
    share = sum(assignment.matrix(step) for step in range(steps)) / steps
    # Standard deviation of a share is below 0.5 / sqrt(3000) = 0.009; five of them.
    torch.testing.assert_close(share, torch.full((K, M), 1 / M), rtol=0, atol=0.046)
    assert set(assignment.pairs()) == {(k, m) for k in range(K) for m in range(M)}


def test_random_uses_all_permutations_and_other_seeds_differ():
    maps = Counter(tuple(RandomAssignment(3, 3, 0).matrix(s).argmax(1).tolist()) for s in range(300))
    assert len(maps) == 6
    assert min(maps.values()) > 20
    a, b = ([RandomAssignment(3, 3, seed).matrix(s).argmax(1).tolist() for s in range(20)] for seed in (0, 1))
    assert a != b


def test_random_does_not_touch_the_global_generator():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    RandomAssignment(3, 3).matrix(5)
    assert torch.equal(before, torch.get_rng_state())


def test_explicit_rows():
    rows = [[0.25, 0.75], [1, 0], [0, 1]]
    assignment = build_assignment(rows, 3, 2)
    torch.testing.assert_close(assignment.matrix(7), torch.tensor(rows))
    assert assignment.pairs() == [(0, 0), (0, 1), (1, 0), (2, 1)]
    make_assignment([[0.3333333, 0.3333333, 0.3333334]], 1, 3)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[1, 0]], r"2 rows \(branches\) of 2 weights"),
        ([[1, 0], [1]], r"2 rows \(branches\) of 2 weights"),
        ([2, 0], r"2 teachers \(one per branch, 0 to 1\), or 2 rows \(branches\) of 2 weights"),
        ([1, -1], r"2 teachers \(one per branch, 0 to 1\)"),
        ([True, 0], r"2 teachers \(one per branch, 0 to 1\)"),
        ([1, 0, 1], r"2 teachers \(one per branch, 0 to 1\)"),
        ("1,0,1", r"2 teachers \(one per branch, 0 to 1\)"),
        ([[1, 0], "ab"], r"2 rows \(branches\) of 2 weights"),
        ([[1, 0], [1.5, -0.5]], r"row 1, teacher 1=-0.5: must be at least 0"),
        ([[1, 0], [0.5, 0.4]], r"row 1=\[0.5, 0.4\] sums to 0.9"),
        ([[1, 0], [0.5, 0.50001]], "must sum to 1"),
        ([[1, 0], [float("nan"), 1]], "row 1, teacher 0=nan"),
        ([[1, 0], [True, 0]], "row 1, teacher 0=True"),
    ],
)
def test_explicit_rows_that_do_not_fit(rows, message):
    with pytest.raises(UserError, match=message):
        make_assignment(rows, 2, 2)


@pytest.mark.parametrize("kind", [[2, 0, 2], "2,0,2", ([0, 0, 1], [1, 0, 0], [0, 0, 1])])
def test_teachers_of_the_branches_can_be_listed(kind):
    assert make_assignment(kind, 3, 3).tolist() == [[0, 0, 1], [1, 0, 0], [0, 0, 1]]


def test_a_schedule_changes_the_teachers_at_its_shares():
    scheduled = build_assignment({"schedule": [[0, "one_to_one"], [0.25, "mean"], [0.8, "1,0"]]}, 2, 2)
    one, mean, swapped = (make_assignment(kind, 2, 2) for kind in ("one_to_one", "mean", [1, 0]))
    for progress, expected in [(0, one), (0.2499, one), (0.25, mean), (0.7999, mean), (0.8, swapped), (1, swapped)]:
        assert torch.equal(scheduled.matrix(7, progress), expected)
    torch.testing.assert_close(scheduled.mean_KM, 0.25 * one + 0.55 * mean + 0.2 * swapped)
    assert scheduled.pairs() == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert last_kind({"schedule": [[0, "mean"], [0.5, [1, 0]]]}) == [1, 0]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({}, "give {schedule:"),
        ({"schedule": []}, "give {schedule:"),
        ({"schedule": [[0, "mean"]], "more": 1}, "give {schedule:"),
        ({"schedule": ["mean"]}, "give {schedule:"),
        ({"schedule": [[0.1, "mean"]]}, "must increase from 0 and stay below 1"),
        ({"schedule": [[0, "mean"], [0, "permuted"]]}, "must increase from 0 and stay below 1"),
        ({"schedule": [[0, "mean"], [1, "permuted"]]}, "must increase from 0 and stay below 1"),
        ({"schedule": [[0, "mean"], ["0.5", "permuted"]]}, "share='0.5': must be a finite number"),
        ({"schedule": [[0, "mean"], [0.5, "permutd"]]}, "did you mean 'permuted'"),
        ({"schedule": [[0, "mean"], [0.5, "random"]]}, "a schedule takes fixed kinds, no random and no schedule"),
        ({"schedule": [[0, {"schedule": [[0, "mean"]]}]]}, "a schedule takes fixed kinds"),
        ({"schedule": [[0, "mean"], [0.5, [0, 3]]]}, r"2 teachers \(one per branch, 0 to 1\)"),
    ],
)
def test_schedules_that_do_not_fit(spec, message):
    with pytest.raises(UserError, match=message) as error:
        build_assignment(spec, 2, 2)
    assert "\n" not in str(error.value)


def test_unknown_kind_and_impossible_counts():
    with pytest.raises(UserError, match="did you mean 'one_to_one'"):
        build_assignment("one_to_on", 2, 2)
    for kind in ("mean", "random"):
        with pytest.raises(UserError, match="branches=0"):
            build_assignment(kind, 0, 2)
        with pytest.raises(UserError, match="teachers=0"):
            build_assignment(kind, 2, 0)
    with pytest.raises(UserError, match="seed=-1"):
        build_assignment("random", 2, 2, seed=-1)


def test_warnings_for_idle_teachers_and_for_a_permutation_of_one():
    with pytest.warns(UserWarning, match=r"4 teachers for 2 branches, so teachers \[2, 3\]"):
        make_assignment("one_to_one", 2, 4)
    with pytest.warns(UserWarning, match="2 teachers for 1 branch, so"):
        make_assignment("one_to_one", 1, 2)
    with pytest.warns(UserWarning, match="equals one_to_one"):
        A = make_assignment("permuted", 3, 1)
    assert torch.equal(A, torch.ones(3, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_assignment("one_to_one", 4, 2)
        make_assignment("mean", 2, 4)
        build_assignment("random", 2, 4)


def test_the_matrix_moves_with_the_module_and_stays_out_of_checkpoints():
    assignment = Assignment(make_assignment("mean", 2, 2))
    assert assignment.state_dict() == {}
    assert assignment.to("meta").matrix(0).device.type == "meta"
