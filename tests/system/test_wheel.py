"""The wheel holds what a user needs outside the repository. Builds with what is installed; nothing is fetched."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_wheel_is_complete(tmp_path):
    pytest.importorskip("build")
    pytest.importorskip("setuptools")
    copy = tmp_path / "copy"  # building leaves folders behind
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("src", "conf"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    words = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(copy)]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert names >= {
        "ekd_lightning/py.typed",
        "ekd_lightning/data/cifar.yaml",
        "ekd_lightning/networks/zoo.yaml",
        "ekd_lightning/conf/train.yaml",
        "ekd_lightning/students/resnet8-ekd-cifar10.safetensors",
    }
    for folder, prefix in (("conf", "ekd_lightning/conf"), ("src/ekd_lightning", "ekd_lightning")):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".yaml") and "local" not in path.parts:
                assert f"{prefix}/{path.relative_to(ROOT / folder).as_posix()}" in names
    assert not [name for name in names if name.startswith(("tests", "conf/"))]
