"""Metadata of exported students: classes, data, method, metrics, hashes, versions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from ekd_lightning import __version__
from ekd_lightning.evaluation.efficiency import count_macs, count_parameters
from ekd_lightning.evaluation.scores import class_accuracy, score_logits
from ekd_lightning.networks import BranchedStudent, state_sha256
from ekd_lightning.networks.staged import sides
from ekd_lightning.pipeline.context import EvaluationContext
from ekd_lightning.runs.writer import version_of

_PACKAGES = ("torch", "safetensors", "onnx", "onnxscript", "onnxruntime")
_OF_A_TEACHER = ("id", "network", "sha256", "source", "trained_on", "test_accuracy", "num_parameters")


def measure(logits: Tensor, labels: Tensor) -> dict[str, Any]:
    """Computes scores on the test set from logits, float32 [N, C], and labels, int64 [N].

    Returns:
        `images`, `accuracy`, `nll`, `ece`, `brier`, `top5` (from 20 classes on), and `class_accuracy` (None
        for a class without images). Numbers that are not finite are None.
    """
    confusion = multiclass_confusion_matrix(logits, labels, num_classes=logits.shape[1]).cpu().numpy()
    scores = {name: value if math.isfinite(value) else None for name, value in score_logits(logits, labels).items()}
    return {"images": len(labels), **scores, "class_accuracy": class_accuracy(confusion)}


def describe_export(
    context: EvaluationContext,
    provenance: Mapping[str, Any],
    student: BranchedStudent,
    branches: Sequence[int],
    weights: str,
    metrics: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns the metadata that files of every format hold, JSON-able.

    `student` is the exported student, after cutting or folding branches, `metrics` its scores from `measure`, and
    `branches` are those of the run's student that it keeps.
    """
    data = context.dataset
    return {
        "library": {"name": "ekd-lightning", "version": __version__},
        "task": "image-classification",
        "class_names": list(data.class_names),
        "image_size": data.image_size,
        "input": {
            "name": "images",
            "type": "float32",
            "shape": ["batch", 3, *sides(data.image_size)],
            "range": [0, 1],
            "channels": "RGB",
            "normalization": {**student.spec.to_dict()["normalization"], "inside": True},
        },
        "data": {
            "name": data.name,
            "fraction": context.result.fraction,
            "num_train_images": len(context.subset.train_index),
            "num_val_images": len(context.subset.val_index),
            "subset_sha256": context.subset.sha256,
            "train_sha256": data.train.sha256,
            "test_sha256": data.test.sha256,
        },
        "student": {
            "branches": list(branches),
            "of_branches": context.student.num_branches,
            "one_head": student.num_branches < len(branches),
            "weights": weights,
            "sha256": state_sha256(student),
            "num_parameters": count_parameters(student),
            "macs": count_macs(student, data.image_size),
        },
        "method": _method(context, provenance),
        "recipe": asdict(context.settings.recipe),
        "seed": context.settings.seed,
        "test_metrics": dict(metrics),
        "run": _run(provenance),
        "versions": {name: version_of(name) for name in _PACKAGES},
    }


def _method(context: EvaluationContext, provenance: Mapping[str, Any]) -> dict[str, Any]:
    method, result = context.settings.method, context.result
    scored = {teacher.get("id"): teacher for teacher in result.teachers or []}
    teachers = []
    for entry in provenance.get("teachers") or []:
        known = {**entry, **scored.get(entry.get("id"), {})}
        teachers.append({key: known[key] for key in _OF_A_TEACHER if key in known})
    return {
        "name": method.name,
        "temperature": method.temperature,
        "assignment": result.assignment,
        "terms": {name: term["weight"] for name, term in method.terms.items()},
        "teachers": teachers,
    }


def _run(provenance: Mapping[str, Any]) -> dict[str, Any]:
    hardware = provenance.get("hardware") or {}
    return {
        "commit": (provenance.get("git") or {}).get("commit"),
        "started": provenance.get("started"),
        "python": provenance.get("python"),
        "packages": provenance.get("packages") or {},
        "hardware": {key: hardware.get(key) for key in ("cpu", "cpu_count", "threads", "gpus")},
    }
