"""Files that programs of users read, and what was downloaded: spoilt in every way, below the commands.

Refused in one line that names the file, made again, or as if untouched. What has no checksum of its own, as weights
and arrays of others, may be read as what it says now, but never runs, hangs or crashes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from damages import DAMAGES, EXECUTED, damage
from scenes import limited

from ekd_lightning.data.arrays import list_npz
from ekd_lightning.data.cifar import read_cifar
from ekd_lightning.data.decoding import cached_images
from ekd_lightning.data.listing import read_listing
from ekd_lightning.errors import UserError, users_line
from ekd_lightning.files import SEAL, UNSEALED, seal
from ekd_lightning.networks import (
    BranchedStudent,
    NetworkSpec,
    build_network,
    load_network,
    load_student,
    normalization,
    save_network,
    save_student,
)
from ekd_lightning.networks.deploy import DeployedStudent, pack_metadata, quantize_onnx, to_bytes
from ekd_lightning.networks.deployed import load_deployed
from ekd_lightning.networks.weights import read_foreign_checkpoint, read_metadata
from ekd_lightning.networks.zoo import find_zoo_file, zoo
from ekd_lightning.reporting.report_files import _remove_earlier
from ekd_lightning.runs.directory import RunDirectory
from ekd_lightning.runs.lock import LOCK_FILE, DirectoryLock
from ekd_lightning.runs.result import Result
from ekd_lightning.runs.writer import RunWriter
from ekd_lightning.studies.sweep import Job, job_state
from ekd_lightning.tracking.loggers import wandb_run_id

sys.path.append(str(Path(__file__).parents[1] / "data"))
from cifar_files import make_tiny

SPEC = NetworkSpec("resnet8", 4, normalization("unit"), {"width": 0.25})
METADATA = {"class_names": list("abcd"), "image_size": 8, "data": {"name": "nothing"}}
IMAGES = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
CIFAR = make_tiny("cifar10")
TEACHER, PUBLISHED = "cifar10_resnet20_akamaster", bytes(range(256))


def _network(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return build_network(SPEC).eval()


def _exported(file_format: str) -> bytes:
    torch.manual_seed(0)
    student = BranchedStudent(SPEC, branches=2, split_after="stage1").eval()
    return to_bytes(DeployedStudent(student), METADATA, file_format)


def _int8() -> bytes:
    torch.manual_seed(0)
    spec = DeployedStudent(BranchedStudent(SPEC, branches=2, split_after="stage1").eval()).spec
    return quantize_onnx(_exported("onnx"), [IMAGES.numpy()], pack_metadata({**METADATA, "spec": spec}))


def _said(path: Path) -> Any:
    return load_deployed(path)(IMAGES).tolist()


def _weights(path: Path) -> Any:
    return {name: tensor.tolist() for name, tensor in load_network(path).state_dict().items()}


def _foreign(path: Path) -> Any:
    return {name: tensor.shape for name, tensor in read_foreign_checkpoint(path).items()}


def _zoo(path: Path) -> Any:
    """The teacher of a published file that is ours."""
    entry = replace(zoo()[TEACHER], sha256=hashlib.sha256(PUBLISHED).hexdigest())
    return find_zoo_file(entry, path.parent).read_bytes()


def _cifar(path: Path) -> Any:
    found = read_cifar(CIFAR.spec, path.parent)
    return found.train.sha256, found.test.sha256, found.class_names


def _npz(path: Path) -> Any:
    return read_listing(list_npz(path), "own", image_size=None, cache=path.parent / "cache", skip_broken=False).train


def _cached(path: Path) -> Any:
    def build(target: Path) -> dict[str, Any]:
        target.write_bytes(bytes(range(24)))
        return {"shape": [2, 3, 2, 2]}

    images, facts = cached_images(path.parent, {"of": "two"}, build)
    return images.tolist(), facts


def _only_lock(folder: Path) -> None:
    _cached(folder / "x")
    for path in folder.glob("*.*"):
        if path.suffix == ".lock":
            path.write_text("lock")
        else:
            path.unlink()


def _locked(path: Path) -> Any:
    run = RunDirectory(path.parent)
    before = run.is_held()
    with DirectoryLock(path.parent):
        return before, run.is_held()


def _finished_job(folder: Path) -> None:
    run = RunWriter(folder)
    run.start(resumed=False)
    run.finish(Result.of({"method": "ekd", "data": "digits", "seed": 0, "fraction": 0.5, "test_accuracy": 0.25}))


def _counted(path: Path) -> Any:
    """What a sweep counts a job as; one that it counts as failed, it names with the error."""
    run = job_state(Job(path.parent, ())).run
    if run.error:
        raise UserError(run.error)
    return run.state, dict(run.result)


@dataclass(frozen=True)
class Kind:
    """A file that is spoilt.

    Attributes:
        make: Writes it, and what belongs to it, into a folder that is empty.
        file: Its name there; a pattern.
        read: What a program has of it.
        believed: Whether it may be read as something else: it has no checksum that one could know.
    """

    make: Callable[[Path], object]
    file: str
    read: Callable[[Path], Any]
    believed: bool = False


def _written(name: str, content: Callable[[], bytes], read: Callable[[Path], Any], believed: bool = False) -> Kind:
    return Kind(lambda folder: (folder / name).write_bytes(content()), name, read, believed)


KINDS = {
    "exported ONNX": _written("student.onnx", lambda: _exported("onnx"), _said),
    "exported ONNX in int8": _written("student-int8.onnx", _int8, _said),
    "exported .pt2": _written("student.pt2", lambda: _exported("torch-export"), _said),
    "teacher from a file": Kind(lambda folder: save_network(folder / "t.safetensors", _network()), "t.*", _weights),
    "foreign checkpoint": Kind(
        lambda folder: torch.save({"state_dict": _network().state_dict()}, folder / "t.pt"), "t.pt", _foreign, True
    ),
    "foreign safetensors": Kind(
        lambda folder: save_network(folder / "t.safetensors", _network()), "t.*", _foreign, True
    ),
    "teacher of the zoo": _written(zoo()[TEACHER].file, lambda: PUBLISHED, _zoo),
    "CIFAR's binary file": Kind(CIFAR.write, f"{CIFAR.spec.binary.folder}/data_batch_2.bin", _cifar),
    "CIFAR's names": Kind(lambda folder: _named(CIFAR.write(folder)), f"{CIFAR.spec.binary.folder}/*.txt", _cifar),
    "CIFAR's python file": Kind(
        lambda folder: CIFAR.write(folder, "python"), f"{CIFAR.spec.python.folder}/data_batch_2", _cifar
    ),
    "own arrays": Kind(lambda folder: _arrays(folder / "own.npz"), "own.npz", lambda path: _npz(path).sha256, True),
    "cached pixels": Kind(lambda folder: _cached(folder / "x"), "*.pixels", _cached),
    "facts of cached pixels": Kind(lambda folder: _cached(folder / "x"), "*.json", _cached),
    "lock of cached pixels": Kind(_only_lock, ".*.lock", _cached),
    "state of a sweep's job": Kind(_finished_job, "status.json", _counted),
    "result of a sweep's job": Kind(_finished_job, "result.json", _counted),
    "id of a W&B run": _written("wandb_run_id.txt", lambda: b"a1b2c3\n", lambda path: wandb_run_id(path.parent), True),
    "files of an earlier report": _written(
        "summary.json", lambda: b'{"files": ["a.svg", "\\u0000"]}', lambda path: _remove_earlier(path.parent), True
    ),
    "lock of a run": Kind(lambda folder: (folder / LOCK_FILE).write_text("{}"), LOCK_FILE, _locked),
}


def _named(folder: Path) -> None:
    (folder / CIFAR.spec.names_file).write_text("\n".join(CIFAR.spec.class_names))


def _arrays(path: Path) -> None:
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (8, 4, 4, 3), np.uint8)
    np.savez(path, x_train=images, y_train=np.arange(8) % 2, x_test=images[::-1], y_test=np.arange(8)[::-1] % 2)


def _student(path: Path) -> None:
    torch.manual_seed(0)
    save_student(path, BranchedStudent(SPEC, branches=2, split_after="stage1"))


DESCRIBED = {
    "network": ("ekd_spec", lambda path: save_network(path, _network()), load_network),
    "student": ("ekd_spec", _student, load_student),
    "exported student": ("spec", lambda path: path.write_bytes(_exported("safetensors")), load_deployed),
}


def _places(document: Any) -> list[tuple[Any, Any]]:
    """All values of a JSON document, as the mapping or list that each is in, and its key there."""
    pairs = [*(document.items() if isinstance(document, dict) else enumerate(document))]
    below = [value for _, value in pairs if isinstance(value, (dict, list))]
    return [*((document, key) for key, _ in pairs), *(place for value in below for place in _places(value))]


@pytest.mark.parametrize("kind", DESCRIBED)
def test_a_false_description_of_weights_is_refused_with_the_name_of_its_file(tmp_path, outcomes, kind):
    """Its checksum is right: it is not damaged, but made so."""
    key, write, read = DESCRIBED[kind]
    write(path := tmp_path / "made.safetensors")
    tensors, metadata = safetensors.torch.load_file(path), read_metadata(path)
    texts = ["[" * 50_000, "x", "{}", "null", '"x"', "[]"]
    for position in range(len(_places(json.loads(metadata[key])))):
        for value in (-1, 10**400, "x", {"a": 1}, None):
            document = json.loads(metadata[key])
            parent, name = _places(document)[position]
            parent[name] = value
            texts.append(json.dumps(document))
    for text in texts:
        path.write_bytes(seal(safetensors.torch.save(tensors, {**metadata, key: text, SEAL: UNSEALED})))
        outcomes["false description of weights"] += 1
        refusal = str(path)
        try:
            read(path)
        except UserError as error:
            refusal = str(error)
        assert str(path) in refusal


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders of undamaged files, made when first asked for."""
    root = tmp_path_factory.mktemp("whole")

    def folder(kind: str) -> Path:
        if not (root / kind).exists():
            (root / kind).mkdir()
            KINDS[kind].make(root / kind)
        return root / kind

    return folder


def spoil(whole: Path, folder: Path, kind: str, how: str) -> str | None:
    """What is wrong with how one damage of one file ended; None where it ended as promised."""
    found = KINDS[kind]
    shutil.copytree(whole, folder)
    path = next(folder.glob(found.file))
    expected = found.read(path)
    shutil.rmtree(folder)
    shutil.copytree(whole, folder)
    other = next((one for one in sorted(folder.iterdir()) if one.is_file() and one != path), Path(__file__))
    damage(how, path, other, Random(f"{kind} {how}"))
    try:
        with limited():
            said = found.read(path)
    except Exception as error:
        line = users_line(error)
        named = line is not None and path.name in line
        return None if named else f"{type(error).__name__}: {error}"
    return None if said == expected or found.believed else "believed"


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.attacks] * kind.startswith("exported")) for kind in KINDS]
)
def test_every_damage_of_a_file_that_is_read(tmp_path, monkeypatch, whole, outcomes, kind):
    monkeypatch.chdir(tmp_path)
    wrong = {}
    for place, how in enumerate(DAMAGES):
        ended = spoil(whole(kind), tmp_path / str(place), kind, how)
        outcomes["damaged file below the commands"] += 1
        if ended:
            wrong[how] = ended
    assert not list(tmp_path.rglob(EXECUTED))
    assert wrong == {}
