"""Efficiency of a network: parameters, multiply-accumulates, latency and memory."""

from __future__ import annotations

import copy
import weakref
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from ekd_lightning.errors import quiet
from ekd_lightning.networks.staged import ImageSize, meta_probe, sides


def count_parameters(module: nn.Module) -> int:
    """Counts all parameters, including frozen ones, without buffers (batch norm statistics)."""
    return sum(parameter.numel() for parameter in module.parameters())


def count_macs(module: nn.Module, image_size: ImageSize = 32) -> int:
    """Counts the multiply-accumulates of convolutions and linear layers in the forward pass of one image.

    They are half of the floating-point operations that PyTorch's counter reports. Nothing is computed (meta device, on
    a copy in eval mode), unless the module's path depends on values, and the module does not change.
    """
    counter, images = FlopCounterMode(display=False), torch.zeros(1, 3, *sides(image_size))
    with torch.no_grad():
        try:
            with counter:
                meta_probe(module)(images.to("meta"))
        except RuntimeError:  # the meta device has no values
            with counter:
                copy.deepcopy(module).cpu().eval()(images)
    return int(counter.get_total_flops()) // 2


_BLOCKS = 9


@dataclass(frozen=True)
class Latency:
    """Time of one forward pass: median and interquartile range of the means of nine blocks of passes, in seconds."""

    median: float
    iqr: float
    threads: int


def measure_latency(module: nn.Module, images: Tensor, *, min_seconds: float = 1.0) -> Latency:
    """Times forward passes by `torch.utils.benchmark`, which synchronises with an accelerator.

    The module is in eval mode on the device of the images, float32 [B, 3, H, W] in [0, 1]. The measurement takes about
    `min_seconds`, longer if a pass takes more than a ninth of it.
    """
    benchmark = torch_benchmark()
    threads = torch.get_num_threads()

    def forward() -> None:
        with torch.inference_mode():
            module(images)

    timer = benchmark.Timer("forward()", globals={"forward": forward}, num_threads=threads)
    passes = max(1, round(min_seconds / _BLOCKS / timer.timeit(1).median))  # the first pass also warms up
    merged = benchmark.Measurement.merge([timer.timeit(passes) for _ in range(_BLOCKS)])[0]
    return Latency(float(merged.median), float(merged.iqr), threads)


def torch_benchmark() -> Any:
    """Imports PyTorch's benchmark package without its warning on machines that have nvcc but no GPU."""
    with quiet("torch.utils.cpp_extension"):
        from torch.utils import benchmark  # noqa: PLC0415
    return benchmark


def stored_bytes(module: nn.Module) -> int:
    """Returns the size in bytes of a safetensors file of the module's parameters and buffers."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    return len(safetensors.torch.save(state))


@torch.no_grad()
def peak_memory(module: nn.Module, images: Tensor) -> int:
    """Measures the peak memory in bytes of one forward pass: weights, images and intermediate tensors.

    On CUDA, intermediates are the allocator's peak above its level before the pass, which includes the kernels' work
    space. On other devices they are the tensors that PyTorch's operations return, as long as they live; the work space
    of kernels is not included. The module is in eval mode on the device of the images [B, 3, H, W].
    """
    resident = _bytes([images, *module.parameters(), *module.buffers()])
    if images.is_cuda:
        module(images)  # libraries allocate their work space in the first pass
        torch.cuda.synchronize(images.device)
        before = torch.cuda.memory_allocated(images.device)
        torch.cuda.reset_peak_memory_stats(images.device)
        module(images)
        torch.cuda.synchronize(images.device)
        return resident + torch.cuda.max_memory_allocated(images.device) - before
    with _LiveTensors([images, *module.parameters(), *module.buffers()]) as live:
        module(images)
    return resident + live.peak


def _bytes(tensors: list[Tensor]) -> int:
    """Returns the bytes of the tensors' storages, counting shared storages once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


class _LiveTensors(TorchDispatchMode):
    """Counts the bytes of the storages that operations create, until they are freed.

    Attributes:
        peak: Largest number of bytes at one time, without the known tensors.
    """

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._known = {t.untyped_storage()._cdata for t in known}
        self._living: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known or key in self._living:
            return
        size = storage.nbytes()
        self._living.add(key)
        self._now += size
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._living.discard(key)
        self._now -= size
