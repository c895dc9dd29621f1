"""The flat record of a finished run, as result.json holds it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ekd_lightning.errors import unknown_name
from ekd_lightning.evaluation.efficiency import count_macs, count_parameters
from ekd_lightning.networks import TeacherEnsemble
from ekd_lightning.pipeline.prepare import Prepared
from ekd_lightning.settings import Settings

RETURNABLE = (
    "test_accuracy",
    "test_accuracy_best",
    "test_accuracy_last",
    "test_nll",
    "test_ece",
    "test_brier",
    "val_accuracy",
    "val_accuracy_best",
    "num_parameters",
    "macs",
    "train_seconds",
    "images_per_second",
)
"""Fields of a result that a sweeper may optimise."""


def check_metric(name: str) -> None:
    """Refuses a metric that results do not have, offering the nearest.

    Raises:
        UserError: For an unknown name.
    """
    if name not in RETURNABLE:
        raise unknown_name("metric", name, RETURNABLE)


def describe_run(settings: Settings, prepared: Prepared) -> dict[str, Any]:
    """What was run: everything that is known before training."""
    student = prepared.student
    return {
        "method": settings.method.name,
        "data": prepared.dataset.name,
        "student": settings.student.network,
        "num_teachers": len(prepared.teachers),
        "assistants": [a.spec.name for a in prepared.chain.assistants] if prepared.chain else [],
        "num_branches": student.num_branches,
        "split_after": settings.student.split_after if student.num_branches > 1 else None,
        "ensemble": settings.student.ensemble,
        "temperature": settings.method.temperature,
        "assignment": settings.method.assignment if prepared.teachers else None,
        "fraction": prepared.subset.fraction,
        "num_train_images": len(prepared.subset.train_index),
        "num_val_images": len(prepared.subset.val_index),
        "subset_sha256": prepared.subset.sha256,
        "subset_seed": settings.data.subset_seed,
        "seed": settings.seed,
        "epochs": settings.recipe.epochs,
        "batch_size": settings.recipe.batch_size,
        "views": prepared.views.key,
        "mixup": settings.recipe.mixup,
        "cutmix": settings.recipe.cutmix,
        "num_parameters": count_parameters(student),
        "num_adapter_parameters": count_parameters(prepared.method),
        "macs": count_macs(student, prepared.dataset.image_size),
        "tags": list(settings.tags),
        "partial": _is_partial(settings.trainer),
        **{f"weight_{name}": term["weight"] for name, term in settings.method.terms.items()},
    }


def describe_teacher(settings: Settings, prepared: Prepared) -> dict[str, Any]:
    """Whom a method that knows one teacher was given, and why; once that is known."""
    pool = prepared.chain.origins if prepared.chain else prepared.teachers
    one = settings.method.teacher in ("best", "first") and len(pool) == 1
    return {
        "teacher_choice": settings.method.teacher if prepared.teachers else None,
        "teacher": pool[0].id if one else None,
        "pool_teachers": [plan.id for plan in pool],
        "teacher_candidates": prepared.candidate_scores,
        "num_adapter_parameters": count_parameters(prepared.method),
    }


def origin(prepared: Prepared, teachers: TeacherEnsemble | None) -> dict[str, Any]:
    """Hashes of data and teachers, for the provenance."""
    identities = [] if teachers is None else teachers.identities
    return {
        "data": {
            "name": prepared.dataset.name,
            "source": prepared.dataset.source,
            "train_sha256": prepared.dataset.train.sha256,
            "test_sha256": prepared.dataset.test.sha256,
            "subset_sha256": prepared.subset.sha256,
        },
        "teachers": [
            {"id": t.id, "sha256": t.sha256, "source": t.source, "network": t.network, **t.detail}
            for t in identities
        ],
    }


def _is_partial(flags: Mapping[str, Any]) -> bool:
    """Whether Lightning was told to look at a part of the data only; such results are no results."""
    limits = [flags.get(f"limit_{part}_batches") for part in ("train", "val", "test")]
    # To Lightning 1.0 is all of the data, and 1 is one batch.
    limited = any(limit is not None and (limit != 1.0 or isinstance(limit, int)) for limit in limits)
    return bool(flags.get("fast_dev_run") or flags.get("overfit_batches")) or limited


def named_scores(prefix: str, metrics: Mapping[str, Any], suffix: str = "") -> dict[str, Any]:
    """Renames Lightning's `test/nll`, `test/branch_accuracy_0`, ... to flat fields.

    Args:
        prefix: "test" or "val".
        metrics: What Lightning returned or logged.
        suffix: Appended to every field, e.g. "_best".

    Returns:
        `test_nll<suffix>`, ..., and `test_branch_accuracy<suffix>` as a list in branch order.
    """
    fields: dict[str, Any] = {}
    branches: dict[int, float] = {}
    start = f"{prefix}/branch_accuracy_"
    for name, value in metrics.items():
        if name.startswith(start):
            branches[int(name[len(start) :])] = float(value)
        elif name.startswith(f"{prefix}/"):
            fields[f"{prefix}_{name[len(prefix) + 1 :]}{suffix}"] = float(value)
    if branches:
        fields[f"{prefix}_branch_accuracy{suffix}"] = [branches[k] for k in sorted(branches)]
    return fields
