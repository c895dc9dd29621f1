"""Zoo of pretrained teachers by name, each with its address, hash and accuracy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock

from ekd_lightning.errors import Registry, UserError
from ekd_lightning.files import file_sha256
from ekd_lightning.networks.convert import load_foreign
from ekd_lightning.networks.staged import NetworkSpec, StagedNetwork, normalization


@dataclass(frozen=True)
class ZooEntry:
    """One pretrained teacher.

    Attributes:
        id: its name in the zoo.
        data: the data set it was trained on, `cifar10` or `cifar100`.
        network: its registered network.
        num_classes: C.
        normalization: name of the normalisation it was trained with.
        key_map: name of the map from the file's names to ours.
        file: the file's name in a folder of weights.
        url: where the file is published.
        sha256: of the file; anything else under that name is refused.
        accuracy: top-1 in percent on the 10,000 official test images.
        source: who trained it, and where the file is from.
        licence: under which terms it is published.
        options: options of the network.
    """

    id: str
    data: str
    network: str
    num_classes: int
    normalization: str
    key_map: str
    file: str
    url: str
    sha256: str
    accuracy: float
    source: str
    licence: str
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def spec(self) -> NetworkSpec:
        """The network of this entry."""
        return NetworkSpec(self.network, self.num_classes, normalization(self.normalization), self.options)


def zoo_ids(data: str | None = None) -> tuple[str, ...]:
    """Returns the names of all entries, or of those trained on one data set, in the zoo's order."""
    return tuple(name for name, entry in _entries().items() if data in (None, entry.data))


def zoo_entry(id: str) -> ZooEntry:
    """Looks up an entry.

    Raises:
        UserError: when there is none of that name; the nearest one is offered.
    """
    return _entries()[id]


def load_zoo_teacher(id: str, weights_dir: str | Path, download: bool = False) -> tuple[StagedNetwork, ZooEntry]:
    """Loads a pretrained teacher from a folder of weights, after fetching it there if allowed.

    Concurrent runs fetch a file once (file lock), and a file appears in the folder whole or not at
    all. Its SHA-256 is checked before it is opened, wherever it came from.

    Args:
        id: the entry's name.
        weights_dir: the folder that holds, or is to hold, the file.
        download: whether the file may be fetched from the entry's address.

    Returns:
        The network on the CPU, in eval mode, and its entry.

    Raises:
        UserError: on an unknown name, a missing file that may not or cannot be fetched, a file that
            is not the published one.
    """
    entry = zoo_entry(id)
    path = Path(weights_dir).expanduser() / entry.file
    if not path.is_file():
        if not download:
            raise UserError(
                f"teacher {id!r}: {entry.file} is not in {path.parent}; "
                f"allow downloads, or put it there from {entry.url}"
            )
        _fetch(entry, path)
    found = file_sha256(path)
    if found != entry.sha256:
        raise UserError(
            f"teacher {id!r}: {path} is not the published file (SHA-256 {found[:12]}..., "
            f"expected {entry.sha256[:12]}...); remove it to have it fetched again"
        )
    return load_foreign(path, entry.spec, entry.key_map), entry


@cache
def _entries() -> Registry[ZooEntry]:
    text = resources.files(__package__).joinpath("zoo.yaml").read_text(encoding="utf-8")
    entries: Registry[ZooEntry] = Registry("teacher")
    for values in yaml.safe_load(text)["teachers"]:
        entry = ZooEntry(**values)
        if entry.id in entries:
            raise ValueError(f"zoo.yaml holds {entry.id!r} twice")
        entries[entry.id] = entry
    return entries


def _fetch(entry: ZooEntry, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock")):
            if not path.is_file():  # else another run fetched it while this one waited
                torch.hub.download_url_to_file(entry.url, str(path), hash_prefix=entry.sha256, progress=False)
    except RuntimeError as error:  # of another hash: PyTorch keeps nothing then
        raise UserError(f"teacher {entry.id!r}: {entry.url} gave another file ({error}); nothing was kept") from None
    except OSError as error:  # network and disk alike: urllib's errors are OSErrors
        raise UserError(
            f"teacher {entry.id!r}: {entry.file} is not in {path.parent} and could not be fetched from "
            f"{entry.url} ({error}); put the file there by hand"
        ) from None
