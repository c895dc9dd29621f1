"""Students by name: a file, a student of the package, or a repository of the hub, which is a folder here."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard, constants
from huggingface_hub.utils import filter_repo_objects

import ekd_lightning
from ekd_lightning.data import load_dataset
from ekd_lightning.errors import UserError
from ekd_lightning.networks import BranchedStudent, NetworkSpec, hub, normalization
from ekd_lightning.networks.deploy import DeployedStudent, to_bytes
from ekd_lightning.networks.deployed import load_deployed

IMAGES = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
METADATA = {"class_names": ["a", "b"], "image_size": 16}
CARD = "---\ntags:\n- image-classification\n---\n# A student\n"


def content(branches: int) -> bytes:
    """A student's file."""
    torch.manual_seed(branches)
    spec = NetworkSpec("resnet8", 2, normalization("cifar10"), {"width": 0.25})
    student = BranchedStudent(spec, branches=branches, split_after="stage1").eval()
    return to_bytes(DeployedStudent(student), METADATA, "safetensors")


def record(folder: Path, *files: str) -> None:
    """Writes export.json."""
    (folder / "export.json").write_text(json.dumps({"files": {name: {} for name in files}}), encoding="utf-8")


@pytest.fixture
def export(tmp_path: Path) -> Path:
    """What `ekd-export` leaves behind, and a file of somebody's beside it."""
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "student.safetensors").write_bytes(content(branches=2))
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    record(folder, "student.safetensors")
    (folder / "private.txt").write_text("not to be seen", encoding="utf-8")
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def put(cache: Path, repository: str, commit: str, revision: str, file: Path) -> None:
    """Lays a file into the cache as the hub does."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    (folder / "snapshots" / commit).mkdir(parents=True)
    shutil.copy(file, folder / "snapshots" / commit / file.name)
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / revision).write_text(commit, encoding="utf-8")


class Hub:
    """Stands for `huggingface_hub.HfApi`, and remembers what it is told."""

    def __init__(self, *files: str) -> None:
        self.made: dict[str, bool] = {}
        self.files = set(files)

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        assert exist_ok
        self.made[repo_id] = private

    def upload_folder(
        self, *, repo_id: str, folder_path: Path, allow_patterns: list[str], delete_patterns: list[str]
    ) -> str:
        self.files -= set(filter_repo_objects(self.files, allow_patterns=delete_patterns))
        self.files |= set(filter_repo_objects((p.name for p in folder_path.iterdir()), allow_patterns=allow_patterns))
        return f"https://hub/{repo_id}/commit/1"


def test_a_repository_answers_as_the_file_does_by_branch_and_tag(export, cache):
    file = export / "student.safetensors"
    put(cache, "me/small", "a" * 40, "main", file)
    other = export / "other" / "student.safetensors"
    other.parent.mkdir()
    other.write_bytes(content(branches=1))
    put(cache, "me/small", "b" * 40, "v2", other)
    for revision, path in ((None, file), ("v2", other), ("b" * 40, other)):
        assert torch.equal(ekd_lightning.load("me/small", revision=revision)(IMAGES), load_deployed(path)(IMAGES))


@pytest.mark.parametrize("missing", ["repository", "revision", "file"])
def test_what_the_hub_lacks_is_one_line(export, cache, missing):
    if missing != "repository":
        put(cache, "me/small", "a" * 40, "main", export / ("README.md" if missing == "file" else "student.safetensors"))
    revision = "v9" if missing == "revision" else None
    with pytest.raises(UserError, match=r"^hub repository 'me/small': student.safetensors cannot be fetched \(.+\)$"):
        ekd_lightning.load("me/small", revision=revision)


def test_a_repository_of_something_else_is_refused(cache, tmp_path):
    (tmp_path / "student.safetensors").write_bytes(b"\x00" * 64)
    put(cache, "me/other", "a" * 40, "main", tmp_path / "student.safetensors")
    with pytest.raises(UserError, match="not a safetensors file, or damaged"):
        ekd_lightning.load("me/other")


def test_a_missing_package_names_the_extra(export, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    said = r"^huggingface_hub is not installed: pip install 'ekd-lightning\[hub\]'$"
    with pytest.raises(UserError, match=said):
        ekd_lightning.load("me/small")
    with pytest.raises(UserError, match=said):
        ekd_lightning.push(export, "me/small")


def test_a_folder_of_the_same_name_hides_no_repository(export, cache, monkeypatch):
    put(cache, "me/small", "a" * 40, "main", export / "student.safetensors")
    monkeypatch.chdir(export)
    Path("me/small").mkdir(parents=True)
    expected = load_deployed(export / "student.safetensors")(IMAGES)
    assert torch.equal(ekd_lightning.load("me/small")(IMAGES), expected)


def test_a_folder_answers_for_the_one_student_in_it(export, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "b").mkdir(parents=True)
    shutil.copy(export / "student.safetensors", "a/b/one.safetensors")
    assert hub.find_student("a/b") == Path("a/b/one.safetensors")
    shutil.copy(export / "student.safetensors", "a/b/two.safetensors")
    with pytest.raises(UserError, match=r"several students; name one: a/b/one.safetensors, a/b/two.safetensors"):
        hub.find_student("a/b")


def test_students_of_the_package_go_by_name_and_files_before_them(export, monkeypatch):
    own = export / "students"
    own.mkdir()
    shutil.move(export / "student.safetensors", own / "tiny.safetensors")
    monkeypatch.setattr(hub, "STUDENTS", own)
    expected = load_deployed(own / "tiny.safetensors")(IMAGES)
    assert torch.equal(ekd_lightning.load("tiny")(IMAGES), expected)
    with pytest.raises(UserError, match=r"^unknown student 'tinny'; did you mean 'tiny'\? \(allowed: tiny\)"):
        ekd_lightning.load("tinny")
    with pytest.raises(UserError, match="revision='v1': tiny is not a repository"):
        ekd_lightning.load("tiny", revision="v1")
    monkeypatch.chdir(export)
    Path("tiny").mkdir()
    assert torch.equal(ekd_lightning.load("tiny")(IMAGES), expected)
    Path("tiny").rmdir()
    Path("tiny").write_text("a file")
    with pytest.raises(UserError, match="tiny: not an exported student"):
        ekd_lightning.load("tiny")


@pytest.mark.parametrize("name", ["none.safetensors", "me/none.onnx", "a/b/c", "../up", Path("me/small")])
def test_paths_are_never_asked_of_the_hub(name, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(UserError, match=r"cannot be read|not an exported student"):
        ekd_lightning.load(name)


def test_pushing_sends_the_export_and_nothing_beside_it(export, monkeypatch):
    api = Hub("student.pt2", "student.safetensors", "student-notes.md")  # of another student, pushed earlier
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api)
    (export / "student.int8.onnx").write_bytes(b"")
    (export / "student.onnx").write_bytes(b"left by somebody")
    record(export, "student.safetensors", "student.int8.onnx")
    assert ekd_lightning.push(export, "me/small") == "https://hub/me/small/commit/1"
    assert api.made == {"me/small": True}
    assert api.files == {"README.md", "export.json", "student.safetensors", "student.int8.onnx", "student-notes.md"}
    ekd_lightning.push(export, "me/open", private=False)
    assert api.made["me/open"] is False


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: (folder / "export.json").unlink(), r"lacks export\.json \(ekd-export RUN -o"),
        (lambda folder: (folder / "student.safetensors").unlink(), r"lacks student\.safetensors"),
        (lambda folder: record(folder, "student.safetensors", "student.onnx"), r"lacks student\.onnx"),
        (record, r"lacks student\.safetensors"),
        (lambda folder: record(folder, "*"), r"export\.json: damaged, or not written by ekd-export"),
        (lambda folder: (folder / "export.json").write_text("[]"), r"export\.json: damaged"),
        (lambda folder: (folder / "README.md").write_text("---\na: [\n---\n"), "the hub cannot read its header"),
        (lambda folder: None, r"hub repository 'me/small': nothing was uploaded \(no token\)"),
    ],
)
def test_what_cannot_be_pushed_is_one_line(export, monkeypatch, spoil, said):
    class Refusing(Hub):
        def create_repo(self, *_: object, **__: object) -> None:
            raise OSError("no token")

    monkeypatch.setattr(huggingface_hub, "HfApi", Refusing)
    spoil(export)
    with pytest.raises(UserError, match=said) as caught:
        ekd_lightning.push(export, "me/small")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["small", "a/b/c", "../b", "me/", "https://hub/me/small"])
def test_names_that_are_no_repository(export, name):
    with pytest.raises(UserError, match="not the name of a repository"):
        ekd_lightning.push(export, name)


OWN = sorted(path.stem for path in hub.STUDENTS.glob("*.safetensors"))


@pytest.mark.parametrize("name", OWN)
def test_a_student_of_the_package_is_small_and_has_a_card_that_names_it(name):
    path = hub.STUDENTS / f"{name}.safetensors"
    card: Any = ModelCard.load(path.with_suffix(".md"))
    model = ekd_lightning.load(name)
    assert model.metadata["student"]["num_parameters"] < 250_000
    assert path.stat().st_size < 5 * model.metadata["student"]["num_parameters"]
    assert card.data.model_name == name
    assert f'ekd_lightning.load("{name}")' in card.text
    (accuracy,) = (one.metric_value for one in card.data.eval_results if one.metric_type == "accuracy")
    assert accuracy == model.metadata["test_metrics"]["accuracy"]


@pytest.mark.assets
@pytest.mark.skipif(not os.environ.get("EKD_DATA_ROOT"), reason="EKD_DATA_ROOT names no real images")
@pytest.mark.parametrize("name", OWN)
def test_its_accuracy_on_the_real_test_images_is_that_of_its_card(name):
    model = ekd_lightning.load(name)
    test = load_dataset(model.metadata["data"]["name"], os.environ["EKD_DATA_ROOT"]).test
    right = sum(
        int((model(images.float() / 255).argmax(1) == labels).sum())
        for images, labels in zip(test.images.split(500), test.labels.split(500), strict=True)
    )
    expected = model.metadata["test_metrics"]["accuracy"]
    assert right / len(test.labels) == pytest.approx(expected, abs=2e-4)  # near ties may fall either way


def test_the_page_lists_the_students_of_the_package_with_their_numbers():
    page = (Path(__file__).parents[2] / "docs/export.md").read_text()
    page = page.split("## Students in the package\n")[1].split("\n## ")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("| `")
    ]
    assert sorted(row[0].strip("`") for row in rows) == sorted(OWN)
    assert {"resnet8-ekd-cifar10", "resnet20-ekd-cifar10", "resnet20-ekd-cifar100"} < set(OWN)
    for name, _, data, labels, parameters, macs, accuracy, best in rows:
        facts = ekd_lightning.load(name.strip("`")).metadata
        teachers = [one["test_accuracy"] for one in facts["method"]["teachers"]]
        share = facts["data"].get("fraction")
        assert data == facts["data"]["name"].upper().replace("CIFAR", "CIFAR-")
        assert labels == ("all" if share in (None, 1.0) else f"{share:.0%}".replace("%", " %"))
        assert parameters == f"{facts['student']['num_parameters']:,}"
        assert macs == f"{facts['student']['macs'] / 1e6:.1f} M"
        assert (accuracy, best) == (f"{100 * facts['test_metrics']['accuracy']:.2f}", f"{100 * max(teachers):.2f}")
