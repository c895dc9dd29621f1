"""Hardware: native precisions, torch.compile with a fallback, the number of threads, and memory."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ekd_lightning.errors import UserError

log = logging.getLogger(__name__)

_THREADS = "OMP_NUM_THREADS"
_SAMPLES, _BETWEEN = 5, 0.01  # samples of the running threads, and seconds between them


# Constants of glibc's malloc.h, see mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_NEVER = 2**31 - 1
_LARGEST = (1 << 30, 1 << 25)  # older versions take 32 MB at most


def native_bfloat16(device_type: str) -> bool:
    """Whether the hardware multiplies bfloat16; where it is emulated, it is slower than float32.

    A CPU needs AVX512-BF16 or AMX for it. False for devices besides "cpu" and "cuda", which were not measured.
    """
    if device_type == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type != "cpu":
        return False
    if hasattr(torch.cpu, "get_capabilities"):
        able = torch.cpu.get_capabilities()
        return bool(able.get("avx512_bf16") or able.get("amx_bf16"))
    older = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # of torch versions without the public query
    return any(getattr(torch.cpu, name, bool)() for name in older)


def resolve_precision(precision: str | int | None, accelerator: str = "auto") -> str | int | None:
    """Turns the precision `auto` into `bf16-mixed` where the hardware multiplies bfloat16, else into `32-true`.

    Any other value of Lightning's `precision` flag is returned unchanged.
    """
    if precision != "auto":
        return precision
    return "bf16-mixed" if native_bfloat16(device_type_of(accelerator)) else "32-true"


def device_type_of(accelerator: str) -> str:
    """Returns the device type of Lightning's `accelerator` flag on this machine; an unknown flag stays as it is."""
    on_gpu = accelerator in ("gpu", "cuda") or (accelerator == "auto" and torch.cuda.is_available())
    return "cuda" if on_gpu else "cpu" if accelerator in ("auto", "cpu") else accelerator


def teacher_dtype(precision: str, device_type: str) -> torch.dtype:
    """Returns the dtype of frozen teachers for `teachers.precision`: auto, float32 or bfloat16."""
    if precision == "auto":
        return torch.bfloat16 if native_bfloat16(device_type) else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]


def compiled_or_not(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Compiles a function for the shapes of its first call, with options of `torch.compile`.

    If its first call fails, e.g. without a compiler, this and all later calls go to the function itself. Errors of
    compiling the backward pass occur later and are not caught.
    """
    chosen: Callable[..., Any] = torch.compile(function, dynamic=False, **options)
    tried = False

    def call(*args: Any) -> Any:
        nonlocal chosen, tried
        if tried:
            return chosen(*args)
        tried = True
        try:
            return chosen(*args)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # no C++ compiler, no Triton, a bug of a compiler: many kinds
            reason = " ".join(str(error).split())[:200]
            message = f"torch.compile does not work here, so this runs slower ({type(error).__name__}: {reason})"
            warnings.warn(message, RuntimeWarning, stacklevel=3)
            chosen = function
            return chosen(*args)

    return call


def usable_cores() -> int:
    """Returns the number of cores that this process may use: its affinity, limited by its control group's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cores, round(int(quota) / int(period))))
    except (OSError, ValueError):  # no such file, or no limit ("max")
        return cores


def busy_threads() -> int:
    """Returns the number of other running threads, the median of a few samples; 0 if the system does not report it."""
    samples = []
    for sample in range(_SAMPLES):
        if sample:
            time.sleep(_BETWEEN)
        try:
            running = Path("/proc/loadavg").read_text().split()[3].split("/")[0]
        except (OSError, IndexError):
            return 0
        samples.append(max(0, int(running) - 1))  # without this one
    return sorted(samples)[_SAMPLES // 2]


def set_threads(requested: int | None, recorded: int | None, *, device_type: str, num_devices: int) -> int:
    """Chooses, sets, logs and returns the number of torch's threads in this process.

    Args:
        requested: `trainer.threads`; None to choose.
        recorded: Threads of the part of the run that is resumed, as another number changes rounding; None for a new
            run.
        device_type: Device of the training; on an accelerator threads hardly matter and stay as they are.
        num_devices: Processes that share the machine.

    Raises:
        UserError: If `requested` is not a positive integer.
    """
    if requested is not None and (not isinstance(requested, int) or isinstance(requested, bool) or requested < 1):
        raise UserError(f"trainer.threads={requested}: must be a positive integer, or null to choose it by the machine")
    chosen, why = _choice(requested, recorded, device_type, num_devices)
    if chosen is None:
        return torch.get_num_threads()
    if chosen != torch.get_num_threads() or requested is None:
        log.info("%d %s: %s", chosen, "thread" if chosen == 1 else "threads", why)
    torch.set_num_threads(chosen)
    if num_devices > 1:
        os.environ[_THREADS] = str(chosen)  # for the other processes, and for Lightning, which sets it otherwise
    return chosen


@contextlib.contextmanager
def threads_as_before() -> Iterator[None]:
    """Restores torch's number of threads and the environment's after the block: jobs of a sweep share a process."""
    environment, threads = os.environ.get(_THREADS), torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        os.environ.pop(_THREADS, None)
        if environment is not None:
            os.environ[_THREADS] = environment


def _choice(requested: int | None, recorded: int | None, device_type: str, num_devices: int) -> tuple[int | None, str]:
    if requested is not None:
        return requested, "trainer.threads"
    if device_type != "cpu":
        return None, ""
    if recorded is not None:
        return recorded, "as many as before the run was stopped"
    if _THREADS in os.environ:
        return None, ""
    cores = usable_cores()
    if num_devices > 1:
        return max(1, cores // num_devices), f"{cores} cores for {num_devices} processes"
    share = cores != os.cpu_count()  # busy threads are known of the whole machine only
    busy = 0 if share else busy_threads()
    found = f"this process's share of {os.cpu_count()} cores" if share else f"{cores} cores, {busy} of them busy"
    return max(1, cores - busy), f"{found} (trainer.threads=N overrides)"


def keep_freed_memory() -> bool:
    """Makes glibc keep freed memory instead of returning it to the system, for the rest of the process.

    By default large tensors are mapped anew in every step, and the system clears their pages each time: about 10,000
    page faults per step of a ResNet-8 at batch 128, a seventh of a compiled step on two cores. Returns whether it has
    an effect, which needs Linux with glibc; accelerators have their own allocators.
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    mapped_from = any(mallopt(_M_MMAP_THRESHOLD, size) for size in _LARGEST)
    return bool(mallopt(_M_TRIM_THRESHOLD, _NEVER)) and mapped_from
