"""Loading of deployed students, from any of the three formats, in one call.

A torch.export archive is looked through before PyTorch opens it, for opening it may run what stands in it: PyTorch
falls back to a free unpickling of inputs and constants, compiles `guards_code`, and evaluates symbolic sizes as Python.
Students need none of these beyond arithmetic on the batch size, so anything else is refused.
"""

from __future__ import annotations

import io
import json
import logging
import re
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from ekd_lightning.errors import UserError, one_line, quiet
from ekd_lightning.files import is_intact
from ekd_lightning.networks.deploy import DeployedModel, DeployedSpec, unpack_metadata
from ekd_lightning.networks.deployed_bytes import METADATA_FILE, SUFFIXES, require


def load_deployed(path: str | Path, device: torch.device | str = "cpu") -> DeployedModel:
    """Reads a student that `ekd-export` wrote; the format is told by the file's name.

    Neither Lightning nor Hydra is imported. A safetensors file builds the network by its registered name; the other
    two hold their computation themselves.

    Args:
        path: A `.safetensors`, `.onnx` or `.pt2` file.
        device: Where to compute.

    Returns:
        The model: `model(images)` gives logits [B, C] for images [B, 3, H, W] in [0, 1].

    Raises:
        UserError: If the file is missing, damaged or not a deployed student, would run code, needs a package that
            is not installed, or a device that is not there.
    """
    path = Path(path)
    formats = {suffix: name for name, suffix in SUFFIXES.items()}
    if path.suffix not in formats:
        raise UserError(f"{path}: not an exported student, those end in {', '.join(SUFFIXES.values())}")
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device {device}: this machine has no CUDA device, or PyTorch does not see it")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    readers: dict[str, Callable[[Path, bytes, torch.device], DeployedModel]] = {
        "safetensors": _from_safetensors,
        "onnx": _from_onnx,
        "torch-export": _from_torch_export,
    }
    return readers[formats[path.suffix]](path, content, device)


def _from_safetensors(path: Path, content: bytes, device: torch.device) -> DeployedModel:
    try:
        (length,) = struct.unpack("<Q", content[:8])
        strings = dict(json.loads(content[8 : 8 + length]).get("__metadata__") or {})
        state = safetensors.torch.load(content)
    except (struct.error, ValueError, AttributeError, OverflowError, safetensors.SafetensorError) as error:
        raise UserError(f"{path}: not a safetensors file, or damaged ({type(error).__name__})") from None
    metadata = unpack_metadata(strings, path)
    _require_intact(path, content)
    try:
        student = DeployedSpec.from_dict(metadata["spec"]).build()
        student.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise UserError(
            f"{path}: its weights do not fit its own description ({' '.join(str(error).split())[:160]})"
        ) from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    student.to(device)
    return _of_module(student, metadata, "safetensors", device)


def _from_torch_export(path: Path, content: bytes, device: torch.device) -> DeployedModel:
    check_archive(content, path)
    extra: dict[str, Any] = {METADATA_FILE: ""}
    try:
        with quiet("torch.export", level=logging.CRITICAL):  # it tells at length what the error says anyway
            program = torch.export.load(io.BytesIO(content), extra_files=extra)
            module = program.module()
        strings = json.loads(extra[METADATA_FILE] or "{}")
    except Exception as error:  # many kinds, as the graph is built from what stands in the file
        raise UserError(
            f"{path}: damaged, or of a PyTorch that this one ({torch.__version__}) cannot read ({type(error).__name__})"
        ) from None
    metadata = unpack_metadata(strings, path)
    if device.type != "cpu":
        from torch.export.passes import move_to_device_pass  # noqa: PLC0415

        module = move_to_device_pass(program, device).module()
    return _of_module(module, metadata, "torch-export", device)


def _of_module(module: nn.Module, metadata: dict[str, Any], file_format: str, device: torch.device) -> DeployedModel:
    several = bool(metadata["spec"].get("probabilities"))

    def run(images: Tensor) -> Tensor:
        found = module(images.to(device))
        return found[0] if several else found

    return DeployedModel(run, metadata, file_format, module)


def _from_onnx(path: Path, content: bytes, device: torch.device) -> DeployedModel:
    require("export", "onnxruntime")
    import onnxruntime  # noqa: PLC0415  # optional

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()  # one setting for all formats
    options.log_severity_level = 3
    providers = ["CPUExecutionProvider"]
    if device.type == "cuda":
        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise UserError(f"{path}: this onnxruntime computes on the CPU only (install onnxruntime-gpu)")
        providers.insert(0, "CUDAExecutionProvider")
    try:
        session = onnxruntime.InferenceSession(content, options, providers=providers)
    except Exception as error:  # its own kinds, which are not to be imported by name
        raise UserError(f"{path}: not an ONNX file, or damaged ({type(error).__name__})") from None
    metadata = unpack_metadata(session.get_modelmeta().custom_metadata_map, path)
    _require_intact(path, content)

    def run(images: Tensor) -> Tensor:
        pixels = np.ascontiguousarray(images.cpu().numpy())
        return torch.from_numpy(session.run(["logits"], {"images": pixels})[0]).to(device)

    return DeployedModel(run, metadata, "onnx")


def _require_intact(path: Path, content: bytes) -> None:
    if not is_intact(content):
        raise UserError(f"{path}: damaged or changed, its content is not that which was exported (SHA-256)")


_PLAIN = re.compile(
    r"(data/(weights|constants)/((weight|tensor)_\d+|\w+_config\.json|\w+\.pt)|data/sample_inputs/\w+\.pt"
    r"|models/\w+\.json|extra/[\w.]+|extra_files/[\w.]+|archive_format|archive_version|version|byteorder"
    r"|serialized_\w+\.(json|pt)|\.data/\w+|\.format_version|\.storage_alignment)"
)
"""Members that students' archives have, by PyTorch 2.6 and later; compiled code, custom and opaque objects are not."""
_NAMES = {"Symbol", "Integer", "Add", "Mul", "Pow", "Max", "Min", "Mod", "positive", "integer", "nonnegative"}
_NAMES |= {"FloorDiv", "True", "False"}
_TARGETS = re.compile(r"torch\.ops\.aten\.(?!from_file)\w+\.\w+|_operator\.\w+|torch\.sym_\w+")


def check_archive(content: bytes, path: Path) -> None:
    """Refuses an archive that is damaged, or would run code on being opened.

    Args:
        content: The file's.
        path: Its name, for the error.

    Raises:
        UserError: Saying which.
    """
    try:
        members = _read_members(content)
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise UserError(f"{path}: not a torch.export archive, or damaged ({one_line(error)})") from None
    for name, data in members.items():
        reason = _objection(name, data)
        if reason:
            raise UserError(f"{path}: refused, {reason}")


def _read_members(content: bytes) -> dict[str, bytes]:
    """Members by name, without the folder that PyTorch wraps around them; every checksum is compared."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        names = archive.namelist()
        if len(set(names)) < len(names):
            raise ValueError("a member is there twice")
        found = {name: archive.read(name) for name in names}
    inside = {name.split("/", 1)[0] for name in found if "/" in name}
    folder = f"{inside.pop()}/" if len(inside) == 1 and all("/" in name for name in found) else ""
    members = {name[len(folder) :]: data for name, data in found.items()}
    if not any(name.startswith("models/") or name.startswith("serialized_exported") for name in members):
        raise ValueError("it holds no program")
    return members


def _objection(name: str, data: bytes) -> str | None:
    if not _PLAIN.fullmatch(name):
        return f"its member {name!r} may hold code"
    if name.endswith(".pt"):
        return _unpickling(name, data)
    if name.startswith("extra") or not name.endswith(".json"):
        return None
    try:
        content = json.loads(data)
    except ValueError:
        return f"its member {name!r} is damaged"
    return next(_suspicious(content), None)


def _unpickling(name: str, data: bytes) -> str | None:
    if not data:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except Exception:  # damaged ones raise many kinds
        return f"its member {name!r} holds more than tensors: opening it would run code, or it is damaged"
    return None


def _suspicious(value: Any) -> Iterator[str]:
    """What in a program's description PyTorch would evaluate, and is not arithmetic on sizes."""
    if isinstance(value, list):
        for item in value:
            yield from _suspicious(item)
    if not isinstance(value, dict):
        return
    for key, item in value.items():
        if key == "guards_code" and item:
            yield "its guards are code"
        elif key == "use_pickle" and item:
            yield "its weights are pickled"
        elif key == "expr_str" and not _is_arithmetic(item):
            yield f"it has the size {str(item)[:40]!r}"
        elif key == "target" and isinstance(item, str) and not _is_known(value, item):
            yield f"it calls {item[:60]!r}"
        yield from _suspicious(item)


def _is_known(node: dict[str, Any], target: str) -> bool:
    # Buffers and outputs have targets, too: names of theirs, which nothing calls.
    return "inputs" not in node or bool(_TARGETS.fullmatch(target))


def _is_arithmetic(text: Any) -> bool:
    if not isinstance(text, str):
        return False
    text = re.sub(r"'[a-z]+\d+'", "", text)
    if not re.fullmatch(r"[\w\s(),=+*/-]*", text):
        return False
    return all(re.fullmatch(r"\d+|[suzb]\d+", word) or word in _NAMES for word in re.findall(r"\w+", text))
