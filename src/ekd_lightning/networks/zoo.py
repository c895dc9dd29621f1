"""Zoo of pretrained teachers by name, each with its URL, hash and accuracy."""

from __future__ import annotations

import logging
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
from ekd_lightning.networks.spec import NetworkSpec, normalization

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ZooEntry:
    """One pretrained teacher.

    Attributes:
        id: its name in the zoo.
        normalization: name of its normalisation.
        key_map: name of the map from the file's tensor names to this package's, see `convert.KEY_MAPS`.
        file: the file's name in a folder of weights.
        sha256: SHA-256 of the file; other files of its name are refused.
        accuracy: top-1 in percent on the 10,000 official test images.
        source: author and origin of the file.
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
        """The spec of this entry's network."""
        return NetworkSpec(self.network, self.num_classes, normalization(self.normalization), self.options)


@cache
def zoo() -> Registry[ZooEntry]:
    """Returns all entries by name, in the zoo's order."""
    text = resources.files(__package__).joinpath("zoo.yaml").read_text(encoding="utf-8")
    entries: Registry[ZooEntry] = Registry("teacher")
    for values in yaml.safe_load(text)["teachers"]:
        entries.register(values["id"])(ZooEntry(**values))
    return entries


def find_zoo_file(entry: ZooEntry, weights_dir: str | Path, download: bool = False) -> Path:
    """Finds the file of a pretrained teacher in a folder; downloads it first if it is missing and `download` allows it.

    Concurrent runs download a file once (file lock), and it appears in the folder only when complete. Its SHA-256 is
    always checked before it is opened.

    Raises:
        UserError: for a missing file that may not or cannot be downloaded, or a file that is not the published one.
    """
    path = Path(weights_dir).expanduser() / entry.file
    if not path.is_file():
        if not download:
            raise UserError(
                f"teacher {entry.id!r}: {entry.file} is not in {path.parent}; "
                f"allow downloads, or download it there from {entry.url}"
            )
        _fetch(entry, path)
    found = file_sha256(path)
    if found != entry.sha256:
        raise UserError(
            f"teacher {entry.id!r}: {path} is not the published file (SHA-256 {found[:12]}..., "
            f"expected {entry.sha256[:12]}...); delete it, and download it again (teachers.download=true)"
        )
    return path


def _fetch(entry: ZooEntry, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock")):
            if not path.is_file():  # another run may have fetched it while this one waited
                log.info("downloading %s from %s", path, entry.url)
                torch.hub.download_url_to_file(entry.url, str(path), hash_prefix=entry.sha256, progress=False)
    except RuntimeError as error:  # the hash differs; PyTorch has deleted the file
        raise UserError(
            f"teacher {entry.id!r}: {entry.url} gave another file ({error}); nothing was kept, put the published "
            f"file into {path.parent}, if you have it"
        ) from None
    except OSError as error:  # network and disk: urllib's errors are OSErrors
        raise UserError(
            f"teacher {entry.id!r}: {entry.file} is not in {path.parent} and could not be fetched from "
            f"{entry.url} ({error}); put the file there by hand, or try again"
        ) from None
