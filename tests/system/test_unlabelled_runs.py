"""Whole runs with images without labels: their record, resumed and recorded steps, tables, two processes, refusals."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from whole_runs import TINY, Outcome

from ekd_lightning.data import load_dataset
from ekd_lightning.runs.directory import RunDirectory
from ekd_lightning.runs.protocol import Protocol

Train = Callable[..., Outcome]
REST = ("data.unlabelled=rest", "data.unlabelled_share=0.25", "recipe.epochs=2", "data.val_fraction=0.25")


@pytest.fixture(scope="module")
def whole(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    outcome = train(tmp_path_factory.mktemp("whole") / "run", *REST)
    assert outcome.code == 0, outcome.err
    return outcome


def student(outcome: Outcome) -> dict[str, torch.Tensor]:
    return load_file(outcome.directory / "student.safetensors")


def same(one: Outcome, other: Outcome) -> bool:
    ours, theirs = student(one), student(other)
    return all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)


def test_the_record_says_what_was_seen(whole: Outcome) -> None:
    result = whole.result
    digits = load_dataset("digits", "unused")
    labelled, validation = result["num_train_images"], result["num_val_images"]
    assert result["num_unlabelled_images"] == len(digits.train) - labelled - validation
    assert result["unlabelled_share"] == 0.25
    assert result["steps"] == 2 * (labelled // 24)  # 24 of a batch's 32 rows have labels
    origin = whole.json("provenance.json")["data"]["unlabelled"]
    assert origin == {
        "source": "the rest of digits",
        "images": result["num_unlabelled_images"],
        "sha256": result["unlabelled_sha256"],
    }
    assert "8 images of a batch of 32" in whole.err + whole.out
    assert (result["unlabelled_from"], result["epoch_over"]) == ("rest", "labelled")
    nothing = dict.fromkeys(("unlabelled_sha256", "unlabelled_share", "unlabelled_from"))
    plain = Protocol.of({**result, "num_unlabelled_images": 0, **nothing})
    assert "num_unlabelled_images" in Protocol.of(result).differences(plain)
    earlier = {name: value for name, value in result.items() if "unlabelled" not in name}
    assert Protocol.of(earlier) == plain


def test_one_and_one_epoch_are_two(train: Train, resume: Train, whole: Outcome, tmp_path: Path) -> None:
    half = train(tmp_path / "run", *REST, "trainer.max_epochs=1")
    assert (half.code, half.result["epochs_done"]) == (0, 1), half.err
    assert same(resume(half.directory, "trainer.max_epochs=2"), whole)


def test_a_step_from_buffers_computes_the_same(train: Train, whole: Outcome, tmp_path: Path) -> None:
    assert same(train(tmp_path / "run", *REST, "capture=always"), whole)


@pytest.mark.slow
def test_images_of_the_rest_use_the_rows_that_they_have_as_labelled_ones(train: Train, tmp_path: Path) -> None:
    """Teachers were asked about all images; none of them is asked again when most have lost their labels."""
    words = ("data.augmentation=none", "data.val_fraction=0", "method=kd_mean", "teachers.train_on=all")
    everything = train(tmp_path / "all", *words, "data.fraction=1", "recipe.batch_size=479")
    assert everything.code == 0, everything.err
    beside = train(tmp_path / "rest", *words, "data.unlabelled=rest")
    assert beside.result["num_unlabelled_images"] > 1200
    assert beside.result["teacher_table_hit_rate"] == 1.0


def test_teachers_of_the_subset_see_no_other_image(whole: Outcome, train: Train, tmp_path: Path) -> None:
    """They are the very teachers of a run without the others: the store has them already."""
    alone = train(tmp_path / "run", "data.val_fraction=0.25", "recipe.epochs=1")
    taught, untold = ([t["sha256"] for t in outcome.result["teachers"]] for outcome in (whole, alone))
    assert taught == untold


def write_images(folder: Path, names: Sequence[str], invert: int = 255) -> None:
    """Writes digits, or at 255 their negatives, as files of these names."""
    images = load_dataset("digits", "unused").test.images
    for name, image in zip(names, images, strict=False):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image ^ invert).permute(1, 2, 0).numpy()).save(path)


def test_a_run_goes_on_with_its_images_wherever_they_lie(train: Train, resume: Train, tmp_path: Path) -> None:
    """Other ones at the named places are refused, by the place."""
    write_images(tmp_path / "mine", [f"{label}/{number}.png" for number in range(30) for label in "ab"], invert=0)
    write_images(tmp_path / "found", [f"{number:02}.png" for number in range(24)])
    places = (f"data.root={tmp_path}/mine", f"data.unlabelled={tmp_path}/found", f"data.cache={tmp_path}/cache")
    words = ("data=folder", "data.image_size=32", "data.fraction=1", "recipe.epochs=2", "recipe.batch_size=16", *places)
    first = train(tmp_path / "run", *words, "recipe=digits", "trainer.max_epochs=1")
    assert first.code == 0, first.err
    for name in ("mine", "found"):
        (tmp_path / name).rename(tmp_path / f"moved_{name}")
        shutil.copytree(tmp_path / f"moved_{name}", tmp_path / f"other_{name}")
        (file, *_) = sorted((tmp_path / f"other_{name}").rglob("*.png"))
        Image.open(file).rotate(90).save(file)
    moved = [f"data.root={tmp_path}/moved_mine", f"data.unlabelled={tmp_path}/moved_found", "trainer.max_epochs=2"]
    record = (first.directory / "provenance.json").read_bytes()
    for word, said in (
        (f"data.unlabelled={tmp_path}/nowhere", "no such folder"),
        (f"data.unlabelled={tmp_path}/other_found", "its unlabelled images are not those of the run"),
        (f"data.root={tmp_path}/other_mine", "images are not those of the run"),
        ("data.unlabelled=rest", "data.unlabelled differ from the recorded run"),
    ):
        refused = resume(first.directory, *moved, word)
        assert refused.code == 2
        assert said in refused.err, refused.err
        assert word.partition("=")[0] in refused.err
    assert (first.directory / "provenance.json").read_bytes() == record
    again = resume(first.directory, *moved)
    assert (again.code, again.result["epochs_done"]) == (0, 2), again.err
    assert again.json("provenance.json")["data"]["unlabelled"]["source"] == f"{tmp_path}/moved_found"


def test_images_of_a_folder_have_tables_of_their_own(train: Train, tmp_path: Path) -> None:
    write_images(tmp_path / "found", [f"{number % 3}/{number:03}.png" for number in range(40)])
    words = (f"data.unlabelled={tmp_path}/found", f"data.cache={tmp_path}/cache", "recipe.epochs=2")
    first = train(tmp_path / "first", *words, "data.epoch=unlabelled", "recipe.batch_size=16")
    assert first.code == 0, first.err
    assert (first.result["num_unlabelled_images"], first.result["steps"]) == (40, 10)
    again = train(tmp_path / "again", *words, "data.epoch=unlabelled", "recipe.batch_size=16")
    assert again.result["teacher_table_hit_rate"] == 1.0
    assert same(first, again)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("data.unlabelled=rest", "data.fraction=1.0"),
            "data.unlabelled=rest: the subset leaves no training image out",
        ),
        (("data.unlabelled_share=0.5",), "data.unlabelled_share=0.5: has no effect without data.unlabelled"),
        (("data.epoch=unlabelled",), "data.epoch=unlabelled: has no effect without data.unlabelled"),
        (("data.unlabelled=rest", "data.unlabelled_share=1.0"), "data.unlabelled_share=1.0"),
        (("data.unlabelled=rest", "data.unlabelled_share=0"), "data.unlabelled_share=0"),
        (("data.unlabelled=rest", "method=ce"), "all terms of the method 'ce' need labels"),
        (("data.unlabelled=rest", "method=camkd"), "all terms of the method 'camkd' need labels"),
        (("data.unlabelled=rest", "recipe.mixup=0.2"), "images without labels cannot be mixed (recipe.mixup"),
        (("data.unlabelled=.",), "holds no images"),
        (("data.unlabelled=nowhere",), "no such folder"),
        (("data.unlabelled=split",), "data.unlabelled=split needs data=torchvision"),
    ],
)
def test_bad_input_is_told_in_one_line(train: Train, tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    outcome = train(tmp_path / "run", *words)
    (line,) = [line for line in outcome.err.splitlines() if line.startswith("ekd-train: error:")]
    assert outcome.code == 2
    assert message in line
    assert not (tmp_path / "run" / "result.json").exists()


@pytest.mark.slow
@pytest.mark.ddp
def test_two_processes_see_the_batches_of_one(whole: Outcome, store: Path, tmp_path: Path) -> None:
    """The first loss is that of one process, up to batch norm's statistics, which each process takes of its rows."""
    words = [*TINY, *REST, "trainer=ddp_sim", f"teachers.store={store}", f"hydra.run.dir={tmp_path}/run"]
    done = subprocess.run(
        [sys.executable, "-m", "ekd_lightning.cli.train", *words],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = RunDirectory(tmp_path / "run").read_result()
    assert (result["num_devices"], result["steps"]) == (2, whole.result["steps"])
    assert result["unlabelled_sha256"] == whole.result["unlabelled_sha256"]
    both = []
    for folder in (tmp_path / "run", whole.directory):
        with (folder / "metrics.csv").open(newline="") as stream:
            both.append(float(next(csv.DictReader(stream))["train/loss"]))
    assert both[0] == pytest.approx(both[1], rel=0.25)
