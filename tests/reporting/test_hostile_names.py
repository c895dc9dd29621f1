"""Names from records that would be markup: in a report, a model card and a page they are text."""

from __future__ import annotations

import re
from collections import Counter
from html.parser import HTMLParser

import pytest
import yaml
from made_runs import TEACHERS
from markdown_it import MarkdownIt
from rich_runs import EVIL_NAME, evil
from test_model_card import export

from ekd_lightning.reporting import figures, page, report_files, tables
from ekd_lightning.reporting.blocks import block_of_rows
from ekd_lightning.reporting.model_card import model_card

PARSER = MarkdownIt("commonmark").enable("table")


def harmless(markdown, headings):
    """Nothing of a Markdown page is HTML, a link or an image, and its headings are as many as they should be."""
    tokens = PARSER.parse(markdown)
    inside = [child for token in tokens if token.type == "inline" for child in token.children]
    kinds = {token.type for token in [*tokens, *inside]}
    assert not kinds & {"html_block", "html_inline", "link_open", "image", "blockquote_open"}
    assert sum(token.type == "heading_open" for token in tokens) == headings
    return tokens


def test_the_tables_of_a_report(hostile_report):
    text = report_files.markdown(hostile_report)
    heads = [line for line in text.splitlines() if line.startswith("#")]
    assert len(heads) == len(hostile_report.blocks) + 4  # title, how to read, notes, runs that do not count
    harmless(text, len(heads))


def test_the_table_of_a_study(hostile_report):
    block = block_of_rows(EVIL_NAME, 0.1, {EVIL_NAME: hostile_report.groups[0].runs})
    tokens = harmless(tables.markdown(tables.rows(block, [EVIL_NAME]), tables.STUDY, {EVIL_NAME: EVIL_NAME}), 0)
    assert sum(token.type == "tr_open" for token in tokens) == 2


def test_the_list_of_figures(hostile_report, tmp_path):
    pytest.importorskip("matplotlib")
    figures.write_figures(hostile_report, tmp_path, ["svg"])
    text = (tmp_path / "figures.md").read_text()
    images = re.findall(r"^!\[.*\]\([A-Za-z0-9._-]+\.svg\)$", text, re.MULTILINE)
    assert images
    harmless("\n".join(line for line in text.splitlines() if not line.startswith("![")), 1)
    for path in tmp_path.glob("*.svg"):
        assert "<script" not in path.read_text()


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


def test_the_page_has_the_elements_of_any_other(hostile_report, rich_report):
    pytest.importorskip("plotly")
    found = []
    for one in (hostile_report, rich_report):
        reader = Tags()
        reader.feed(page.page(one))
        found.append(Counter(tag for tag, _ in reader.tags))
        assert not [name for _, attributes in reader.tags for name in attributes if name.startswith("on")]
    assert found[0].keys() <= found[1].keys()
    assert found[0]["script"] == found[1]["script"]


def test_a_model_card():
    record = export()
    record["method"]["teachers"] = [{**TEACHERS[0], "network": "n", "trained_on": "all"}]
    plain = model_card(record, {"partial": True})
    record = {**evil(record), "files": record["files"]}
    record["spec"]["ensemble"] = "mean_probs"
    card = model_card(record, {"efficiency_device": EVIL_NAME, "corruption_mce": 0.1, "corruption_source": EVIL_NAME})
    headers = [yaml.safe_load(text.split("---\n", 2)[1]) for text in (card, plain)]
    assert headers[0].keys() == headers[1].keys() - {"datasets"}  # it is none of the hub's
    bodies = [text.split("---\n", 2)[2] for text in (card, plain)]
    expected = PARSER.parse(bodies[1])
    tokens = harmless(bodies[0], sum(token.type == "heading_open" for token in expected))
    code = [[token.content for token in page if token.type == "fence"] for page in (tokens, expected)]
    assert code[0] == code[1]
