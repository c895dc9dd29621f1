"""The zoo: entries that hold together, hashes before opening, one line for every failure."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ekd_lightning.errors import UserError
from ekd_lightning.networks import NetworkSpec, build_network, normalization
from ekd_lightning.networks.convert import KEY_MAPS, load_foreign
from ekd_lightning.networks.zoo import ZooEntry, find_zoo_file, zoo


def test_every_entry_holds_together() -> None:
    assert [entry.data for entry in zoo().values()].count("cifar10") == 9
    hashes = set()
    for entry in zoo().values():
        with torch.device("meta"):
            assert build_network(entry.spec).spec.num_classes == {"cifar10": 10, "cifar100": 100}[entry.data]
        assert entry.key_map in KEY_MAPS
        assert re.fullmatch(r"[0-9a-f]{64}", entry.sha256)
        assert re.fullmatch(r"https://github\.com/\S+/raw/[0-9a-f]{40}/\S+", entry.url)
        assert 60 < entry.accuracy < 96
        assert entry.licence
        hashes.add(entry.sha256)
    assert len(hashes) == 14


def test_unknown_teacher_gets_the_nearest_name() -> None:
    with pytest.raises(UserError, match="did you mean 'cifar10_resnet20_akamaster'"):
        zoo()["cifar10_resnet20_akamastr"]


@pytest.fixture
def published(tmp_path: Path) -> tuple[ZooEntry, Path]:
    """An entry of the zoo, and the file that it is published as."""
    spec = NetworkSpec("resnet8", 10, normalization("cifar10"))
    file = tmp_path / "published.pth"
    torch.save(build_network(spec).state_dict(), file)
    entry = replace(
        zoo()["cifar10_resnet20_chenyaofo"],
        id="mine",
        network="resnet8",
        key_map="own",
        file="mine.pth",
        url=file.as_uri(),
        sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
    )
    return entry, file


def test_missing_file_without_permission_to_fetch(published: tuple[ZooEntry, Path], tmp_path: Path) -> None:
    entry, _ = published
    with pytest.raises(UserError, match=r"mine\.pth is not in .*weights.*allow downloads") as caught:
        find_zoo_file(entry, tmp_path / "weights")
    assert entry.url in str(caught.value)
    assert not (tmp_path / "weights").exists()


def test_fetches_once_and_loads(published: tuple[ZooEntry, Path], tmp_path: Path) -> None:
    entry, file = published
    path = find_zoo_file(entry, tmp_path / "weights", download=True)
    assert path.read_bytes() == file.read_bytes()
    file.unlink()
    assert find_zoo_file(entry, tmp_path / "weights") == path
    assert not load_foreign(path, entry.spec, entry.key_map).training
    assert [f.name for f in (tmp_path / "weights").iterdir() if f.suffix != ".lock"] == ["mine.pth"]


def test_address_that_does_not_answer(published: tuple[ZooEntry, Path], tmp_path: Path) -> None:
    entry, file = published
    file.unlink()
    with pytest.raises(UserError, match=r"could not be fetched.*by hand") as caught:
        find_zoo_file(entry, tmp_path / "weights", download=True)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "weights" / "mine.pth").exists()


def test_address_that_gives_another_file(published: tuple[ZooEntry, Path], tmp_path: Path) -> None:
    entry, file = published
    file.write_bytes(b"a login page")
    with pytest.raises(UserError, match=r"gave another file.*nothing was kept"):
        find_zoo_file(entry, tmp_path / "weights", download=True)
    assert [f for f in (tmp_path / "weights").iterdir() if f.suffix != ".lock"] == []


def test_file_that_is_not_the_published_one_is_not_opened(
    published: tuple[ZooEntry, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry, file = published
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("opened before its hash was checked"))
    (tmp_path / "mine.pth").write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"mine\.pth is not the published file"):
        find_zoo_file(entry, tmp_path)
