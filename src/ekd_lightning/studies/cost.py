"""Cost of a study's runs: images, multiply-accumulates, and time on this machine."""

from __future__ import annotations

import contextlib
import logging
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ekd_lightning.config.config import to_settings
from ekd_lightning.errors import UserError
from ekd_lightning.progress import readable
from ekd_lightning.reporting.details import read_curves
from ekd_lightning.reporting.estimates import plural
from ekd_lightning.reporting.report import kind_of_machine
from ekd_lightning.runs.collection import RunEntry
from ekd_lightning.runs.writer import provenance
from ekd_lightning.settings import Settings
from ekd_lightning.studies.study import Composer, Study, every_run, read_runs
from ekd_lightning.studies.sweep import Job

if TYPE_CHECKING:
    from ekd_lightning.pipeline.prepare import Prepared

log = logging.getLogger(__name__)

_PROBE_SECONDS = 1.0


def training_cost(settings: Settings, prepared: Prepared) -> dict[str, int]:
    """The cost of a run's training.

    Returns:
        `images`, each counted as often as it is seen, and `macs`: three forward passes of the student for each of them,
        and without teacher tables one forward pass of every teacher.
    """
    from ekd_lightning.evaluation.efficiency import count_macs  # noqa: PLC0415 (slow)
    from ekd_lightning.networks import build_network  # noqa: PLC0415

    size = prepared.dataset.image_size
    macs = 3 * count_macs(prepared.student, size)
    if not prepared.source.tables:
        macs += sum(count_macs(build_network(plan.spec), size) for plan in prepared.teachers)
    images = settings.recipe.epochs * prepared.datamodule.num_train_images
    return {"images": images, "macs": images * macs}


def remaining_cost(run: RunEntry, settings: Settings, cost: Mapping[str, int]) -> dict[str, int]:
    """The cost of a stopped run's remaining epochs, read from metrics.csv; the whole cost if that file is damaged."""
    done = 0
    with contextlib.suppress(UserError):
        done = max(read_curves(run).get("epoch", {0: 0.0}))
    epochs = settings.recipe.epochs
    return {name: value * max(epochs - done, 0) // epochs for name, value in cost.items()}


def log_cost(planned: Mapping[Path, tuple[Study, Sequence[Job]]], composer: Composer) -> None:
    """Logs the number of runs, training images and the time that the jobs of several studies need on this machine.

    Times are estimated from finished runs of the studies that were made on this kind of machine; without any, a second
    of a student's training is timed, eagerly, as compiling would take longer than the estimate is worth.
    """
    jobs = {place.name: own for place, (_, own) in planned.items() if own}
    if not jobs:
        return
    here, done = kind_of_machine(provenance()), {study.data: list[RunEntry]() for study, _ in planned.values()}
    for place, (study, _) in planned.items():
        runs = every_run(read_runs(study, place))
        done[study.data] += [run for run in runs if run.result and kind_of_machine(run.provenance) == here]
    every = [run for own in done.values() for run in own]
    _, speed = recorded_pace(every)
    source = plural(len(every), "finished run")
    if not speed:
        source = (
            "one second of a student's eager training steps, which compiled and captured ones beat several times; "
            "filling the teacher tables takes additional time"
        )
        first = next(own[0] for own in jobs.values())
        speed = training_speed(to_settings(composer(overrides=first.overrides)))
    costs = []
    for place, (study, own) in planned.items():
        if own:  # a row's pace holds for its own data set only: images of another may have another size
            pace, _ = recorded_pace(done[study.data])
            costs.append((place.name, len(own), sum(job.images for job in own), seconds_of(own, pace, speed)))
    whole = (sum(one[1] for one in costs), sum(one[2] for one in costs), sum(one[3] for one in costs))
    for name, count, images, seconds in (*costs, ("in all", *whole)):
        log.info("%s: %s, %s training images, about %s", name, plural(count, "run"), f"{images:,}", readable(seconds))
    log.info("times are for one run at a time on %s, estimated from %s", here, source)


def recorded_pace(done: Iterable[RunEntry]) -> tuple[dict[str, float], float]:
    """The training speed that finished runs have recorded.

    Returns:
        Seconds per image by row, and the multiply-accumulates per second of all runs together, with three forward
        passes of the student for each image; 0 without any run.
    """
    rows: dict[str, list[float]] = {}
    macs = seconds = 0.0
    for run in done:
        images = (run.get("num_train_images") or 0) * (run.get("epochs_done") or run.get("epochs") or 0)
        took = run.get("train_seconds") or 0.0
        if images and took:
            rows.setdefault(run.directory.name.rsplit("-f", 1)[0], []).append(took / images)
            macs, seconds = macs + 3.0 * images * (run.get("macs") or 0), seconds + took
    return {row: statistics.median(own) for row, own in rows.items()}, macs / seconds if seconds else 0.0


def seconds_of(jobs: Iterable[Job], pace: Mapping[str, float], speed: float) -> float:
    """Estimated seconds of jobs that run one after another, by the pace of their row, else by MACs and speed."""
    return sum(job.images * pace[job.row] if job.row in pace else job.macs / speed for job in jobs)


def training_speed(settings: Settings) -> float:
    """Multiply-accumulates per second of this machine, measured in about a second of a student's training steps."""
    import torch  # noqa: PLC0415 (slow; --help needs none)

    from ekd_lightning.data import open_dataset  # noqa: PLC0415
    from ekd_lightning.evaluation.efficiency import count_macs, torch_benchmark  # noqa: PLC0415
    from ekd_lightning.networks.staged import sides  # noqa: PLC0415
    from ekd_lightning.pipeline.prepare import build_student  # noqa: PLC0415
    from ekd_lightning.teachers.hardware import device_type_of, resolve_precision  # noqa: PLC0415

    accelerator = str(settings.trainer.get("accelerator", "auto"))
    device = torch.device(device_type_of(accelerator))
    half = "bf16" in str(resolve_precision(settings.trainer.get("precision"), accelerator))
    dataset = open_dataset(settings.data)
    student, batch = build_student(settings, dataset), settings.recipe.batch_size
    macs = 3 * batch * count_macs(student, dataset.image_size)
    student.to(device).train()
    images = torch.rand(batch, 3, *sides(dataset.image_size), device=device)
    threads = int(settings.trainer.get("threads") or torch.get_num_threads())

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            loss = student(images).float().square().mean()
        loss.backward()
        loss.item()  # waits for the device

    timer = torch_benchmark().Timer("step()", globals={"step": step}, num_threads=threads)
    return float(macs / timer.blocked_autorange(min_run_time=_PROBE_SECONDS).mean)
