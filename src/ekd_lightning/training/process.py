"""Process of a run: as many threads as are free, and the memory that a step frees kept for the next one.

Two runs that each take all cores stall each other.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import sys
import time
from pathlib import Path

import torch

from ekd_lightning.errors import UserError

log = logging.getLogger(__name__)

_LOOKS, _BETWEEN = 5, 0.01  # snapshots of what else runs, and seconds between them


# Numbers of glibc's malloc.h; its manual: mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_NEVER = 2**31 - 1
_LARGEST = (1 << 30, 1 << 25)  # older versions take 32 MB at most


def usable_cores() -> int:
    """Cores that this process may run on: its affinity, cut by the quota of its control group."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cores, round(int(quota) / int(period))))
    except (OSError, ValueError):  # no such file, or no limit ("max")
        return cores


def busy_threads() -> int:
    """Threads of others that are running now: the median of a few looks; 0 where the system does not tell."""
    looks = []
    for look in range(_LOOKS):
        if look:
            time.sleep(_BETWEEN)
        try:
            running = Path("/proc/loadavg").read_text().split()[3].split("/")[0]
        except (OSError, IndexError):
            return 0
        looks.append(max(0, int(running) - 1))  # this one runs, too
    return sorted(looks)[_LOOKS // 2]


def set_threads(asked: int | None, recorded: int | None, *, device_type: str, num_devices: int) -> int:
    """Chooses the threads that torch computes with in this process, sets them, and says so in a line.

    Args:
        asked: `trainer.threads`; None to choose.
        recorded: Threads of the part of the run that is resumed: sums in another order round otherwise. None for a
            new run.
        device_type: Where training runs; on an accelerator threads hardly matter and stay as they are.
        num_devices: Processes that share the machine.

    Returns:
        The number of threads.

    Raises:
        UserError: `asked` is not positive.
    """
    if asked is not None and (not isinstance(asked, int) or isinstance(asked, bool) or asked < 1):
        raise UserError(f"trainer.threads={asked}: must be a positive integer, or null to choose")
    chosen, why = _choice(asked, recorded, device_type, num_devices)
    if chosen is None:
        return torch.get_num_threads()
    if chosen != torch.get_num_threads() or asked is None:
        log.info("%d %s: %s", chosen, "thread" if chosen == 1 else "threads", why)
    torch.set_num_threads(chosen)
    return chosen


def _choice(
    asked: int | None, recorded: int | None, device_type: str, num_devices: int
) -> tuple[int | None, str]:
    if asked is not None:
        return asked, "trainer.threads"
    if device_type != "cpu" or "OMP_NUM_THREADS" in os.environ:
        return None, ""
    if recorded is not None:
        return recorded, "as before the run was stopped"
    cores = usable_cores()
    if num_devices > 1:
        return max(1, cores // num_devices), f"{cores} cores for {num_devices} processes"
    busy = busy_threads()
    return max(1, cores - busy), f"{cores} cores, {busy} of them busy (trainer.threads=N overrides)"


def keep_freed_memory() -> bool:
    """Tells glibc not to hand freed memory back to the system, for the rest of the process.

    By default large tensors are mapped anew in every step, and the system clears their pages each time: some
    10,000 page faults a step of a ResNet-8 at batch 128, a seventh of a compiled step on two cores.

    Returns:
        Whether it has an effect: on Linux with glibc. Accelerators have allocators of their own.
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    mapped_from = any(mallopt(_M_MMAP_THRESHOLD, size) for size in _LARGEST)
    return bool(mallopt(_M_TRIM_THRESHOLD, _NEVER)) and mapped_from
