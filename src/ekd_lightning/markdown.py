"""Markdown of recorded values: escaped text, code spans, images, tables, and templates filled with them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined

_MARKUP = re.compile(r"[\\`*]|<(?=[A-Za-z/!?])|&(?=#?\w+;)|(?<![^\W_])_|_(?![^\W_])|~(?=~)|\](?=[(\[:])")
"""Characters that are markup in CommonMark or GitHub's dialect. An underscore inside a word is plain text, and so is a
closing bracket unless the next character makes a link of it."""
_START = re.compile(r"^(?:(\d{1,9})(?=[.)](?:\s|$))|(?=[#>]|([-+=])(?:\2|\s|$)))")
"""Beginnings that make a line a heading, a quotation, an item of a list or a rule."""


class Markdown(str):
    """Text that is Markdown already."""


def prose(text: object) -> Markdown:
    """Escapes a text, joined to one line, so that none of it becomes markup, HTML, a heading or a link."""
    if isinstance(text, Markdown):
        return text
    return Markdown(_START.sub(r"\1\\", _MARKUP.sub(r"\\\g<0>", " ".join(str(text).split()))))


def code(text: object) -> Markdown:
    """Returns a text, joined to one line, as a code span; it may contain backticks."""
    line = " ".join(str(text).split())
    longest = max(map(len, re.findall("`+", line)), default=0)
    fence, space = "`" * (longest + 1), " " if longest else ""
    return Markdown(f"{fence}{space}{line}{space}{fence}")


def image(path: str, text: object) -> Markdown:
    """Returns an image with an alternative text."""
    alternative = prose(str(text).translate({ord("["): "(", ord("]"): ")"}))
    return Markdown(f"![{alternative}]({path})")


def table(heads: Iterable[object], rows: Iterable[Iterable[object]]) -> Markdown:
    """Returns a table; cells are escaped by `prose` unless they are `Markdown` already."""
    names = list(heads)
    lines: list[Iterable[object]] = [names, [Markdown("---")] * len(names), *rows]
    texts = [[" ".join(prose(cell).split()).replace("|", "\\|") for cell in line] for line in lines]
    return Markdown("".join(f"| {' | '.join(line)} |\n" for line in texts))


def known(value: float | None, form: str) -> str:
    """Formats a number, a percentage as `51.20 %`; None becomes `not known`."""
    return "not known" if value is None else format(value, form).replace("%", " %")


def fill(package: str, template: str, values: Mapping[str, Any]) -> str:
    """Fills a Jinja template; its values are escaped by `prose` unless they are `Markdown` already.

    The template is the file `assets/<template>` of a package. Filters: `code`, `known`, and `fmt`, which formats a
    number, e.g. `{{ steps | fmt(",") }}`; a function: `table`.

    Raises:
        jinja2.UndefinedError: If the template uses a name without a value.
    """
    environment = Environment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, finalize=prose)
    environment.filters |= {"code": code, "fmt": format, "known": known}
    text = (resources.files(package) / "assets" / template).read_text(encoding="utf-8")
    return environment.from_string(text, {"table": table}).render(values).rstrip("\n") + "\n"
