"""What a sweep says at its end: which jobs are done and which failed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

_folders: list[Path] = []


class SweepSummary(Callback):
    """Notes where a multirun keeps its jobs, for `tell_sweep`."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Notes the folder, at the start: Hydra calls `on_multirun_end` only when no job failed."""
        _folders.append(Path(str(config.hydra.sweep.dir)))


def tell_sweep() -> None:
    """Prints the counts and one line per failed job of the sweep that ran in this process, if one did."""
    while _folders:
        folder = _folders.pop()
        runs = sorted({path.parent for name in (".hydra", "status.json") for path in folder.rglob(name)})
        states = {run: _status(run / "status.json") for run in runs}
        failed = {run: status for run, status in states.items() if status["state"] == "failed"}
        done = sum(status["state"] == "done" for status in states.values())
        print(f"{folder}: {done} of {len(states)} runs done, {len(failed)} failed")
        for run, status in failed.items():
            print(f"  failed: {run.relative_to(folder)}  {status['error']}")


def _status(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {"state": "failed", "error": "ended before it had a record; see its log"}
    return dict(json.loads(path.read_text()))
