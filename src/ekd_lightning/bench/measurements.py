"""Measurements by letter: the settings, data and teachers that all parts share, and the parts."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from ekd_lightning.bench import cost, parts
from ekd_lightning.bench.parts import Bench, worker_counts
from ekd_lightning.config.config import compose_settings, import_user_modules
from ekd_lightning.config.overrides import key_of
from ekd_lightning.errors import UserError, quiet
from ekd_lightning.pipeline.prepare import prepare
from ekd_lightning.settings import MethodSettings
from ekd_lightning.teachers.hardware import keep_freed_memory, resolve_precision
from ekd_lightning.training.pool import gather_teachers

_GPU_MINUTES = 3.0


def make_bench(overrides: Sequence[str], *, epochs: int, minutes: float | None, **counts: Any) -> Bench:
    """Prepares settings, data and teachers for all parts.

    Args:
        overrides: As for ekd-train.
        epochs: Epochs of every training.
        minutes: No part is started after this time; None for no limit, on a GPU for three minutes.
        **counts: Fields of `Bench` that set how often and how much is measured.

    Raises:
        UserError: For settings that the plain loop cannot train with.
    """
    began = time.perf_counter()
    keep_freed_memory()  # as every run does; the plain loop profits too
    more = (f"recipe.epochs={epochs}", "trainer.devices=1")
    settings = compose_settings(*more, *overrides)
    if settings.method.name == MethodSettings().name and "method" not in map(key_of, overrides):
        # In place of the default a method that teacher tables serve: the plain loop computes no stage outputs.
        overrides = ["method=ekd_pooled", *overrides]
        settings = compose_settings(*more, *overrides)
    import_user_modules(settings.imports)
    accelerator = str(settings.trainer.get("accelerator", "auto"))
    on_gpu = torch.cuda.is_available() and accelerator in ("auto", "gpu", "cuda")
    settings.trainer["precision"] = resolve_precision(settings.trainer.get("precision"), accelerator)
    if settings.recipe.mixed("recipe"):
        raise UserError(f"{settings.recipe.mixed('recipe')}: the plain loop does not mix images; set it to 0")
    # As in a long run: the benchmark's own trainings would be too short to pay for compiling.
    if settings.teachers.compile == "auto" and not on_gpu:
        settings.teachers.compile = "always"
    if settings.student.compile == "auto":
        long_run = str(settings.trainer["precision"]).startswith("bf16") and not on_gpu
        settings.student.compile = "always" if long_run else "never"
    prepared = prepare(settings, accelerator)
    if settings.method.teacher is not None:
        raise UserError(
            f"method.teacher={settings.method.teacher}: ekd-bench measures all teachers of the pool; set it to null"
        )
    if prepared.method.teacher_stages or not prepared.teachers:
        raise UserError(
            f"method={settings.method.name}: ekd-bench needs a method with teachers that does not read their stage "
            "outputs, e.g. method=ekd_pooled"
        )
    device = torch.device("cuda" if on_gpu else "cpu")
    limit = minutes or (_GPU_MINUTES if on_gpu else math.inf)
    return Bench(
        settings,
        prepared.dataset,
        gather_teachers(prepared.teachers).to(device),
        device,
        workers=worker_counts(device),
        overrides=tuple(overrides),
        began=began,
        deadline=began + 60 * limit,
        **counts,
    )


_PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "a": parts.loader_alone,
    "b": parts.teachers_alone,
    "c": parts.epoch,
    "d": parts.sweep,
    "e": cost.inference,
    "f": cost.memory,
    "g": cost.growth,
    "i": parts.overhead,
    "l": cost.folder_loading,
    "p": cost.step_profile,
}


def measure(key: str, bench: Bench, found: dict[str, Any]) -> dict[str, Any]:
    """Measures one part.

    Parts that it needs are measured and added to `found`, the results of earlier parts.
    """
    with quiet():  # `make_bench` has already warned
        if key != "h":
            return _PARTS[key](_smaller(bench, key) if key in "dgi" else bench)
        for needed in "bc":
            if needed not in found:
                found[needed] = _PARTS[needed](bench)
        return cost.peak_share(bench, found["b"], found["c"])


def _smaller(bench: Bench, key: str) -> Bench:
    """Returns a smaller benchmark for parts with many trainings; the sweep compiles whenever ekd-train would."""
    settings, epochs = bench.settings, bench.sweep_epochs
    if bench.sweep_fraction is not None:
        data = replace(settings.data, fraction=bench.sweep_fraction, per_class=None)
        settings = replace(settings, data=data)
    if key != "g":
        recipe = replace(settings.recipe, epochs=epochs)
        settings = replace(settings, recipe=recipe, trainer={**settings.trainer, "max_epochs": epochs})
    if key == "d":
        chosen = compose_settings(*bench.overrides)
        teachers = replace(settings.teachers, compile=chosen.teachers.compile)
        student = replace(settings.student, compile=chosen.student.compile)
        settings = replace(settings, teachers=teachers, student=student)
    return replace(bench, settings=settings)
