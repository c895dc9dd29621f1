"""Files are the old ones or the new ones, tell when they changed, and name themselves when a disk is full."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ekd_lightning.errors import UserError
from ekd_lightning.files import (
    SEAL,
    UNSEALED,
    DamagedFileError,
    file_sha256,
    is_intact,
    move_folder,
    read_json,
    read_yaml,
    remove_parts,
    replacing,
    seal,
    write_bytes,
    write_json,
    write_text,
)


def read(path: Path) -> object:
    return json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


def test_json_is_strict(tmp_path: Path) -> None:
    content = {"a": math.nan, "b": [math.inf, 1.5], "c": {"d": -math.inf}, "e": (1, 2), 3: None, "f": True}
    write_json(tmp_path / "x.json", content)
    expected = {"a": None, "b": [None, 1.5], "c": {"d": None}, "e": [1, 2], "3": None, "f": True}
    found = read(tmp_path / "x.json")
    assert isinstance(found, dict)
    assert found.keys() == {*expected, SEAL}
    assert read_json(tmp_path / "x.json") == expected


def test_what_is_not_json_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == {"a": 1}


@pytest.mark.parametrize("call", ["open", "fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "deep" / "x.txt"
    write_text(path, "old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(UserError, match=rf"{re.escape(str(path))}: cannot be written \(No space left") as caught:
            write_text(path, "new")
    assert isinstance(caught.value, OSError)
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_the_disk_has_a_file_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, calls = tmp_path / "x", []
    fsync, replace = os.fsync, os.replace

    def synced(handle: int) -> None:
        calls.append(("fsync", Path(os.readlink(f"/proc/self/fd/{handle}"))))
        fsync(handle)

    def replaced(old: Path, new: Path) -> None:
        calls.append(("replace", new))
        assert old.parent == new.parent, "a rename between file systems would not be one step"
        assert old.read_bytes() == b"content"
        replace(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    write_bytes(path, b"content")
    assert [name for name, _ in calls] == ["fsync", "replace", "fsync"]
    assert calls[0][1].parent == tmp_path
    assert calls[1:] == [("replace", path), ("fsync", tmp_path)]


def test_a_block_that_fails_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.onnx"
    path.write_text("old")
    with pytest.raises(KeyError), replacing(path) as part:  # noqa: PT012  # the block is what fails
        assert part.suffix == ".onnx"
        part.write_text("new")
        raise KeyError
    assert [path] == list(tmp_path.iterdir())
    assert path.read_text() == "old"


def test_new_files_have_the_rights_that_the_user_gives_new_files(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "x", "")
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640


def test_parts_of_a_killed_writer_are_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in (".part-1234.last.ckpt", ".part-1234.best.ckpt", "last.ckpt", ".last.ckpt"):
        (tmp_path / name).write_text("")
    remove_parts(tmp_path, "last.ckpt")
    remove_parts(tmp_path / "none", "last.ckpt")
    assert {path.name for path in tmp_path.iterdir()} == {".part-1234.best.ckpt", "last.ckpt", ".last.ckpt"}
    remove_parts(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"last.ckpt", ".last.ckpt"}


def test_a_folder_moves_whole(tmp_path: Path) -> None:
    write_text(tmp_path / "ready" / "a", "content")
    move_folder(tmp_path / "ready", tmp_path / "final")
    assert (tmp_path / "final" / "a").read_text() == "content"
    write_text(tmp_path / "other" / "a", "")
    with pytest.raises(UserError, match="final: cannot be written"):
        move_folder(tmp_path / "other", tmp_path / "final")


def test_file_hash(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    assert file_sha256(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    with pytest.raises(UserError, match="no such file"):
        file_sha256(tmp_path / "g")


@given(before=st.binary(), after=st.binary(), data=st.data())
def test_a_seal_is_the_hash_of_the_unsealed_content_and_breaks_with_any_byte(
    before: bytes, after: bytes, data: st.DataObject
) -> None:
    open_content = before + f'{SEAL}": "{UNSEALED}'.encode() + after
    sealed = seal(open_content)
    digest = hashlib.sha256(open_content).hexdigest()
    assert sealed == before + f'{SEAL}": "{UNSEALED.replace("0" * 64, digest)}'.encode() + after
    assert is_intact(sealed) is True
    place = data.draw(st.integers(0, len(sealed) - 1))
    damaged = bytearray(sealed)
    damaged[place] ^= data.draw(st.integers(1, 255))
    assert is_intact(bytes(damaged)) is False


@pytest.mark.parametrize("text", ["", "{", "[1]", '"a"', f'{{"a": 1, "{SEAL}": "{UNSEALED}"}}'])
def test_json_that_is_no_mapping_or_changed_is_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(DamagedFileError, match=r"x\.json: damaged") as caught:
        read_json(tmp_path / "x.json")
    assert "\n" not in str(caught.value)


def test_a_merged_mapping_may_override_a_key_but_none_may_be_there_twice(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("p:\n  q: &b\n    <<: &a {x: 1}\n    x: 2\nd:\n  <<: *b\n")
    assert read_yaml(path)["p"] == {"q": {"x": 2}}
    path.write_text("p:\n- {x: 1, y: 2, x: 3}\n")
    with pytest.raises(DamagedFileError, match=r"x\.yaml: the key 'x' is there twice \(line 2\); remove one$"):
        read_yaml(path)
    path.write_text("")
    assert read_yaml(path) is None
