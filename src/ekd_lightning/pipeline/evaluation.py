"""Evaluation of a trained student: its parts, and how they are run and their findings recorded."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ekd_lightning.data import ImageSet
from ekd_lightning.data.views import to_unit
from ekd_lightning.errors import UserError, reason, users_line
from ekd_lightning.evaluation.efficiency import measure_latency, peak_memory, stored_bytes
from ekd_lightning.evaluation.flatness import DatasetLoss, curve_alphas, loss_curves, loss_rise, sharpness
from ekd_lightning.evaluation.robustness import (
    MAIN,
    CorruptedSets,
    mean_by_severity,
    mean_corruption_error,
    score_corruptions,
    spread_index,
)
from ekd_lightning.evaluation.scores import score_batches, score_logits
from ekd_lightning.networks import BranchedStudent
from ekd_lightning.networks.frozen import FrozenStudent
from ekd_lightning.pipeline.context import BETWEEN, EvaluationContext, Findings, merge
from ekd_lightning.pipeline.predictions import predictions
from ekd_lightning.progress import part, phase
from ekd_lightning.runs.result import Result
from ekd_lightning.runs.writer import RunWriter, cpu_name

log = logging.getLogger(__name__)


def generalisation(context: EvaluationContext) -> Findings:
    """Measures the generalisation gap: scores on the training images against those on the test images.

    Both are computed here, in float32 and without augmentation, so that only the images differ.

    Returns:
        `train_accuracy`, `train_nll`; `gap_accuracy` (train - test) and `gap_nll` (test - train), both positive
        if the student is better on the training images.
    """
    student = _for_inference(context)
    train_set, test_set = context.dataset.train, context.dataset.test
    batch = context.settings.data.eval_batch_size
    train = score_batches(
        student, _batches(train_set, context.subset.train_index, batch), train_set.num_classes, context.device
    )
    test = score_logits(context.test_predictions.logits, test_set.labels)
    return Findings(
        {
            "train_accuracy": train["accuracy"],
            "train_nll": train["nll"],
            "gap_accuracy": train["accuracy"] - test["accuracy"],
            "gap_nll": test["nll"] - train["nll"],
        }
    )


def flatness(
    context: EvaluationContext,
    *,
    sharpness_images: int = 5000,
    curve_images: int = 1000,
    directions: int = 5,
    points: int = 17,
    seed: int = 0,
) -> Findings:
    """Measures how the loss of the ensemble output on training images changes around the weights.

    Args:
        context: The run.
        sharpness_images: Training images for the sharpness, evenly spread; all if there are fewer.
        curve_images: Training images for the curves, which need the loss about `directions · (points + 3)` times.
        directions: D, the number of curves; 0 for none.
        points: Points of each curve, at equal distances from -1 to 1; at least 2.
        seed: Seed of the first direction; the others take the following numbers.

    Returns:
        `sharpness_sam` (ρ = 0.05), `sharpness_adaptive` (ρ = 0.5), `sharpness_images`; with curves also
        `loss_rise_at_quarter`, `loss_rise_at_half`, `loss_curve_images`, and the arrays `loss_curve_alpha [A]`
        and `loss_curve_loss [D, A]`, in nats.
    """
    with part("sharpness", weight=0.25):
        loss = _training_loss(context, sharpness_images)
        gradient = loss.gradient(loss.weights)
        fields: dict[str, object] = {
            "sharpness_sam": sharpness(loss, rho=0.05, gradient=gradient),
            "sharpness_adaptive": sharpness(loss, rho=0.5, adaptive=True, gradient=gradient),
            "sharpness_images": loss.num_images,
        }
    if directions == 0:
        return Findings(fields)
    loss = _training_loss(context, curve_images)
    alphas = curve_alphas(points)
    with part("curves", weight=0.75):
        curves = loss_curves(loss, alphas, range(seed, seed + directions))
    fields |= {
        "loss_rise_at_quarter": loss_rise(curves, alphas, 0.25),
        "loss_rise_at_half": loss_rise(curves, alphas, 0.5),
        "loss_curve_images": loss.num_images,
    }
    return Findings(fields, {"loss_curve_alpha": np.array(alphas), "loss_curve_loss": curves.numpy()})


def corruptions(
    context: EvaluationContext, *, images: int | None = 2000, seed: int = 0, extra: bool = False
) -> Findings:
    """Scores the student on corrupted test images, the official ones if `data.root` has them.

    Args:
        context: The run.
        images: Test images, evenly spread, for each of 15 corruptions × 5 severities; None for all.
        seed: Seed of regenerated images.
        extra: Whether the four extra corruptions are scored, too; no mean includes them.

    Returns:
        `corruption_source` (`official` or `regenerated`), `corruption_images`, `corruption_left_out` (main
        corruptions that could not be made); `corruption_clean_accuracy`, `corruption_clean_nll` and
        `corruption_clean_ece` of the same images uncorrupted; `corruption_mce`, `corruption_accuracy` {name: [5]};
        and `corruption_accuracy_by_severity`, `corruption_nll_by_severity`, `corruption_ece_by_severity`: means
        over the main corruptions.

    Raises:
        UserError: If the official folder, or that of the frost photographs, is incomplete or damaged.
    """
    test, batch = context.dataset.test, context.settings.data.eval_batch_size
    sets = CorruptedSets(test, Path(context.settings.data.root), extra=extra, seed=seed)
    index = spread_index(len(test), images)
    student = _for_inference(context)
    with part("uncorrupted", weight=0):
        clean = score_batches(student, _batches(test, index, batch), test.num_classes, context.device)
    found = score_corruptions(student, sets, test, index, batch_size=batch, device=context.device)
    return Findings(
        {
            "corruption_source": sets.source,
            "corruption_images": len(index),
            "corruption_left_out": [name for name in MAIN if name not in sets.names],
            **{f"corruption_clean_{s}": clean[s] for s in ("accuracy", "nll", "ece")},
            "corruption_mce": mean_corruption_error(found),
            "corruption_accuracy": {name: scores["accuracy"] for name, scores in found.items()},
            **{f"corruption_{s}_by_severity": mean_by_severity(found, s) for s in ("accuracy", "nll", "ece")},
        }
    )


def efficiency(context: EvaluationContext, *, min_seconds: float = 1.0) -> Findings:
    """Measures the cost of the deployed form: batch norm folded, channels-last, float32, not compiled.

    Each batch size is measured for at least `min_seconds`.

    Returns:
        `deployed_bytes`; `latency_ms_batch1`, `latency_ms_batch128` (medians) and `latency_iqr_ms_batch1`,
        `latency_iqr_ms_batch128`; `throughput_batch128` in images/s; `memory_bytes_batch128` (see `peak_memory`);
        `efficiency_device`, `efficiency_threads`.
    """
    deployed = FrozenStudent(context.student).to(context.device)
    images = to_unit(context.dataset.test.images[:1].to(context.device))
    one = measure_latency(deployed, images, min_seconds=min_seconds)
    images = images.repeat(128, 1, 1, 1)  # the time does not depend on the pixels
    many = measure_latency(deployed, images, min_seconds=min_seconds)
    return Findings(
        {
            "deployed_bytes": stored_bytes(deployed),
            "latency_ms_batch1": one.median * 1e3,
            "latency_iqr_ms_batch1": one.iqr * 1e3,
            "latency_ms_batch128": many.median * 1e3,
            "latency_iqr_ms_batch128": many.iqr * 1e3,
            "throughput_batch128": len(images) / many.median,
            "memory_bytes_batch128": peak_memory(deployed, images),
            "efficiency_device": device_name(context.device),
            "efficiency_threads": many.threads,
        }
    )


def device_name(device: torch.device) -> str:
    """Returns the model name of the device: of the GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return cpu_name()
    return device.type


def _for_inference(context: EvaluationContext) -> BranchedStudent:
    """Returns a copy of the student in float32 and channels-last."""
    return copy.deepcopy(context.student).eval().float().to(memory_format=torch.channels_last)


def _batches(images: ImageSet, index: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    with part(f"{images.split} images", len(index)) as task:
        for some in index.split(batch_size):
            place = some.to(images.images.device)
            yield images.images[place], images.labels[place]
            task.advance(len(some))


def _training_loss(context: EvaluationContext, most: int) -> DatasetLoss:
    train = context.dataset.train
    chosen = context.subset.train_index[spread_index(len(context.subset.train_index), most)]
    place = chosen.to(train.images.device)
    batch = context.settings.data.eval_batch_size
    return DatasetLoss(_for_inference(context), train.images[place], train.labels[place], batch_size=batch)


PARTS: dict[str, Callable[[EvaluationContext], Findings]] = {
    "predictions": predictions,
    "generalisation": generalisation,
    "flatness": flatness,
    "corruptions": corruptions,
    "efficiency": efficiency,
}
"""All parts, in the order in which they run; none changes the student or the teachers."""
_SECONDS = {"predictions": 8, "generalisation": 9, "flatness": 70, "corruptions": 130, "efficiency": 4}
"""Rough relative times, for the time left: of a ResNet-8 with three branches on CIFAR-10, on two cores."""


class Outcome(NamedTuple):
    """Outcome of an evaluation: the result with all findings, the parts that were run, and the failures.

    Attributes:
        skipped: Parts whose findings were already recorded.
        errors: The error of each part that failed, in one line.
    """

    result: Result
    done: list[str]
    skipped: list[str]
    errors: dict[str, str]


def evaluate_new_run(context: EvaluationContext, directory: RunWriter) -> Result:
    """Runs the parts of `evaluation.parts` after a training; if a part fails, only its findings are lost.

    The context's result has everything but the evaluation. The directory receives arrays.npz; the caller writes the
    returned result.
    """
    outcome = _run_parts(context, directory, context.settings.evaluation.parts, force=True, new=True)
    return outcome.result.having(evaluation_error=BETWEEN.join(outcome.errors.values()) or None)


def evaluate_finished_run(
    context: EvaluationContext, directory: RunWriter, parts: Sequence[str], *, force: bool = False
) -> Outcome:
    """Runs parts for a finished run, and writes result.json and arrays.npz after each.

    Fields and arrays of other parts, and of the run itself, are kept. Parts with recorded findings are run again only
    with `force`.
    """
    return _run_parts(context, directory, parts, force=force, new=False)


def _run_parts(
    context: EvaluationContext, directory: RunWriter, parts: Sequence[str], *, force: bool, new: bool
) -> Outcome:
    result, done, errors = context.result, [], {}
    if result.evaluated is None:
        result = result.having(evaluated=[])
    chosen = [name for name in PARTS if name in parts]
    skipped = [name for name in chosen if name in (result.evaluated or []) and not force]
    to_run = [name for name in chosen if name not in skipped]
    with phase("evaluation", sum(_SECONDS[name] for name in to_run), None):
        for name in to_run:
            start = time.perf_counter()
            try:
                with part(name, 1, None, weight=_SECONDS[name]):
                    findings = PARTS[name](context)
                seconds = time.perf_counter() - start
                with nullcontext() if new else directory.changing():
                    arrays = directory.arrays()
                    if new and not arrays.keys().isdisjoint(findings.arrays):
                        own = sorted(findings.arrays)
                        raise ValueError(f"part {name!r} and another one write the same arrays: {own}")
                    result = merge(result if new else _recorded(context, directory), findings, name, seconds)
                    directory.write_arrays(arrays | dict(findings.arrays))
                    if not new:
                        directory.write_result(result)
            except Exception as error:
                # The training is not lost, and the part can be run later: one warning, and the next part.
                errors[name] = f"{name}: {reason(error).replace(BETWEEN, ', ')}"
                bug = users_line(error) is None
                if bug or new:  # else the caller reports it
                    log.warning("evaluation: %s", errors[name], exc_info=bug)
            else:
                done.append(name)
    return Outcome(result, done, skipped, errors)


def _recorded(context: EvaluationContext, directory: RunWriter) -> Result:
    """Reads the current result of a finished run; refuses that of another run, which has replaced it."""
    result = directory.read_result()
    if (directory.started(), *_identity(result)) != (context.started, *_identity(context.result)):
        raise UserError(f"{directory.path}: holds another run now, so the findings are not recorded")
    return result


def _identity(result: Result) -> tuple[Any, ...]:
    return result.subset_sha256, result.seed, result.steps
