"""Weights on disk: safetensors files of this package, and foreign checkpoints, which are read without trust."""

from __future__ import annotations

import contextlib
import hashlib
import json
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ekd_lightning.errors import UserError, few, one_line, unknown_name
from ekd_lightning.files import SEAL, UNSEALED, DamagedFileError, read_bytes, require_intact, seal, write_bytes
from ekd_lightning.networks.registry import build_network, library_version
from ekd_lightning.networks.spec import NetworkSpec
from ekd_lightning.networks.staged import StagedNetwork
from ekd_lightning.networks.student import BranchedStudent

_ModuleT = TypeVar("_ModuleT", bound=nn.Module)
_KIND, _SPEC = "ekd_kind", "ekd_spec"
_WRAPPERS = ("state_dict", "model_state_dict", "model_ema", "state_dict_ema", "ema", "model", "net")


def save_network(path: str | Path, network: StagedNetwork, metadata: Mapping[str, str] | None = None) -> None:
    """Writes a network as safetensors with its spec in the metadata; the file appears only when it is complete.

    Args:
        path: the file to write; missing folders are created.
        network: the network to write.
        metadata: further strings to store in the file.

    Raises:
        UserError: when the file cannot be written.
        ValueError: when the metadata are not strings or use a reserved name (`ekd_*`).
    """
    _save(Path(path), network, "network", network.spec.to_dict(), metadata or {})


def load_network(path: str | Path) -> StagedNetwork:
    """Reads a file of `save_network`, onto the CPU in eval mode. The global random generator is not advanced.

    Raises:
        UserError: when the file is missing, damaged, not a network of this package, or does not fit its spec.
    """
    return _load(Path(path), "network", lambda values: build_network(NetworkSpec.from_dict(values)))


def save_student(path: str | Path, student: BranchedStudent, metadata: Mapping[str, str] | None = None) -> None:
    """Writes a student as safetensors with all its constructor arguments; see `save_network`."""
    _save(Path(path), student, "student", student.arguments(), metadata or {})


def load_student(path: str | Path) -> BranchedStudent:
    """Reads a file of `save_student`, onto the CPU in eval mode. The global random generator is not advanced.

    Raises:
        UserError: when the file is missing, damaged, not a student of this package, or does not fit its spec.
    """

    def build(values: dict[str, Any]) -> BranchedStudent:
        return BranchedStudent(NetworkSpec.from_dict(values.pop("spec")), **values)

    return _load(Path(path), "student", build)


def read_metadata(path: str | Path) -> dict[str, str]:
    """Reads the metadata of a safetensors file, without its tensors and its checksum.

    A file that is missing or not a complete safetensors file is a `UserError`.
    """
    path = Path(path)
    _require_file(path)
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            return {key: value for key, value in (file.metadata() or {}).items() if key != SEAL}
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a safetensors file, or damaged ({one_line(error)})") from None


def read_spec(path: str | Path) -> NetworkSpec:
    """Reads the spec of a file of `save_network`, without its weights; raises as `load_network`."""
    with _described(Path(path), "network") as values:
        return NetworkSpec.from_dict(values)


def state_sha256(network: StagedNetwork | BranchedStudent) -> str:
    """Hashes a network's spec and weights to 64 hexadecimal digits, whatever its file, device or memory format."""
    digest = hashlib.sha256(json.dumps(network.spec.to_dict(), sort_keys=True).encode())
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(memoryview(values.numpy()))
    return digest.hexdigest()


def answers_sha256(sha256: str, network: str) -> str:
    """Hashes everything that determines a network's outputs: its `state_sha256`, and the version of its library.

    For networks of this package it is `state_sha256` itself.
    """
    version = library_version(network)
    return hashlib.sha256(f"{sha256} {version}".encode()).hexdigest() if version else sha256


def read_foreign_checkpoint(path: str | Path, state_key: str | None = None) -> dict[str, Tensor]:
    """Reads the named tensors of a foreign checkpoint, onto the CPU, without executing code in it.

    The usual keys of weights (`state_dict`, `model_state_dict`, `model_ema`, `model`, `net` and the like) are followed,
    and the prefix `module.` of data-parallel training is removed. Files `*.safetensors` are read as safetensors.
    `state_key` names the weights, if there are several or the key is unusual; dots separate nested keys.

    Raises:
        UserError: when the file is missing or damaged, would run code when unpickled, lacks the key, or holds anything
            but named tensors.
    """
    path = Path(path)
    _require_file(path)
    content = _load_untrusted(path)
    if state_key is not None:
        for key in state_key.split("."):
            if not isinstance(content, Mapping) or key not in content:
                keys = list(content) if isinstance(content, Mapping) else []
                raise unknown_name(f"{path}: key", state_key, map(str, keys))
            content = content[key]
    while isinstance(content, Mapping):
        inner = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping) or not content:
        raise UserError(f"{path}: holds no weights (a {type(content).__name__}, not named tensors)")
    others = [str(key) for key, value in content.items() if not isinstance(value, Tensor)]
    if others:
        raise UserError(
            f"{path}: holds values that are not tensors: {few(others)}; give the key of the weights by state_key=KEY"
        )
    return {str(key).removeprefix("module."): value for key, value in content.items()}


def _load_untrusted(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(str(path))
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # PyTorch's message names the callable that the file would run; for a damaged file it names none.
        found = re.search(r"(?:GLOBAL|class|global) ([A-Za-z_][\w]*\.?[\w.]*)", str(error))
        if found:
            code = f"{path}: refused, opening it would run code ({found.group(1)})"
            raise UserError(f"{code}; it must hold tensors only, as a state_dict() does") from None
        raise UserError(f"{path}: not a checkpoint, or damaged") from None
    except Exception as error:  # damaged files raise many kinds
        raise UserError(f"{path}: not a checkpoint, or damaged ({one_line(error)})") from None


def _save(path: Path, module: nn.Module, kind: str, spec: dict[str, Any], metadata: Mapping[str, str]) -> None:
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str) or key.startswith("ekd_"):
            raise ValueError(
                f"metadata {key!r}: {value!r} must be strings, and names starting with 'ekd_' are reserved"
            )
    write_sealed_tensors(path, module.state_dict(), {**metadata, _KIND: kind, _SPEC: json.dumps(spec)})


def write_sealed_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes named tensors as safetensors with a checksum of the file in its metadata; see `files.replacing`."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_bytes(path, seal(safetensors.torch.save(state, {**(metadata or {}), SEAL: UNSEALED})))


def read_sealed_tensors(path: Path) -> dict[str, Tensor]:
    """Reads the tensors of a safetensors file, and verifies its checksum if it has one.

    Raises:
        DamagedFileError: If it is not a safetensors file, differs from its checksum, or cannot be read.
        FileNotFoundError: If it does not exist.
    """
    content = read_bytes(path)
    require_intact(path, content)
    try:
        return safetensors.torch.load(content)
    except safetensors.SafetensorError as error:
        raise DamagedFileError(f"{path}: not a safetensors file, or damaged ({one_line(error)})") from None


@contextlib.contextmanager
def _described(path: Path, kind: str) -> Iterator[dict[str, Any]]:
    """Yields the spec in a file's metadata; errors in the block, which builds the module, name the file."""
    metadata = read_metadata(path)
    found = metadata.get(_KIND)
    if found != kind:
        what = f"a {found}" if found else "something else"
        raise UserError(f"{path}: holds {what}, not a {kind} saved by ekd-lightning")
    try:
        yield dict(json.loads(metadata[_SPEC]))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: its description of the {kind} is damaged ({one_line(error)})") from None
    except RuntimeError as error:  # a spec of a network that is too large for the memory
        raise UserError(f"{path}: the {kind} of its description cannot be built ({one_line(error)})") from None


def _load(path: Path, kind: str, build: Callable[[dict[str, Any]], _ModuleT]) -> _ModuleT:
    _require_file(path)
    try:
        tensors = read_sealed_tensors(path)  # first, as it checks the checksum: a damaged spec may be of a huge network
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    with _described(path, kind) as values, torch.random.fork_rng(devices=[]):
        module = build(values)
    try:
        module.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise UserError(f"{path}: its weights do not fit its description ({one_line(error)})") from None
    return module.eval()


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
