"""The record of a run: status.json, provenance.json and result.json, each written atomically."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ekd_lightning import __version__
from ekd_lightning.files import write_json

_PACKAGES = (
    "torch",
    "torchvision",
    "pytorch-lightning",
    "torchmetrics",
    "hydra-core",
    "omegaconf",
    "wandb",
    "numpy",
)

ARRAYS = "arrays.npz"
"""Beside result.json: what plots need and no table shows."""


def provenance() -> dict[str, Any]:
    """Where a result comes from: code, versions, hardware, command."""
    return {
        "version": __version__,
        "git": _git(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "platform": platform.platform(),
        "hardware": _hardware(),
        "started": now(),
    }


def is_rank_zero() -> bool:
    """Whether this process writes the run's files; known before any process group exists."""
    for name in ("RANK", "SLURM_PROCID"):
        if name in os.environ:
            return int(os.environ[name]) == 0
    return all(int(os.environ.get(name, "0")) == 0 for name in ("LOCAL_RANK", "NODE_RANK"))


def now() -> str:
    """The time as ISO 8601 in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git() -> dict[str, Any] | None:
    """Commit of the source tree this package runs from; None for an installed wheel."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return None

    def ask(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    return {
        "commit": ask("rev-parse", "HEAD") or None,
        "modified": bool(ask("status", "--porcelain", "-uno")),
    }


def _hardware() -> dict[str, Any]:
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


class RunRecord:
    """The JSON files of one run directory. Only the process with global rank 0 may hold one."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def status(self, state: str, error: str | None = None) -> None:
        """Says `running`, `failed` (with the error) or `done` in status.json."""
        write_json(self.directory / "status.json", {"state": state, "error": error, "time": now()})

    def start(self, *, resumed: bool) -> None:
        """Marks the run as running; a result of an earlier try is withdrawn.

        A resumed run keeps its first provenance and appends this start to it.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        for name in ("result.json", ARRAYS):
            (self.directory / name).unlink(missing_ok=True)
        path = self.directory / "provenance.json"
        here = provenance()
        if resumed and path.is_file():
            first = json.loads(path.read_text())
            here = {**first, "resumed": [*first.get("resumed", []), here]}
        write_json(path, here)
        self.status("running")

    def forget_earlier_run(self) -> None:
        """Removes what an earlier run left in the same directory, so that nothing of it passes for this run's.

        Its last checkpoint above all: resuming this run must not go on from there.
        """
        for name in (
            "checkpoints/best.ckpt",
            "checkpoints/last.ckpt",
            "student.safetensors",
            "metrics.csv",
            "wandb_run_id.txt",
        ):
            (self.directory / name).unlink(missing_ok=True)

    def add_provenance(self, **facts: Any) -> None:
        """Adds facts known only after the start, e.g. hashes of data and teachers."""
        path = self.directory / "provenance.json"
        write_json(path, {**json.loads(path.read_text()), **facts})

    def result(self, content: dict[str, Any]) -> None:
        """Writes result.json, then says done; in this order, so that done implies a result."""
        write_json(self.directory / "result.json", content)
        self.status("done")
