"""Result of a run: a flat, typed record of what was run and every final number, as in result.json."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, TypedDict, get_type_hints

from ekd_lightning.roles import is_of
from ekd_lightning.settings import EVALUATION_PARTS

_LATE = {"late": True}
"""Metadata of optional fields, which a record leaves out while they are None."""


class TeacherRecord(TypedDict):
    """Required fields of a teacher's record."""

    sha256: str


class AssistantRecord(TypedDict):
    """Required fields of an assistant's record."""

    teachers_sha256: list[str]


class SubsetScores(TypedDict):
    """Required fields of the scores of a subset of branches."""

    branches: list[int]


class ExitScores(TypedDict):
    """Required fields of an operating point of early exit."""

    threshold: float
    mean_branches: float


_ROWS: dict[str, Any] = {
    "teachers": list[TeacherRecord],
    "chain": list[AssistantRecord],
    "test_branch_accuracy": list[float | None],
    "val_branch_accuracy": list[float | None],
    "test_subsets": list[SubsetScores],
    "test_early_exit": list[ExitScores],
    **dict.fromkeys(
        (f"test_branch_{name}" for name in ("cka", "agreement", "teacher_cka", "teacher_agreement", "teacher_kl")),
        list[list[float | None]],
    ),
}
"""Types of the items of lists in a record."""


class NotAResultError(ValueError):
    """A record without a required field or with one of another type; the message names the field."""


@dataclass(frozen=True, eq=False)
class Result(Mapping[str, Any]):
    """Settings and final numbers of a run.

    It is also a mapping of all recorded fields: parts of the evaluation add their own, and unknown fields of a newer
    version are kept. None stands for a field that does not apply, or that an older version did not record.

    Attributes:
        fraction: Share of the training images, in (0, 1], as requested.
        num_unlabelled_images: Training images without labels, beside the `num_train_images` with labels.
        unlabelled_sha256: Hash of the unlabelled images.
        unlabelled_share: Share of unlabelled images in each batch, in (0, 1).
        unlabelled_from: `rest` for training images that the subset leaves out, `own` for images of their own.
        epoch_over: Whether an epoch was one pass over the `labelled` or over the `unlabelled` images.
        subset_sha256: Hash of the labelled images that the run saw.
        student_sha256: `state_sha256` of student.safetensors.
        views: The augmentation, see `Views.key`.
        macs: Multiply-accumulates of one image through the student.
        partial: Whether the run saw only part of the data, so that its numbers do not count as results.
        teacher_choice: `best`, `first` or `mean` for methods with one teacher.
        pool_teachers: Ids of the teachers to choose from.
        teacher_candidates: Scores by which `best` chose: `id`, `val_accuracy`, `val_nll` of each candidate.
        teachers: A record per teacher: `id`, `sha256`, `source`, `test_accuracy` in [0, 1], `test_nll` in nats, ...
        chain: Such a record per assistant, from the first to the one that taught the student.
        test_accuracy: Accuracy of the ensemble after the last epoch, in [0, 1]; NaN if the test set was not read.
        test_branch_accuracy: Accuracy of each branch [K].
        best_epoch: Epoch with the best validation accuracy, counted from 1; fields `..._best` are of its weights.
        steps: Optimiser steps.
        teacher_table_hit_rate: Share of teacher rows that were found rather than computed.
        evaluated: Parts of the evaluation whose findings are in the record.
        evaluation_error: Why other parts failed, joined by semicolons.
        evaluation_seconds: Seconds that each part took.
        more: All other fields: findings of the evaluation, `weight_<term>`, fields of newer versions.
    """

    method: str
    data: str
    seed: int
    fraction: float
    test_accuracy: float = field(default=math.nan, metadata=_LATE)
    student: str | None = None
    num_teachers: int | None = None
    assistants: list[Any] | None = None
    num_branches: int | None = None
    split_after: str | None = None
    ensemble: str | None = None
    temperature: float | None = None
    assignment: Any = None
    num_train_images: int | None = None
    num_val_images: int | None = None
    num_unlabelled_images: int = 0
    unlabelled_sha256: str | None = None
    unlabelled_share: float | None = None
    unlabelled_from: str | None = None
    epoch_over: str | None = None
    subset_sha256: str | None = None
    subset_seed: int | None = None
    epochs: int | None = None
    batch_size: int | None = None
    views: str | None = None
    mixup: float | None = None
    cutmix: float | None = None
    num_parameters: int | None = None
    num_adapter_parameters: int | None = None
    macs: int | None = None
    tags: list[Any] | None = None
    partial: bool = False
    teacher_choice: str | None = None
    teacher: str | None = None
    pool_teachers: list[Any] | None = None
    teacher_candidates: list[Any] | None = None
    val_accuracy: float | None = field(default=None, metadata=_LATE)
    val_accuracy_best: float | None = field(default=None, metadata=_LATE)
    test_accuracy_best: float | None = field(default=None, metadata=_LATE)
    test_accuracy_last: float | None = field(default=None, metadata=_LATE)
    test_accuracy_ema: float | None = field(default=None, metadata=_LATE)
    test_branch_accuracy: list[Any] | None = field(default=None, metadata=_LATE)
    test_nll: float | None = field(default=None, metadata=_LATE)
    test_ece: float | None = field(default=None, metadata=_LATE)
    best_epoch: int | None = field(default=None, metadata=_LATE)
    train_seconds: float | None = None
    images_per_second: float | None = None
    teacher_table_hit_rate: float | None = None
    epochs_done: int | None = None
    steps: int | None = None
    num_devices: int | None = None
    precision: str | None = None
    teachers: list[Any] | None = field(default=None, metadata=_LATE)
    chain: list[Any] | None = field(default=None, metadata=_LATE)
    student_sha256: str | None = field(default=None, metadata=_LATE)
    evaluated: list[Any] | None = field(default=None, metadata=_LATE)
    evaluation_error: str | None = None
    evaluation_seconds: dict[str, Any] | None = field(default=None, metadata=_LATE)
    more: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Result:
        """Builds a result from a flat record.

        Raises:
            NotAResultError: If a required field is missing, or a field has a value of another type.
        """
        hints = _hints()
        for name in ("method", "data", "seed", "fraction"):
            if not is_of(record.get(name), hints[name]):
                found = record.get(name)
                raise NotAResultError(f"no {name!r}" if found is None else f"{name!r} is {found!r:.60}")
        tested = record.get("test_accuracy")
        checked = ("fraction",) if tested is None and record.get("partial") else ("fraction", "test_accuracy")
        for name in checked:
            value: Any = record.get(name)
            if not (is_of(value, float) and 0 <= value <= 1):
                raise NotAResultError(f"{name!r} is {value!r}, not in [0, 1]")
        known: dict[str, Any] = {}
        more: dict[str, Any] = {}
        for name, value in record.items():
            if value is not None and not is_of(value, _ROWS.get(name, hints.get(name, Any))):
                raise NotAResultError(f"{name!r} is {value!r:.60}")
            if name not in hints:
                more[name] = value
            elif value is not None:
                known[name] = value
        return cls(**known, more=more)

    def having(self, **more: Any) -> Result:
        """Returns the result with further or changed fields, known or not."""
        return Result.of({**self, **more})

    @property
    def lacks_evaluation(self) -> bool:
        """Whether a part of the evaluation is missing.

        Corruptions do not count: images that are not square cannot have them.
        """
        return bool({*EVALUATION_PARTS} - {*(self.evaluated or ())} - {"corruptions"})

    @property
    def chosen_branch(self) -> int | None:
        """The branch to use if only one may be: the first with the highest validation accuracy; None if unknown."""
        scores = self.get("val_branch_accuracy") or []
        if len(scores) < 2 or None in scores:
            return None
        return int(max(range(len(scores)), key=scores.__getitem__))

    @property
    def branch_alone(self) -> Mapping[str, Any] | None:
        """Scores and costs of the chosen branch without the others, an entry of `test_subsets`; None if unknown."""
        return next((one for one in self.get("test_subsets") or [] if one["branches"] == [self.chosen_branch]), None)

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name) if name in _hints() else self.more[name]

    def __iter__(self) -> Iterator[str]:
        for one in fields(self)[:-1]:
            value = getattr(self, one.name)
            untested = one.name == "test_accuracy" and math.isnan(value)
            if not (untested or (one.metadata and value is None)):
                yield one.name
        yield from self.more

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return name in set(self)


@cache
def _hints() -> dict[str, Any]:
    return {name: hint for name, hint in get_type_hints(Result).items() if name != "more"}
