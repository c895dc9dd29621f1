from __future__ import annotations

import math

import pytest
import torch

from ekd_lightning.training.step_log import StepLog

NAMES = ("loss", "kd", "ce")


def log_of(*rows: tuple[float, ...]) -> StepLog:
    log = StepLog(NAMES)
    for row in rows:
        log.append([torch.tensor(value) for value in row])
    return log


def test_means_over_the_steps():
    means = log_of((1.0, 2.0, 4.0), (3.0, 2.0, 8.0)).means()
    assert {name: float(value) for name, value in means.items()} == {"loss": 2.0, "kd": 2.0, "ce": 6.0}


def test_an_empty_log_has_no_means():
    log = log_of((1.0, 1.0, 1.0))
    log.clear()
    assert log.means() == {}
    assert log.first_non_finite() is None


def test_values_carry_no_gradient():
    log = StepLog(NAMES)
    log.append([torch.ones((), requires_grad=True) * 2] * 3)
    assert not any(value.requires_grad for value in log.means().values())


def test_low_precision_is_summed_in_float32():
    log = StepLog(("x",))
    for _ in range(1000):
        log.append([torch.tensor(1.001, dtype=torch.bfloat16)])
    assert log.means()["x"].dtype == torch.float32
    assert float(log.means()["x"]) == 1.0  # what bfloat16 makes of 1.001


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([(1.0, 1.0, 1.0)], None),
        ([(1.0, 1.0, 1.0), (math.inf, 1.0, math.inf)], (1, "ce", math.inf)),
        ([(-math.inf, -math.inf, 1.0), (math.inf, math.inf, 1.0)], (0, "kd", -math.inf)),
        ([(math.inf, 3e38, 3e38)], (0, "loss", math.inf)),  # only the sum overflowed
    ],
)
def test_the_first_value_that_is_not_finite(rows, expected):
    assert log_of(*rows).first_non_finite() == expected


def test_not_a_number_is_found():
    step, name, value = log_of((1.0, 1.0, 1.0), (math.nan, math.nan, 1.0)).first_non_finite()
    assert (step, name) == (1, "kd")
    assert math.isnan(value)


def test_the_newest_step_alone():
    log = log_of((math.nan, 1.0, 1.0))
    assert not log.last_is_finite()
    log.append([torch.ones(())] * 3)
    assert log.last_is_finite()
