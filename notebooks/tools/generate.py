"""Makes every notebook from its script and runs it, so that it is committed with its outputs.

    python notebooks/tools/generate.py               all of them
    python notebooks/tools/generate.py quickstart    one

A test compares the cells of the committed notebooks with those of the scripts.
"""

from __future__ import annotations

import base64
import hashlib
import io
import sys
import tempfile
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from PIL import Image

FOLDER = Path(__file__).resolve().parents[1]
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def notebook(script: Path) -> nbformat.NotebookNode:
    """The notebook of a script, without outputs; cell ids depend on the cells' text alone."""
    made = jupytext.read(script, fmt="py:percent")
    made.metadata = nbformat.from_dict(METADATA)
    made.nbformat, made.nbformat_minor = 4, 5
    for cell in made.cells:
        cell.metadata = nbformat.from_dict({})
        # jupytext draws ids at random, and then no two builds are alike.
        cell.id = hashlib.sha256(cell.source.encode()).hexdigest()[:12]
    nbformat.validate(made)  # refuses two cells with one id, i.e. with the same text
    return made


def executed(script: Path) -> nbformat.NotebookNode:
    """The notebook with its outputs, run in a folder of its own; logs and times of execution are left out."""
    made = notebook(script)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(made, kernel_name="python3", timeout=3600, resources={"metadata": {"path": folder}}).execute()
    made.metadata = nbformat.from_dict(METADATA)
    for cell in made.cells:
        cell.metadata = nbformat.from_dict({})
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for data in (output.data for output in cell.outputs if "image/png" in output.get("data", {})):
                data["image/png"] = with_palette(data["image/png"])
    return made


def with_palette(png: str) -> str:
    """A PNG in base64 with 128 colours, a third as large."""
    packed = io.BytesIO()
    with Image.open(io.BytesIO(base64.b64decode(png))) as image:
        image.convert("RGB").quantize(128).save(packed, "PNG", optimize=True)
    return base64.b64encode(packed.getvalue()).decode()


if __name__ == "__main__":
    for path in sorted(FOLDER.glob("*.py")):
        if path.stem in sys.argv[1:] or not sys.argv[1:]:
            content = nbformat.writes(executed(path)).rstrip("\n") + "\n"
            path.with_suffix(".ipynb").write_text(content, encoding="utf-8")
            print(path.with_suffix(".ipynb"))
