"""Processes of benchmarks/gpu.py: one command by the clock, and several runs at once on one GPU."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib.util import cache_from_source
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch

from ekd_lightning.bench import rate_of
from ekd_lightning.bench.ours import BareLoop, Job
from ekd_lightning.config.config import compose_settings
from ekd_lightning.files import write_json
from ekd_lightning.pipeline.prepare import prepare
from ekd_lightning.studies.sharing import mps_service
from ekd_lightning.teachers.hardware import resolve_precision
from ekd_lightning.training.pool import gather_teachers

_SETTLE = 1.0  # seconds after the number of runs has changed
_START = 60.0  # seconds in which all runs must have begun
_IMPORTS = """
from ekd_lightning.progress import importing
with importing("as ekd-train does"):
    import ekd_lightning.pipeline.run
"""


def import_seconds(folder: Path) -> float:
    """Seconds that a process takes to import what a run needs, PyTorch and Lightning above all.

    Args:
        folder: For bytecode of packages that were installed without.
    """
    seconds = 0.0
    for _ in range(2):  # the first process may have to compile
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", _IMPORTS], check=True, env=_environment(folder))
        seconds = time.perf_counter() - began
    return seconds


def _environment(folder: Path) -> dict[str, str]:
    """Of a process. Packages without bytecode get it in `folder`, or each process would compile all modules."""
    if Path(cache_from_source(torch.__file__)).is_file():
        return dict(os.environ)
    others = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**others, "PYTHONPYCACHEPREFIX": str(folder / "bytecode")}


def timed_command(words: tuple[str, ...], folder: Path, store: Path, limit: float = 60.0) -> dict[str, Any]:
    """Runs `ekd-train` as a user would.

    Args:
        words: Its overrides.
        folder: Where the run goes.
        store: Its store.
        limit: Seconds after which it is ended, and prints where its threads were.

    Returns:
        Seconds from the command to its first step's end, of the training after that, and from its last step to the
        end of the process; the record of the training.
    """
    folder.mkdir(parents=True)
    moments = folder / "moments.json"
    own = [
        f"hydra.run.dir={folder / 'run'}",
        f"teachers.store={store}",
        "+callbacks.moments._target_=ekd_lightning.bench.ours.Clock",
        f"+callbacks.moments.file={moments}",
    ]
    command = [sys.executable, "-X", "faulthandler", "-m", "ekd_lightning.cli.train", *words, *own]
    output = folder / "output.txt"  # no pipe, which anything that the command leaves behind would keep open
    began = time.time()
    environment = _environment(store.parent)
    with (
        output.open("w") as stream,
        subprocess.Popen(command, stdout=stream, stderr=stream, env=environment) as process,
    ):
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGABRT)  # prints the stacks of all threads
            time.sleep(1)
            process.kill()
            code = process.wait(5)
    ended = time.time()
    if code:
        print(said := output.read_text()[-5000:], file=sys.stderr)
        raise RuntimeError(f"ekd-train: exit code {code}: {' '.join(said.splitlines()[-1:])}")
    found = json.loads(moments.read_text())
    result = json.loads((folder / "run/result.json").read_text())
    return {
        "seconds_to_first_step": found["first_step"] - began,
        "seconds_of_training": found["last_step"] - found["first_step"],
        "seconds_after_last_step": ended - found["last_step"],
        "images_per_second": result["images_per_second"],
        "test_accuracy": result["test_accuracy"],
    }


class TakesPart(pl.Callback):
    """Trains only while so many runs are wanted that this one counts; notes when its images were done.

    Args:
        rank: Of this run, 0 or more.
        wanted: Shared number of runs; negative ends them.
        begun: Shared number of runs that are ready.
        file: Where the moments are written, as JSON, when the run is ended.
    """

    def __init__(self, rank: int, wanted: Any, begun: Any, file: Path) -> None:
        self.rank, self._wanted, self._begun, self._file = rank, wanted, begun, file
        self.times: list[float] = []
        self.images: list[int] = []
        self._done = 0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Waits for its turn, after an epoch in which everything has been captured."""
        if trainer.current_epoch == 1:
            with self._begun.get_lock():
                self._begun.value += 1
        while trainer.current_epoch and 0 <= self._wanted.value <= self.rank:
            time.sleep(0.002)
        if self._wanted.value < 0:
            write_json(self._file, {"times": self.times, "images": self.images})
            os._exit(0)  # a training that does not end by itself
        self._note()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Counts the epoch's images, once they are done."""
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        self._done += int(trainer.num_training_batches) * trainer.datamodule.batch_size  # type: ignore[attr-defined]
        self._note()

    def _note(self) -> None:
        self.times.append(time.monotonic())
        self.images.append(self._done)


def _one_run(words: tuple[str, ...], device: str, part: TakesPart) -> None:
    settings = compose_settings(*words)
    accelerator = str(settings.trainer.get("accelerator", "auto"))
    settings.trainer["precision"] = resolve_precision(settings.trainer.get("precision"), accelerator)
    settings = replace(settings, seed=part.rank)
    teachers = gather_teachers(prepare(settings, accelerator).teachers).to(device)
    Job(settings, teachers, torch.device(device)).fit(also=[part])


def many_at_once(
    words: tuple[str, ...],
    device: str,
    folder: Path,
    *,
    mps: bool,
    seconds: float,
    counts: Sequence[int] = (1, 2, 4, 8),
) -> dict[str, Any]:
    """Images per second of several runs of one GPU together, validation and checkpoints included.

    Args:
        words: Overrides of the runs; their table is full after one epoch, and their training does not end by itself.
        device: "cuda" or "cpu".
        folder: For their files.
        mps: Whether NVIDIA's multi-process service serves them.
        seconds: How long each number is measured.
        counts: Numbers of runs.
    """
    with mps_service() if mps else contextlib.nullcontext() as problem:
        if problem:
            return {"unmeasured": problem}
        return {"mps": mps, "runs": _phases(words, device, folder, seconds, counts)}


def on_streams(job: Job, *, seconds_each: float, counts: Sequence[int] = (1, 2, 4, 8)) -> dict[int, Any]:
    """Images per second of several students of one process together, each with its graphs on a stream of its own.

    They are loops without Lightning, which take turns step by step; a full table is assumed.

    Args:
        job: The training.
        seconds_each: Each number of students makes 300 times as many steps in all.
        counts: Numbers of students.
    """
    cuda = job.device.type == "cuda"
    streams = [torch.cuda.Stream(job.device) if cuda else None for _ in range(max(counts))]
    loops = []
    for seed, stream in enumerate(streams):
        with torch.cuda.stream(stream):  # None changes nothing
            loops.append(BareLoop(replace(job, settings=replace(job.settings, seed=seed))))
            loops[-1].start_epoch(0)
            loops[-1].run(10)

    def run(count: int, steps: int) -> None:
        for _ in range(steps):
            for loop, stream in zip(loops[:count], streams, strict=False):
                with torch.cuda.stream(stream):
                    loop.run(1)

    found = {}
    for count in counts:
        steps = max(2, round(300 * seconds_each / count))
        images = count * steps * job.settings.recipe.batch_size
        found[count] = {"images_per_second": rate_of(partial(run, count, steps), images, job.device, 1)()}
    return found


def _phases(words: tuple[str, ...], device: str, folder: Path, seconds: float, counts: Sequence[int]) -> dict[int, Any]:
    context = multiprocessing.get_context("spawn" if torch.cuda.is_initialized() else "fork")
    wanted, begun = context.Value("i", 0), context.Value("i", 0)
    files = [folder / f"run{rank}.json" for rank in range(max(counts))]
    runs = [
        context.Process(target=_one_run, args=(words, device, TakesPart(rank, wanted, begun, file)))
        for rank, file in enumerate(files)
    ]
    windows: dict[int, tuple[float, float]] = {}
    try:
        for run in runs:
            run.start()
        deadline = time.monotonic() + _START
        while begun.value < len(runs) and time.monotonic() < deadline and all(run.is_alive() for run in runs):
            time.sleep(0.05)
        if begun.value < len(runs):
            raise RuntimeError(f"only {begun.value} of {len(runs)} runs began within {_START:.0f} s")
        for count in counts:
            wanted.value = count
            time.sleep(_SETTLE)
            start = time.monotonic()
            time.sleep(seconds)
            windows[count] = (start, time.monotonic())
        wanted.value = -1
        for run in runs:
            run.join(30)
    finally:
        for run in runs:
            run.kill()
    told = [json.loads(file.read_text()) for file in files]
    found = {}
    for count, (start, end) in windows.items():
        rates = [between(one["times"], one["images"], start, end) for one in told]
        found[count] = {"images_per_second": sum(rates), "by_run": [rate for rate in rates if rate > 0]}
    return found


def between(times: list[float], images: list[int], start: float, end: float) -> float:
    """Images per second between two moments, from cumulative counts at some moments."""
    first, last = np.interp([start, end], times, images)
    return float(last - first) / (end - start)
