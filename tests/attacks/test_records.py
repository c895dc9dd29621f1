"""Parsers of records and overrides: what was written comes back, and of anything else they say what it is."""

from __future__ import annotations

import contextlib
import json
import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from made_runs import config, result
from omegaconf import OmegaConf

from ekd_lightning.config.config import read_config, recorded_settings
from ekd_lightning.config.internals import parse_override
from ekd_lightning.config.overrides import check_typed, expand_resume, key_of, override
from ekd_lightning.errors import UserError
from ekd_lightning.files import read_json, read_yaml, write_json, write_yaml
from ekd_lightning.pipeline.export import read_export
from ekd_lightning.reporting.details import damage
from ekd_lightning.reporting.report import make_report, summary
from ekd_lightning.reporting.report_files import runs_csv
from ekd_lightning.runs.collection import RunEntry, collect
from ekd_lightning.runs.directory import RunDirectory
from ekd_lightning.runs.writer import RunWriter
from ekd_lightning.studies.rows import read_tuned
from ekd_lightning.studies.space import read_space
from ekd_lightning.studies.study import read_study
from ekd_lightning.studies.sweep import read_sweep

many = settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))

TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=8)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | TEXT
ANYTHING = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3))


@st.composite
def changed(draw: st.DrawFn, document: Any) -> Any:
    """A document of which a few values, at any depth, are something else, or gone."""
    document = json.loads(json.dumps(document))
    for _ in range(draw(st.integers(1, 3))):
        part, places = document, []
        while isinstance(part, (dict, list)) and part:
            key = draw(st.sampled_from(sorted(part) if isinstance(part, dict) else range(len(part))))
            places.append((part, key))
            part = part[key]
        if not places:
            return draw(ANYTHING)
        parent, key = draw(st.sampled_from(places))
        if draw(st.integers(0, 4)) == 0:
            del parent[key]
        else:
            parent[key] = draw(ANYTHING)
    return document


# -- what was written comes back --------------------------------------------------------------------------------------


@many
@given(st.dictionaries(TEXT, ANYTHING, max_size=4))
@example({"a": {"ekd": [1e308, -0.0]}})
def test_json_comes_back(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "record.json"
    write_json(path, content)

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    assert read_json(path) == plain(content)


@many
@given(st.dictionaries(TEXT, ANYTHING, max_size=4))
def test_yaml_comes_back(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "record.yaml"
    text = yaml.safe_dump(content, allow_unicode=True)
    write_yaml(path, text)
    assert repr(read_yaml(path)) == repr(yaml.safe_load(text))


@many
@given(st.from_regex(r"[+]{0,2}[a-z_]+(\.[a-z_]+){0,3}", fullmatch=True), LEAVES)
@example("a", "null")
@example("a", "1_000")
@example("a", -0.0)
def test_an_override_of_any_value_is_read_as_that_value(key, value):
    if isinstance(value, str) and "\0" in value:
        return
    word = override(key, value)
    parsed = parse_override(word)
    found = OmegaConf.create({"x": parsed.value()}).x
    assert key_of(word) == key.lstrip("+") == parsed.key_or_group
    assert repr(found) == repr(value)


@many
@given(TEXT)
@example("my data (1)")
@example("/home/józef/d")
@example("a\\'${b}")
def test_what_a_text_without_quotes_is_told_to_be_typed_as_is_read_as_that_text(text):
    try:
        check_typed([f"method.name={text}"])
    except UserError as error:
        (word,) = shlex.split(str(error).rpartition("; its text must be quoted: ")[2])
        assert OmegaConf.create({"x": parse_override(word).value()}).x == text
        assert check_typed([word]) is None


# -- anything else is refused by name ---------------------------------------------------------------------------------

RESULT = result()
STATUS = {"format": 2, "state": "done", "error": None, "time": "2026-01-01T00:00:00+00:00"}
PROVENANCE = {"started": "2026-01-01", "resumed": [{"started": "2026-01-02"}], "working_directory": "/", "data": {}}
STUDY = {
    "rows": {"ce": {"overrides": ["method=ce"], "without": []}},
    "fractions": [0.1],
    "seeds": [0],
    "common": ["data=digits"],
    "data": "digits",
}
SWEEP = {
    "started": "2026",
    "config_name": "train",
    "config_dir": None,
    "hydra": ["hydra/launcher=basic"],
    "common": [],
    "jobs": [{"directory": "0", "overrides": ["seed=0"]}],
}
TUNED = {"method": "kd_mean", "overrides": ["method.temperature=2"], "protocol": {"data": "digits", "fraction": 0.1}}
SPACE = {"method.temperature": {"low": 1, "high": 4.0, "log": True}, "recipe.lr": {"choices": [1, 2]}}
EXPORT = {"files": {"student.safetensors": {}}, "student": {"sha256": "0"}}

DOCUMENTS: dict[str, tuple[str, Any, tuple[Callable[[Path], Any], ...]]] = {
    "status": ("status.json", STATUS, (lambda run: RunEntry.read(run, "x"), lambda run: RunDirectory(run).holds_run())),
    "result": (
        "result.json",
        RESULT,
        (lambda run: RunDirectory(run).finished_result(), lambda run: RunWriter(run).refuse_complete(2)),
    ),
    "config": (
        "config.yaml",
        config(RESULT),
        (
            read_config,
            lambda run: RunDirectory(run).section("data"),
            lambda run: recorded_settings(RunDirectory(run)),
            lambda run: expand_resume(["ekd-train", f"resume={run}"]),
        ),
    ),
    "overrides": (
        ".hydra/overrides.yaml",
        ["method=ekd", "seed=1"],
        (lambda run: RunDirectory(run).overrides(), lambda run: expand_resume(["ekd-train", f"resume={run}"])),
    ),
    "provenance": (
        "provenance.json",
        PROVENANCE,
        (
            lambda run: RunDirectory(run).started(),
            lambda run: RunDirectory(run).record(),
            lambda run: recorded_settings(RunDirectory(run)),
        ),
    ),
    "study": ("study.json", STUDY, (read_study,)),
    "sweep": ("sweep.json", SWEEP, (read_sweep,)),
    "tuned": ("tuned.yaml", TUNED, (lambda run: read_tuned(run / "tuned.yaml"),)),
    "space": ("space.yaml", SPACE, (lambda run: read_space(run / "space.yaml"),)),
    "export": ("export.json", EXPORT, (read_export,)),
}
"""Record -> its file in a folder, a whole document, and what reads it."""


def _folder(root: Path) -> Path:
    """A folder with all records."""
    for name, document, _ in DOCUMENTS.values():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document))
    return root


@pytest.mark.parametrize("record", DOCUMENTS)
@many
@given(data=st.data())
def test_any_document_in_place_of_a_record_is_read_or_refused(tmp_path_factory, record, data):
    name, document, readers = DOCUMENTS[record]
    root = _folder(tmp_path_factory.getbasetemp() / "documents")
    found = data.draw(ANYTHING | changed(document))
    (root / name).write_text(json.dumps(found) if name.endswith("json") else yaml.safe_dump(found))
    for read in readers:
        with contextlib.suppress(UserError):
            read(root)


@many
@given(content=st.binary(max_size=60), record=st.sampled_from(sorted(DOCUMENTS)))
def test_any_bytes_in_place_of_a_record_are_refused(tmp_path_factory, content, record):
    name, _, readers = DOCUMENTS[record]
    root = _folder(tmp_path_factory.getbasetemp() / "documents")
    (root / name).write_bytes(content)
    for read in readers:
        with contextlib.suppress(UserError):
            read(root)


@many
@given(first=changed(RESULT), provenance=changed(PROVENANCE), settings=changed(config(RESULT)))
def test_a_report_of_any_records_is_made_or_refused(tmp_path_factory, first, provenance, settings):
    root = tmp_path_factory.getbasetemp() / "reported"
    for name, made in (("a", first), ("b", result(seed=1))):
        (root / name).mkdir(parents=True, exist_ok=True)
        (root / name / "status.json").write_text(json.dumps(STATUS))
        (root / name / "result.json").write_text(json.dumps(made))
        (root / name / "provenance.json").write_text(json.dumps(provenance))
        (root / name / "config.yaml").write_text(yaml.safe_dump(settings))
    with contextlib.suppress(UserError):
        report = make_report(collect([root]))
        summary(report)
        runs_csv(report)
        for run in report.collection.runs:
            damage(run)
