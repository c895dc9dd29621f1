"""A folder of one's own photographs, through a whole run and its export."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from ekd_lightning.cli.export import main as export
from ekd_lightning.data import Dataset, catalog
from ekd_lightning.data.catalog import read_digits
from ekd_lightning.networks import load_student, state_sha256
from ekd_lightning.networks.deployed import load_deployed

DIGITS = ("teachers=digits", "recipe=digits")  # what comes with the data set that the images are of


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


def losses(run) -> list[str]:
    with (run.directory / "metrics.csv").open() as file:
        return [row["train/loss"] for row in csv.DictReader(file) if row.get("train/loss")]


def test_files_train_the_student_that_the_same_images_in_memory_train(train, tmp_path, monkeypatch):
    """A part of the digits, as PNG files and in memory in the folder's order: losses and weights, bit for bit."""
    sets = {}
    for name, split in (("train", read_digits().train), ("test", read_digits().test)):
        order = sorted(range(0, len(split), 3), key=lambda i: (int(split.labels[i]), i))
        sets[name] = replace(split, name="own", images=split.images[order], labels=split.labels[order])
        for i in order:
            path = tmp_path / "own" / name / str(int(split.labels[i])) / f"{i:05}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(split.images[i].permute(1, 2, 0).numpy()).save(path)
    memory = Dataset("own", **sets, normalization="imagenet")
    monkeypatch.setitem(catalog.DATASETS, "own", lambda root, download: memory)
    common = ("data.name=own", "data.fraction=0.5", "data.padding=2", "data.flip=false")
    rest = (*common, *DIGITS)
    files = ("data=folder", f"data.root={tmp_path / 'own'}", "data.image_size=32")
    runs = [train(tmp_path / "memory", "data=digits", *common), train(tmp_path / "files", *files, *rest)]
    assert [run.code for run in runs] == [0, 0], runs[1].err
    hashes = [run.json("provenance.json")["data"] for run in runs]
    for key in ("train_sha256", "test_sha256", "subset_sha256"):
        assert hashes[0][key] == hashes[1][key]
    assert len(losses(runs[0])) > 0
    assert losses(runs[0]) == losses(runs[1])
    one, other = (state_sha256(load_student(run.directory / "student.safetensors")) for run in runs)
    assert one == other
    assert runs[0].json("result.json")["test_nll"] == runs[1].json("result.json")["test_nll"]


def test_a_data_set_of_the_hub_is_named_with_its_user(train, tmp_path):
    """Without the package the extra is named, with it that the hub cannot be asked."""
    words = ("data=huggingface", "data.image_size=32", "data.download=false", *DIGITS)
    asked = train(tmp_path / "run", *words, "data.name=user/set")
    assert asked.code == 2
    assert any(said in asked.err for said in ("ekd-lightning[datasets]", "data.name=user/set: cannot be loaded"))
    for name in ("user/../set", "/set", "user/set/more"):
        refused = train(tmp_path / "run", *words, f"data.name={name}")
        assert refused.code == 2
        assert "folders are named after it" in refused.err


def test_what_needs_squares_is_refused_before_training(photographs, train, tmp_path):
    size = "data.image_size=[16,24]"
    words = ["teachers.count=1", "data.val_fraction=0", "evaluation=full"]
    run = train(tmp_path / "run", "data=folder", f"data.root={photographs}", size, *words)
    assert run.code != 0
    assert "evaluation.parts: corruptions need square images, these are 16×24" in run.err
    assert not (tmp_path / "run" / "checkpoints").exists()
