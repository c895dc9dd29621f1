"""Our files: round trips, hashes, damage. Foreign files: never executed, always refused in one line."""

from __future__ import annotations

import json
import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from ekd_lightning.errors import UserError
from ekd_lightning.networks import (
    BranchedStudent,
    NetworkSpec,
    StagedNetwork,
    build_network,
    load_network,
    load_student,
    normalization,
    save_network,
    save_student,
    state_sha256,
)
from ekd_lightning.networks.weights import read_foreign_checkpoint, read_metadata


def _network(seed: int = 0, statistics: str = "cifar10", **options: Any) -> StagedNetwork:
    torch.manual_seed(seed)
    return build_network(NetworkSpec("resnet8", 10, normalization(statistics), options))


def _student(ensemble: str = "mean_logits") -> BranchedStudent:
    spec = NetworkSpec("resnet8", 10, normalization("cifar100"), {"shortcut": "A"})
    return BranchedStudent(spec, branches=2, split_after="stage2", ensemble=ensemble)


def test_network_round_trip(tmp_path: Path) -> None:
    network = _network(shortcut="A")
    network(torch.rand(4, 3, 32, 32))  # moves the batch norm statistics
    path = tmp_path / "deep" / "teacher.safetensors"
    save_network(path, network, {"subset": "abc"})
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    loaded = load_network(path)
    assert torch.equal(torch.rand(3), expected), "loading must not advance the random generator"
    assert loaded.spec == network.spec
    assert not loaded.training
    assert state_sha256(loaded) == state_sha256(network)
    assert read_metadata(path)["subset"] == "abc"
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(loaded(images), network.eval()(images))


@pytest.mark.parametrize("ensemble", ["mean_probs", "gate"])
def test_student_round_trip(tmp_path: Path, ensemble: str) -> None:
    student = _student(ensemble).eval()
    save_student(tmp_path / "s.safetensors", student, {"method": "ekd"})
    loaded = load_student(tmp_path / "s.safetensors")
    assert (loaded.spec, loaded.num_branches) == (student.spec, 2)
    assert (loaded.split_after, loaded.ensemble) == ("stage2", ensemble)
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(loaded(images), student(images))


def test_kinds_are_not_confused(tmp_path: Path) -> None:
    save_student(tmp_path / "s", _student())
    save_network(tmp_path / "n", _network())
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "x")
    with pytest.raises(UserError, match="holds a student, not a network"):
        load_network(tmp_path / "s")
    with pytest.raises(UserError, match="holds a network, not a student"):
        load_student(tmp_path / "n")
    with pytest.raises(UserError, match="holds something else"):
        load_network(tmp_path / "x")


def test_damaged_files_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "n.safetensors"
    save_network(path, _network())
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], content[:5], b"", b"hello"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"n\.safetensors"):
            load_network(path)
    with pytest.raises(UserError, match="no such file"):
        load_network(tmp_path / "none.safetensors")


def test_weights_that_do_not_fit_their_description_are_refused(tmp_path: Path) -> None:
    network = _network()
    state = network.state_dict()
    del state["head.bias"]
    metadata = {"ekd_kind": "network", "ekd_spec": '{"name": "resnet8"}'}
    safetensors.torch.save_file(state, tmp_path / "a", metadata)
    with pytest.raises(UserError, match="not a network spec"):
        load_network(tmp_path / "a")
    save_network(tmp_path / "b", network)
    safetensors.torch.save_file(state, tmp_path / "c", read_metadata(tmp_path / "b"))
    with pytest.raises(UserError, match=r"do not fit.*head\.bias"):
        load_network(tmp_path / "c")
    spec = {**network.spec.to_dict(), "num_classes": 10**15}
    safetensors.torch.save_file(state, tmp_path / "d", {**metadata, "ekd_spec": json.dumps(spec)})
    with pytest.raises(UserError, match=r"/d: the network of its description cannot be built"):
        load_network(tmp_path / "d")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "n.safetensors"
    save_network(path, _network())
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(UserError, match=r"cannot be written.*No space"):
        save_network(path, _network(seed=1))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_metadata_must_be_strings_and_not_ours(tmp_path: Path) -> None:
    for bad in ({"ekd_spec": "x"}, {"a": 1}):
        with pytest.raises(ValueError, match="metadata"):
            save_network(tmp_path / "n", _network(), bad)


def test_state_hash_is_of_content_only() -> None:
    network = _network()
    digest = state_sha256(network)
    assert digest == state_sha256(_network().eval().to(memory_format=torch.channels_last))
    assert digest != state_sha256(_network(seed=1))
    assert digest != state_sha256(_network(statistics="unit"))
    with torch.no_grad():
        network.head.bias[3] += 1e-6
    assert digest != state_sha256(network)


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "net"])
def test_foreign_wrappings_are_taken_off(tmp_path: Path, wrapper: str | None) -> None:
    state: Any = OrderedDict({"module.conv.weight": torch.ones(2), "module.fc.bias": torch.zeros(1)})
    if wrapper:
        state = {wrapper: state, "epoch": 3, "best": 0.5}
    torch.save(state, tmp_path / "c.pth")
    found = read_foreign_checkpoint(tmp_path / "c.pth")
    assert list(found) == ["conv.weight", "fc.bias"]
    assert torch.equal(found["conv.weight"], torch.ones(2))


def test_foreign_safetensors(tmp_path: Path) -> None:
    safetensors.torch.save_file({"module.a": torch.ones(2)}, tmp_path / "c.safetensors")
    assert list(read_foreign_checkpoint(tmp_path / "c.safetensors")) == ["a"]


class Malicious:
    """Makes a file when unpickled freely."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.mark}'",)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_code_in_a_checkpoint_is_refused_and_does_not_run(tmp_path: Path, form: str) -> None:
    mark, path = tmp_path / "ran", tmp_path / "evil.pth"
    content = {"state_dict": {"a": torch.zeros(1), "b": Malicious(mark)}}
    if form == "pickle":
        path.write_bytes(pickle.dumps(content["state_dict"]["b"], protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(UserError, match=r"evil\.pth: refused, opening it would run code") as caught:
        read_foreign_checkpoint(path)
    assert "\n" not in str(caught.value)
    assert not mark.exists()
    torch.load(path, weights_only=False) if form != "pickle" else pickle.loads(path.read_bytes())
    assert mark.exists(), "the file is harmless, so the test shows nothing"


def test_what_is_no_checkpoint_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "c.pth"
    torch.save({"a": torch.zeros(1000)}, path)
    whole = path.read_bytes()
    torch.save({"lr": 0.1}, tmp_path / "numbers.pth")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    torch.save({}, tmp_path / "empty.pth")
    damaged = {
        "half": whole[: len(whole) // 2],
        "none": b"",
        "text": b"hello world",
        "png": b"\x89PNG",
        "jpg": b"\xff\xd8",
    }
    for name, content in damaged.items():
        (tmp_path / f"{name}.pth").write_bytes(content)
    for name in ("numbers", "list", "empty", *damaged, "missing"):
        with pytest.raises(UserError, match=rf"{name}\.pth") as caught:
            read_foreign_checkpoint(tmp_path / f"{name}.pth")
        assert "\n" not in str(caught.value)
        assert "would run code" not in str(caught.value)
    with pytest.raises(UserError, match="no such file"):
        read_foreign_checkpoint(tmp_path)
