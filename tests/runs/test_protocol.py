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


def unlabelled(fraction: float, images: int, sha256: str, kind: str | None, over: str | None = "labelled") -> dict:
    made = {"num_unlabelled_images": images, "unlabelled_sha256": sha256, "unlabelled_share": 0.5}
    return {**result(fraction=fraction), **made, "unlabelled_from": kind, "epoch_over": over}


def test_a_curve_over_fractions_has_the_rest_of_each_subset_or_the_same_images():
    def family(*words):
        return Protocol.of(unlabelled(*words)).family

    assert family(0.1, 45_000, "a", "rest") == family(0.2, 40_000, "b", "rest")
    assert family(0.1, 900, "c", "own") == family(0.2, 900, "c", "own")
    assert family(0.1, 900, "c", "own") != family(0.2, 800, "d", "own")
    assert family(0.1, 900, "c", "own") != family(0.2, 40_000, "b", "rest")
    assert family(0.1, 45_000, "a", "rest") != family(0.2, 40_000, "b", "rest", "unlabelled")


def test_a_record_without_unlabelled_images_used_none():
    plain = Protocol.of(result())
    assert (plain.unlabelled_from, plain.epoch_over) == ("none", "labelled")
    assert Protocol.of({**result(), "epoch_over": "labelled"}) == plain
