"""Where the time of a training step goes, and how fast the step could be if only its convolutions took time."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from ekd_lightning.bench.ours import BareLoop
from ekd_lightning.bench.parts import Bench
from ekd_lightning.bench.timing import seconds_of

GROUPS = {
    "convolutions, backward": ("convolution_backward",),
    "convolutions, forward": ("mkldnn_convolution", "cudnn_convolution", "conv2d", "aten::convolution"),
    "batch norm, activations and other compiled code": ("CompiledFxGraph", "batch_norm", "triton_"),
    "optimiser": ("_fused_sgd", "Optimizer."),
}
"""What an operator's name contains; the first that fits counts."""

KERNELS = {
    "convolutions, backward": ("dgrad", "wgrad", "convolve_common_engine", "bprop"),
    "convolutions, forward": ("fprop", "implicit_convolve", "winograd", "conv2d", "convolve", "xmma", "cutlass_"),
    "batch norm": ("batch_norm", "bn_fw", "bn_bw", "batchnorm"),
    "compiled code": ("triton_",),
    "optimiser": ("FusedSgd", "fused_sgd", "multi_tensor_apply"),
    "gathering": ("index_select", "indexSelect", "gather", "index_elementwise", "index_kernel"),
    "matrix products": ("gemm", "gemv", "splitKreduce"),
    "copies and formats": ("Memcpy", "Memset", "copy_kernel", "nchwToNhwc", "nhwcToNchw", "transpose", "CatArray"),
    "losses and other reductions": ("softmax", "SoftMax", "reduce_kernel", "nll_loss"),
    "other element-wise kernels": ("elementwise",),
}
"""What a CUDA kernel's name contains; the first group that fits counts."""

OTHER = "everything else"


def step_profile(bench: Bench) -> dict[str, Any]:
    """(p) Shares of a training epoch's time with warm tables, by the torch profiler.

    Returns:
        The rate without the profiler, each group's share in [0, 1] of the operators' own time with it, and the
        rate that is left if nothing but the convolutions took time: a bound for this machine's kernels.
    """
    with tempfile.TemporaryDirectory() as folder:
        loop = BareLoop(bench.job().with_store(Path(folder)))
        loop.images_per_second(1)  # fills the table and compiles
        rate = loop.images_per_second(1)
        shares = time_shares(lambda: loop.images_per_second(1), bench.device)["shares"]
    convolutions = shares["convolutions, backward"] + shares["convolutions, forward"]
    return {
        "unit": "images/s",
        "rate": rate,
        "shares": shares,
        "rate_of_the_convolutions_alone": rate / convolutions if convolutions else None,
    }


def time_shares(work: Callable[[], object], device: torch.device, most: int = 15) -> dict[str, Any]:
    """Shares of the time by group of kernels, also of work that replays graphs; of operators on a processor.

    Args:
        work: What to look at, warm by now.
        device: Where it computes.
        most: How many single kernels or operators to name.

    Returns:
        Shares in [0, 1] by group, the largest kernels in microseconds with their number of calls, and the share of
        the elapsed time in which any kernel ran.
    """
    on_gpu = device.type == "cuda"
    kind, groups = (DeviceType.CUDA, KERNELS) if on_gpu else (DeviceType.CPU, GROUPS)
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as recorded:
        seconds = seconds_of(work, device)
    field = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = [event for event in recorded.key_averages() if event.device_type == kind]
    events.sort(key=lambda event: -getattr(event, field))
    times = {event.key: float(getattr(event, field)) for event in events}
    return {
        "shares": by_group(times, groups),
        "busy": sum(times.values()) / 1e6 / seconds,
        "kernels": [[event.key[:120], times[event.key], int(event.count)] for event in events[:most]],
    }


def by_group(times: Mapping[str, float], groups: Mapping[str, tuple[str, ...]]) -> dict[str, float]:
    """Shares of the whole time in [0, 1], by group; name of an operator or kernel -> its own time."""
    sums = dict.fromkeys([*groups, OTHER], 0.0)
    for name, value in times.items():
        fitting = (group for group, parts in groups.items() if any(part in name for part in parts))
        sums[next(fitting, OTHER)] += value
    whole = sum(sums.values())
    return {group: value / whole if whole else 0.0 for group, value in sums.items()}
