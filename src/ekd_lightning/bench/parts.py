"""Parts of the benchmark that compare plain loops with this package on the same work."""

from __future__ import annotations

import math
import os
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ekd_lightning.bench import rate_of, summary, take_turns
from ekd_lightning.bench.ours import BareLoop, Job
from ekd_lightning.bench.plain import CarefulLoop, PlainLoop, loader_rate
from ekd_lightning.data import Dataset
from ekd_lightning.data.loader import TrainLoader, gather_batch
from ekd_lightning.networks import TeacherEnsemble
from ekd_lightning.settings import Settings
from ekd_lightning.teachers.hardware import usable_cores
from ekd_lightning.teachers.source import FrozenTeachers, TeacherFormat


@dataclass(frozen=True)
class Bench:
    """Settings, data and extent of the measurements.

    Attributes:
        settings: Data, pool of teachers, student, method, recipe and trainer flags of the job.
        dataset: The images.
        teachers: All teachers of the pool.
        device: Device of all measurements.
        rounds: Counted rounds of every comparison.
        plain_steps: Steps of the plain loop in a round; its speed does not change over an epoch.
        workers: Numbers of loader workers to try for the plain loop.
        overrides: Overrides from which the settings were composed, as for ekd-train.
        sweep_fraction: Share of the data for parts with many trainings; None for that of the settings.
        sweep_epochs: Epochs of the trainings of these parts.
        folder_images: Number of images in the folder whose loading is measured.
        began: `time.perf_counter` at the start of the benchmark.
        deadline: `time.perf_counter` after which no further reference or part is started.
    """

    settings: Settings
    dataset: Dataset
    teachers: TeacherEnsemble
    device: torch.device
    rounds: int = 3
    plain_steps: int = 30
    workers: tuple[int, ...] = (0, 1, 2)
    overrides: tuple[str, ...] = ()
    sweep_fraction: float | None = None
    sweep_epochs: int = 3
    folder_images: int = 1000
    began: float = 0.0
    deadline: float = math.inf

    def has_time(self, seconds: float = 0.0) -> bool:
        """Whether work of this many seconds would end before the deadline."""
        return time.perf_counter() + seconds < self.deadline

    def job(self, settings: Settings | None = None, teachers: int | None = None) -> Job:
        """Returns the job with the first `teachers` teachers; None for all."""
        count = self.teachers.num_teachers if teachers is None else teachers
        chosen = TeacherEnsemble(self.teachers.members[:count], self.teachers.identities[:count])
        settings = settings or self.settings
        pool = replace(settings.teachers, count=count)
        return Job(replace(settings, teachers=pool), chosen, self.device)


def worker_counts(device: torch.device) -> tuple[int, ...]:
    """Numbers of loader workers worth trying: on a GPU up to one for each core."""
    if device.type == "cpu":
        return (0, 1, 2)
    cores = usable_cores()
    return (0, *(2**power for power in range(cores.bit_length()) if 2**power < cores), cores)


def loader_alone(bench: Bench) -> dict[str, Any]:
    """(a) Images per second of the loaders alone, without training: PIL in workers, and views in memory."""
    prepared, batch_size = bench.job().prepared(), bench.settings.recipe.batch_size
    index = prepared.subset.train_index
    rate = partial(loader_rate, bench.dataset.train, index, batch_size, 2 * bench.plain_steps)
    rates = {workers: rate(workers) for workers in bench.workers}
    best = max(rates, key=rates.__getitem__)
    images = bench.dataset.train.images.to(bench.device)
    ours = TrainLoader(bench.dataset.train, index, prepared.views, batch_size, seed=0)

    def epoch() -> None:
        for rows in ours:
            gather_batch(images, rows, prepared.views)

    alternatives = {
        "plain": lambda: rate(best),
        "views in memory": rate_of(epoch, len(ours) * batch_size, bench.device, repeats=1),
    }
    found = take_turns(alternatives, bench.rounds)
    return {"unit": "images/s", "workers": rates, "best_workers": best, "rates": summary(found, "plain")}


FORMATS = {
    "float32 eager": TeacherFormat("float32", fold=False, compile="never", channels_last=False),
    "float32 folded": TeacherFormat("float32", compile="never"),
    "float32 folded, compiled": TeacherFormat("float32", compile="always"),
    "auto folded": TeacherFormat("auto", compile="never"),
    "auto folded, compiled": TeacherFormat("auto", compile="always"),
}
"""Formats of frozen teachers; "auto" is bfloat16 where the hardware has it."""


def teachers_alone(bench: Bench) -> dict[str, Any]:
    """(b) Each teacher at batch 128 in every format; agreement with float32 on test images."""
    batch = bench.dataset.test.images[:128].float().div(255).to(bench.device)
    test = bench.dataset.test.images[:2048].float().div(255).to(bench.device)
    result: dict[str, Any] = {"unit": "images/s", "batch": len(batch), "teachers": {}}
    ready = {name: FrozenTeachers(bench.teachers.to(bench.device), how) for name, how in FORMATS.items()}
    for m, identity in enumerate(bench.teachers.identities):
        start = time.perf_counter()
        ready["auto folded, compiled"].outputs(m, batch)
        compile_seconds = time.perf_counter() - start
        alternatives = {
            name: rate_of(partial(frozen.outputs, m, batch), len(batch), bench.device) for name, frozen in ready.items()
        }
        rates = summary(take_turns(alternatives, bench.rounds), "float32 eager")
        plain, fast = (
            torch.cat([ready[name].outputs(m, part).logits for part in test.split(128)])
            for name in ("float32 eager", "auto folded, compiled")
        )
        result["teachers"][identity.id] = {
            "rates": rates,
            "first_call_seconds": compile_seconds,
            "format": ready["auto folded, compiled"].numeric_format,
            **agreement(plain, fast),
        }
    return result


def agreement(plain: Tensor, fast: Tensor, temperature: float = 4.0) -> dict[str, float]:
    """Agreement of two sets of logits [B, C]: log-probabilities at T = 1 and T, and the same top class."""

    def distance(T: float) -> float:
        return float(((plain / T).log_softmax(-1) - (fast / T).log_softmax(-1)).abs().max())

    return {
        "max_log_prob_difference": distance(1.0),
        f"max_log_prob_difference_at_T{temperature:g}": distance(temperature),
        "top1_agreement": float((plain.argmax(-1) == fast.argmax(-1)).float().mean()),
        "images": len(plain),
    }


CAREFUL = {"careful plain": "default", "careful plain, reduce-overhead": "reduce-overhead"}
"""Names of a careful user's loops in results, and their modes of `torch.compile`."""
_COMPILE_SECONDS = 60  # of a careful loop on a GPU


def fastest_plain(bench: Bench, job: Job) -> tuple[PlainLoop, float, dict[int, float]]:
    """The plain loop with the best number of workers, the seconds to its first step, and all rates."""
    loops = {workers: PlainLoop(job, workers) for workers in bench.workers}
    seconds = {workers: loop.started() for workers, loop in loops.items()}
    steps = max(3, bench.plain_steps // 3)
    tried = {workers: loop.images_per_second(steps) for workers, loop in loops.items()}
    best = max(tried, key=tried.__getitem__)
    for workers in tried.keys() - {best}:
        loops[workers].close()
    return loops[best], seconds[best], tried


def careful_epoch(bench: Bench, job: Job, plain: PlainLoop) -> tuple[dict[str, Any], dict[str, float | str]]:
    """The loops of a careful user, in turn with the plain one.

    Returns:
        Rates with their ratios to the plain loop, and the seconds to the first steps, or why there is none.
    """
    loops: dict[str, PlainLoop] = {}
    starts: dict[str, float | str] = {}
    for name, mode in CAREFUL.items() if job.settings.teachers.compile != "never" else ():
        if mode == "reduce-overhead" and bench.device.type != "cuda":
            continue
        if loops and not bench.has_time(_COMPILE_SECONDS):
            starts[name] = "no time left"
            continue
        try:
            careful = CarefulLoop(job, plain.loader.num_workers, mode)
            starts[name] = careful.started()
            loops[name] = careful
        except Exception as error:  # no compiler, or one that fails: many kinds
            starts[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if not loops:
        return {}, starts
    alternatives = {name: partial(loop.images_per_second, bench.plain_steps) for name, loop in loops.items()}
    alternatives["plain"] = partial(plain.images_per_second, bench.plain_steps)
    rates = summary(take_turns(alternatives, bench.rounds, warm_up=False), "plain")
    for loop in loops.values():
        loop.close()
    torch.compiler.reset()
    return {name: rates[name] for name in loops}, starts


def epoch(bench: Bench) -> dict[str, Any]:
    """(c) A training epoch with all teachers: plain loops, cold table, warm table, bare loop with our kernels."""
    job = bench.job()
    plain, seconds, tried = fastest_plain(bench, job)
    best = plain.loader.num_workers
    careful, careful_starts = careful_epoch(bench, job, plain)
    starts: dict[str, float | str] = {"plain": seconds, **careful_starts}
    with tempfile.TemporaryDirectory() as folder:
        warm = job.with_store(Path(folder) / "warm")
        starts["cold table"] = warm.fit().clock.first_step

        def warm_rate() -> float:
            fitted = warm.fit()
            starts["warm table"] = fitted.clock.first_step
            return fitted.images_per_second

        def cold() -> float:
            with tempfile.TemporaryDirectory() as empty:
                rate = job.with_store(Path(empty)).fit().images_per_second
            os.sync()  # else its files are written to disk while the next alternative is timed
            return rate

        def bare() -> float:
            rate = BareLoop(warm).images_per_second(job.settings.recipe.epochs)
            torch.compiler.reset()  # so that the next training includes tracing, as a run does
            return rate

        alternatives = {
            "plain": lambda: plain.images_per_second(bench.plain_steps),
            "warm table": warm_rate,
            "bare loop, warm table": bare,
            "cold table": cold,
        }
        rates = take_turns(alternatives, bench.rounds, warm_up=False)
    plain.close()
    return {
        "unit": "images/s",
        "plain_workers": tried,
        "best_workers": best,
        "seconds_to_first_step": starts,
        "rates": {**summary(rates, "plain"), **careful},
        "epochs": job.settings.recipe.epochs,
        "images": len(job.prepared().subset.train_index),
    }


def overhead(bench: Bench) -> dict[str, Any]:
    """(i) Overhead of Lightning over the bare loop with the same kernels: both train uncompiled from one warm table.

    Lightning's time is from the first step to the end, with logging and checkpoints; neither side validates.
    """
    settings = replace(bench.settings, student=replace(bench.settings.student, compile="never"))
    job, epochs = bench.job(settings), settings.recipe.epochs
    with tempfile.TemporaryDirectory() as folder:
        warm = job.with_store(Path(folder))
        alternatives = {
            "bare loop": lambda: BareLoop(warm).images_per_second(epochs),
            "Lightning": lambda: warm.fit(whole=True, validate=False).images_per_second,
        }
        rates = take_turns(alternatives, 2 * bench.rounds + 1)
    found = summary(rates, "bare loop")
    return {"unit": "images/s", "epochs": epochs, "rates": found, "overhead": 1 / found["Lightning"]["ratio"] - 1}


def sweep(bench: Bench) -> dict[str, Any]:
    """(d) Total seconds of a sweep of teachers 1, 2, ... × branches 1, 2, 3, from an empty store.

    Those of the plain loop are computed from its measured speed in each of the jobs.
    """
    counts, branches = range(1, bench.teachers.num_teachers + 1), (1, 2, 3)
    plain_seconds, jobs = 0.0, []
    index, size = bench.job().prepared().subset.train_index, bench.settings.recipe.batch_size
    workers = max(bench.workers, key=partial(loader_rate, bench.dataset.train, index, size, bench.plain_steps))
    for count in counts:
        for number in branches:
            student = replace(bench.settings.student, branches=number)
            job = bench.job(replace(bench.settings, student=student), count)
            jobs.append(job)
            loop = PlainLoop(job, workers)
            loop.step()
            images = len(job.prepared().subset.train_index) * job.settings.recipe.epochs
            plain_seconds += images / loop.images_per_second(max(3, bench.plain_steps // 3))
            loop.close()
    with tempfile.TemporaryDirectory() as folder:
        stored = [job.with_store(Path(folder)) for job in jobs]
        start = time.perf_counter()
        attributed = [_attributed(job) for job in stored]
        seconds = time.perf_counter() - start
    return {
        "unit": "s",
        "jobs": len(jobs),
        "epochs": bench.settings.recipe.epochs,
        "plain_workers": workers,
        "plain": plain_seconds,
        "ours": seconds,
        "ratio": plain_seconds / seconds,
        **{part: sum(row[part] for row in attributed) for part in attributed[0]},
    }


def _attributed(job: Job) -> dict[str, float]:
    """Trains a job; returns its seconds by phase."""
    start = time.perf_counter()
    fitted = job.fit()
    source, training = fitted.module.teacher_source, fitted.seconds
    teachers = 0.0 if source is None else source.seconds
    return {
        "teachers_seconds": teachers,
        "students_seconds": training - teachers,
        "start_validation_and_end_seconds": time.perf_counter() - start - training,
    }
