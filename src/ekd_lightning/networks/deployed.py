"""Deployed models: exported students, loaded from any of the three formats.

Shape letters: B batch, C classes.

Opening a torch.export archive may run code in it: PyTorch falls back to unrestricted unpickling of inputs and
constants, compiles `guards_code`, and evaluates symbolic sizes as Python. An archive is therefore checked first; a
student needs only arithmetic on the batch size, so everything else is refused.
"""

from __future__ import annotations

import io
import json
import logging
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from ekd_lightning.errors import UserError, one_line, quiet, require
from ekd_lightning.files import SEAL, is_intact, read_bytes
from ekd_lightning.networks.deploy import DEPLOYED, KIND, METADATA_FILE, SUFFIXES, DeployedStudent
from ekd_lightning.networks.staged import ImageSize, sides
from ekd_lightning.networks.weights import read_metadata

REQUIRED = ("spec", "class_names", "image_size")
BEYOND = 0.2
"""How far pixels may lie outside [0, 1], since resizing overshoots a little."""


class DeployedModel:
    """A classifier for inference; the result of `load_deployed`.

    Attributes:
        format: `safetensors`, `onnx` or `torch-export`.
        metadata: The file's metadata: classes, data, method, metrics, hashes, versions.
        module: The PyTorch module that computes the logits; None if ONNX Runtime does.
    """

    def __init__(
        self,
        run: Callable[[Tensor], Tensor],
        metadata: Mapping[str, Any],
        file_format: str,
        module: nn.Module | None = None,
    ) -> None:
        self._run, self.metadata, self.format, self.module = run, dict(metadata), file_format, module

    @property
    def class_names(self) -> tuple[str, ...]:
        """Class names in the order of the logits."""
        return tuple(self.metadata["class_names"])

    @property
    def image_size(self) -> ImageSize:
        """Side of square images in pixels, else (height, width)."""
        height, width = sides(self.metadata["image_size"])
        return height if height == width else (height, width)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Classifies a batch of any size.

        Args:
            images: [B, 3, H, W], RGB, not normalised: float in [0, 1], or uint8 in 0 .. 255.

        Returns:
            Logits, float32 [B, C], on the model's device.

        Raises:
            TypeError: If the images are no tensor, or neither floating point nor uint8.
            ValueError: If they have another shape, or values more than `BEYOND` outside [0, 1].
        """
        if not isinstance(images, Tensor):
            raise TypeError(
                f"images must be a tensor [B, 3, H, W], got {type(images).__name__}; "
                "ekd_lightning.read_images(files, model.image_size) reads files"
            )
        if images.dtype == torch.uint8:
            images = images.float() / 255
        if not images.is_floating_point():
            raise TypeError(f"images must be floating point in [0, 1] or uint8, got {images.dtype}; divide by 255")
        height, width = sides(self.image_size)
        if images.ndim != 4 or images.shape[1:] != (3, height, width):
            raise ValueError(f"images must be [B, 3, {height}, {width}], got {list(images.shape)}")
        low, high = (float(end) for end in images.aminmax()) if len(images) else (0.0, 1.0)
        if not (low >= -BEYOND and high <= 1 + BEYOND):  # also refuses nan
            raise ValueError(
                f"images must lie in [0, 1], got [{low:g}, {high:g}]; do not normalise them, the model does"
            )
        return self._run(images.float())

    def probabilities(self, images: Tensor) -> Tensor:
        """Returns probabilities [B, C]; see `__call__`."""
        return self(images).softmax(dim=-1)

    def classify(self, images: Tensor) -> list[tuple[str, float]]:
        """Returns the most probable class of each image, with its probability."""
        confidence, index = self.probabilities(images).max(dim=-1)
        names = self.class_names
        return [(names[i], p) for i, p in zip(index.tolist(), confidence.tolist(), strict=True)]

    def __repr__(self) -> str:
        spec = self.metadata["spec"]
        branches = f"{spec['branches']} {'branch' if spec['branches'] == 1 else 'branches'}"
        what = f"{spec['network']['name']}, {branches}, {len(self.class_names)} classes"
        return f"DeployedModel({what}, {self.format})"


def load_deployed(path: str | Path, device: torch.device | str = "cpu") -> DeployedModel:
    """Loads a student written by `ekd-export` or `save`; the file's suffix gives the format.

    Neither Lightning nor Hydra is imported. For a safetensors file, the network is built by its registered name; the
    other formats contain the computation.

    Args:
        path: A `.safetensors`, `.onnx` or `.pt2` file.
        device: The device to compute on.

    Returns:
        The model: `model(images)` gives logits [B, C] for images [B, 3, H, W] in [0, 1].

    Raises:
        UserError: If the file is missing, damaged, not a deployed student or would run code, or if it needs a package
            or a device that is not available.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES.values():
        raise UserError(f"{path}: not an exported student, whose file ends in {', '.join(SUFFIXES.values())}")
    try:
        device = torch.device(device)
    except RuntimeError:
        raise UserError(f"device {device!r} is none of PyTorch's; give cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device {device}: PyTorch finds no CUDA device on this machine; use device=cpu")
    try:
        content = read_bytes(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    readers = {".safetensors": _from_safetensors, ".onnx": _from_onnx, ".pt2": _from_torch_export}
    return readers[path.suffix](path, content, device)


def _from_safetensors(path: Path, content: bytes, device: torch.device) -> DeployedModel:
    metadata = _checked_metadata(read_metadata(path), path, content)
    try:
        student = DeployedStudent.from_spec(metadata["spec"])
        student.load_state_dict(safetensors.torch.load(content), strict=True)
    except RuntimeError as error:
        raise UserError(f"{path}: its weights do not fit its description ({one_line(error)})") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    student.to(device)
    return _of_module(student, metadata, "safetensors", device)


def _from_torch_export(path: Path, content: bytes, device: torch.device) -> DeployedModel:
    check_archive(content, path)
    extra: dict[str, Any] = {METADATA_FILE: ""}
    try:
        with quiet("torch.export", level=logging.CRITICAL):  # it would log the error at length
            program = torch.export.load(io.BytesIO(content), extra_files=extra)
            module = program.module()
        strings = json.loads(extra[METADATA_FILE] or "{}")
    except Exception as error:  # the graph is built from the file's content, which raises many kinds
        raise UserError(
            f"{path}: damaged, or written by a version of PyTorch that {torch.__version__} cannot read "
            f"({type(error).__name__})"
        ) from None
    metadata = _checked_metadata(strings, path, None)
    if device.type != "cpu":
        from torch.export.passes import move_to_device_pass  # noqa: PLC0415

        module = move_to_device_pass(program, device).module()
    return _of_module(module, metadata, "torch-export", device)


def _of_module(module: nn.Module, metadata: dict[str, Any], file_format: str, device: torch.device) -> DeployedModel:
    has_probabilities = bool(metadata["spec"].get("probabilities"))

    def run(images: Tensor) -> Tensor:
        outputs = module(images.to(device))
        return outputs[0] if has_probabilities else outputs

    return DeployedModel(run, metadata, file_format, module)


def _from_onnx(path: Path, content: bytes, device: torch.device) -> DeployedModel:
    require("export", "onnxruntime")
    import onnxruntime  # noqa: PLC0415  # optional

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()  # as for the other formats
    options.log_severity_level = 3
    providers = ["CPUExecutionProvider"]
    if device.type == "cuda":
        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise UserError(f"{path}: the installed onnxruntime supports only the CPU; install onnxruntime-gpu")
        providers.insert(0, "CUDAExecutionProvider")
    try:
        session = onnxruntime.InferenceSession(content, options, providers=providers)
    except Exception as error:  # onnxruntime's errors are not public
        raise UserError(f"{path}: not an ONNX file, or damaged ({type(error).__name__})") from None
    metadata = _checked_metadata(session.get_modelmeta().custom_metadata_map, path, content)

    def run(images: Tensor) -> Tensor:
        pixels = np.ascontiguousarray(images.cpu().numpy())
        return torch.from_numpy(session.run(["logits"], {"images": pixels})[0]).to(device)

    return DeployedModel(run, metadata, "onnx")


def _checked_metadata(strings: Mapping[str, str], path: Path, content: bytes | None) -> dict[str, Any]:
    """Parses the strings of `pack_metadata` and verifies the content's checksum (None for .pt2, which has its own)."""
    kind = strings.get(KIND)
    if kind != DEPLOYED:
        what = f"a {kind}" if kind else "something else"
        hint = " (ekd-export makes one of a run, ekd_lightning.save of a student)" if kind == "student" else ""
        raise UserError(f"{path}: holds {what}, not a {DEPLOYED}{hint}")
    metadata: dict[str, Any] = {}
    for key, value in strings.items():
        if key not in (KIND, SEAL):
            try:
                metadata[key] = json.loads(value)
            except (ValueError, TypeError, RecursionError):
                continue  # an entry of another tool
    missing = [key for key in REQUIRED if key not in metadata]
    if missing:
        raise UserError(f"{path}: its description of the student lacks {', '.join(missing)}")
    if content is not None and not is_intact(content):
        raise UserError(f"{path}: damaged or changed, its SHA-256 differs from the recorded one; export it again")
    return metadata


_PLAIN = re.compile(
    r"(data/(weights|constants)/((weight|tensor)_\d+|\w+_config\.json|\w+\.pt)|data/sample_inputs/\w+\.pt"
    r"|models/\w+\.json|extra/[\w.]+|extra_files/[\w.]+|archive_format|archive_version|version|byteorder"
    r"|serialized_\w+\.(json|pt)|\.data/\w+|\.format_version|\.storage_alignment)"
)
"""Members of students' archives written by PyTorch 2.6 and later, without compiled code and custom objects."""
_NAMES = {"Symbol", "Integer", "Add", "Mul", "Pow", "Max", "Min", "Mod", "positive", "integer", "nonnegative"}
_NAMES |= {"FloorDiv", "True", "False"}
_TARGETS = re.compile(r"torch\.ops\.aten\.(?!from_file)\w+\.\w+|_operator\.\w+|torch\.sym_\w+")


def check_archive(content: bytes, path: Path) -> None:
    """Refuses the content of a torch.export archive that is damaged, or runs code when it is opened."""
    try:
        members = _read_members(content)
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise UserError(f"{path}: not a torch.export archive, or damaged ({one_line(error)})") from None
    for name, data in members.items():
        reason = _objection(name, data)
        if reason:
            raise UserError(f"{path}: refused, because {reason}")


def _read_members(content: bytes) -> dict[str, bytes]:
    """Reads the members by name, without PyTorch's top folder, and verifies their checksums."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        names = archive.namelist()
        if len(set(names)) < len(names):
            raise ValueError("it has two members of one name")
        found = {name: archive.read(name) for name in names}
    inside = {name.split("/", 1)[0] for name in found if "/" in name}
    folder = f"{inside.pop()}/" if len(inside) == 1 and all("/" in name for name in found) else ""
    members = {name.removeprefix(folder): data for name, data in found.items()}
    if not any(name.startswith(("models/", "serialized_exported")) for name in members):
        raise ValueError("it holds no program")
    return members


def _objection(name: str, data: bytes) -> str | None:
    """Returns the reason to refuse a member; None if it is harmless."""
    if not _PLAIN.fullmatch(name):
        return f"its member {name!r} may hold code"
    if name.endswith(".pt") and data:
        try:
            with quiet():
                torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
        except Exception:  # damaged data raises many kinds
            return f"its member {name!r} holds more than tensors (opening it would run code) or is damaged"
    if name.startswith("extra") or not name.endswith(".json"):
        return None
    try:
        return next(_suspicious(json.loads(data)), None)
    except ValueError:
        return f"its member {name!r} is damaged"


def _suspicious(value: Any) -> Iterator[str]:
    """Yields a reason to refuse for each part of a program's description that PyTorch would run as code."""
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
        # The targets of buffers and outputs are names, which are not called.
        elif key == "target" and isinstance(item, str) and "inputs" in value and not _TARGETS.fullmatch(item):
            yield f"it calls {item[:60]!r}"
        yield from _suspicious(item)


def _is_arithmetic(text: Any) -> bool:
    text = re.sub(r"'[a-z]+\d+'", "", text) if isinstance(text, str) else "'"
    words = re.findall(r"\w+", text)
    known = all(re.fullmatch(r"\d+|[suzb]\d+", word) or word in _NAMES for word in words)
    return known and bool(re.fullmatch(r"[\w\s(),=+*/-]*", text))
