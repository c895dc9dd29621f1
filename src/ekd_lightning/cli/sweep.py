"""What a sweep says at its end: which jobs are done and which failed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig


class SweepSummary(Callback):
    """Lists the jobs of a multirun from their status files."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Prints one line per failed job, and the counts."""
        folder = Path(str(config.hydra.sweep.dir))
        states = {path.parent: json.loads(path.read_text()) for path in sorted(folder.rglob("status.json"))}
        failed = {run: status for run, status in states.items() if status["state"] == "failed"}
        done = sum(status["state"] == "done" for status in states.values())
        print(f"{folder}: {done} of {len(states)} runs done, {len(failed)} failed")
        for run, status in failed.items():
            print(f"  failed: {run.relative_to(folder)}  {status['error']}")
