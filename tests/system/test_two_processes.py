"""Two DDP processes on the processor, as a user starts them: each job launches its own second process."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from whole_runs import TINY

from ekd_lightning.config.config import recorded_settings
from ekd_lightning.config.overrides import override
from ekd_lightning.evaluation.scores import ClassificationScores
from ekd_lightning.networks import load_student
from ekd_lightning.pipeline.context import open_context, plain
from ekd_lightning.pipeline.predictions import predictions
from ekd_lightning.pipeline.prepare import prepare
from ekd_lightning.runs.directory import RunDirectory

WORDS = [word for word in TINY if not word.startswith(("trainer=", "trainer.limit", "data.eval"))]


@pytest.mark.slow
@pytest.mark.ddp
def test_a_sweep_with_two_processes_per_job(tmp_path, store, tiny_settings):
    """One subprocess for three jobs: the first is refused, the other two train and test in two processes."""
    folder = tmp_path / 'a "sweep", it\'s ${e}\\'  # which each second process must be told as it is
    own = [
        "trainer=ddp_sim",
        "data.eval_batch_size=77",  # 360 test and 15 validation images: padding on the second process
        "trainer.max_steps=2",
        "student.branches=0,1,2",
        "evaluation.parts=[predictions]",
        f"teachers.store={store}",
        override("hydra.sweep.dir", folder),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "ekd_lightning.cli.train", "-m", *WORDS, *own],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 2, said
    assert "student.branches=0: must be at least 1" in done.stderr
    states = [json.loads((folder / str(job) / "status.json").read_text()) for job in range(3)]
    assert [status["state"] for status in states] == ["failed", "done", "done"], said
    assert not (folder / "0" / "result.json").exists()

    # One tree with three jobs and nothing else: the second processes repeated their job, not the sweep.
    assert sorted(path.name for path in tmp_path.iterdir()) == [folder.name]
    found = {str(path.parent.relative_to(folder)) for path in folder.rglob("config.yaml")}
    assert {name for name in found if ".hydra" not in name} == {"0", "1", "2"}

    told = re.findall(r"epoch 1/1  loss (\S+)  accuracy (\S+)", said)
    for job, (loss, accuracy) in zip((1, 2), told[-2:], strict=True):  # before them: their teachers
        with (folder / str(job) / "metrics.csv").open(newline="") as stream:
            (logged,) = [row for row in csv.DictReader(stream) if row["train/loss"]]
        # What is printed is the mean over both processes, as what is logged is.
        assert (loss, accuracy) == tuple(f"{float(logged[f'train/{n}']):.4f}" for n in ("loss", "accuracy"))
        result = json.loads((folder / str(job) / "result.json").read_text())
        assert (result["num_devices"], result["num_branches"], result["steps"]) == (2, job, 2)
        assert_scores_of_one_process(folder / str(job), result, tiny_settings())
        assert_evaluation_of_one_process(folder / str(job), result)


def assert_scores_of_one_process(directory, result, settings):
    """What two processes found on the test set is what one process finds with the same weights."""
    test = prepare(settings, "cpu").dataset.test
    student = load_student(directory / "student.safetensors").to(memory_format=torch.channels_last)
    scores = ClassificationScores(10, student.num_branches)
    with torch.no_grad():
        output = student.outputs((test.images.float() / 255).contiguous(memory_format=torch.channels_last))
    scores.update(output.logits, test.labels, None, output.branch_logits)
    expected = scores.compute()
    assert round(result["test_accuracy"] * 360) == round(expected["accuracy"] * 360)
    branches = [round(360 * value) for value in result["test_branch_accuracy"]]
    assert branches == [round(360 * value) for value in expected["branch_accuracy"]]
    for name in ("nll", "ece", "brier"):
        assert result[f"test_{name}"] == pytest.approx(expected[name], rel=1e-5, abs=1e-7)


def assert_evaluation_of_one_process(directory, result):
    """What follows a training of two processes is what `ekd-evaluate` finds alone, with other batches."""
    assert (result["evaluated"], result["evaluation_error"]) == (["predictions"], None)
    run = RunDirectory(directory)
    settings = recorded_settings(run, ["data.eval_batch_size=360"])
    context = open_context(run, settings, torch.device("cpu"))
    found = plain(predictions(context).fields)
    for name, value in found.items():
        assert flat(result[name]) == pytest.approx(flat(value), rel=1e-4, abs=1e-5, nan_ok=True), name


def flat(value):
    """The numbers in nested lists and mappings, in order; None as NaN."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for item in value for number in flat(item)]
    return [float("nan") if value is None else float(value)]
