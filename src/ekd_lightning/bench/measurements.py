"""Measurements by letter: what all parts of the benchmark share, and what each of them measures."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ekd_lightning.bench import cost, parts, step_profile
from ekd_lightning.bench.parts import Bench, worker_counts
from ekd_lightning.config.config import compose_settings
from ekd_lightning.errors import UserError
from ekd_lightning.pipeline.prepare import prepare
from ekd_lightning.settings import Settings
from ekd_lightning.teachers.hardware import keep_freed_memory, resolve_precision
from ekd_lightning.training.pool import gather_teachers

_GPU_MINUTES = 3.0


def make_bench(overrides: Sequence[str], *, epochs: int, rounds: int, plain_steps: int, minutes: float | None) -> Bench:
    """Prepares what all parts measure.

    Args:
        overrides: As for ekd-train.
        epochs: Of every training.
        rounds: Counted rounds of every comparison.
        plain_steps: Steps of the plain loop in a round.
        minutes: Nothing begins after so long; None for no limit, three minutes on a GPU.

    Raises:
        UserError: For a job that the plain loop cannot do.
    """
    began = time.perf_counter()
    keep_freed_memory()  # as every run does; the plain loop profits too
    settings = compose_settings(f"recipe.epochs={epochs}", "trainer.devices=1", *overrides)
    accelerator = str(settings.trainer.get("accelerator", "auto"))
    on_gpu = torch.cuda.is_available() and accelerator in ("auto", "gpu", "cuda")
    settings.trainer["precision"] = resolve_precision(settings.trainer.get("precision"), accelerator)
    if settings.recipe.mixed("recipe"):
        raise UserError(f"{settings.recipe.mixed('recipe')}: the plain loop does not mix images")
    # What a long run would choose: the benchmark's own trainings are too short to pay for compiling.
    if settings.teachers.compile == "auto" and not on_gpu:
        settings.teachers.compile = "always"
    if settings.student.compile == "auto":
        long_run = str(settings.trainer["precision"]).startswith("bf16") and not on_gpu
        settings.student.compile = "always" if long_run else "never"
    prepared = prepare(settings, accelerator)
    if settings.method.teacher is not None:
        raise UserError(f"method.teacher={settings.method.teacher}: ekd-bench measures all teachers of the pool")
    if prepared.method.teacher_stages or not prepared.teachers:
        raise UserError(f"method={settings.method.name}: ekd-bench needs a method with teachers, without their stages")
    device = torch.device("cuda" if on_gpu else "cpu")
    limit = minutes or (_GPU_MINUTES if on_gpu else math.inf)
    return Bench(
        settings,
        prepared.dataset,
        gather_teachers(prepared.teachers).to(device),
        device,
        rounds=rounds,
        plain_steps=plain_steps,
        workers=worker_counts(device),
        began=began,
        deadline=began + 60 * limit,
    )


def measure(
    key: str,
    bench: Bench,
    overrides: Sequence[str],
    found: dict[str, Any],
    *,
    sweep_fraction: float | None,
    sweep_epochs: int,
) -> dict[str, Any]:
    """Measures one part.

    Args:
        key: Its letter.
        bench: From `make_bench`.
        overrides: As for ekd-train.
        found: What earlier parts measured; what this one needs of others is added.
        sweep_fraction: Share of the data for the parts that train often; None for that of the settings.
        sweep_epochs: Epochs of their trainings.

    Returns:
        The part's numbers, for a table and JSON.
    """
    if key in "dgi":
        bench = replace(bench, settings=_smaller(bench.settings, overrides, key, sweep_fraction, sweep_epochs))
    if key == "d":
        return parts.sweep(bench)
    if key == "h":
        for needed, also in (("b", parts.teachers_alone), ("c", parts.epoch)):
            if needed not in found:
                found[needed] = also(bench)
        teachers = {
            name: row["rates"]["auto folded, compiled"]["median"] for name, row in found["b"]["teachers"].items()
        }
        return cost.peak_share(bench, found["c"]["rates"]["warm table"]["median"], teachers)
    if key == "f":
        return cost.memory(overrides)
    parts_by_letter = {
        "a": parts.loader_alone,
        "b": parts.teachers_alone,
        "c": parts.epoch,
        "e": cost.inference,
        "g": cost.growth,
        "i": parts.overhead,
        "p": step_profile.step_profile,
    }
    return parts_by_letter[key](bench)


def _smaller(settings: Settings, overrides: Sequence[str], key: str, fraction: float | None, epochs: int) -> Settings:
    """The settings for the parts that train often; the sweep compiles when ekd-train would."""
    data, recipe = settings.data, settings.recipe
    if fraction is not None:
        data = replace(data, fraction=fraction, per_class=None)
    if key == "g":
        return replace(settings, data=data)
    recipe = replace(recipe, epochs=epochs)
    trainer = {**settings.trainer, "max_epochs": epochs}
    settings = replace(settings, data=data, recipe=recipe, trainer=trainer)
    if key == "d":
        chosen = compose_settings(*overrides)
        teachers = replace(settings.teachers, compile=chosen.teachers.compile)
        student = replace(settings.student, compile=chosen.student.compile)
        settings = replace(settings, teachers=teachers, student=student)
    return settings
