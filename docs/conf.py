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

import torch
from sphinx.application import Sphinx

from ekd_lightning.evaluation.efficiency import count_macs, count_parameters
from ekd_lightning.markdown import Markdown, code, table
from ekd_lightning.networks import NetworkSpec, build_network, normalization
from ekd_lightning.networks.registry import NETWORKS
from ekd_lightning.networks.zoo import zoo

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


def network_reference() -> Iterator[str]:
    """The page of built-in networks and pretrained teachers, from their builders and zoo.yaml."""
    yield (
        "# Built-in networks\n\nFor `student.network` and `teachers.pool`; costs are at 10 classes and 32×32 pixels. "
        "`wrn_<6n+4>_<k>` exists for every n and k.\n"
    )
    with torch.device("meta"):
        networks = {name: build_network(NetworkSpec(name, 10, normalization("unit"))) for name in NETWORKS.names()}
    costs = {name: (count_macs(one), count_parameters(one)) for name, one in networks.items()}
    rows = [
        (code(name), f"{costs[name][1]:,}", f"{costs[name][0] / 1e6:,.1f} M", ", ".join(networks[name].stage_names))
        for name in sorted(networks, key=lambda name: (re.split(r"\d", name)[0], costs[name]))
    ]
    yield table(("network", "parameters", "MACs", Markdown("stages, for `student.split_after`")), rows)
    yield (
        "\n## Pretrained teachers\n\nFor `teachers.pool`; their files are downloaded and checked against their hash. "
        "Accuracy: top-1 on the test images.\n"
    )
    entries = list(zoo().values())
    found = [(code(e.id), e.data, e.network, f"{e.accuracy:.2f} %", e.source, e.licence) for e in entries]
    yield table(("id", "data", "network", "accuracy", "published by", "licence"), found)


def make_pages(app: Sphinx) -> None:
    """Writes the references of commands and networks, and copies the notebooks into the site's sources."""
    shutil.rmtree(GENERATED, ignore_errors=True)
    GENERATED.mkdir()
    (GENERATED / "commands.md").write_text("\n".join(command_reference()))
    (GENERATED / "builtin_networks.md").write_text("\n".join(network_reference()))
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
