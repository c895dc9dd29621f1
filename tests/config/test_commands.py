"""Commands that programs print: pasted one after the other, none is refused for what an earlier one left."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from ekd_lightning.config.commands import compare_command, report_command, search_path, typed_resume
from ekd_lightning.errors import STARTED_IN
from ekd_lightning.reporting.report_files import SUMMARY, check_output


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Where the user is, while the program has gone elsewhere."""
    (elsewhere := tmp_path / "elsewhere").mkdir()
    monkeypatch.setenv(STARTED_IN, str(tmp_path))
    monkeypatch.chdir(elsewhere)
    return tmp_path


def test_a_report_is_written_over_an_earlier_one(here):
    assert report_command([here / "a b"], here / "report") == "ekd-report 'a b' -o report"
    (here / "report").mkdir()
    assert report_command([here / "a b"], here / "report") == "ekd-report 'a b' -o report"
    (here / "report" / SUMMARY).write_text("{}")
    command = report_command([Path("x"), Path("y")], Path("report"))
    assert command == "ekd-report x y -o report --force"
    check_output(here / "report", force=True)


def test_a_study_of_other_settings_gets_a_folder_of_its_own(here):
    words = ["method=ce", "method.terms.a.weight=2", "seed=3", "+student.options={width: 0.5}", "tags=['a b']"]

    def printed() -> list[str]:
        (command,) = compare_command("ce,ekd", "compare/c10", words, "--fractions", "0.1")
        return shlex.split(command)

    (here / "elsewhere" / "compare" / "c10").mkdir(parents=True)
    expected = ["ekd-compare", "--methods", "ce,ekd", "--output", "compare/c10", "--fractions", "0.1", *words[3:]]
    assert printed() == expected
    for number in (2, 3):
        (here / expected[4]).mkdir(parents=True)
        expected[4] = f"compare/c10-{number}"
        assert printed() == expected
    assert compare_command("ce", "compare/c10", ["data.per_class=5"]) == []


def test_files_of_the_users_configuration_are_named_again(here, monkeypatch):
    search = "hydra.searchpath=[file:///my conf]"
    own = [search, "hydra.launcher.setup=[module load x]"]
    others = ["-m", "experiment=mine", "hydra/launcher=slurm", "hydra.sweep.dir=x", "hydra.run.dir=y", "hydra.mode=RUN"]
    monkeypatch.setattr(sys, "argv", ["ekd-train", *own, *others])
    assert shlex.split(typed_resume(here / "x")) == ["ekd-train", "resume=x", *own]
    assert search_path() == [search]
    (command,) = compare_command("ce", "compare/c10", [*search_path(), "experiment=mine"])
    assert shlex.split(command)[-2:] == [search, "experiment=mine"]
