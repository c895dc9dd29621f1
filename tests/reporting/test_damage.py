"""Damaged records and places that cannot be written: named in one line, and nothing else suffers."""

from __future__ import annotations

import csv
import io
import json
import resource

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_runs import config, write_study
from rich_runs import rich_result, write_rich

from ekd_lightning.cli.report import main
from ekd_lightning.files import write_json, write_yaml
from ekd_lightning.reporting import page, report_files
from ekd_lightning.reporting.report import kind_of_machine, make_report, summary
from ekd_lightning.runs.collection import collect

TABLES = ("--no-page", "--no-figures")
FILES = ("status.json", "result.json", "config.yaml", "provenance.json", "metrics.csv", "arrays.npz")
CONTENTS = {
    "half": lambda whole: whole[: len(whole) // 2],
    "empty": lambda whole: b"",
    "list": lambda whole: b"[1, 2]",
    "scalar": lambda whole: b"3",
    "tag": lambda whole: b"!!python/object/apply:os.system [touch hurt]",
    "bytes": lambda whole: b"\xff\xfe\x00",
}


@pytest.fixture
def runs(tmp_path):
    """A study, and a run with every file, each as it is written today."""
    write_study(tmp_path / "in", {"ce": (0.6, 0.61), "kd_mean": (0.7, 0.71)})
    made, run = rich_result("ekd", 0, 0.72), tmp_path / "in" / "bad"
    write_rich(run, made)
    status = json.loads((run / "status.json").read_text())
    for name, content in (("status.json", status), ("result.json", made), ("provenance.json", {"git": {}})):
        write_json(run / name, content)
    write_yaml(run / "config.yaml", json.dumps(config(made)))
    return tmp_path / "in"


@pytest.mark.parametrize("kind", CONTENTS)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_and_the_rest_is_reported(runs, tmp_path, capsys, monkeypatch, name, kind):
    monkeypatch.chdir(tmp_path)
    path = runs / "bad" / name
    path.write_bytes(CONTENTS[kind](path.read_bytes()))
    main([str(runs), "-o", str(tmp_path / "out"), *TABLES])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"ekd-report: bad/{name}: ")
    assert line.removeprefix("ekd-report: ") in (tmp_path / "out" / "summary.json").read_text().replace('\\"', '"')
    rows = {row["run"]: row for row in csv.DictReader(io.StringIO((tmp_path / "out" / "runs.csv").read_text()))}
    assert sum(row["counts"] == "True" for row in rows.values()) == 4 + (name not in ("status.json", "result.json"))
    drawn = page.payload(make_report(collect([runs])))["groups"]
    bad = [group for group in drawn if group["method"] == "ekd" and group["n"]]
    assert [bool(group["curves"]) for group in bad] == [name != "metrics.csv"] * len(bad)
    assert [bool(group["reliability"]) for group in bad] == [name != "arrays.npz"] * len(bad)
    assert not (tmp_path / "hurt").exists()


@pytest.mark.parametrize(
    "start",
    [{"resumed": "x"}, {"resumed": ["x"]}, {"resumed": [None]}, {"hardware": "x"}, {"resumed": [{"hardware": ["x"]}]}],
)
def test_machines_of_starts_that_are_none_are_unknown(runs, start):
    path = runs / "bad" / "provenance.json"
    path.write_text(json.dumps({"hardware": {"cpu": "A"}, **start}))
    (bad,) = (run for run in collect([runs]).runs if run.name == "bad")
    assert kind_of_machine(bad.provenance) == "unknown hardware"


def test_arrays_are_never_unpickled(runs):
    np.savez(runs / "bad" / "arrays.npz", reliability_count=np.array([{}], dtype=object))
    (note,) = make_report(collect([runs])).notes
    assert note.startswith("bad/arrays.npz: damaged (Object arrays cannot be loaded")


def test_half_a_curve_is_none(runs):
    for content in ("step\n1\n", "epoch,val/accuracy\nx,y\n", "epoch,val/accuracy\n0,0.5\n1,0.", "epoch\n1e999\n"):
        (runs / "bad" / "metrics.csv").write_text(content)
        (note,) = make_report(collect([runs])).notes
        assert note.startswith("bad/metrics.csv: damaged (")
        assert note.endswith("; its curves are left out")


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(), inner, max_size=2))


def places(value, path=()):
    """Paths to everything inside a value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def put(value, path, new):
    """A value with another one at a place inside it."""
    if not path:
        return new
    made = dict(value) if isinstance(value, dict) else list(value)
    made[path[0]] = put(value[path[0]], path[1:], new)
    return made


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_whatever_stands_in_a_record_the_report_is_made_or_the_record_is_named(runs, data):
    """Records without a checksum, as by hand or of earlier versions, with any value at any place."""
    name = data.draw(st.sampled_from(["result.json", "result.json", "provenance.json", "status.json"]))
    path = runs / "bad" / name
    whole = path.read_bytes()
    content = json.loads(whole)
    content.pop("ekd_sha256", None)
    where = data.draw(st.sampled_from(list(places(content))))
    try:
        path.write_text(json.dumps(put(content, where, data.draw(JSON))))
        found = make_report(collect([runs]))
        json.dumps(summary(found), allow_nan=False)
        assert "bad" in report_files.markdown(found) + report_files.runs_csv(found)
        page.script_json([page.payload(found), page.records(found)])
    finally:
        path.write_bytes(whole)


# -- places that cannot be written ----------------------------------------------------------------------


def refused(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    return line


PLACES = {
    "/proc/x": "/proc/x: cannot make a directory here",
    "/proc/x/y": "/proc/x: cannot make a directory here",
    "/dev/null/x": "/dev/null/x: Not a directory",
    "file/x": "file/x: Not a directory",
}


@pytest.mark.parametrize(("place", "said"), PLACES.items())
def test_a_place_that_cannot_be_is_named(runs, tmp_path, capsys, monkeypatch, place, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    assert refused(capsys, runs, "-o", place, *TABLES) == f"ekd-report: error: {said}"


@pytest.mark.parametrize("most", [100, 5_000, 400_000])
@pytest.mark.parametrize("earlier", [False, True])
def test_a_disk_that_is_full_leaves_the_old_report_or_none(runs, tmp_path, capsys, most, earlier):
    """A limit on the size of files, which a write meets as it meets a full disk: at the tables, a figure, the page."""
    out = tmp_path / "out"
    if earlier:
        main([str(runs), "-o", str(out), "--title", "Old", "--formats", "svg"])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        capsys.readouterr()
        line = refused(capsys, runs, "-o", out, "--force", "--formats", "png" if most > 5_000 else "svg")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert line == f"ekd-report: error: {out}: cannot be written (File too large)"
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert out.exists() == earlier
