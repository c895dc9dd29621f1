"""The page as text: well-formed, self-contained, and harmless whatever runs have recorded."""

from __future__ import annotations

import base64
import gzip
import json
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_runs import collection, result, study, write_run
from rich_runs import EVIL
from test_figures import contrast

from ekd_lightning.reporting import page
from ekd_lightning.reporting.estimates import points
from ekd_lightning.reporting.page import plain, short_paths
from ekd_lightning.reporting.report import make_report
from ekd_lightning.runs.collection import collect

VOID = {"meta", "link", "input", "br", "img", "hr"}


class Reader(HTMLParser):
    """Elements of a page; complains of one that is not closed, or closed twice."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.content: dict[str, str] = {}

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        name = self.found[-1][1].get("id") if self.open and self.open[-1] == "script" else None
        if name:
            self.content[name] = self.content.get(name, "") + data


def read(text):
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert not reader.open
    return reader


@pytest.fixture(scope="module")
def text(rich_report):
    pytest.importorskip("plotly")
    return page.page(rich_report)


@pytest.fixture(scope="module")
def reader(text):
    return read(text)


def unpack(packed):
    return gzip.decompress(base64.b64decode(packed)).decode()


def test_it_is_one_well_formed_document(reader):
    assert [tag for tag, _ in reader.found].count("html") == 1
    ids = [attributes["id"] for _, attributes in reader.found if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_every_reference_is_inside_the_page(reader):
    ids = {attributes.get("id") for _, attributes in reader.found}
    for tag, attributes in reader.found:
        for name in ("src", "href", "action", "srcset", "poster", "data"):
            value = attributes.get(name)
            if value is not None:
                assert value == "data:," or value[1:] in ids, (tag, value)
        for name in ("aria-labelledby", "aria-describedby"):
            assert set((attributes.get(name) or "").split()) <= ids


def test_nothing_may_be_loaded(reader, text):
    policy = next(a["content"] for _, a in reader.found if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; ")
    assert not re.findall(r"https?:", policy)
    own = text.replace(reader.content["plotly"], "")
    assert not re.findall(r"@import|url\((?!data:)|\bfetch\(|XMLHttpRequest|https?://(?!www\.w3\.org/2000/svg)", own)


def test_what_runs_recorded_is_never_markup(text, reader):
    assert EVIL.splitlines()[0] not in text
    assert not [tag for tag, _ in reader.found if tag == "img"]
    payload = json.loads(reader.content["payload"])
    assert EVIL in [run["error"] for run in payload["runs"]]
    assert "Study &lt;b&gt;&amp;&lt;/b&gt; report" in text


def test_everything_is_in_it(reader, rich_report):
    payload = json.loads(reader.content["payload"])
    details = json.loads(unpack(reader.content["details"]))
    assert len(payload["runs"]) == len(rich_report.collection.runs) == len(details)
    assert {run["name"] for run in payload["runs"]} == set(details)
    assert "name: ekd" in details["ekd-f0.1-s0"]["config"]
    for run in rich_report.collection.runs:
        shown = details[run.name]["result"]
        assert shown == {} if run.result is None else shown["test_accuracy"] == run.result["test_accuracy"]
    in_groups = {run for group in payload["groups"] for run in group["runs"]}
    assert in_groups == set(details)
    assert "Plotly" in unpack(reader.content["plotly"])


def test_folders_of_the_machine_are_not_shown(reader):
    details = unpack(reader.content["details"])
    assert "/home" not in details + reader.content["payload"]
    assert "\\u2026/cifar" in details
    assert short_paths("no memory at /home/x/y.py:3") == "no memory at …/y.py:3"
    assert short_paths("3/4, and/or, a://b/c") == "3/4, and/or, a://b/c"


@settings(max_examples=40)
@given(st.recursive(st.none() | st.booleans() | st.text() | st.floats(allow_nan=False, allow_infinity=False),
                    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8))  # fmt: skip
def test_json_survives_a_script_element(content):
    written = page.script_json(content)
    assert json.loads(written) == content
    assert not set(written) & set("<>&\u2028\u2029")
    assert read(f'<script id="x">{written}</script>').content["x"] == written


def test_what_is_no_number_is_null():
    found = plain((None, float("nan"), float("inf"), 2.0, 0.1234567, True, "x"))
    assert found == [None, None, None, 2, 0.123457, True, "x"]


def test_without_a_run_that_is_done_there_is_still_a_page(tmp_path):
    pytest.importorskip("plotly")
    write_run(tmp_path / "only", result(), "failed", error=EVIL)
    report = make_report(collect([tmp_path]))
    read(page.page(report))


def themes():
    """Colours of the two themes, by name."""
    css = page._asset("page.css")
    found = {}
    for name, block in (("light", r":root \{(.*?)\}"), ("dark", r':root\[data-theme="dark"\] \{(.*?)\}')):
        body = re.search(block, css, re.DOTALL).group(1)
        found[name] = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", body))
    return found


def test_the_answer_of_a_single_run_has_no_empty_half(tmp_path):
    pytest.importorskip("plotly")
    write_run(tmp_path / "one", result("ekd"))
    made = page.page(make_report(collect([tmp_path])))
    _, _, beside = made.partition('<div class="beside">')
    assert re.match(r"\s*<div><details open><summary>Cost, choices and caveats</summary>", beside)
    assert "1 run (1 done), 1 setting with results" in made


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_can_be_read_in_both_themes(theme):
    colours = themes()[theme]
    grounds = [colours[name] for name in ("ground", "raised", "sunk")]
    for ink in ("ink", "soft", "accent", "good", "bad"):
        assert min(contrast(colours[ink], ground) for ground in grounds) >= 4.5, ink
    assert contrast(colours["on-accent"], colours["accent"]) >= 4.5
    assert min(contrast(colours[ink], colours["bad-tint"]) for ink in ("ink", "bad", "accent")) >= 4.5
    assert min(contrast(colours["edge"], ground) for ground in grounds[:2]) >= 3  # borders of what can be pressed


def test_verdicts_are_those_of_the_answer(text, rich_report):
    table = re.search(r'<table id="verdicts">.*?</table>', text, re.DOTALL).group(0)
    marks = {"ahead": "▲ ahead", "behind": "▼ behind", "undecided": "≈ undecided", "not_enough": "too few runs"}
    for verdict, mark in marks.items():
        findings = [f for told in rich_report.answers for f in told.findings if f.verdict == verdict]
        assert table.count(mark) == len(findings)
    shown = {f.other.label for told in rich_report.answers for f in told.findings}
    assert set(re.findall(r'class="sub">(.*?), n = \d', table)) == shown


def test_a_control_that_one_block_lacks_is_an_empty_cell():
    pytest.importorskip("plotly")
    few = study({"ekd": (0.7, 0.71, 0.72), "ce": (0.6, 0.61, 0.62)}, fraction=0.5)
    report = make_report(collection(*study(), *few))
    made = page.page(report)
    roles = {finding.role for answer in report.answers for finding in answer.findings}
    found = sum(len(answer.findings) for answer in report.answers)
    assert len(report.answers) == 2
    assert made.count('<td class="soft">no such run</td>') == 2 * len(roles) - found > 0


def test_the_first_table_agrees_with_the_answer_and_the_table_of_results():
    report = make_report(collection(*study(), *study({"fitnet": (0.5, 0.53, 0.51), "kd": (0.7, 0.71, 0.75)}, K=1)))
    (answer,) = report.answers
    rows = {row["group"].label: row for row in page.overview(report, answer)}
    assert list(rows) == sorted(rows, key=lambda label: -rows[label]["group"].mean("test_accuracy"))
    assert rows["ekd"]["verdict"] == rows["ekd"]["difference"] == ""
    for finding in answer.findings:
        row = rows[finding.other.label]
        assert (row["verdict"], row["difference"]) == (finding.verdict, points(finding.difference.mean))
        assert page.ROLES[finding.role] in row["words"]
    others = rows.keys() - {"ekd"} - {finding.other.label for finding in answer.findings}
    assert others == {"fitnet"}
    theirs = next(row for row in report.rows[answer.block.key] if row.group.label == "fitnet").differences["ekd"]
    assert rows["fitnet"]["difference"] == points(-theirs.mean)
    assert rows["fitnet"]["between"] == f"[{points(-theirs.high)}, {points(-theirs.low)}]"
