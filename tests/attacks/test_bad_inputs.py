"""Bad inputs by the table: one line that names what is wrong, before anything expensive, and nothing left behind."""

from __future__ import annotations

import importlib
import re
import shlex
import string
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from whole_runs import TINY, Outcome, _call

from ekd_lightning.config.overrides import key_of

TABLE = Path(__file__).with_name("bad_inputs.yaml")
TINY_STUDY = tuple(word for word in TINY if not word.startswith(("method=", "data.fraction")))
SETTINGS = {"ekd-train": TINY, "ekd-teach": TINY, "ekd-compare": TINY_STUDY, "ekd-tune": TINY, "ekd-bench": TINY}
"""What commands are given beside a row's own words, which come last."""
EXPENSIVE = (
    "ekd_lightning.runs.writer.RunWriter.start",  # all checks of a run have passed
    "ekd_lightning.config.directory.JobOutput.start",
    "ekd_lightning.data.download._fetch",
    "ekd_lightning.teachers.store.TeacherStore.get_or_train",
    "ekd_lightning.cli.compare.write_study",
    "ekd_lightning.studies.search.Search",
    "ekd_lightning.pipeline.context.open_context",
    "ekd_lightning.reporting.report_files.write_report",
)


class Row(NamedTuple):
    """One bad input: what is typed, what the line must name, and what may happen before."""

    command: str
    typed: str
    named: tuple[str, ...]
    reads_data: bool
    warns: bool


class Accepted(BaseException):
    """Says that all checks have passed, where one should not."""


def read_rows() -> Iterator[Row]:
    for section in yaml.safe_load(TABLE.read_text(encoding="utf-8")):
        for typed, named in section["rows"].items():
            names = named if isinstance(named, list) else [key_of(typed.split()[-1]) if named is None else named]
            yield Row(
                section["command"],
                typed,
                tuple(map(str, names)),
                section.get("reads") == "data",
                section.get("ends") == "warning",
            )


def raising(what: str) -> Any:
    def stop(*args: Any, **kwargs: Any) -> Any:
        raise Accepted(what)

    return stop


@pytest.fixture
def places(finished, tmp_path) -> dict[str, str]:
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    names = {"FILE": "file", "EMPTY": "empty", "NOWHERE": "nowhere", "NEW": "new"}
    return {"RUN": str(finished), **{key: str(tmp_path / name) for key, name in names.items()}}


def files_below(*folders: Path) -> set[tuple[str, int]]:
    return {(str(path), path.stat().st_mtime_ns) for folder in folders for path in folder.rglob("*")}


def run_row(row: Row, places: dict[str, str], folder: Path) -> tuple[Outcome, list[str]]:
    """Calls the command in this process; returns what it left behind, and the warnings."""
    typed = string.Template(row.typed).safe_substitute(places)
    words = [*SETTINGS.get(row.command, ()), *shlex.split(typed)]
    if row.command in ("ekd-train", "ekd-teach"):
        words = [f"teachers.store={folder / 'store'}", f"hydra.run.dir={folder / 'run'}", *words]
        words.sort(key=lambda word: not re.match("-m$|--config", word))  # argparse: no words on both sides of a flag
    main = importlib.import_module(f"ekd_lightning.cli.{row.command.removeprefix('ekd-')}").main
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for name in EXPENSIVE:
            patch.setattr(name, raising(name))
        if not row.reads_data:
            patch.setattr("ekd_lightning.data.catalog._LOADED", {})
            patch.setattr("ekd_lightning.data.catalog.read_digits", raising("images were read"))
        # What takes most of the time: the garbage collector, and composing once more to look for hydra.mode.
        patch.setattr("ekd_lightning.pipeline.run._free_memory", lambda: None)
        patch.setattr("hydra._internal.hydra.Hydra.get_mode", lambda *_, **__: None)
        outcome = _call(main, [row.command, *words], folder / "run")
    return outcome, [str(one.message) for one in caught]


def parameters() -> list[Any]:
    """All rows; every fourth runs with all tests, the whole table by `make attacks`."""
    return [
        pytest.param(row, id=f"{row.command} {row.typed}", marks=[pytest.mark.attacks] * (place % 4 > 0))
        for place, row in enumerate(read_rows())
    ]


@pytest.mark.parametrize("row", parameters())
def test_bad_input(row, places, finished, tmp_path):
    folders = (tmp_path, finished)
    before = files_below(*folders)
    outcome, warned = run_row(row, places, tmp_path)
    named = [string.Template(name).safe_substitute(places) for name in row.named]
    if row.warns:
        assert isinstance(outcome.error, Accepted), outcome.err
        assert any(all(name in line for name in named) for line in (*warned, *outcome.out.splitlines())), warned
        return
    assert outcome.code == 2, outcome.err
    *said, line = outcome.err.splitlines()  # argparse's usage, or how far the command has come
    assert not said or row.command not in ("ekd-train", "ekd-teach"), outcome.err
    assert [part for part in said if re.search("error|Traceback", part, re.IGNORECASE)] == [], outcome.err
    assert line.startswith(f"{row.command}: error: "), outcome.err
    assert [name for name in named if name not in line] == [], line
    assert files_below(*folders) == before
