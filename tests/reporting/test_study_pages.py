"""Pages of studies: records that keep what runs found, and where EKD stands, by scipy."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from made_runs import collection, entry, result
from scipy import stats

from ekd_lightning.errors import UserError
from ekd_lightning.files import DamagedFileError
from ekd_lightning.reporting.blocks import blocks
from ekd_lightning.reporting.groups import group
from ekd_lightning.reporting.study_pages import lead, standings, write_records
from ekd_lightning.runs.collection import RunEntry, collect, read_records

EKD = (0.70, 0.72, 0.71, 0.705)
OTHERS = {
    "kd_mean": (0.66, 0.665, 0.67, 0.67),
    "camkd": (0.725, 0.74, 0.738, 0.73),
    "fitnet": (0.69, 0.735, 0.70, 0.71),
    "takd": (0.69, 0.735),
}
HARDWARE = {"cpu": "AMD EPYC", "cpu_capability": "AVX512", "gpus": [], "threads": 1, "hostname": "secret"}


def row(name: str, values: tuple[float, ...], decides: bool = True, **more: Any) -> list[RunEntry]:
    made = []
    for seed, value in enumerate(values):
        run = replace(entry(result(name, seed, value, **more), f"{name}-s{seed}"), row=name, study="s", decides=decides)
        found = {"hardware": HARDWARE, "packages": {"torch": "2.14.1"}, "working_directory": "/secret"}
        vars(run).update(config=entry(dict(run.result or {}), recipe__lr=0.05).config, provenance=found)
        made.append(run)
    return made


@pytest.fixture
def runs() -> list[RunEntry]:
    plain = [run for name, own in OTHERS.items() for run in row(name, own, name != "fitnet", K=1)]
    costly = row("ce", (0.9, 0.91, 0.92, 0.93), student="resnet20", macs=90_000_000)
    return [*row("ekd", EKD), *row("ekd_mean", (0.8,) * 4), *plain, *costly]


def test_records_keep_what_runs_found_and_nothing_of_where_they_lay(runs: list[RunEntry], tmp_path: Path) -> None:
    (path,) = write_records(runs, tmp_path, {"s": "A study."})
    assert path.name == "cifar10.jsonl"
    assert "secret" not in path.read_text()
    kept = {run.name.split("/")[1].replace("-f0.1", ""): run for run in read_records(path)}
    assert set(kept) == {run.name for run in runs}
    for run in runs:
        back = kept[run.name]
        lost = {name for name, value in (run.result or {}).items() if back.get(name) != value and name != "teachers"}
        assert (lost, back.row, back.decides, back.setting("recipe.lr")) == (set(), run.row, run.decides, 0.05)
        assert back.provenance["hardware"]["cpu"] == "AMD EPYC"
        assert [t["sha256"] for t in back.get("teachers")] == [t["sha256"] for t in run.get("teachers")]
    again = write_records(read_records(path), tmp_path / "again", {"s": "A study."})
    assert again[0].read_bytes() == path.read_bytes()
    assert [run.row for run in collect([path]).runs] == [run.row for run in read_records(path)]


def test_where_ekd_stands_is_what_scipy_says(runs: list[RunEntry]) -> None:
    (block,) = blocks(group(collection(*runs)))
    (found,) = standings(block)
    assert set(found.against) == set(OTHERS)  # no variant of EKD, and none that costs more
    assert found.best is not None
    assert found.best.label == "camkd"
    p = {}
    for name, own in OTHERS.items():
        minus = [ours - other for ours, other in zip(EKD, own, strict=False)]
        if len(own) < 3:
            assert found.side(name) == "too few runs"
            continue
        test = stats.ttest_1samp(minus, 0)
        low, high = test.confidence_interval(0.95)
        assert found.side(name) == ("above" if low > 0 else "below" if high < 0 else "level")
        assert (found.against[name].low, found.against[name].high) == pytest.approx((low, high))
        p[name] = test.pvalue
    assert {found.side(name) for name in OTHERS} == {"above", "below", "level", "too few runs"}
    first, second = sorted(("kd_mean", "camkd"), key=p.__getitem__)  # they decide: corrected for two
    assert found.against[first].p_holm == pytest.approx(2 * p[first])
    assert found.against[second].p_holm == pytest.approx(max(2 * p[first], p[second]))
    assert lead([found]).startswith("With at most 20 % of the labels EKD is not ahead at equal cost")
    assert "below in 1, level in 0, above in 0 of 1 comparison " in lead([found])
    assert lead([]).startswith("Whether EKD is ahead at equal cost with limited data is open")


def test_of_equal_rows_of_two_studies_each_is_named(runs: list[RunEntry]) -> None:
    other = [replace(run, study="t") for run in row("camkd", OTHERS["camkd"], K=1, weight_x=2.0)]
    (block,) = blocks(group(collection(*runs, *other)))
    assert {"camkd (s)", "camkd (t)", "ekd"} <= {one.label for one in block.groups}


@pytest.mark.parametrize("line", ["{", "[]", '{"row": "ce"}', '{"row": "ce", "result": {"seed": 0, "fraction": 2}}'])
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"study": "s"}) + "\n" + line + "\n")
    with pytest.raises(DamagedFileError, match=r"x\.jsonl: damaged \(line 2: "):
        read_records(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_records(tmp_path / "missing.jsonl")
