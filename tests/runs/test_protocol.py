"""The protocol of runs: what they differ in, and which may be compared."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
from made_runs import result

from ekd_lightning.runs.protocol import Protocol
from ekd_lightning.runs.result import Result

ONE = Protocol.of(Result.of(result()))
KNOWN = [field.name for field in fields(Protocol) if getattr(ONE, field.name) is not None]


def test_a_result_and_its_record_have_the_same_protocol():
    assert Protocol.of(result()) == ONE
    assert "subset_sha256" in KNOWN


@pytest.mark.parametrize("name", KNOWN)
def test_what_differs_is_named_and_what_is_not_recorded_fits(name):
    other, unknown = replace(ONE, **{name: "other"}), replace(ONE, **{name: None})
    assert ONE.differences(other) == other.differences(ONE) == [name]
    assert not ONE.fits(other)
    assert ONE.fits(unknown)
    assert unknown.fits(other)
