"""Damaged files of every kind: refused by name or made again, never taken for what was written."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ekd_lightning.data import load_dataset
from ekd_lightning.errors import UserError
from ekd_lightning.files import SEAL, is_intact
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
from ekd_lightning.networks.weights import read_metadata
from ekd_lightning.teachers.store import TeacherStore
from ekd_lightning.training.checkpoints import read_checkpoint, write_checkpoint

SPEC = NetworkSpec("resnet8", 10, normalization("unit"), {"width": 0.25})
KEY = {"data": "digits"}
DIGITS = load_dataset("digits", "unused")

many = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
"""A file is written anew in every example."""


@st.composite
def damages(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """A bit that flipped, an end or a block that never got to disk, or something behind the end."""
    kind = draw(st.sampled_from(["bit", "cut", "zeros", "tail"]))
    place, bit = draw(st.floats(0, 1, exclude_max=True)), draw(st.integers(0, 7))

    def damage(content: bytes) -> bytes:
        at = int(place * len(content))
        changed = bytearray(content)
        if kind == "bit":
            changed[at] ^= 1 << bit
        elif kind == "cut":
            del changed[at:]
        elif kind == "zeros":
            changed[at : at + 512] = bytes(len(changed[at : at + 512]))
        else:
            changed += b"\0" * (1 + bit)
        return bytes(changed)

    return damage


def same(found: Any, expected: Any) -> bool:
    if isinstance(expected, torch.Tensor):
        return torch.equal(found, expected)
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[key], expected[key]) for key in expected)
    return bool(found == expected)


def attempt(read: Callable[[], Any]) -> tuple[Any, str]:
    """What was read, or the line that refuses it."""
    try:
        return read(), ""
    except UserError as error:
        return None, str(error)


# -- what cannot be made again is refused ---------------------------------------------------------------------


def _network() -> Any:
    torch.manual_seed(0)
    return build_network(SPEC).eval()


def _student() -> BranchedStudent:
    torch.manual_seed(0)
    return BranchedStudent(SPEC, branches=2, split_after="stage1").eval()


def _state() -> dict[str, Any]:
    momentum = {0: {"momentum_buffer": torch.linspace(0, 1, 500)}}
    return {"global_step": 4, "epoch": 1, "state_dict": _network().state_dict(), "optimizer": momentum}


KINDS: dict[str, tuple[Callable[[Path], None], Callable[[Path], Any], Callable[[Path], None]]] = {
    "checkpoint": (
        lambda path: write_checkpoint(path, _state()),
        read_checkpoint,
        lambda path: torch.save(_state(), path),
    ),
    "teacher": (
        lambda path: save_network(path, _network(), {"data": "digits"}),
        lambda path: load_network(path).state_dict(),
        lambda path: _unsealed(path, _network().state_dict()),
    ),
    "student": (
        lambda path: save_student(path, _student(), {"subset_sha256": "0" * 64}),
        lambda path: load_student(path).state_dict(),
        lambda path: _unsealed(path, _student().state_dict()),
    ),
}
"""Kind: how it is written, how it is read, and how it was written before files had checksums."""


def _unsealed(path: Path, state: dict[str, torch.Tensor]) -> None:
    """What stands in `path`, as safetensors without a checksum."""
    metadata = read_metadata(path)
    assert SEAL not in metadata
    safetensors.torch.save_file(state, path, metadata)


@pytest.mark.parametrize("kind", KINDS)
@many
@given(damage=damages())
def test_what_is_damaged_is_refused_by_name(
    tmp_path_factory: pytest.TempPathFactory, kind: str, damage: Callable[[bytes], bytes]
) -> None:
    write, read, _ = KINDS[kind]
    folder = tmp_path_factory.getbasetemp() / "whole"
    folder.mkdir(exist_ok=True)
    whole = folder / kind
    if not whole.is_file():
        write(whole)
    content, path = whole.read_bytes(), folder / f"{kind}.damaged"
    path.write_bytes(damage(content))
    found, refusal = attempt(lambda: read(path))
    if refusal:
        assert refusal.startswith(f"{path}: ")
        assert "\n" not in refusal
    else:  # what is zero now was zero before, or the zeros hit a checkpoint's checksum alone
        assert same(found, read(whole))
        assert kind == "checkpoint" or path.read_bytes() == content


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_before_are_accepted(tmp_path: Path, kind: str) -> None:
    write, read, write_before = KINDS[kind]
    path = tmp_path / kind
    write(path)
    assert is_intact(path.read_bytes()) is True
    found = read(path)
    write_before(path)
    assert is_intact(path.read_bytes()) is None
    assert same(read(path), found)


@many
@given(damage=damages())
def test_a_damaged_teacher_of_the_store_says_what_to_delete(
    tmp_path_factory: pytest.TempPathFactory, damage: Callable[[bytes], bytes]
) -> None:
    store = TeacherStore(tmp_path_factory.getbasetemp() / "store")
    network = store.get_or_train(KEY, lambda scratch: _network())
    path = store.path(KEY)
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    found, refusal = attempt(lambda: store.get_or_train(KEY, pytest.fail))
    path.write_bytes(whole)
    if refusal:
        assert refusal.startswith(f"{path}: ")
        assert refusal.endswith(f"delete the folder {path.parent} to train this teacher again")
    else:
        assert same(found.state_dict(), network.state_dict())


# -- what can be made again is made again ---------------------------------------------------------------------


@many
@given(damage=damages())
def test_damaged_outputs_of_a_teacher_are_made_again(
    tmp_path_factory: pytest.TempPathFactory, damage: Callable[[bytes], bytes]
) -> None:
    store, network = TeacherStore(tmp_path_factory.getbasetemp() / "asked"), _network()
    test, device = DIGITS.test, torch.device("cpu")
    outputs = store.test_outputs(lambda: network, "a", test, 120, device)
    scores = store.test_scores(network, "a", test, 120, device)
    (path,) = (store.root / "outputs").glob("*.safetensors")
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("ekd_lightning").addHandler(handler)
    try:
        assert store.test_scores(network, "a", test, 120, device) == scores
        again = store.test_outputs(lambda: network, "a", test, 120, device)
    finally:
        logging.getLogger("ekd_lightning").removeHandler(handler)
    assert all(map(torch.equal, again, outputs))
    if said:
        (line,) = said
        assert line.startswith(f"{path}: ")
        assert line.endswith("again")
        assert is_intact(path.read_bytes()) is True
    else:  # what is zero now was zero before
        assert path.read_bytes() == whole
