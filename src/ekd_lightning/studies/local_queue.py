"""Jobs of submitit's local executor: processes that outlive the one that started them, unless it sees to it."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

_GRACE_SECONDS = 30.0  # for interrupted jobs to say so and end


def stop_local_queue(folder: Path) -> None:
    """Ends jobs of submitit's local executor, which outlive the process that started them.

    Args:
        folder: Folder of the sweep.
    """
    for pid in (alive := _local_queue(folder)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGINT)
    until = time.monotonic() + _GRACE_SECONDS
    for pid in alive:
        while _is_our_child(pid) and time.monotonic() < until:
            time.sleep(0.05)


def wait_for_local_queue(folder: Path) -> None:
    """Waits until all jobs of submitit's local executor have ended."""
    for pid in _local_queue(folder):
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)


def _local_queue(folder: Path) -> list[int]:
    """Processes that look after a job for submitit, our children; it names its folders by them."""
    found = [int(path.name) for path in (folder / ".submitit").glob("*") if path.name.isdecimal()]
    return [pid for pid in found if _is_our_child(pid)]


def _is_our_child(pid: int) -> bool:
    """Whether a process is a child of this one and still runs."""
    try:
        return os.waitpid(pid, os.WNOHANG) == (0, 0)
    except (ChildProcessError, OverflowError):
        return False
