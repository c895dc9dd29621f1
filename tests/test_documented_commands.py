"""Documented commands are accepted by the programs, links lead somewhere, and the README shows the recorded table."""

from __future__ import annotations

import importlib
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from matplotlib.figure import Figure
from whole_runs import called

from ekd_lightning.cli import report
from ekd_lightning.config.config import register_schema, to_settings
from ekd_lightning.data import load_dataset
from ekd_lightning.data.views import to_unit
from ekd_lightning.methods.terms import TERMS
from ekd_lightning.reporting import figure_style, figures
from ekd_lightning.reporting.blocks import Block
from ekd_lightning.reporting.figure_style import CaptionedFigure

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted(RESULTS.glob("*.md"))]
OWN_PARTS = ROOT / "docs" / "extending.md"  # its commands run in test_docs.py
HYDRA = ("ekd-train", "ekd-teach")
FOR_EVALUATION = ("data.root", "data.cache", "data.download", "teachers.store", "imports")


def commands(page: Path) -> Iterator[list[str]]:
    """The words of every `ekd-...` command in a page's shell blocks, whatever starts it."""
    for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        text = re.sub(
            r"\$\(which ([\w-]+)\)",
            r"\1",
            block.replace("\\\n", " ").replace("$method", "ekd").replace("$HOME", "/home/me"),
        )
        for line in re.sub(r"\$\(.*?\)", "", text).splitlines():
            words = [] if line.startswith("#") else shlex.split(line, comments=True)
            start = next((at for at, word in enumerate(words) if re.fullmatch("ekd-(?!lightning)[a-z]+", word)), None)
            if start is not None and words[0] != "git":
                yield words[start:]


def accepted(words: list[str]) -> list[str]:
    """Lets the program's own parser read a command, and returns the overrides in it."""
    program = words[0].removeprefix("ekd-")
    found: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        module = importlib.import_module(f"ekd_lightning.cli.{program}")
        patch.setattr(
            module, "run_command", lambda parser, body, argv=None, **_: found.append(parser.parse_intermixed_args(argv))
        )
        module.main(words[1:])
    lists = [value for value in vars(found[0]).values() if isinstance(value, list)]
    return [word for value in lists for word in map(str, value) if "=" in word]


def first_job(words: list[str]) -> list[str]:
    """The overrides of the first job of a sweep."""
    made = []
    for word in words:
        override = OverridesParser.create().parse_override(word)
        sweeps = override.is_sweep_override()
        made.append(f"{override.get_key_element()}={next(override.sweep_string_iterator())}" if sweeps else word)
    return made


@pytest.mark.parametrize("page", [p for p in PAGES if p != OWN_PARTS], ids=lambda page: page.stem)
def test_documented_commands_are_accepted(page: Path):
    register_schema()
    with initialize_config_module("ekd_lightning.conf", version_base="1.3"):
        for words in commands(page):
            if words[0] in HYDRA:
                overrides = first_job([w for w in words[1:] if not w.startswith("-") and w != "job"])
            else:
                overrides = accepted(words)
            if words[0] in {"ekd-evaluate", "ekd-export"}:
                assert {word.partition("=")[0] for word in overrides} <= set(FOR_EVALUATION)
            elif not any(word.startswith("resume=") for word in overrides):
                to_settings(compose("teach" if words[0] == "ekd-teach" else "train", overrides=overrides))


def test_make_has_the_documented_targets():
    targets = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {
        name for page in PAGES for name in re.findall(r"(?:^|`)make ([a-z][a-z-]+)", page.read_text(), re.MULTILINE)
    }
    assert {"run", "test", "docs"} <= named <= targets


def test_the_page_of_terms_describes_every_term():
    page = (ROOT / "docs" / "terms.md").read_text()
    described = dict(re.findall(r"^### (\w+)\n.*?autoclass:: (\S+)", page, re.DOTALL | re.MULTILINE))
    own = {name: TERMS[name] for name in TERMS.names() if TERMS[name].__module__.startswith("ekd_lightning")}
    assert described == {name: f"{term.__module__}.{term.__name__}" for name, term in own.items()}


def test_links_between_files_lead_somewhere():
    for page in PAGES:
        links = re.findall(r"\]\(([^)#\s]+)[^)\s]*\)", page.read_text())
        assert [link for link in links if ":" not in link and not (page.parent / link).exists()] == [], page


STUDY_PAGES = ("--study-pages", "--study", "full", "--force")


def undrawn(block: Block) -> CaptionedFigure:
    return CaptionedFigure(figure_style.file_name(figure_style.COST_FIGURE, block.key), Figure(), "")


def test_the_pages_of_studies_are_made_of_their_records(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Byte for byte, but for the figures, which depend on the version of matplotlib: these are there."""
    readme = Path(shutil.copy(ROOT / "README.md", tmp_path))
    text = re.sub(r"(<!-- first-result -->\n).*(<!-- /first-result -->)", r"\1\2", readme.read_text(), flags=re.DOTALL)
    readme.write_text(text)
    study = Path("docs/results/study")
    shutil.copytree(ROOT / study, tmp_path / study, ignore=shutil.ignore_patterns("README.md", "cifar*.md"))
    drawn = ROOT / study / "figures"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(figures, "by_cost", lambda report, _: map(undrawn, report.blocks))
    monkeypatch.setattr(
        figure_style,
        "save",
        lambda _, stem, formats: [Path(shutil.copy(drawn / f"{stem.name}.{formats[0]}", stem.parent))],
    )
    records = [path.relative_to(tmp_path) for path in (tmp_path / study).glob("*.jsonl")]
    code, _, err = called(report.main, *records, "-o", study, *STUDY_PAGES)
    assert code == 0, err
    runpy.run_path(str(ROOT / "docs" / "tools" / "readme_table.py"))["main"](str(study), Path("README.md"))
    made = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in made} == {".md", ".jsonl", ".json", ".svg"}
    assert [path for path in made if path.read_bytes() != (ROOT / path).read_bytes()] == []
    assert len(readme.read_text().splitlines()) <= 110


@pytest.mark.slow
def test_the_site_builds_without_warnings(tmp_path: Path):
    pytest.importorskip("furo")
    from sphinx.cmd.build import build_main

    arguments = [
        "-q",
        "-W",
        "--keep-going",
        "-b",
        "html",
        "-d",
        str(tmp_path / "trees"),
        str(ROOT / "docs"),
        str(tmp_path),
    ]
    assert build_main(arguments) == 0


@pytest.mark.slow
def test_the_first_run_does_what_its_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    docs = ROOT / "docs"
    short = "recipe.epochs=1 recipe.batch_size=32 teachers.recipe.epochs=1 teachers.recipe.batch_size=32 trainer=cpu"
    fewer = {"ekd-train": ["data.fraction=0.2"], "ekd-compare": ["--fractions", "0.2", "--no-controls"]}
    for program, *words in commands(docs / "first_run.md"):
        once = ["0" if word == "0,1,2" else word for word in words]
        more = [*fewer[program], *short.split()] if program in fewer else []
        command = [str(Path(sys.executable).with_name(program)), *more, *once]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (command, done.stderr[-2000:])
    assert "EKD" in (tmp_path / "report-digits" / "tables.md").read_text()

    # The snippets of Python use what the commands have left.
    (tmp_path / "exported").symlink_to(tmp_path / "student")
    (tmp_path / "outputs" / "run").symlink_to(tmp_path / "outputs" / "digits" / "first")
    digits = load_dataset("digits", tmp_path).test
    for page, images in (
        ("first_run", to_unit(digits.images)),
        ("export", to_unit(digits.images)),
        ("evaluation", digits),
    ):
        (snippet,) = re.findall(r"^```python\n(.*?)^```", (docs / f"{page}.md").read_text(), re.DOTALL | re.MULTILINE)
        exec(compile(snippet, page, "exec"), {"images": images})
    space: dict[str, Any] = {}
    for snippet in re.findall(r"^```python\n(.*?)^```", (docs / "python.md").read_text(), re.DOTALL | re.MULTILINE):
        exec(compile(snippet, "python.md", "exec"), space)
    assert [teacher["network"] for teacher in space["module"].hparams["teachers"]] == ["resnet8", "resnet8"]
