"""The wheel holds what a user needs outside the repository. Builds with what is installed; nothing is fetched."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import safetensors.torch
import torch
from PIL import Image

ROOT = Path(__file__).parents[2]


def call(words: Sequence[str], folder: Path, **environment: str) -> str:
    """Calls a program and returns what it prints."""
    words = [shutil.which(words[0], path=environment.get("PATH")) or words[0], *words[1:]]
    env = {**os.environ, **environment}
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("build")
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "copy"  # building leaves folders behind
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("src", "conf"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    call([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(copy)], folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.mark.slow
def test_the_wheel_is_complete(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert names >= {
        "ekd_lightning/py.typed",
        "ekd_lightning/data/cifar.yaml",
        "ekd_lightning/networks/zoo.yaml",
        "ekd_lightning/conf/train.yaml",
        "ekd_lightning/students/resnet8-ekd-cifar10.safetensors",
        "ekd_lightning/students/resnet20-ekd-cifar10.safetensors",
    }
    for folder, prefix in (("conf", "ekd_lightning/conf"), ("src/ekd_lightning", "ekd_lightning")):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".yaml") and "local" not in path.parts:
                assert f"{prefix}/{path.relative_to(ROOT / folder).as_posix()}" in names
    assert not [name for name in names if name.startswith(("tests", "conf/"))]


def three_commands() -> list[list[str]]:
    """Those that the README shows for images of one's own."""
    section = (ROOT / "README.md").read_text().split("## Your own images and networks")[1]
    (block,) = re.findall(r"^```bash\n(.*?)^```", section.split("\n## ")[0], re.DOTALL | re.MULTILINE)
    return [shlex.split(line) for line in block.replace("\\\n", " ").splitlines()]


def write_photographs(folder: Path) -> None:
    """Cuts pieces out of the two photographs that scikit-learn brings."""
    from sklearn.datasets import load_sample_images

    photographs = load_sample_images()
    for name, pixels in zip(photographs.filenames, photographs.images, strict=True):
        for number in range(24):
            place = folder / Path(name).stem / f"{number:02}.jpg"
            place.parent.mkdir(parents=True, exist_ok=True)
            top, left = 70 * (number // 6), 90 * (number % 6)
            Image.fromarray(pixels[top : top + 96, left : left + 110]).save(place)


def publish_weights(folder: Path) -> dict[str, str]:
    """Puts random weights where the libraries keep what they have fetched; returns the variables that say so."""
    import timm
    from torchvision import models

    torch.manual_seed(0)
    url = models.ResNet18_Weights.DEFAULT.url
    checkpoints = folder / "torch" / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    torch.save(models.resnet18().state_dict(), checkpoints / url.rpartition("/")[2])
    network = timm.create_model("resnet50")
    repository = folder / "hub" / f"models--{network.pretrained_cfg['hf_hub_id'].replace('/', '--')}"
    snapshot = repository / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("1")
    safetensors.torch.save_file(network.state_dict(), snapshot / "model.safetensors")
    return {"TORCH_HOME": str(folder / "torch"), "HF_HUB_CACHE": str(folder / "hub"), "HF_HUB_OFFLINE": "1"}


@pytest.mark.slow
def test_the_three_commands_of_the_readme_lead_from_a_folder_of_images_to_an_exported_student(
    wheel: Path, tmp_path: Path
) -> None:
    """In an environment with the wheel and the packages installed here; each network is trained for an epoch."""
    for package in ("timm", "onnx", "onnxruntime", "onnxscript", "sklearn"):
        pytest.importorskip(package)
    install, train, export = three_commands()
    assert install[:2] == ["pip", "install"]
    assert re.fullmatch(r"ekd-lightning\[[\w,]+\]", install[2])
    venv.create(tmp_path / "venv")
    programs = tmp_path / "venv" / "bin"
    pip = [sys.executable, "-m", "pip", "--quiet", "--python", str(programs / "python"), "install"]
    call([*pip, "--no-deps", "--no-index", str(wheel)], tmp_path)
    (packages,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    installed = [*site.getsitepackages(), *(place for place in sys.path if place.endswith("site-packages"))]
    (packages / "installed.pth").write_text("\n".join(dict.fromkeys(installed)))
    here = tmp_path / "empty"
    here.mkdir()
    write_photographs(here / "birds")
    outside = publish_weights(tmp_path) | {"PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": ""}
    short = ("recipe.epochs=1", "teachers.recipe.epochs=1", "recipe.batch_size=16", "teachers.recipe.batch_size=16")
    call([*train, *short, "trainer=cpu"], here, **outside)
    call(export, here, **outside)
    record = json.loads((here / "outputs" / "birds" / "provenance.json").read_text())
    assert record["git"] is None  # the wheel, not this tree
    assert record["data"]["class_names"] == ["china", "flower"]
    asks = """
import json, numpy, onnxruntime, torch, ekd_lightning
images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
model = ekd_lightning.load("birds-student/student.onnx")
session = onnxruntime.InferenceSession("birds-student/student.onnx")
logits = session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]
print(json.dumps([ekd_lightning.__file__, model.class_names, float(abs(model(images).numpy() - logits).max())]))
"""
    file, names, off = json.loads(call(["python", "-c", asks], here, **outside))
    assert Path(file).is_relative_to(packages)
    assert names == ["china", "flower"]
    assert off < 1e-4
