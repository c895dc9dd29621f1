"""Evaluation of a trained student: what its parts are given, how they are run, and how findings get into the record."""

from __future__ import annotations

import importlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch

from ekd_lightning.data import Dataset, Subset
from ekd_lightning.errors import UserError, unknown_name
from ekd_lightning.evaluation.predict import StudentPredictions, predict_student
from ekd_lightning.networks import BranchedStudent, TeacherEnsemble
from ekd_lightning.runs.directory import RunDirectory
from ekd_lightning.runs.lock import DirectoryLock
from ekd_lightning.runs.result import Result
from ekd_lightning.settings import EVALUATION_PARTS, Settings

log = logging.getLogger(__name__)

_PLACES = {
    "predictions": "ekd_lightning.pipeline.predictions",
    "generalisation": "ekd_lightning.pipeline.evaluation_parts",
    "flatness": "ekd_lightning.pipeline.evaluation_parts",
    "corruptions": "ekd_lightning.pipeline.evaluation_parts",
    "efficiency": "ekd_lightning.pipeline.evaluation_parts",
}
_BETWEEN = "; "  # between the errors of two parts


class Findings(NamedTuple):
    """What a part found.

    Attributes:
        fields: Numbers, strings, and lists or mappings of them, for result.json; names are unique over all parts.
        arrays: What plots need and no table shows, for the run's arrays file; names likewise.
    """

    fields: dict[str, Any]
    arrays: Mapping[str, np.ndarray] = MappingProxyType({})


@dataclass
class EvaluationContext:
    """A trained student, the data it was made for, and its teachers.

    Attributes:
        settings: The run's.
        result: What is recorded of the run so far (`num_branches`, `assignment`, ...).
        student: In eval mode, on `device`.
        dataset: Training and test images, all of them.
        subset: Which training images the run saw (`train_index`) and validated on (`val_index`).
        device: Where to compute.
        gather: Loads the run's teachers; None if it had none.
        started: When the run, or its last part, was started, as it was opened; None where that is unknown.
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
        """The run's teachers on `device`, loaded when first asked for; None if it had none."""
        return None if self.gather is None else self.gather().to(self.device)

    @cached_property
    def test_predictions(self) -> StudentPredictions:
        """What the student says of the test images; several parts read it, so it is asked once."""
        batch_size = self.settings.data.eval_batch_size
        return predict_student(self.student, self.dataset.test, batch_size=batch_size, device=self.device)


Part = Callable[[EvaluationContext], Findings]
"""One part of an evaluation. It leaves student and teachers as they were."""


class Outcome(NamedTuple):
    """What came of an evaluation.

    Attributes:
        result: What is recorded of the run now.
        done: Parts that were run.
        skipped: Parts that were there already.
        errors: Parts that failed, each with one line that says why.
    """

    result: Result
    done: list[str]
    skipped: list[str]
    errors: dict[str, str]


def find_part(name: str) -> Part:
    """The function of a part; its module is imported now, as some need much.

    Raises:
        UserError: For an unknown name.
    """
    if name not in _PLACES:
        raise unknown_name("part", name, EVALUATION_PARTS)
    part: Part = getattr(importlib.import_module(_PLACES[name]), name)
    return part


def evaluate_new_run(context: EvaluationContext, directory: RunDirectory) -> Result:
    """Runs the parts of `evaluation.parts` after a training. A part that fails loses its findings, not the run.

    Args:
        context: The trained student; its `result` holds what is known of the run.
        directory: The run's; receives the arrays file.

    Returns:
        The result with what was found; the caller writes it.
    """
    outcome = _run_parts(context, directory, context.settings.evaluation.parts, force=True, write=False)
    return outcome.result


def evaluate_finished_run(
    context: EvaluationContext, directory: RunDirectory, parts: Sequence[str], *, force: bool = False
) -> Outcome:
    """Runs parts for a run that is done, and writes result.json and the arrays file after each.

    What other parts, and the run itself, wrote there is kept.

    Args:
        context: The run's student, data and result.
        directory: The run's directory.
        parts: Their names.
        force: Whether parts that are there already are run again.
    """
    return _run_parts(context, directory, parts, force=force, write=True)


def _run_parts(
    context: EvaluationContext, directory: RunDirectory, parts: Sequence[str], *, force: bool, write: bool
) -> Outcome:
    result, done, skipped, errors = context.result, [], [], {}
    if result.evaluated is None:
        result = result.having(evaluated=[])
    there = result.evaluated or []
    for name in [name for name in EVALUATION_PARTS if name in parts]:
        if name in there and not force:
            skipped.append(name)
            continue
        start = time.perf_counter()
        try:
            findings = find_part(name)(context)
            seconds = time.perf_counter() - start
            if write:
                result = _added(context, directory, findings, name, seconds)
            else:
                result = _kept(directory, findings, name, seconds, result)
        except Exception as error:
            # Training took long, and this can be made up for: one warning, and the next part.
            errors[name] = f"{name}: {_one_line(error)}"
            bug = not isinstance(error, UserError)
            if bug or not write:  # else the caller tells
                log.warning("evaluation: %s", errors[name], exc_info=bug)
            continue
        done.append(name)
    if not write:
        result = result.having(evaluation_error=_BETWEEN.join(errors.values()) or None)
    return Outcome(result, done, skipped, errors)


def _kept(directory: RunDirectory, findings: Findings, part: str, seconds: float, result: Result) -> Result:
    """Adds a part's findings to the arrays of a new run; returns its result with them."""
    arrays = directory.arrays()
    merged = merge(result, findings, part, seconds)
    if not arrays.keys().isdisjoint(findings.arrays):
        raise ValueError(f"part {part!r} and others write the same arrays: {sorted(findings.arrays)}")
    directory.write_arrays(arrays | dict(findings.arrays))
    return merged


def _added(
    context: EvaluationContext, directory: RunDirectory, findings: Findings, part: str, seconds: float
) -> Result:
    """Adds a part's findings to the record and the arrays of a finished run; returns the record.

    Raises:
        UserError: If another run has taken its place, or is about to.
    """
    # Two evaluations may be at work, each with parts of its own, and wait for each other: read again what is there.
    # A run is not waited for: it does not leave what was evaluated.
    with directory.changing(), DirectoryLock(directory.path):
        there = directory.read_result()
        if (directory.started(), *_identity(there)) != (context.started, *_identity(context.result)):
            raise UserError(f"{directory.path}: holds another run than the one that was evaluated")
        merged = merge(there, findings, part, seconds)
        directory.write_arrays(directory.arrays() | dict(findings.arrays))
        directory.write_result(merged)
    return merged


def _identity(result: Result) -> tuple[Any, ...]:
    return result.subset_sha256, result.seed, result.steps


def merge(result: Result, findings: Findings, part: str, seconds: float) -> Result:
    """The result with a part's findings, which replace those that it left there before.

    Args:
        result: Of the run, with the parts that are there.
        findings: Of the part.
        part: Its name.
        seconds: What it took.

    Raises:
        ValueError: If a part that was not there finds something under a name that is taken.
    """
    there = list(result.evaluated or [])
    own = ("evaluated", "evaluation_error", "evaluation_seconds")
    taken = [name for name in findings.fields if name in own or (part not in there and name in result)]
    if taken:
        raise ValueError(f"part {part!r} and others write the same names: {', '.join(taken)}")
    lines = (result.evaluation_error or "").split(_BETWEEN)
    left = [line for line in lines if not line.startswith(f"{part}: ")]
    return result.having(
        **{name: plain(value) for name, value in findings.fields.items()},
        evaluated=[name for name in EVALUATION_PARTS if name in {*there, part}],
        evaluation_seconds={**(result.evaluation_seconds or {}), part: round(seconds, 3)},
        evaluation_error=_BETWEEN.join(left) or None,
    )


def plain(value: Any) -> Any:
    """The value with NumPy's numbers and arrays as Python's, for JSON."""
    if isinstance(value, (np.ndarray, np.generic)):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()).replace(_BETWEEN, ", ")
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"
