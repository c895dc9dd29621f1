"""The pages of benchmarks/: a study that goes on without the folders of its first runs; searches that are fair."""

import importlib
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from ekd_lightning.reporting.blocks import Block
from ekd_lightning.runs.collection import RunEntry
from ekd_lightning.runs.directory import RunState
from ekd_lightning.runs.protocol import Protocol
from ekd_lightning.runs.result import Result
from ekd_lightning.studies.comparison import Runs, records, study_block, study_rows


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts are no part of the package."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))


@pytest.fixture
def earlier() -> ModuleType:
    return importlib.import_module("earlier")


COST = {"num_branches": 1, "num_teachers": 3, "num_parameters": 10, "num_adapter_parameters": 0, "macs": 5, "steps": 7}
SAME = {
    **dict.fromkeys((part.name for part in fields(Protocol)), 1),
    "data": "cifar10",
    "fraction": 0.1,
    "subset_sha256": "abcd",
    "steps": 7,
    "views": "crop_flip",
    "precision": "32-true",
}
KNOWN = {key: SAME[key] for key in ("data", "fraction", "epochs", "batch_size", "precision")}


def run(row: str, seed: int, outcome: float | str, **more: object) -> RunEntry:
    """A run of the study, or what became of it."""
    name = f"{row}-f0.1-s{seed}"
    if isinstance(outcome, str):
        state = RunState.PLANNED if outcome == "missing" else RunState(outcome)
        return RunEntry(Path(name), name, state)
    result = {**SAME, **COST, "seed": seed, "test_accuracy": outcome, "machine": "here", "threads": 1, "torch": "2"}
    more = {"method": row, "teachers": [], "train_seconds": 3.0, **more}
    return RunEntry(Path(name), name, RunState.DONE, Result.of({**result, **more}))


def study(*runs: RunEntry) -> Runs:
    """The runs by row and seed."""
    found: dict[str, dict[int, RunEntry]] = {}
    for one in runs:
        row, seed = one.name.split("-f0.1-s")
        found.setdefault(row, {})[int(seed)] = one
    return found


def block_of(runs: Runs) -> Block:
    return study_block("cifar10", 0.1, runs)


def kept(runs: Runs) -> list[dict[str, Any]]:
    block = block_of(runs)
    return records(block, study_rows(block), runs)


def file_of(runs: Runs, **protocol: object) -> dict[str, Any]:
    """The file of earlier runs."""
    known = {**KNOWN, "subset_sha256": "ab", "threads": 1, "torch": "2", **protocol}
    return {"machine": "there", "protocol": known, "rows": kept(runs)}


def outcomes(runs: Runs, row: str) -> list[tuple[Any, ...]]:
    return [(seed, one.state, one.get("test_accuracy"), one.get("machine")) for seed, one in sorted(runs[row].items())]


def test_earlier_runs_count_and_the_study_adds_those_that_were_missing(earlier: ModuleType) -> None:
    runs = study(run("ce", 0, 0.9), run("ce", 1, "failed"), run("kd", 0, 0.7), run("kd", 1, 0.75), run("sp", 0, 0.4))
    before = file_of(study(run("ce", 0, 0.5), run("ce", 1, 0.6), run("kd", 0, 0.65), run("kd", 1, "missing")))
    merged, repeats = earlier.merged(runs, before)
    assert outcomes(merged, "ce") == [(0, "done", 0.5, "there"), (1, "done", 0.6, "there")]
    assert outcomes(merged, "kd") == [(0, "done", 0.65, "there"), (1, "done", 0.75, "here")]
    assert outcomes(merged, "sp") == [(0, "done", 0.4, "here")]
    kd = next(row for row in study_rows(block_of(merged)) if row.group.label == "kd")
    assert kd.differences["ce"].mean == pytest.approx((0.15 + 0.15) / 2)
    # What came out the second time never replaces the first, and a second run that failed is told.
    assert [(r.row, r.seed, r.earlier, r.again) for r in repeats] == [
        ("ce", 0, 0.5, 0.9), ("ce", 1, 0.6, "failed"), ("kd", 0, 0.65, 0.7),
    ]  # fmt: skip
    assert earlier.merged(runs, before) == (merged, repeats)


def test_what_failed_earlier_is_told_unless_it_was_made_up_for(earlier: ModuleType) -> None:
    before = file_of(study(run("ce", 0, "failed"), run("ce", 1, 0.6), run("kd", 0, "failed")))
    merged, _ = earlier.merged(study(run("ce", 0, 0.5)), before)
    assert outcomes(merged, "ce") == [(0, "done", 0.5, "here"), (1, "done", 0.6, "there")]
    assert outcomes(merged, "kd") == [(0, "failed", None, None)]


def test_rows_that_the_study_does_not_add_to_keep_their_records(earlier: ModuleType) -> None:
    first = study(
        run("ce", 0, 0.5, num_teachers=0),
        run("kd", 0, 0.6, teacher="t56", num_teachers=1),
        run("takd", 0, 0.7, teacher="t56", num_teachers=1, chain_stored_seconds=9.0),
        run("ekd", 0, 0.8),
    )
    before = file_of(first)
    merged, _ = earlier.merged(study(run("bss", 0, 0.1)), before)
    after = {record["row"]: record for record in kept(merged)}
    told = [key for key in before["rows"][0] if not key.endswith("_p_holm")]  # one row more to correct for
    for record in before["rows"]:
        assert {key: after[record["row"]][key] for key in told} == {key: record[key] for key in told}


@pytest.mark.parametrize("key", sorted(COST))
def test_rows_of_another_cost_are_not_put_together(earlier: ModuleType, key: str) -> None:
    before = file_of(study(run("ce", 0, 0.5)))
    before["rows"][0][key] = 99
    with pytest.raises(ValueError, match=f"{key} of ce was 99, is"):
        earlier.merged(study(run("ce", 0, 0.5)), before)


@pytest.mark.parametrize("key", [*KNOWN, "subset_sha256", "threads", "torch"])
def test_runs_that_went_another_way_are_not_put_together(earlier: ModuleType, key: str) -> None:
    with pytest.raises(ValueError, match=f"{key} was 99, is"):
        earlier.merged(study(run("kd", 0, 0.5)), file_of(study(run("ce", 0, 0.5)), **{key: 99}))


@pytest.mark.parametrize("key", [*KNOWN, "subset_sha256"])
def test_what_must_be_known_of_earlier_runs(earlier: ModuleType, key: str) -> None:
    before = file_of(study(run("ce", 0, 0.5)))
    del before["protocol"][key]
    with pytest.raises(ValueError, match=f"does not know their {key}"):
        earlier.merged(study(run("kd", 0, 0.5)), before)


def test_a_study_without_runs_cannot_go_on(earlier: ModuleType) -> None:
    with pytest.raises(ValueError, match="no finished run"):
        earlier.merged(study(run("ce", 0, "missing")), file_of(study(run("ce", 0, 0.5))))


def test_a_page_says_which_rows_are_of_the_other_machine() -> None:
    parts = importlib.import_module("page_parts")
    runs = [run("ce", 0, 0.5), run("ce", 1, 0.5), run("kd", 0, 0.6), run("kd", 1, 0.6, machine="there")]
    assert parts.made_on(study_rows(block_of(study(*runs)))).startswith("here; there for `kd` seed 1, so")
    assert parts.made_on(study_rows(block_of(study(*runs[:3])))) == "here"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"trials": 6}, "kd_mean: 6 of 7 trials"),
        ({"trials": 9, "budget": 9}, "searched with other budget"),
        ({"validation_images": 5}, "searched with other validation_images"),
        ({"protocol": {"data": "cifar10", "fraction": 0.1, "subset_sha256": "x", "epochs": 2}}, "other epochs"),
    ],
)
def test_searches_of_other_budgets_make_no_page(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    page = importlib.import_module("equal_macs_page")
    protocol = {"data": "cifar10", "fraction": 0.1, "subset_sha256": "x", "epochs": 1}
    found = {"trials": 7, "budget": 7, "seeds": [0], "validation_images": 4, "protocol": protocol}
    (tmp_path / "ekd.yaml").write_text(yaml.safe_dump(found))
    (tmp_path / "kd_mean.yaml").write_text(yaml.safe_dump(found))
    assert [t["row"] for t in page.tuned(tmp_path)] == ["ekd", "kd_mean"]
    (tmp_path / "kd_mean.yaml").write_text(yaml.safe_dump({**found, **change}))
    with pytest.raises(ValueError, match=words):
        page.tuned(tmp_path)
