from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ekd_lightning.errors import UserError
from ekd_lightning.methods import build_method
from ekd_lightning.methods.options import WeightSchedule, read_schedule

from .helpers import make_batch, make_student, make_teachers, sizes

SHARES = st.floats(0, 1, allow_nan=False)


def test_no_schedule_is_constant():
    assert read_schedule("x", None)(0.0) == read_schedule("x", None)(1.0) == 1.0


@given(
    shares=st.lists(SHARES, min_size=1, max_size=6, unique=True).map(sorted),
    factors=st.lists(st.floats(0, 9), min_size=6, max_size=6),
    progress=SHARES,
)
def test_points_are_numpys_interpolation(shares, factors, progress):
    schedule = read_schedule("x", {"linear": list(zip(shares, factors, strict=False))})
    expected = np.interp(progress, shares, factors[: len(shares)])
    assert schedule(progress) == pytest.approx(expected, abs=1e-9)


def test_two_points_with_one_share_are_a_jump():
    schedule = read_schedule("x", {"linear": [[0, 1], [0.5, 1], [0.5, 4], [1, 2]]})
    assert [schedule(p) for p in (0, 0.499, 0.5, 0.75, 1.0)] == pytest.approx([1, 1, 4, 3, 2])


@given(until=st.floats(0.01, 1), progress=SHARES)
def test_ramp_up(until, progress):
    expected = math.exp(-5 * (1 - min(1.0, progress / until)) ** 2)
    assert read_schedule("x", {"ramp_up": until})(progress) == pytest.approx(expected)


def test_ramp_and_points_multiply():
    both = read_schedule("x", {"linear": [[0, 4], [1, 2]], "ramp_up": 1.0})
    assert both(0.5) == pytest.approx(3 * math.exp(-1.25))
    assert WeightSchedule()(0.3) == 1.0


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({}, "is not allowed"),
        (3, "is not allowed"),
        ({"linaer": [[0, 1]]}, "did you mean 'linear'"),
        ({"linear": []}, "pairs"),
        ({"linear": [0, 1]}, "pairs"),
        ({"linear": "ab"}, "pairs"),
        ({"linear": [[0, 1], [2, 1]]}, "at most 1"),
        ({"linear": [[0.5, 1], [0.1, 1]]}, "must not decrease"),
        ({"linear": [[0, -1]]}, "at least 0"),
        ({"linear": [[0, 10**309]]}, "0: must be a finite number"),
        ({"ramp_up": 0}, "positive"),
    ],
)
def test_what_makes_no_sense_is_one_line(spec, message):
    with pytest.raises(UserError, match=message) as error:
        read_schedule("method.terms.kd.schedule", spec)
    assert "\n" not in str(error.value)
    assert "method.terms.kd.schedule" in str(error.value)


def test_a_method_weighs_its_terms_by_progress():
    terms = {
        "ce_ensemble": {"weight": 2.0},
        "kd_ensemble": {"weight": 3.0, "schedule": {"linear": [[0, 1], [0.5, 1], [0.5, 0]]}},
    }
    method = build_method("x", terms, sizes())
    outputs = make_student(), make_teachers(), make_batch()
    early, late = method(*outputs, progress=0.2), method(*outputs, progress=0.6)
    assert float(late.total) == pytest.approx(2 * float(late.terms["ce_ensemble"]))
    assert float(early.total) == pytest.approx(
        2 * float(early.terms["ce_ensemble"]) + 3 * float(early.terms["kd_ensemble"]), rel=1e-5
    )


STAGED = {
    "hint": {
        "type": "feature_branch",
        "weight": 10.0,
        "feature": "stage1",
        "schedule": {"linear": [[0, 1], [0.3, 1], [0.3, 0]]},
    },
    "kd_ensemble": {"weight": 0.5, "schedule": {"linear": [[0.3, 0], [0.3, 1], [0.8, 1], [0.8, 0]]}},
    "ce_ensemble": {"weight": 2.0, "schedule": {"linear": [[0.3, 0], [0.3, 1]]}},
}


def test_a_method_says_what_it_asks_for_by_progress():
    method = build_method("x", STAGED, sizes())
    asked = [method.teacher_needs(progress) for progress in (0.0, 0.29, 0.3, 0.79, 0.8, 1.0)]
    assert asked == [(True, ("stage1",))] * 2 + [(True, ())] * 2 + [(False, ())] * 2
    assert () in method.needed_stage_sets
    assert () not in build_method("x", {"hint": STAGED["hint"]}, sizes()).needed_stage_sets


def test_an_idle_term_costs_nothing_and_leaves_zero_gradients():
    method = build_method("x", STAGED, sizes())
    alone = build_method("x", {"ce_ensemble": {"weight": 2.0}}, sizes())
    student, other = make_student(), make_student()
    found = method(student, None, make_batch(), progress=0.9)
    expected = alone(other, None, make_batch())
    found.total.backward()
    expected.total.backward()
    assert torch.equal(found.total, expected.total)
    assert torch.equal(student.branch_logits.grad, other.branch_logits.grad)
    assert float(found.terms["hint"]) == float(found.terms["kd_ensemble"]) == 0.0
    adapters = list(method.terms["hint"].parameters())
    assert adapters
    assert all(p.grad is not None and not p.grad.any() for p in adapters)
    # In the first part only the hint counts: logits still get a gradient, of zero.
    student = make_student()
    method(student, make_teachers(), make_batch(), progress=0.0).total.backward()
    assert not student.branch_logits.grad.any()
    assert student.stages[0]["stage1"].grad.any()


def test_a_method_whose_terms_are_all_idle_is_computed_nevertheless():
    ends = {"ce_ensemble": {"weight": 1.0, "schedule": {"linear": [[0, 1], [0.5, 0]]}}}
    result = build_method("x", ends, sizes())(make_student(), None, make_batch(), progress=0.9)
    assert float(result.total) == 0.0
    assert result.total.requires_grad
    assert float(result.terms["ce_ensemble"]) > 0.0
