"""Makes every notebook from its script: outputs stripped, cell ids that depend on the cells' text alone.

    python notebooks/tools/generate.py

A test compares the committed notebooks with what this writes.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import jupytext
import nbformat

FOLDER = Path(__file__).resolve().parents[1]


def scripts() -> list[Path]:
    """The scripts that are notebooks."""
    return sorted(FOLDER.glob("*.py"))


def notebook(script: Path) -> nbformat.NotebookNode:
    """The notebook of a script."""
    made = jupytext.read(script, fmt="py:percent")
    made.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    made.nbformat, made.nbformat_minor = 4, 5
    for cell in made.cells:
        cell.metadata = nbformat.from_dict({})
        # jupytext draws ids at random, and then no two builds are alike.
        cell.id = hashlib.sha256(cell.source.encode()).hexdigest()[:12]
    nbformat.validate(made)  # refuses two cells with one id, i.e. with the same text
    return made


def text(script: Path) -> str:
    """What the .ipynb file beside the script must hold."""
    return nbformat.writes(notebook(script)).rstrip("\n") + "\n"


if __name__ == "__main__":
    for path in scripts():
        path.with_suffix(".ipynb").write_text(text(path), encoding="utf-8")
        print(path.with_suffix(".ipynb"))
