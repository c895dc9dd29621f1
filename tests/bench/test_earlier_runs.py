"""benchmarks/earlier.py: a study that goes on where the folders of its first runs are not."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest

from ekd_lightning.reporting.comparison import PROTOCOL, Run, compare


@pytest.fixture
def earlier(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module, which is no part of the package."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("earlier")


COST = {
    "num_branches": 1,
    "num_teachers": 0,
    "num_parameters": 10,
    "num_adapter_parameters": 0,
    "macs": 5,
    "steps": 7,
}


def run(row: str, seed: int, accuracy: float | None, **more: object) -> Run:
    """A run of the study; None is one that was not made."""
    if accuracy is None:
        return Run(row, 0.1, seed, "missing")
    result = {
        **dict.fromkeys(PROTOCOL, 1),
        **COST,
        "seed": seed,
        "test_accuracy": accuracy,
        "machine": "here",
    }
    return Run(row, 0.1, seed, "done", {**result, "method": row, "teachers": [], **more})


def record(row: str, by_seed: dict[str, float | str], **more: object) -> dict[str, object]:
    """A row of an earlier page."""
    made = {seed: "there" for seed, value in by_seed.items() if isinstance(value, float)}
    return {
        "row": row,
        "fraction": 0.1,
        **COST,
        "train_seconds": 3.0,
        "by_seed": by_seed,
        "machines": made,
        **more,
    }


def test_earlier_runs_count_and_the_study_adds_those_that_were_missing(earlier: ModuleType) -> None:
    runs = [
        *(run("ce", seed, None if seed else 0.9) for seed in (0, 1)),
        *(run("kd", seed, (0.7, 0.75)[seed]) for seed in (0, 1)),
    ]
    merged, repeats = earlier.merged(
        runs,
        [
            record("ce", {"0": 0.5, "1": 0.6}),
            record("kd", {"0": 0.65, "1": "missing"}),
            record("bss", {"0": "missing"}, steps=None),
        ],
    )
    rows = {row.name: row for row in compare(merged, "cifar10")[0].rows}
    assert [(r["test_accuracy"], r["machine"]) for r in rows["ce"].done] == [(0.5, "there"), (0.6, "there")]
    assert [(r["test_accuracy"], r["machine"]) for r in rows["kd"].done] == [(0.65, "there"), (0.75, "here")]
    assert rows["kd"].differences["ce"].cell.mean == pytest.approx((0.15 + 0.15) / 2)
    # What came out the second time never replaces the first.
    assert [(r.row, r.seed, r.earlier, r.again) for r in repeats] == [
        ("ce", 0, 0.5, 0.9),
        ("kd", 0, 0.65, 0.7),
    ]


@pytest.mark.parametrize("key", sorted(COST))
def test_rows_of_another_cost_are_not_put_together(earlier: ModuleType, key: str) -> None:
    with pytest.raises(ValueError, match=f"ce: {key} was 99, is"):
        earlier.merged([run("ce", 0, 0.5)], [record("ce", {"0": 0.5}, **{key: 99})])


def test_steps_must_be_those_of_the_study_for_rows_that_it_does_not_have(earlier: ModuleType) -> None:
    with pytest.raises(ValueError, match="kd: steps was 99, is 7"):
        earlier.merged([run("ce", 0, 0.5)], [record("kd", {"0": 0.5}, steps=99)])
