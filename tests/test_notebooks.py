"""The notebooks are what their scripts say, and they run."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
SCRIPTS = sorted(FOLDER.glob("*.py"))
FIGURES = {"finished_study": 2, "quickstart": 5}


def test_there_is_a_notebook_for_each_script_and_no_other():
    assert SCRIPTS
    assert [path.stem for path in sorted(FOLDER.glob("*.ipynb"))] == [path.stem for path in SCRIPTS]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_notebook_is_what_its_script_makes(script: Path):
    made = runpy.run_path(str(FOLDER / "tools" / "generate.py"))["notebook"](script)
    found = nbformat.read(script.with_suffix(".ipynb"), as_version=4)
    for notebook in (made, found):
        for cell in notebook.cells:
            cell.update({"outputs": [], "execution_count": None} if cell.cell_type == "code" else {})
    assert found == made, "the notebook and its script differ: run python notebooks/tools/generate.py"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_notebook_is_committed_with_its_outputs(script: Path):
    text = script.with_suffix(".ipynb").read_text(encoding="utf-8")
    outputs = [output for cell in nbformat.reads(text, as_version=4).cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == FIGURES[script.stem]
    assert {output.output_type for output in outputs} <= {"display_data", "execute_result", "stream"}
    assert re.findall(r"/(?:root|home|work|tmp|Users)/", re.sub(r'"image/png": "[^"]*"', "", text)) == []
    assert len(text) < 400_000


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_notebook_runs(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("EKD_NOTEBOOK_FAST", "1")
    notebook = nbformat.read(script.with_suffix(".ipynb"), as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell("import sys; print(sys.executable)"))
    place = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, kernel_name="python3", timeout=300, allow_errors=False, resources=place).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert outputs[-1]["text"].strip() == sys.executable  # not some other Python that is installed, too
    assert sum("image/png" in output.get("data", {}) for output in outputs) == FIGURES[script.stem]
