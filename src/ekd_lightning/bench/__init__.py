"""Timing of alternatives in turn, so that a drift of the machine's speed affects all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ekd_lightning.progress import part

_PEAK_SIZES = {"cpu": 2048, "cuda": 8192}


def seconds_of(work: Callable[[], object], device: torch.device | None = None) -> float:
    """Seconds that a function takes, including work that it leaves running on the device."""
    wait_for(device)
    start = time.perf_counter()
    work()
    wait_for(device)
    return time.perf_counter() - start


def wait_for(device: torch.device | None) -> None:
    """Waits until a GPU has done its work."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


def rate_of(
    work: Callable[[], object], count: int, device: torch.device | None = None, repeats: int = 5
) -> Callable[[], float]:
    """Returns a function that measures a rate: `count` over the median seconds of several repeats."""
    return lambda: count / statistics.median(seconds_of(work, device) for _ in range(repeats))


def matmul_peak(dtype: torch.dtype, device: torch.device, repeats: int = 5) -> float:
    """Multiply-accumulates per second of a square matrix product in this format, the best of several tries."""
    n = _PEAK_SIZES.get(device.type, 2048)
    left, right = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    torch.mm(left, right)
    return max(n**3 / seconds_of(lambda: torch.mm(left, right), device) for _ in range(repeats))


def take_turns(
    alternatives: Mapping[str, Callable[[], float]], rounds: int, *, warm_up: bool = True
) -> dict[str, list[float]]:
    """Measures the rate of every alternative (larger is faster), round by round; the warm-up round does not count."""
    rates: dict[str, list[float]] = {name: [] for name in alternatives}
    with part("", (rounds + warm_up) * len(alternatives), "measurements") as task:
        for number in range(rounds + warm_up):
            for name, measure in alternatives.items():
                task.note = name
                rate = measure()
                if number >= warm_up:
                    rates[name].append(rate)
                task.advance()
    return rates


def summary(rates: Mapping[str, list[float]], against: str) -> dict[str, Any]:
    """Summarises each alternative: median, minimum, maximum, and median ratio to `against`, round by round."""
    return {
        name: {
            "median": statistics.median(values),
            "min": min(values),
            "max": max(values),
            "ratio": statistics.median(value / other for value, other in zip(values, rates[against], strict=True)),
        }
        for name, values in rates.items()
    }
