"""Markdown around what was recorded: text that stays text, code spans, tables, and templates filled with these."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined

_MARKUP = re.compile(r"[\\`*]|<(?=[A-Za-z/!?])|&(?=#?\w+;)|(?<![^\W_])_|_(?![^\W_])|~(?=~)|\](?=[(\[:])")
"""What CommonMark and GitHub's dialect read as more than a letter; an underscore inside a word is one.
Brackets make a link with what follows them."""
_START = re.compile(r"^(?:(\d{1,9})(?=[.)](?:\s|$))|(?=[#>]|([-+=])(?:\2|\s|$)))")
"""How a line begins that would be a heading, a quotation, an item of a list or a rule."""


class Markdown(str):
    """Text that is Markdown already."""


def prose(text: object) -> Markdown:
    """Text in one line that reads as it is: no markup, HTML, heading or link is made of it."""
    if isinstance(text, Markdown):
        return text
    return Markdown(_START.sub(r"\1\\", _MARKUP.sub(r"\\\g<0>", " ".join(str(text).split()))))


def code(text: object) -> Markdown:
    """Text in one line as a code span, whatever backticks it has."""
    line = " ".join(str(text).split())
    longest = max(map(len, re.findall("`+", line)), default=0)
    fence, space = "`" * (longest + 1), " " if longest else ""
    return Markdown(f"{fence}{space}{line}{space}{fence}")


def image(path: str, text: object) -> Markdown:
    """An image with an alternative text."""
    alternative = prose(str(text).translate({ord("["): "(", ord("]"): ")"}))
    return Markdown(f"![{alternative}]({path})")


def table(heads: Iterable[object], rows: Iterable[Iterable[object]]) -> Markdown:
    """A table; its cells are `prose`, unless they are Markdown already."""
    names = list(heads)
    lines: list[Iterable[object]] = [names, [Markdown("---")] * len(names), *rows]
    texts = [[" ".join(prose(cell).split()).replace("|", "\\|") for cell in line] for line in lines]
    return Markdown("".join(f"| {' | '.join(line)} |\n" for line in texts))


def known(value: float | None, form: str) -> str:
    """A number in a format, a share as `51.20 %`; or that it is not known."""
    return "not known" if value is None else format(value, form).replace("%", " %")


def fill(package: str, template: str, values: Mapping[str, Any]) -> str:
    """Fills a Jinja template; what it prints is `prose`, unless it is Markdown already.

    Filters: `code`, `known`, and `fmt`, which formats a number, e.g. `{{ steps | fmt(",") }}`; a function: `table`.

    Args:
        package: Which holds the template as `assets/<template>`.
        template: Its name.
        values: What it prints.

    Raises:
        jinja2.UndefinedError: For a name that has no value.
    """
    environment = Environment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, finalize=prose)
    environment.filters |= {"code": code, "fmt": format, "known": known}
    text = (resources.files(package) / "assets" / template).read_text(encoding="utf-8")
    return environment.from_string(text, {"table": table}).render(values).rstrip("\n") + "\n"
