"""Bytes of a deployed student: the content of a safetensors, ONNX or torch.export file, and int8 by ONNX Runtime."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from ekd_lightning.errors import UserError, one_line, quiet
from ekd_lightning.files import SEAL, UNSEALED, seal
from ekd_lightning.networks.deploy import DeployedStudent, pack_metadata

SUFFIXES = {"safetensors": ".safetensors", "onnx": ".onnx", "torch-export": ".pt2"}
"""Formats, and how their files are called."""

METADATA_FILE = "ekd_metadata.json"  # inside a .pt2
ONNX_OPSET = 18
EXPORTERS = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")


def to_bytes(student: DeployedStudent, metadata: Mapping[str, Any], file_format: str) -> bytes:
    """The content of a file that `load_deployed` reads.

    Args:
        student: On the CPU.
        metadata: JSON-able values, `class_names` and `image_size` among them; the student's spec is added.
        file_format: One of `SUFFIXES`.

    Raises:
        UserError: If a package that the format needs is not installed, or the student cannot be exported.
    """
    strings = pack_metadata({**metadata, "spec": student.spec.to_dict()})
    writers: dict[str, Callable[[DeployedStudent, dict[str, str], int], bytes]] = {
        "safetensors": _to_safetensors,
        "onnx": _to_onnx,
        "torch-export": _to_torch_export,
    }
    try:
        return writers[file_format](student, strings, int(metadata["image_size"]))
    except UserError:
        raise
    except Exception as error:  # a network of a user's may do what a tracer does not know: many kinds
        raise UserError(
            f"the student cannot be written as {file_format} ({type(error).__name__}: {one_line(error)})"
        ) from error


def with_onnx_metadata(model: Any, strings: Mapping[str, str]) -> bytes:
    """Serialises an ONNX model (an `onnx.ModelProto`) with these strings in its metadata."""
    import onnx  # noqa: PLC0415  # optional

    onnx.helper.set_model_props(model, {**strings, SEAL: UNSEALED})
    return seal(model.SerializeToString())


def require(extra: str, *packages: str) -> None:
    """Refuses what needs a package that is not installed.

    Raises:
        UserError: Naming the package and the extra of this project that holds it.
    """
    for name in packages:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"{name} is not installed: pip install 'ekd-lightning[{extra}]'")


def _to_safetensors(student: DeployedStudent, strings: dict[str, str], image_size: int) -> bytes:
    state = {name: tensor.detach().contiguous() for name, tensor in student.state_dict().items()}
    return seal(safetensors.torch.save(state, {**strings, SEAL: UNSEALED}))


def _to_torch_export(student: DeployedStudent, strings: dict[str, str], image_size: int) -> bytes:
    with quiet(*EXPORTERS), contextlib.redirect_stdout(io.StringIO()):
        program = torch.export.export(
            student, (_example(image_size),), dynamic_shapes={"images": {0: torch.export.Dim("batch")}}
        )
        for node in program.graph.nodes:  # they name files of this machine
            node.meta.pop("stack_trace", None)
            node.meta.pop("nn_module_stack", None)
        file = io.BytesIO()
        torch.export.save(program, file, extra_files={METADATA_FILE: json.dumps(strings)})
    return file.getvalue()


def _to_onnx(student: DeployedStudent, strings: dict[str, str], image_size: int) -> bytes:
    require("export", "onnx", "onnxscript")
    with quiet(*EXPORTERS), contextlib.redirect_stdout(io.StringIO()):
        program = torch.onnx.export(
            student,
            (_example(image_size),),
            dynamo=True,
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            input_names=["images"],
            output_names=list(student.spec.outputs),
            opset_version=ONNX_OPSET,
            verbose=False,
        )
    assert program is not None  # with dynamo=True
    model = program.model_proto
    for graph in (model.graph, *model.functions):
        for node in graph.node:
            del node.metadata_props[:]
    del model.graph.metadata_props[:]
    return with_onnx_metadata(model, strings)


def _example(image_size: int) -> torch.Tensor:
    # Of a batch of one, tracing would make a constant.
    return torch.zeros(2, 3, image_size, image_size)


def quantize_onnx(model: bytes, batches: Iterable[np.ndarray], metadata: dict[str, str]) -> bytes:
    """Quantises an ONNX student to int8, with the ranges that activations have on some images.

    Convolutions and additions get int8 weights per output channel (symmetric) and uint8 activations, as pairs of
    QuantizeLinear and DequantizeLinear. Weights take 7 bits: with 8, processors without VNNI saturate, and the
    accuracy would depend on the machine. The first convolution, which sees the images, and the heads, which make
    the logits, stay in float32: they cost little and matter most.

    Args:
        model: Content of an ONNX file of `to_bytes`, batch norm folded.
        batches: float32 [B, 3, H, W] in [0, 1]; their minima and maxima are the ranges.
        metadata: Strings for the file.

    Returns:
        The content of an ONNX file.

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

    with tempfile.TemporaryDirectory() as folder, quiet(None):  # the root logger gets advice on preprocessing
        given, prepared, quantised = (Path(folder) / f"{name}.onnx" for name in ("given", "prepared", "int8"))
        given.write_bytes(model)  # of a model in memory it loses the weights on the way
        # Without symbolic shapes, which are for transformers, and need sympy of one version.
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
        return with_onnx_metadata(onnx.load(str(quantised)), metadata)


def _first_convolutions(graph: Any) -> Iterator[str]:
    """Names of the convolutions behind no other: one, or one a branch where nothing is shared."""
    behind: set[str] = set()
    for node in graph.node:  # in the order of execution
        if node.op_type == "Conv" and behind.isdisjoint(node.input):
            yield node.name
        if node.op_type == "Conv" or not behind.isdisjoint(node.input):
            behind.update(node.output)
