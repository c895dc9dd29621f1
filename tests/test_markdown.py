"""Text of others in Markdown, read back by a parser of CommonMark with tables: it is text, and all of it."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from jinja2 import UndefinedError
from markdown_it import MarkdownIt

from ekd_lightning import markdown as md

PARSER = MarkdownIt("commonmark").enable(["table", "strikethrough"])
HOSTILE = (
    "a\n\n# heading\n\nb",
    "# heading",
    "> quotation",
    "- item",
    "+ item",
    "1. item",
    "2) item",
    "===",
    "---",
    "***",
    "| a | b |",
    "a\\| b",
    "`code`",
    "``a`",
    "<script>hurt()</script>",
    "\\<script>hurt()</script>",
    "<!-- hidden",
    "<http://a.b>",
    "![seen](http://a.b/c.png)",
    "[text](javascript:hurt())",
    "[text][0]",
    "[0]: http://a.b",
    "&lt;b&gt; &#60; &copy;",
    "**bold** __bold__ _it_ *it* ~~gone~~",
    "kd_mean a_b_c _a",
    "$$ {{ answer }} {% if %}",
    "end\\",
    "~~~",
    "\t code",
)
LETTERS = st.text(st.sampled_from(list("ab1 \\`*_[]()<>!#|&;:~-+=.\"'\n\t/$")), max_size=24)


def plain(text: str) -> str:
    return " ".join(text.split())


def read(tokens) -> str:
    """The text of inline tokens, which are nothing but text."""
    assert {token.type for token in tokens} <= {"text", "text_special"}
    return "".join(token.content for token in tokens)


@given(LETTERS)
@pytest.mark.parametrize("before", ["", "words ", "- "])
def test_prose_is_read_as_the_text_it_was(before, text):
    tokens = PARSER.parse(before + md.prose(text))
    (inline,) = [token for token in tokens if token.type == "inline"] or [None]
    kinds = {token.type.rpartition("_")[0] for token in tokens if token.type != "inline"}
    assert kinds <= ({"bullet_list", "list_item", "paragraph"} if before == "- " else {"paragraph"})
    if inline is not None:
        assert read(inline.children) == plain(before.removeprefix("- ") + plain(text))


for text in HOSTILE:
    test_prose_is_read_as_the_text_it_was = example(text=text)(test_prose_is_read_as_the_text_it_was)


@given(LETTERS)
def test_code_is_read_as_the_text_it_was(text):
    (inline,) = [token for token in PARSER.parse(f"a {md.code(text)} b") if token.type == "inline"]
    if plain(text):
        (span,) = [token for token in inline.children if token.type == "code_inline"]
        assert span.content == plain(text)


@given(st.lists(LETTERS, min_size=1, max_size=4), st.lists(LETTERS, min_size=1, max_size=4))
def test_a_table_has_its_cells_and_no_others(heads, row):
    row = [*row, *[""] * len(heads)][: len(heads)]
    tokens = PARSER.parse(md.table(heads, [row, map(md.code, row)]))
    assert {token.type.rpartition("_")[0] for token in tokens if token.type != "inline"} <= {
        "table", "thead", "tbody", "tr", "th", "td",
    }  # fmt: skip
    cells = [token.children for token in tokens if token.type == "inline"]
    assert [read(cell) for cell in cells[: 2 * len(heads)]] == [plain(text) for text in (*heads, *row)]
    codes = ["".join(token.content for token in cell) for cell in cells[2 * len(heads) :]]
    assert codes == [plain(text) if plain(text) else "``" for text in row]


@given(LETTERS)
def test_an_image_is_one_with_the_text_beside_it(text):
    (inline,) = [token for token in PARSER.parse(f"a {md.image('x.svg', text)}") if token.type == "inline"]
    (image,) = [token for token in inline.children if token.type == "image"]
    assert image.attrs["src"] == "x.svg"
    assert image.content.replace("\\", "") == plain(text).translate({91: 40, 93: 41}).replace("\\", "")


def test_what_a_template_prints_is_prose_and_what_it_lacks_is_an_error():
    values = {"export": "x", "report": "y"}
    with pytest.raises(UndefinedError):
        md.fill("ekd_lightning.reporting", "model_card.md", values)
