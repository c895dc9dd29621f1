"""Where the time of a training step goes, and how fast the step could be if only its convolutions took time."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from ekd_lightning.bench.ours import BareLoop
from ekd_lightning.bench.parts import Bench

GROUPS = {
    "convolutions, backward": ("convolution_backward",),
    "convolutions, forward": ("mkldnn_convolution", "cudnn_convolution", "conv2d", "aten::convolution"),
    "batch norm, activations and other compiled code": ("CompiledFxGraph", "batch_norm", "triton_"),
    "optimiser": ("_fused_sgd", "Optimizer."),
}
"""What an operator's name contains; the first that fits counts."""

OTHER = "everything else"
_EPOCHS = 1


def step_profile(bench: Bench) -> dict[str, Any]:
    """(p) Shares of a training epoch's time with warm tables, by the torch profiler.

    Returns:
        The rate without the profiler, each group's share in [0, 1] of the operators' own time with it, and the
        rate that is left if nothing but the convolutions took time: a bound for this machine's kernels.
    """
    with tempfile.TemporaryDirectory() as folder:
        loop = BareLoop(bench.job().with_store(Path(folder)))
        loop.images_per_second(_EPOCHS)  # fills the table and compiles
        rate = loop.images_per_second(_EPOCHS)
        activities = [ProfilerActivity.CPU]
        on_gpu = bench.device.type == "cuda"
        if on_gpu:
            activities.append(ProfilerActivity.CUDA)
        with profile(activities=activities) as recorded:
            loop.images_per_second(_EPOCHS)
    field = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    times = {event.key: float(getattr(event, field)) for event in recorded.key_averages()}
    shares = by_group(times)
    convolutions = shares["convolutions, backward"] + shares["convolutions, forward"]
    return {
        "unit": "images/s",
        "rate": rate,
        "shares": shares,
        "rate_of_the_convolutions_alone": rate / convolutions if convolutions else None,
    }


def by_group(times: dict[str, float]) -> dict[str, float]:
    """Shares of the whole time in [0, 1], by group; operator name -> its own time."""
    sums = dict.fromkeys([*GROUPS, OTHER], 0.0)
    for name, value in times.items():
        fitting = (group for group, parts in GROUPS.items() if any(part in name for part in parts))
        sums[next(fitting, OTHER)] += value
    whole = sum(sums.values())
    return {group: value / whole if whole else 0.0 for group, value in sums.items()}
