"""`ekd-export`: files that say what the run's student says, a true record, a card whose code runs, and refusals."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from whole_runs import called

from ekd_lightning import load
from ekd_lightning.cli import export as command
from ekd_lightning.data import load_dataset
from ekd_lightning.files import file_sha256, read_json, write_json
from ekd_lightning.networks import cut_branches, load_student
from ekd_lightning.pipeline import export
from ekd_lightning.studies.study import RowPlan, Study, write_study

ALL = ("--format", "safetensors,onnx,torch-export", "--int8", "--max-drop", "0.1")
FILES = ("student.safetensors", "student.onnx", "student.pt2", "student.int8.onnx")


@pytest.fixture(scope="module")
def run(train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on the bundled digits: three branches behind a gate."""
    directory = tmp_path_factory.mktemp("exported") / "run"
    student = ("student.branches=3", "student.ensemble=gate", "student.split_after=stage2")
    outcome = train(directory, *student, "recipe.epochs=3", "recipe.ema=0.5")
    assert outcome.code == 0, outcome.err
    return directory


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    """Everything that can be exported of it."""
    command.main([str(run), *ALL])
    return run / "export"


def call(*words: object) -> tuple[int, str, list[str]]:
    code, out, err = called(command.main, *words)
    return code, out, [line for line in err.splitlines() if not line.startswith("export: ")]  # progress, if it is slow


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "export.json").read_text())


def answers(run: Path, branches: tuple[int, ...] = (0, 1, 2)) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Test images, what the run's student says of them, and the labels."""
    test = load_dataset("digits", run).test
    images = test.images.float() / 255
    with torch.no_grad():
        return images, cut_branches(load_student(run / "student.safetensors"), branches)(images), test.labels


# -- what is written --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_the_record_tells_what_the_file_says(run, exported, name):
    images, reference, labels = answers(run)
    logits = load(exported / name)(images)
    facts = read(exported)["files"][name]
    assert facts["accuracy"] == pytest.approx(np.mean((logits.argmax(-1) == labels).numpy()))
    assert facts["reference_accuracy"] == pytest.approx(np.mean((reference.argmax(-1) == labels).numpy()))
    assert facts["max_difference"] == pytest.approx(float((logits - reference).abs().max()), rel=0.2, abs=2e-6)
    assert facts["sha256"] == file_sha256(exported / name)
    assert facts["bytes"] == (exported / name).stat().st_size
    if name == FILES[-1]:
        assert (facts["precision"], facts["tolerance"]) == ("int8", None)
        assert facts["calibration_images"] == json.loads((run / "result.json").read_text())["num_train_images"]
        assert facts["accuracy"] >= facts["reference_accuracy"] - 0.1
    else:
        assert facts["max_difference"] <= facts["tolerance"]
        assert facts["tolerance"] == pytest.approx(1e-4 * max(1.0, float(reference.abs().max())), rel=1e-4)
        assert facts["accuracy"] == facts["reference_accuracy"]


def test_every_file_knows_what_the_run_knows(run, exported):
    result = json.loads((run / "result.json").read_text())
    provenance = json.loads((run / "provenance.json").read_text())
    _, reference, labels = answers(run)
    for name in FILES:
        found = load(exported / name).metadata
        assert found["class_names"] == [str(digit) for digit in range(10)]
        assert found["data"]["test_sha256"] == provenance["data"]["test_sha256"]
        assert found["data"]["subset_sha256"] == result["subset_sha256"]
        assert found["input"]["normalization"] == {"mean": [0.5] * 3, "std": [0.5] * 3, "inside": True}
        assert [t["sha256"] for t in found["method"]["teachers"]] == [t["sha256"] for t in provenance["teachers"]]
        assert found["method"]["terms"]["kd_branch"] == result["weight_kd_branch"]
        assert found["student"]["num_parameters"] == result["num_parameters"]
        assert found["student"]["macs"] == result["macs"]
        assert found["precision"] == ("int8" if "int8" in name else "float32")
        scores = found["test_metrics"]
        assert scores["accuracy"] == pytest.approx(result["test_accuracy"], abs=1e-6)
        assert scores["nll"] == pytest.approx(float(torch.nn.functional.cross_entropy(reference, labels)))
        hit = (reference.argmax(-1) == labels).double()
        assert scores["class_accuracy"] == pytest.approx([float(hit[labels == c].mean()) for c in range(10)])
    assert read(exported)["student"] == found["student"]


def test_the_card_is_filled_and_its_code_runs(exported, monkeypatch):
    card = (exported / "README.md").read_text()
    _, header, body = card.split("---\n", 2)
    facts = yaml.safe_load(header)
    record = read(exported)
    (entry,) = facts["model-index"][0]["results"]
    assert entry["metrics"][0] == {
        "type": "accuracy",
        "value": round(record["test_metrics"]["accuracy"], 6),
        "name": "Test accuracy",
    }
    assert "license" not in facts
    assert "license: yours to choose" in header
    assert {"onnx", "safetensors", "torch-export", "knowledge-distillation"} <= set(facts["tags"])
    for said in ("n = 1, seed 0", "`ekd_pooled`", "resnet8-s0", record["student"]["sha256"], "3 branches", "gate"):
        assert said in body
    for name in FILES:
        assert f"| `{name}` |" in body
    monkeypatch.chdir(exported)
    blocks = re.findall(r"^```python\n(.*?)^```$", body, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 3
    for block in blocks:
        names: dict[str, Any] = {}
        exec(compile(block, "README.md", "exec"), names)
        assert names["logits"].shape == (4, 10)
    assert str(Path(exported).parent) not in card + (exported / "export.json").read_text()


def test_branches_weights_and_output(run, tmp_path):
    code, out, _ = call(run, "-o", tmp_path / "one", "--branches", "2,0", "--no-fold-batch-norm", "--license", "mit")
    assert code == 0, out
    images, expected, _ = answers(run, (2, 0))
    model = load(tmp_path / "one" / "student.safetensors")
    assert float((model(images) - expected).abs().max()) < 1e-4
    assert model.metadata["student"]["branches"] == [2, 0]
    assert model.metadata["spec"]["folded"] is False
    card = (tmp_path / "one" / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n")
    assert "2 branches (2, 0 of the 3 it was trained with" in card


def test_the_best_branch_is_that_of_the_highest_validation_accuracy(run, tmp_path):
    validated = json.loads((run / "result.json").read_text())["val_branch_accuracy"]
    code, out, _ = call(run, "-o", tmp_path / "best", "--branches", "best")
    assert code == 0, out
    model = load(tmp_path / "best" / "student.safetensors")
    (branch,) = model.metadata["student"]["branches"]
    assert branch == validated.index(max(validated))
    images, expected, _ = answers(run, (branch,))
    assert float((model(images) - expected).abs().max()) < 1e-4


def test_the_best_of_one_branch_is_that_branch(train, tmp_path):
    assert train(tmp_path / "run", "student.branches=1").code == 0
    assert call(tmp_path / "run", "-o", tmp_path / "one", "--branches", "best")[0] == 0
    assert read(tmp_path / "one")["student"]["branches"] == [0]


def test_late_branches_are_exported_as_one_head(train, tmp_path):
    run = tmp_path / "run"
    assert train(run, "student.branches=3", "student.split_after=stage3").code == 0
    code, out, err = call(run, "-o", tmp_path / "one", "--fold")
    assert code == 0, (out, err)
    images, expected, _ = answers(run)
    model = load(tmp_path / "one" / "student.safetensors")
    assert float((model(images) - expected).abs().max()) < 1e-4
    own, plain = load_student(run / "student.safetensors"), model.metadata["student"]
    head = sum(value.numel() for value in own.branches[0].parameters())
    assert plain["num_parameters"] == sum(value.numel() for value in own.parameters()) - 2 * head
    assert (plain["branches"], plain["one_head"], model.metadata["spec"]["branches"]) == ([0, 1, 2], True, 1)
    card = (tmp_path / "one" / "README.md").read_text()
    assert "a plain network, whose head is the mean of the heads of 3 branches" in card


@pytest.mark.parametrize("weights", ["best", "ema"])
def test_other_weights_have_the_accuracy_on_record(run, tmp_path, weights):
    _, out, _ = call(run, "-o", tmp_path, "--weights", weights)
    recorded = json.loads((run / "result.json").read_text())[f"test_accuracy_{weights}"]
    found = load(tmp_path / "student.safetensors").metadata
    assert found["student"]["weights"] == weights
    assert found["test_metrics"]["accuracy"] == pytest.approx(recorded, abs=1e-6)
    assert f"the run recorded {100 * recorded:.2f} %" in out


def test_a_folder_holds_one_student(run, tmp_path):
    folder = tmp_path / "out"
    assert call(run, "-o", folder)[0] == 0
    first = file_sha256(folder / "student.safetensors")
    code, _, (line,) = call(run, "-o", folder)
    assert code == 2
    assert f"{folder / 'student.safetensors'} exists (--force" in line
    code, _, (line,) = call(run, "-o", folder, "--format", "torch-export", "--branches", "0")
    assert code == 2
    assert "holds the export of another student" in line

    (folder / "README.md").write_text("my own words")
    code, out, _ = call(run, "-o", folder, "--format", "torch-export")
    assert code == 0
    assert "was edited and is kept" in out
    assert set(read(folder)["files"]) == {"student.safetensors", "student.pt2"}
    assert file_sha256(folder / "student.safetensors") == first

    assert call(run, "-o", folder, "--branches", "0", "--force")[0] == 0
    assert set(read(folder)["files"]) == {"student.safetensors"}
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "export.json", "student.safetensors"]
    assert "one branch" in (folder / "README.md").read_text()


def test_a_file_that_says_something_else_is_removed(run, tmp_path, monkeypatch):
    genuine = export.to_bytes

    def wrong(student, metadata, file_format):
        with torch.no_grad():
            student.network.heads[0].bias[3] += 5
        return genuine(student, metadata, file_format)

    monkeypatch.setattr(export, "to_bytes", wrong)
    code, _, (line,) = call(run, "-o", tmp_path / "out")
    assert code == 1
    assert "does not reproduce the student and was removed: max |Δlogit|" in line
    assert not (tmp_path / "out").exists()


def test_int8_that_loses_too_much_is_removed(run, exported, tmp_path, monkeypatch):
    wrong = (exported / "student.onnx").read_bytes()
    monkeypatch.setattr(export, "quantize_onnx", lambda *_: wrong)
    monkeypatch.setattr(export, "to_bytes", lambda *_: wrong)
    genuine = export.predict_logits
    wrong_classes = torch.eye(10)[(load_dataset("digits", run).test.labels + 1) % 10]
    monkeypatch.setattr(
        export, "predict_logits", lambda *words: wrong_classes if is_last(tmp_path) else genuine(*words)
    )
    code, _, (line,) = call(run, "-o", tmp_path / "out", "--format", "onnx", "--int8")
    assert code == 1
    assert "loses more accuracy than --max-drop 0.02 allows" in line
    assert set(read(tmp_path / "out")["files"]) == {"student.onnx"}
    assert not (tmp_path / "out" / "student.int8.onnx").exists()
    assert "student.onnx" in (tmp_path / "out" / "README.md").read_text()


def is_last(tmp_path: Path) -> bool:
    """Whether the float32 file is there already, so that it is the int8 file that is asked."""
    return (tmp_path / "out" / "student.onnx").exists()


# -- refusals ---------------------------------------------------------------------------------------------

REFUSED = [
    (["--format", "onxn"], ["unknown --format 'onxn'", "did you mean 'onnx'"]),
    (["--format", ","], ["--format ',': name at least one of"]),
    (["--weights", "bets"], ["did you mean 'best'"]),
    (["--branches", "0,x"], ["--branches 0,x"]),
    (["--branches", "0,3"], ["branches 0 to 2, not 3"]),
    (["--branches", "best", "--weights", "best"], ["--branches best --weights best", "the last weights"]),
    (["--branches", "1,1"], ["named twice"]),
    (["--int8"], ["--int8 --format safetensors", "needs the format onnx"]),
    (["--calibration-images", "0"], ["--calibration-images=0"]),
    (["--max-drop", "-1"], ["--max-drop -1"]),
    (["-o", "here.onnx"], ["must be a folder"]),
    (["recipe.lr=1"], ["recipe.lr=1", "data.root"]),
    (["--push", "x"], ["'x'", "USER/REPO"]),
    (["--push", "me/x", "--format", "onnx"], ["--push", "safetensors"]),
    (["--fold"], ["cannot be folded into one head", "ensemble=gate combines them"]),
]


@pytest.mark.parametrize(("words", "named"), REFUSED, ids=[" ".join(words) for words, _ in REFUSED])
def test_one_line_before_anything_is_written(run, tmp_path, words, named):
    own = [] if "-o" in words else ["-o", tmp_path / "out"]
    code, _, (line,) = call(run, *own, *words)
    assert code == 2
    assert line.startswith("ekd-export: error: ")
    assert [part for part in named if part not in line] == [], line
    assert not (tmp_path / "out").exists()


def test_runs_that_cannot_be_exported(run, tmp_path):
    def refused(directory: Path, *words: str) -> str:
        code, _, (line,) = call(directory, "-o", tmp_path / "out", *words)
        assert code == 2
        assert not (tmp_path / "out").exists()
        return line

    assert "no such directory" in refused(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "not the directory of a run (no config.yaml)" in refused(tmp_path / "empty")
    copy = tmp_path / "copy"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("export"))
    (copy / "checkpoints" / "best.ckpt").write_bytes(b"broken")
    assert "not a PyTorch checkpoint" in refused(copy, "--weights", "best")
    (copy / "checkpoints" / "best.ckpt").unlink()
    assert "the run has no" in refused(copy, "--weights", "best")
    provenance = read_json(copy / "provenance.json")
    provenance["data"]["test_sha256"] = "0" * 64
    write_json(copy / "provenance.json", provenance)
    assert "not those of the run" in refused(copy)
    content = (copy / "student.safetensors").read_bytes()
    for damaged in (b"broken", content[:-1] + bytes([content[-1] ^ 1])):
        (copy / "student.safetensors").write_bytes(damaged)
        assert "student.safetensors: " in refused(copy)
    (copy / "status.json").write_text(json.dumps({"state": "failed", "error": "no luck"}))
    assert "the run is not done, its status is 'failed' (no luck)" in refused(copy)
    (copy / "status.json").write_text(json.dumps({"state": "stopped"}))
    assert "its status is 'stopped'; ekd-train resume=DIR continues it" in refused(copy)


def test_a_folder_that_cannot_be_made_is_named(run):
    code, _, lines = call(run, "-o", "/proc/nowhere")
    assert code == 2
    assert lines[-1].startswith("ekd-export: error: /proc/nowhere")


def test_folders_that_are_somebody_elses(run, tmp_path):
    (tmp_path / "README.md").write_text("# my project")
    code, _, (line,) = call(run, "-o", tmp_path)
    assert (code, "is not the model card of an export" in line) == (2, True)
    (tmp_path / "export.json").write_text("{}")
    code, _, (line,) = call(run, "-o", tmp_path, "--force")
    assert (code, "not written by ekd-export" in line) == (2, True)
    code, _, (line,) = call(run, "-o", tmp_path / "README.md")
    assert (code, line.endswith("README.md: File exists")) == (2, True)


def test_a_missing_package_names_the_extra(run, tmp_path, monkeypatch):
    find = __import__("importlib.util").util.find_spec
    hidden = ("onnxscript", "huggingface_hub")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in hidden else find(name))
    code, _, (line,) = call(run, "-o", tmp_path / "out", "--format", "onnx")
    assert (code, "onnxscript is not installed: pip install 'ekd-lightning[export]'" in line) == (2, True)
    code, _, (line,) = call(run, "-o", tmp_path / "out", "--push", "me/x")
    assert (code, "huggingface_hub is not installed: pip install 'ekd-lightning[hub]'" in line) == (2, True)
    assert not (tmp_path / "out").exists()


# -- uploading --------------------------------------------------------------------------------------------


def test_pushing_uploads_the_export_and_says_where(run, tmp_path, monkeypatch):
    monkeypatch.setattr("ekd_lightning.networks.hub.push", lambda *given: f"https://hub/{given[1]}, {len(given)}")
    monkeypatch.chdir(run.parent)
    words = ("data.root=some where", "--trust")
    code, out, _ = call(run, "-o", tmp_path / "out", "--push", "me/x", *words)
    assert (code, "uploaded: https://hub/me/x, 2" in out.splitlines()) == (0, True)
    evaluate, report = (f"  ekd-evaluate {run.name} --parts all", f"  ekd-report {run.name} -o {run.name}/report")
    assert out.splitlines()[-2:] == [f"{evaluate} 'data.root=some where' --trust", report]


def test_each_row_of_a_study_has_the_student_of_its_lowest_finished_seed(run, tmp_path):
    """Whatever the accuracies; rows that cannot be exported do not stop the others."""
    folder, students = tmp_path / "study", tmp_path / "students"
    for name in ("one-f0.1-s1", "one-f0.1-s2", "hurt-f0.1-s0", "whole-f0.1-s0"):
        shutil.copytree(run, folder / "runs" / name, ignore=shutil.ignore_patterns("export"))
    better = folder / "runs" / "one-f0.1-s2" / "student.safetensors"
    for path in (better, folder / "runs" / "hurt-f0.1-s0" / "student.safetensors"):
        path.write_bytes(b"damaged")
    rows = tuple(RowPlan(name, ("method=ekd_pooled",)) for name in ("one", "hurt", "none", "whole"))
    write_study(Study(rows, (0.1,), (0, 1, 2), data="digits"), folder)
    code, out, (err,) = call(folder, "-o", students, "--branches", "0")
    assert code == 1
    assert re.fullmatch(r"ekd-export: error: row hurt: .*/hurt-f0\.1-s0/student\.safetensors: not a .* damaged .*", err)
    assert sorted(path.name for path in students.iterdir() if path.is_dir()) == ["one", "whole"]
    for name in ("one", "whole"):
        assert read(students / name)["student"]["branches"] == [0]
        assert (students / name / "README.md").is_file()
        images, reference, _ = answers(run, (0,))
        assert torch.allclose(
            torch.as_tensor(load(students / name / "student.safetensors")(images)), reference, atol=1e-4
        )
    assert re.search(r"hurt +0 +failed +none +no finished run +whole +0 +[\d.]+ +", out.replace("\n", " "))
    assert call(folder, "--push", "a/b")[2] == [
        f"ekd-export: error: --push: uploads one student, and {folder} is a study; name one of its runs"
    ]
    code, _, told = call(folder, "-o", students, "--branches", "0")
    assert (code, sum("exists (--force overwrites it" in line for line in told)) == (1, 2)
