"""Static int8 quantisation of an exported student, by ONNX Runtime."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ekd_lightning.networks.deployed_bytes import require, with_onnx_metadata


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

    with tempfile.TemporaryDirectory() as folder, _quietly():
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


@contextmanager
def _quietly() -> Iterator[None]:
    """Without advice on preprocessing, which goes to the root logger."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)
