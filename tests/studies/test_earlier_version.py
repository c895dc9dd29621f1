"""Folders of version 0.1: comparisons, sweeps and searches are read as they were left."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from ekd_lightning.cli.compare import main as compare
from ekd_lightning.studies.rows import read_tuned
from ekd_lightning.studies.sweep import found_sweep, show_summary

EARLIER = Path(__file__).parents[1] / "fixtures" / "runs_0_1"


@pytest.fixture
def earlier(tmp_path):
    """A copy, to be written to."""
    return shutil.copytree(EARLIER, tmp_path / "earlier")


def test_a_comparison_makes_the_table_that_it_made_then(earlier, capsys):
    then = json.loads((earlier / "compare" / "comparison.json").read_text())
    compare(["--output", str(earlier / "compare"), "--report-only"])
    now = json.loads((earlier / "compare" / "comparison.json").read_text())
    assert [row["row"] for row in now] == [row["row"] for row in then]
    for ours, theirs in zip(now, then, strict=True):
        assert ours["n"] < 3
        for key, value in theirs.items():
            if key.endswith(("_half_width", "_p", "_p_holm")):  # too few runs for an interval or a test
                assert ours[key] is None, key
                continue
            assert ours[key] == (pytest.approx(value) if isinstance(value, float) else value), key
    assert f"{sum(row['n'] for row in then)} done" in capsys.readouterr().out


def test_a_sweep_is_summed_up(earlier, capsys):
    show_summary(found_sweep(earlier / "multirun"))
    assert "2 of 2 runs done, 0 failed" in capsys.readouterr().out


def test_a_search_goes_on_and_its_result_is_read(earlier):
    pytest.importorskip("optuna")
    from ekd_lightning.studies.trials import Search

    description = json.loads((earlier / "tuned" / "ce" / "study.json").read_text())
    description["config"]["data"]["root"] = "elsewhere"  # was no part of it
    search = Search(earlier / "tuned" / "ce", description, {}, {})
    tuned = read_tuned(earlier / "tuned" / "ce.yaml")
    assert sum(trial.state.is_finished() for trial in search.trials) == tuned["trials"]
    search.close()
