"""Part `predictions` of the evaluation: findings from one pass over test and validation images.

Shape letters: N test images, C classes, K branches, M teachers.
"""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from ekd_lightning.evaluation.calibration import fit_temperature, reliability, score_probabilities
from ekd_lightning.evaluation.diversity import (
    agreement_matrix,
    cka_matrix,
    diversity,
    kl_matrix,
    own_teachers,
    teacher_margin,
)
from ekd_lightning.evaluation.predict import Predictions, StudentPredictions, predict_student
from ekd_lightning.evaluation.scores import class_accuracy
from ekd_lightning.evaluation.subsets import costs_by_size, early_exit, score_subsets
from ekd_lightning.methods import TermContext, make_assignment, uses_assignment
from ekd_lightning.methods.assignment import last_kind
from ekd_lightning.networks import StagedNetwork
from ekd_lightning.networks.cutting import UNKNOWN_LOGIT
from ekd_lightning.networks.weights import answers_sha256
from ekd_lightning.pipeline.context import EvaluationContext, Findings
from ekd_lightning.pipeline.prepare import validation_images
from ekd_lightning.settings import Settings
from ekd_lightning.teachers.store import TeacherStore

NOMINAL = ("one_to_one", "permuted")
"""Assignments whose margins every branched student with teachers gets, besides those of its own assignment."""


def predictions(context: EvaluationContext) -> Findings:
    """Runs the student once on all test and validation images, in float32, and its teachers on the test images.

    docs/evaluation.md defines the fields. Fields that do not apply (one branch, no teachers, no validation images) are
    None, so that a repeated evaluation replaces all of them.
    """
    test = context.dataset.test
    outputs = context.test_predictions
    temperature = None
    if len(context.subset.val_index):
        held_out = validation_images(context.dataset, context.subset)
        batch_size = context.settings.data.eval_batch_size
        held_out_outputs = predict_student(context.student, held_out, batch_size=batch_size, device=context.device)
        temperature = fit_temperature(held_out_outputs.logits, held_out.labels)
    scores, diagrams = _calibration(outputs.logits, test.labels, temperature)
    fields = {
        **_accuracy(outputs, test.labels),
        **scores,
        **_operating_points(context, outputs),
        **_diversity(outputs, test.labels),
        **_fidelity(context, outputs, _teachers(context)),
    }
    arrays = {
        "confusion": multiclass_confusion_matrix(outputs.logits, test.labels, num_classes=test.num_classes).numpy(),
        "ensemble_probs": outputs.logits.double().softmax(-1).numpy().astype(np.float16),
        "labels": test.labels.numpy(),
        "branch_predictions": outputs.branch_logits.argmax(-1).numpy(),
    }
    fields["test_class_accuracy"] = class_accuracy(arrays["confusion"])
    return Findings(fields, arrays | diagrams)


def _accuracy(outputs: StudentPredictions, labels: Tensor) -> dict[str, Any]:
    accuracy = float((outputs.logits.argmax(-1) == labels).double().mean())
    branches = (outputs.branch_logits.argmax(-1) == labels).double().mean(-1)
    mean, best = float(branches.mean()), float(branches.max())
    return {
        "test_mean_branch_accuracy": mean,
        "test_best_branch_accuracy": best,
        "test_gain_over_mean_branch": accuracy - mean,
        "test_gain_over_best_branch": accuracy - best,
    }


def _calibration(
    logits: Tensor, labels: Tensor, temperature: float | None
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    before = score_probabilities(logits, labels)
    scaled = logits.double() / (temperature or 1.0)
    after = None if temperature is None else score_probabilities(scaled, labels)
    fields = {
        "test_adaptive_ece": before.adaptive_ece,
        "test_overconfidence": before.overconfidence,
        "calibration_temperature": temperature,
        "test_nll_calibrated": after and after.nll,
        "test_ece_calibrated": after and after.ece,
        "test_adaptive_ece_calibrated": after and after.adaptive_ece,
        "test_brier_calibrated": after and after.brier,
    }
    arrays = {}
    for suffix, shown in (("", logits.double()), ("_calibrated", scaled)):
        diagram = reliability(shown.softmax(-1), labels)
        known = not suffix or after is not None
        arrays[f"reliability_confidence{suffix}"] = diagram.confidence if known else diagram.confidence * np.nan
        arrays[f"reliability_accuracy{suffix}"] = diagram.accuracy if known else diagram.accuracy * np.nan
        arrays[f"reliability_count{suffix}"] = diagram.count if known else diagram.count * 0
    return fields, arrays


def _operating_points(context: EvaluationContext, outputs: StudentPredictions) -> dict[str, Any]:
    student, dataset = context.student, context.dataset
    costs = costs_by_size(student, dataset.image_size)
    how = (dataset.test.labels, costs, student.ensemble, outputs.gate_weights)
    return {
        "test_subsets": [row._asdict() for row in score_subsets(outputs.branch_logits, *how)],
        "test_early_exit": [row._asdict() for row in early_exit(outputs.branch_logits, *how)],
    }


def _diversity(outputs: StudentPredictions, labels: Tensor) -> dict[str, Any]:
    found = diversity(outputs.branch_logits, labels)._asdict()
    branches = outputs.branch_logits.argmax(-1)
    return {
        "test_branch_variance": found.pop("variance"),
        **{f"test_{name}": value for name, value in found.items()},
        "test_branch_agreement": agreement_matrix(branches, branches).tolist(),
        "test_branch_cka": cka_matrix(list(outputs.pooled), list(outputs.pooled)).tolist(),
    }


def _fidelity(context: EvaluationContext, outputs: StudentPredictions, teachers: list[Predictions]) -> dict[str, Any]:
    margins = [f"test_{kind}_{of}_margin" for kind in ("own_teacher", *NOMINAL) for of in ("cka", "agreement")]
    names = ["test_branch_teacher_cka", "test_branch_teacher_agreement", "test_branch_teacher_kl"]
    names += ["test_teacher_agreement", "test_teacher_kl", "test_teacher_ensemble_accuracy", *margins]
    if not teachers:
        return dict.fromkeys(names)
    cka = cka_matrix(list(outputs.pooled), [one.pooled for one in teachers])
    if any((one.logits <= UNKNOWN_LOGIT / 2).all() for one in teachers):  # a teacher of features alone
        return {**dict.fromkeys(names), "test_branch_teacher_cka": cka.tolist()}
    logits = torch.stack([one.logits for one in teachers])  # [M, N, C]
    together = logits.mean(0)
    agreement = agreement_matrix(outputs.branch_logits.argmax(-1), logits.argmax(-1))
    fields: dict[str, Any] = {
        "test_branch_teacher_cka": cka.tolist(),
        "test_branch_teacher_agreement": agreement.tolist(),
        "test_branch_teacher_kl": kl_matrix(outputs.branch_logits, logits).tolist(),
        "test_teacher_agreement": float((outputs.logits.argmax(-1) == together.argmax(-1)).double().mean()),
        "test_teacher_kl": float(kl_matrix(outputs.logits[None], together[None])[0, 0]),
        "test_teacher_ensemble_accuracy": float((together.argmax(-1) == context.dataset.test.labels).double().mean()),
    }
    K, M = cka.shape
    student = TermContext.of(context.student, image_size=context.dataset.image_size)
    own_teachers_K = final_teachers(context.settings, student, M)
    assignments = {"own_teacher": own_teachers_K, **{k: assigned_teachers(k, K, M) for k in NOMINAL}}
    for kind, own in assignments.items():
        fields[f"test_{kind}_cka_margin"] = teacher_margin(cka, own)
        fields[f"test_{kind}_agreement_margin"] = teacher_margin(agreement, own)
    return fields


def final_teachers(settings: Settings, student: TermContext, num_teachers: int) -> list[int | None]:
    """Returns each branch's own teacher at the end of training; None for mean or random, or without branch terms."""
    kind, num_branches = settings.method.assignment, student.num_branches
    if not uses_assignment(settings.method.terms, student) or kind == "random":
        return [None] * num_branches
    if kind is None:
        kind = "mean" if settings.method.teacher == "mean" else "one_to_one"
    return assigned_teachers(last_kind(kind), num_branches, num_teachers)


def assigned_teachers(kind: Any, num_branches: int, num_teachers: int) -> list[int | None]:
    """Returns each branch's own teacher under an assignment; None if it has none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the run has reported idle teachers
        return own_teachers(make_assignment(kind, num_branches, num_teachers))


def _teachers(context: EvaluationContext) -> list[Predictions]:
    """Returns the outputs of the run's teachers for the test images; the store keeps them for all runs."""

    def network(m: int) -> StagedNetwork:
        if context.teachers is None:
            raise ValueError("result.json names teachers, but provenance.json none that could be loaded")
        return context.teachers.members[m]

    store = TeacherStore(Path(context.settings.teachers.store))
    batch_size = context.settings.data.eval_batch_size
    return [
        store.test_outputs(
            partial(network, m),
            answers_sha256(entry["sha256"], entry.get("network", "")),  # not recorded before version 0.2
            context.dataset.test,
            batch_size,
            context.device,
        )
        for m, entry in enumerate(context.result.teachers or [])
    ]
