"""Deployed students, which map images to logits, and their files: safetensors, ONNX or torch.export.

Shape letters: B batch, C classes, K branches.
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from ekd_lightning.errors import UserError, one_line, quiet, require, require_type
from ekd_lightning.files import SEAL, UNSEALED, seal, write_bytes
from ekd_lightning.networks.frozen import FrozenStudent
from ekd_lightning.networks.spec import NetworkSpec
from ekd_lightning.networks.staged import ImageSize, sides
from ekd_lightning.networks.student import BranchedStudent

SUFFIXES = {"safetensors": ".safetensors", "onnx": ".onnx", "torch-export": ".pt2"}
"""Formats and their file suffixes."""
KIND = "ekd_kind"
DEPLOYED = "deployed student"
METADATA_FILE = "ekd_metadata.json"  # inside a .pt2
ONNX_OPSET = 18
EXPORTERS = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")


class DeployedStudent(nn.Module):
    """A copy of a student for inference: it normalises images itself, has no gradients, and takes batches of any size.

    Branches are selected first by `cut_branches`. With `fold`, batch norms are folded into the convolutions (or the
    gate's linear layer) before them; batch norms without a convolution before them (in pre-activation networks) stay.
    With `probabilities` these are returned as well as logits.

    Attributes:
        spec: Everything that determines its structure (not its weights), JSON-able: `network`, the `NetworkSpec` of
            trunk and branches as a dictionary; `branches`, `split_after` and `ensemble` of the student; whether it is
            `folded` and returns `probabilities`.
    """

    def __init__(self, student: BranchedStudent, *, fold: bool = True, probabilities: bool = False) -> None:
        super().__init__()
        structure = student.arguments()
        del structure["branch_gradients"]  # of the training
        self.spec = {"network": structure.pop("spec"), **structure, "folded": fold, "probabilities": probabilities}
        # Contiguous, because other runtimes use strides as they are and convert to formats of their own.
        self.network = FrozenStudent(student, fold=fold, channels_last=False)
        self.eval().requires_grad_(False)

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> DeployedStudent:
        """Builds the structure with arbitrary weights; the global random generator is not advanced.

        Raises:
            UserError: If a key is missing, unknown or has a value of the wrong kind.
        """
        try:
            values = dict(spec)
            network, fold = NetworkSpec.from_dict(values.pop("network")), values.pop("folded")
            probabilities = values.pop("probabilities")
            with torch.random.fork_rng(devices=[]):
                student = BranchedStudent(network, **values)
        except UserError:
            raise
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise UserError(f"not the description of a deployed student ({type(error).__name__}: {error})") from None
        return cls(student, fold=fold, probabilities=probabilities)

    @property
    def outputs(self) -> list[str]:
        """Names of the outputs."""
        return ["logits", "probabilities"] if self.spec["probabilities"] else ["logits"]

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Maps images, float32 RGB [B, 3, H, W] in [0, 1], not normalised, to logits [B, C]; see `couple`.

        With `probabilities`, returns logits and probabilities [B, C].
        """
        logits = self.network(images)
        return (logits, logits.softmax(dim=-1)) if self.spec["probabilities"] else logits


def save(student: BranchedStudent, path: str | Path, class_names: Sequence[str], image_size: ImageSize) -> None:
    """Writes a student, e.g. of a training loop of your own, as a file for `ekd_lightning.load`.

    `ekd-export` does more for the student of a run: it compares the file with the student on the test images, and adds
    a record and a model card.

    Args:
        student: The student, which does not change.
        path: The file; its suffix gives the format: `.safetensors`, `.onnx` or `.pt2` (see the page on exporting).
        class_names: C names, in the order of the logits.
        image_size: Side of the images in pixels, or (height, width).

    Raises:
        UserError: For another suffix, number of class names or size; if a package that the format needs is not
            installed, or the student cannot be exported.
    """
    require_type("student", student, BranchedStudent)
    path, names = Path(path), list(class_names)
    formats = {suffix: name for name, suffix in SUFFIXES.items()}
    if path.suffix not in formats:
        raise UserError(f"{path}: the name of an exported student must end in {', '.join(formats)}")
    if isinstance(class_names, str) or len(names) != student.num_classes:
        raise UserError(f"class_names={names!r:.80}: must be {student.num_classes} names, one for each class")
    if isinstance(image_size, str) or min(sides(image_size)) < 1:
        raise UserError(f"image_size={image_size!r}: must be a number of pixels >= 1, or (height, width)")
    metadata = {"class_names": [str(name) for name in names], "image_size": list(sides(image_size))}
    write_bytes(path, to_bytes(DeployedStudent(student).cpu(), metadata, formats[path.suffix]))


def to_bytes(student: DeployedStudent, metadata: Mapping[str, Any], file_format: str) -> bytes:
    """Returns the content of a file for `load_deployed`, in one of the formats of `SUFFIXES`.

    The student is on the CPU. The metadata are JSON-able and include `class_names` and `image_size`; the student's spec
    is added.

    Raises:
        UserError: If a package that the format needs is not installed, or the student cannot be exported.
    """
    strings = pack_metadata({**metadata, "spec": student.spec})
    if file_format == "safetensors":
        state = {name: tensor.detach().contiguous() for name, tensor in student.state_dict().items()}
        return seal(safetensors.torch.save(state, {**strings, SEAL: UNSEALED}))
    example = torch.zeros(2, 3, *sides(metadata["image_size"]))  # tracing would make a batch size of 1 a constant
    shapes = {"images": {0: torch.export.Dim("batch")}}
    try:
        with quiet(*EXPORTERS), contextlib.redirect_stdout(io.StringIO()):
            write = _to_onnx if file_format == "onnx" else _to_torch_export
            return write(student, strings, example, shapes)
    except UserError:
        raise
    except Exception as error:  # operations of users' networks that a tracer does not support raise many kinds
        raise UserError(
            f"the student cannot be written as {file_format} ({type(error).__name__}: {one_line(error)}); choose "
            "another format"
        ) from error


def pack_metadata(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Packs metadata as strings, one JSON value per key, which all three formats can store."""
    return {KIND: DEPLOYED, **{key: json.dumps(value, allow_nan=False) for key, value in metadata.items()}}


def _with_onnx_metadata(model: Any, strings: Mapping[str, str]) -> bytes:
    """Serialises an ONNX model (`onnx.ModelProto`) with the given metadata and a checksum."""
    import onnx  # noqa: PLC0415  # optional

    onnx.helper.set_model_props(model, {**strings, SEAL: UNSEALED})
    return seal(model.SerializeToString())


def _to_torch_export(
    student: DeployedStudent, strings: dict[str, str], example: Tensor, shapes: dict[str, Any]
) -> bytes:
    program = torch.export.export(student, (example,), dynamic_shapes=shapes)
    for node in program.graph.nodes:  # these entries contain paths of this machine
        node.meta.pop("stack_trace", None)
        node.meta.pop("nn_module_stack", None)
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={METADATA_FILE: json.dumps(strings)})
    return file.getvalue()


def _to_onnx(student: DeployedStudent, strings: dict[str, str], example: Tensor, shapes: dict[str, Any]) -> bytes:
    require("export", "onnx", "onnxscript")
    program = torch.onnx.export(
        student,
        (example,),
        dynamo=True,
        dynamic_shapes=shapes,
        input_names=["images"],
        output_names=student.outputs,
        opset_version=ONNX_OPSET,
        verbose=False,
    )
    assert program is not None  # with dynamo=True
    model = program.model_proto
    for graph in (model.graph, *model.functions):
        for node in graph.node:
            del node.metadata_props[:]
    del model.graph.metadata_props[:]
    return _with_onnx_metadata(model, strings)


def quantize_onnx(model: bytes, batches: Iterable[np.ndarray], metadata: dict[str, str]) -> bytes:
    """Quantises an ONNX student to int8, with activation ranges measured on some images.

    Convolutions and additions get int8 weights per output channel (symmetric) and uint8 activations, as pairs of
    QuantizeLinear and DequantizeLinear. Weights use 7 bits, because 8 bits saturate on processors without VNNI, and the
    accuracy would depend on the machine. The first convolution and the heads stay in float32: they are cheap and matter
    most for the accuracy.

    Args:
        model: Content of an ONNX file from `to_bytes`, with batch norms folded.
        batches: float32 [B, 3, H, W] in [0, 1], for the minima and maxima of the activations.
        metadata: The file's metadata, from `pack_metadata`.

    Raises:
        UserError: If onnx or onnxruntime is not installed.
    """
    require("export", "onnx", "onnxruntime")
    import onnx  # noqa: PLC0415  # optional
    from onnxruntime import quantization  # noqa: PLC0415
    from onnxruntime.quantization.shape_inference import quant_pre_process  # noqa: PLC0415

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self._batches = iter(batches)

        def get_next(self) -> dict[str, np.ndarray] | None:
            found = next(self._batches, None)
            return None if found is None else {"images": np.ascontiguousarray(found)}

    with tempfile.TemporaryDirectory() as folder, quiet(None):  # onnxruntime logs advice to the root logger
        given, prepared, quantised = (Path(folder) / f"{name}.onnx" for name in ("given", "prepared", "int8"))
        given.write_bytes(model)  # as a file, because quant_pre_process loses the weights of a model in memory
        # Without symbolic shapes, which only transformers need and which require one version of sympy.
        quant_pre_process(str(given), str(prepared), skip_symbolic_shape=True)
        graph = onnx.load(str(prepared)).graph
        quantization.quantize_static(
            str(prepared),
            str(quantised),
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "Add"],
            per_channel=True,
            reduce_range=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            nodes_to_exclude=list(_first_convolutions(graph)),
        )
        return _with_onnx_metadata(onnx.load(str(quantised)), metadata)


def _first_convolutions(graph: Any) -> Iterator[str]:
    """Yields the names of the first convolutions: one, or one per branch if the branches share no trunk."""
    behind: set[str] = set()
    for node in graph.node:  # in the order of execution
        if node.op_type == "Conv" and behind.isdisjoint(node.input):
            yield node.name
        if node.op_type == "Conv" or not behind.isdisjoint(node.input):
            behind.update(node.output)
