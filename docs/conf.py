"""Configuration of the documentation site: `make docs` builds it into docs/_build/html."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import distribution, metadata
from pathlib import Path

from sphinx.application import Sphinx

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
GENERATED = HERE / "generated"

project = "ekd-lightning"
author = "the authors of ekd-lightning"
copyright = author
release = metadata(project)["Version"]

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "myst_nb", "sphinx_copybutton"]
exclude_patterns = ["_build"]
suppress_warnings = ["misc.highlighting_failure"]  # listings of a terminal in blocks without a language

# -- Markdown and notebooks ---------------------------------------------------------------------------------

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4
nb_execution_mode = "off"  # the notebooks are committed with their outputs
copybutton_exclude = ".linenos, .gp, .go"

# -- Docstrings ---------------------------------------------------------------------------------------------

default_role = "code"  # docstrings use single backticks, as Markdown does
highlight_language = "text"  # blocks without a language are listings
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "signature"
autodoc_inherit_docstrings = False
autoclass_content = "both"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
python_use_unqualified_type_names = True
add_module_names = False
toc_object_entries_show_parents = "hide"
nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|pytorch_lightning|numpy|collections|pathlib|omegaconf)\..*"),  # no inventories: builds offline
    (r"py:.*", r"(Tensor|Path|Callback|.*\[.*)"),
    (r"py:.*", r"(.*\.)?(NotAResultError|TeacherSource|TrainLoader|EvalLoader|StepValues|Mix|Mixing|Assignment)"),
    (r"py:.*", r"(.*\.)?(BuilderT|TermClass|AugmentationClass)"),  # type variables
]

# -- HTML ---------------------------------------------------------------------------------------------------

html_theme = "furo"
html_title = f"ekd-lightning {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False

linkcheck_timeout = 20
linkcheck_anchors = False
linkcheck_ignore = [r"https://github\.com/ekd-lightning/.*"]  # our own, which need not be public

# -- Pages made at build time -------------------------------------------------------------------------------


def command_reference() -> Iterator[str]:
    """The page of commands, from what each says to `--help`."""
    yield "# Commands\n\nEach command is installed with the package. The texts below are those of `--help`.\n"
    commands = sorted(entry.name for entry in distribution(project).entry_points if entry.group == "console_scripts")
    environment = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1"}
    for name in commands:
        program = Path(sys.executable).with_name(name)
        done = subprocess.run([program, "--help"], capture_output=True, text=True, check=True, env=environment)
        yield f"## {name}\n\n```text\n{done.stdout.strip()}\n```\n"


def make_pages(app: Sphinx) -> None:
    """Writes the reference of commands and copies the notebooks into the site's sources."""
    shutil.rmtree(GENERATED, ignore_errors=True)
    GENERATED.mkdir()
    (GENERATED / "commands.md").write_text("\n".join(command_reference()))
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        text = notebook.read_text().replace("(../docs/", "(../")
        (GENERATED / notebook.name).write_text(text)


def link_sources(app: Sphinx, name: str, source: list[str]) -> None:
    """Turns links to files outside docs/ into links to the repository."""
    page = Path(app.env.doc2path(name))

    def linked(match: re.Match[str]) -> str:
        target = (page.parent / match[1]).resolve()
        if target.is_relative_to(HERE) or not target.exists():
            return match[0]
        return f"]({repository()}/{'tree' if target.is_dir() else 'blob'}/main/{target.relative_to(ROOT)})"

    source[0] = re.sub(r"\]\((\.\./[^)#\s]*)\)", linked, source[0])


def as_plain_text(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Keeps |x| from being a substitution, and words before a colon in an attribute's docstring from being a type."""
    for number, line in enumerate(lines):
        outside = re.split(r"(`[^`]*`)", line)  # code spans at odd places
        lines[number] = "".join(part if i % 2 else part.replace("|", r"\|") for i, part in enumerate(outside))
    if what in {"attribute", "property", "data"} and lines:
        lines[0] = f": {lines[0]}"


def repository() -> str:
    """The repository's address, as pyproject.toml names it."""
    addresses = dict(entry.split(", ", 1) for entry in metadata(project).get_all("Project-URL", []))
    return next(iter(addresses.values()), "https://github.com")


def setup(app: Sphinx) -> None:
    """Connects the pages that are made."""
    app.connect("builder-inited", make_pages)
    app.connect("source-read", link_sources)
    app.connect("autodoc-process-docstring", as_plain_text, priority=1)  # before Napoleon
