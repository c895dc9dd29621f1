"""Context of an evaluation: a trained student with its data and teachers, opened from a finished run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch

from ekd_lightning.data import Dataset, Subset, Unlabelled
from ekd_lightning.errors import UserError
from ekd_lightning.evaluation.predict import StudentPredictions, predict_student
from ekd_lightning.networks import (
    BranchedStudent,
    StagedNetwork,
    TeacherEnsemble,
    TeacherIdentity,
    load_network,
    load_student,
    state_sha256,
)
from ekd_lightning.networks.weights import read_metadata
from ekd_lightning.pipeline.prepare import prepare_data
from ekd_lightning.runs.directory import RunDirectory
from ekd_lightning.runs.result import Result
from ekd_lightning.settings import EVALUATION_PARTS, Settings
from ekd_lightning.teachers.store import TeacherStore
from ekd_lightning.training.pool import TeacherData, plan_teachers

BETWEEN = "; "  # between the errors of two parts
_ROUNDING = 0.005  # difference of accuracies that may come from different precisions
_OWN = ("id", "sha256", "source", "network")


class Findings(NamedTuple):
    """Findings of a part.

    Attributes:
        fields: Numbers, strings, and lists or mappings of them, for result.json; names are unique over all parts.
        arrays: Arrays for plots, for arrays.npz; names are likewise unique.
    """

    fields: dict[str, Any]
    arrays: Mapping[str, np.ndarray] = MappingProxyType({})


def merge(result: Result, findings: Findings, part: str, seconds: float) -> Result:
    """Returns the result with the findings of a part, which replace its earlier ones, and the seconds that it took.

    Raises:
        ValueError: If a new part has a field of a name that is taken.
    """
    recorded = list(result.evaluated or [])
    own = ("evaluated", "evaluation_error", "evaluation_seconds")
    taken = [name for name in findings.fields if name in own or (part not in recorded and name in result)]
    if taken:
        raise ValueError(f"part {part!r} and another one write the same fields: {', '.join(taken)}")
    lines = (result.evaluation_error or "").split(BETWEEN)
    left = [line for line in lines if not line.startswith(f"{part}: ")]
    return result.having(
        **{name: plain(value) for name, value in findings.fields.items()},
        evaluated=[name for name in EVALUATION_PARTS if name in {*recorded, part}],
        evaluation_seconds={**(result.evaluation_seconds or {}), part: round(seconds, 3)},
        evaluation_error=BETWEEN.join(left) or None,
    )


def plain(value: Any) -> Any:
    """Returns the value with Python's numbers and lists in place of NumPy's, for JSON."""
    if isinstance(value, (np.ndarray, np.generic)):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


@dataclass
class EvaluationContext:
    """A trained student, its data, and its teachers.

    Attributes:
        result: Result of the run so far (`num_branches`, `assignment`, ...).
        student: The student, in eval mode, on `device`.
        device: Device of all computations.
        gather: Loads the run's teachers; None if it had none.
        started: When the opened run, or its last part, was started; None if unknown.
    """

    settings: Settings
    result: Result
    student: BranchedStudent
    dataset: Dataset
    subset: Subset
    device: torch.device
    gather: Callable[[], TeacherEnsemble] | None = field(default=None, repr=False)
    started: datetime | None = None

    @cached_property
    def teachers(self) -> TeacherEnsemble | None:
        """The run's teachers on `device`, loaded on first use; None if it had none."""
        return None if self.gather is None else self.gather().to(self.device)

    @cached_property
    def test_predictions(self) -> StudentPredictions:
        """The student's outputs for the test images, computed once for all parts."""
        batch_size = self.settings.data.eval_batch_size
        return predict_student(self.student, self.dataset.test, batch_size=batch_size, device=self.device)


def load_own_student(run: RunDirectory) -> BranchedStudent:
    """Loads a run's student with the weights after the last epoch.

    Raises:
        UserError: If the file is missing or damaged, or belongs to another run.
    """
    student = load_student(run.student)
    run.require_own(run.student, read_metadata(run.student).get("run"))
    return student


def open_context(
    run: RunDirectory,
    settings: Settings,
    device: torch.device,
    other: BranchedStudent | None = None,
    weights: str = "last",
) -> EvaluationContext:
    """Opens a finished run for an evaluation.

    Args:
        run: The run.
        settings: Settings of the run, with the current paths of data and teachers.
        device: Device of all computations.
        other: The student with other weights, which is moved to `device`; None for those after the last epoch.
        weights: Name of these weights, `best` or `ema`.

    Raises:
        UserError: If the run is not done, one of its files is damaged, the data are missing, or data or student are not
            those of the run.
    """
    started = run.started()  # read first, to detect a run that replaces it meanwhile
    result, record = run.finished_result(), run.provenance()
    student = load_own_student(run) if other is None else other
    dataset, subset, views = prepare_data(settings)
    refuse_other_images(run, settings, dataset)
    if result.subset_sha256 not in (None, subset.sha256):
        raise UserError(f"{run.path}: with these settings the subset is not that of the run (its SHA-256 differs)")
    data = TeacherData(dataset, subset, views, settings.teachers.train_on)
    entries = record.get("teachers") or []
    gather = (lambda: recorded_teachers(settings, entries, data)) if entries else None
    student = student.eval().to(device)
    context = EvaluationContext(settings, result, student, dataset, subset, device, gather, started)
    if other is not None and weights == "best":
        _require_recorded(context, run.best_checkpoint, result.test_accuracy_best)
    elif other is not None:
        _require_recorded(context, run.last_checkpoint, result.test_accuracy_ema)
    elif result.student_sha256 is None:  # not recorded before version 0.2
        _require_recorded(context, run.student, result.test_accuracy)
    elif result.student_sha256 != state_sha256(student):
        raise UserError(f"{run.student}: not the student of this run, its SHA-256 is not the recorded one")
    return context


def refuse_other_images(
    run: RunDirectory, settings: Settings, dataset: Dataset, unlabelled: Unlabelled | None = None
) -> None:
    """Refuses images at the paths of the settings whose hashes are not those that a run has recorded so far."""
    recorded = run.provenance().get("data") or {}
    without = recorded.get("unlabelled") or {}
    for kind, key, found, known in (
        ("train", "root", dataset.train.sha256, recorded.get("train_sha256")),
        ("test", "root", dataset.test.sha256, recorded.get("test_sha256")),
        ("unlabelled", "unlabelled", unlabelled and unlabelled.sha256, without.get("sha256")),
    ):
        if None not in (found, known) and found != known:
            place = getattr(settings.data, key)
            raise UserError(f"data.{key}={place}: its {kind} images are not those of the run {run.path}")


def refuse_other_teachers(run: RunDirectory, teachers: Iterable[tuple[str, str | None]]) -> None:
    """Refuses teachers whose weights, wherever their files are, are not those on a run's record so far.

    `teachers` are the id of each of the run's teachers, and the SHA-256 of its weights if they are known.
    """
    recorded = run.provenance().get("teachers") or []
    for known, (own_id, sha256) in zip(recorded, teachers, strict=False):
        if None not in (sha256, known.get("sha256")) and sha256 != known["sha256"]:
            raise UserError(
                f"{own_id}: its weights are not those of the run's teacher {known.get('id')} ({run.path}); to train "
                "anew with other teachers, leave out resume="
            )


def _require_recorded(context: EvaluationContext, path: Path, recorded: float | None) -> None:
    """Refuses a student whose test accuracy differs from the recorded one by more than rounding explains."""
    if recorded is None or context.result.partial:
        return
    labels = context.dataset.test.labels
    logits = context.test_predictions.logits
    found = float((logits.argmax(-1) == labels).double().mean()) if logits.isfinite().all() else math.nan
    if not abs(found - recorded) <= _ROUNDING + 2 / len(labels):
        raise UserError(
            f"{path}: not the student of this run, or damaged: its test accuracy is {100 * found:.2f} %, the "
            f"recorded one {100 * recorded:.2f} %"
        )


def recorded_teachers(settings: Settings, entries: Iterable[Mapping[str, Any]], data: TeacherData) -> TeacherEnsemble:
    """Loads the teachers that a run's provenance names (`entries`) from their current paths; trains none.

    Raises:
        UserError: If a teacher is missing, or has other weights than the run's.
    """
    networks, identities = [], []
    for entry in entries:
        network = _load(settings, entry, data)
        if state_sha256(network) != entry["sha256"]:
            raise UserError(f"teacher {entry['id']!r} is not the one that taught this run: its SHA-256 differs")
        detail = {name: value for name, value in entry.items() if name not in _OWN}
        networks.append(network)
        identities.append(TeacherIdentity(**{name: entry[name] for name in _OWN}, detail=detail))
    return TeacherEnsemble(networks, identities)


def _load(settings: Settings, entry: Mapping[str, Any], data: TeacherData) -> StagedNetwork:
    if "store_key" in entry:
        weights = TeacherStore(Path(settings.teachers.store)).weights(entry["store_key"])
        if not weights.is_file():
            raise UserError(
                f"teachers.store={settings.teachers.store}: lacks the teacher {entry['id']!r} of the run; name the "
                "store that the run used"
            )
        return load_network(weights)
    found: list[StagedNetwork] = []  # several entries may share id and source
    for plan in plan_teachers(settings.teachers, data, "cpu"):
        if (plan.id, plan.source) == (entry["id"], entry["source"]):
            network, detail = plan.obtain()
            if detail.get("file_sha256") == entry.get("file_sha256"):
                found.append(network)
    if not found:
        raise UserError(f"teachers.pool: lacks the teacher {entry['id']!r} of the run, or its file has changed")
    return next((one for one in found if state_sha256(one) == entry["sha256"]), found[0])
