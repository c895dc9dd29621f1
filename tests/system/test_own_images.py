"""A folder of one's own photographs, through a whole run and its export."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from ekd_lightning.cli.export import main as export
from ekd_lightning.networks import load_deployed


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """JPEGs of three classes and several sizes."""
    root, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for brightness, name in enumerate(("night", "noon", "white sand")):
        (root / name).mkdir()
        for number in range(40):
            pixels = rng.integers(0, 60, (20 + number % 7, 30, 3)) + 90 * brightness
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{number:02}.jpg")
    return root


def test_a_folder_of_jpegs_is_distilled_and_exported(photographs, train, tmp_path):
    """Three classes of rectangles: none of the numbers 10 and 32 is left anywhere."""
    run = train(
        tmp_path / "run",
        "data=folder",
        "teachers.count=1",
        f"data.root={photographs}",
        "data.name=beach",
        "data.image_size=[16,24]",
        "data.fraction=null",
        "evaluation=standard",
    )
    assert run.code == 0, run.err
    result, data = run.json("result.json"), run.json("provenance.json")["data"]
    assert (result["data"], result["num_train_images"]) == ("beach", 87)
    assert data["class_names"] == ["night", "noon", "white sand"]
    assert data["image_size"] == [16, 24]
    export([str(tmp_path / "run"), "--format", "safetensors"])
    model = load_deployed(tmp_path / "run" / "export" / "student.safetensors")
    assert model.class_names == ("night", "noon", "white sand")
    assert model.image_size == (16, 24)
    card = (tmp_path / "run" / "export" / "README.md").read_text()
    assert "16×24" in card
    assert json.loads((tmp_path / "run" / "export" / "export.json").read_text())["input"]["shape"][2:] == [16, 24]


def test_what_needs_squares_is_refused_before_training(photographs, train, tmp_path):
    size = "data.image_size=[16,24]"
    teachers = "teachers.count=1"
    run = train(tmp_path / "run", "data=folder", f"data.root={photographs}", size, teachers, "evaluation=full")
    assert run.code != 0
    assert "evaluation.parts: corruptions are made for squares, images are 16×24" in run.err
    assert not (tmp_path / "run" / "checkpoints").exists()
