from __future__ import annotations

import pytest

from ekd_lightning.reporting.tables import (
    Cell,
    half_width,
    percent,
    summarise,
)


def test_mean_and_sample_deviation():
    assert summarise([1.0, 2.0, 4.0]) == Cell(pytest.approx(7 / 3), pytest.approx((7 / 3) ** 0.5), 3)
    assert summarise(iter([5.0])) == Cell(5.0, None, 1)
    with pytest.raises(ValueError, match="no values"):
        summarise([])


@pytest.mark.parametrize(
    ("cell", "signed", "text"),
    [
        (Cell(0.78021, 0.00312, 3), False, "78.02 ± 0.31"),
        (Cell(0.78, None, 1), False, "78.00"),
        (Cell(0.0123, None, 1), True, "+1.23"),
        (Cell(-0.0123, 0.001, 2), True, "-1.23 ± 0.10"),
        (None, True, "–"),
    ],
)
def test_percent(cell, signed, text):
    assert percent(cell, signed=signed) == text


def test_the_interval_is_students():
    # t(0.975, 2 degrees of freedom) = 4.302653 and t(0.95, 4) = 2.131847, from any table
    assert half_width(Cell(5.0, 1.0, 3)) == pytest.approx(4.302653 / 3**0.5, rel=1e-6)
    assert half_width(Cell(5.0, 2.0, 5), level=0.9) == pytest.approx(2 * 2.131847 / 5**0.5, rel=1e-6)
    assert half_width(Cell(5.0, None, 1)) is None
