"""Reads deployed students back, from any of the three formats, in one call."""

from __future__ import annotations

import io
import json
import logging
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from ekd_lightning.errors import UserError
from ekd_lightning.files import is_intact
from ekd_lightning.networks.deploy import DeployedSpec
from ekd_lightning.networks.deployed_bytes import METADATA_FILE, SUFFIXES, require
from ekd_lightning.networks.deployed_model import DeployedModel, unpack_metadata
from ekd_lightning.networks.pt2_check import check_archive


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
    log = logging.getLogger("torch.export")
    level = log.level
    log.setLevel(logging.CRITICAL)  # it tells at length what the error says anyway
    try:
        program = torch.export.load(io.BytesIO(content), extra_files=extra)
        module = program.module()
        strings = json.loads(extra[METADATA_FILE] or "{}")
    except Exception as error:  # many kinds, as the graph is built from what stands in the file
        raise UserError(
            f"{path}: damaged, or of a PyTorch that this one ({torch.__version__}) cannot read "
            f"({type(error).__name__})"
        ) from None
    finally:
        log.setLevel(level)
    metadata = unpack_metadata(strings, path)
    if device.type != "cpu":
        from torch.export.passes import move_to_device_pass  # noqa: PLC0415

        module = move_to_device_pass(program, device).module()
    return _of_module(module, metadata, "torch-export", device)


def _of_module(
    module: nn.Module, metadata: dict[str, Any], file_format: str, device: torch.device
) -> DeployedModel:
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
