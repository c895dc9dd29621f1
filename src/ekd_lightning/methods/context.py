"""Contexts of a term: `TermContext`, its input when it is built, and `StepContext`, its input in each step.

Shape letters: B batch, C classes (in stage shapes: channels), M teachers, K branches, D features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ekd_lightning.data.loader import Batch
from ekd_lightning.errors import UserError
from ekd_lightning.methods.assignment import Assignment
from ekd_lightning.methods.losses import combine_teachers
from ekd_lightning.networks.own import unknown_to
from ekd_lightning.networks.staged import (
    ImageSize,
    NetworkOutput,
    StagedNetwork,
    StudentOutput,
    TeacherOutput,
    own_stage,
)
from ekd_lightning.networks.student import BranchedStudent

StageShape = tuple[int, int, int]
DEFAULT_TEMPERATURE = 4.0


class LiveNetworks(Protocol):
    """Access to the networks, for terms that need outputs for images outside the batch.

    Teacher outputs are float32, whatever the format of the tables.
    """

    def student_outputs(self, images: Tensor) -> StudentOutput:
        """Outputs of the student for images [N, 3, H, W] in [0, 1], in its present mode, with gradients."""
        ...

    def teacher_outputs(self, m: int, images: Tensor) -> NetworkOutput:
        """Outputs of teacher m (0-based), with gradients to the images but not to its weights."""
        ...

    def classify(self, m: int, features: Tensor) -> Tensor:
        """Logits [B, C] of teacher m's classifier, held fixed, for pooled features [B, D_m] or last maps."""
        ...

    def teacher_statistics(self, m: int) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation [1, 3, 1, 1] of teacher m's normalisation."""
        ...


@dataclass(frozen=True)
class StepContext:
    """Everything that a term reads in one step.

    Attributes:
        student: The student's outputs, with gradients.
        teachers: The teachers' outputs, without gradients; None if no term of the method needs them.
        batch: The batch.
        assignment_KM: float32 [K, M], the assignment of this step; None if no term uses it.
        epoch: Counted from 0.
        step: Optimiser steps so far, counted from 0.
        progress: Completed share of the whole training, in [0, 1].
        networks: The networks, for terms with `needs_networks`; may be None for others.
        step_t: `step` as an int64 scalar on the device; None in steps that are not recorded.
    """

    student: StudentOutput
    teachers: TeacherOutput | None
    batch: Batch
    assignment_KM: Tensor | None = None  # noqa: N815  # shape letters
    epoch: int = 0
    step: int = 0
    progress: float = 0.0
    networks: LiveNetworks | None = None
    step_t: Tensor | None = None

    @property
    def labelled(self) -> StepContext:
        """The same step, restricted to the labelled rows of the batch."""
        rows = self.batch.num_labelled
        if rows is None:  # all have labels
            return self
        return replace(self, batch=self.batch.labelled, **_first_rows(self.student, self.teachers, rows))

    @property
    def teacher_logits(self) -> Tensor:
        """The teachers' logits [M, B, C], for terms with `needs_teachers`."""
        assert self.teachers is not None
        return self.teachers.logits

    @property
    def assigned_logits(self) -> Tensor:
        """The targets of the branches, [K, B, C]: for each, the mean logits of its teachers, weighted as assigned."""
        assert self.assignment_KM is not None
        return combine_teachers(self.teacher_logits, self.assignment_KM)

    def step_tensor(self) -> Tensor:
        """Returns the step as an int64 scalar on the device of the batch: `step_t` if set."""
        if self.step_t is not None:
            return self.step_t
        return torch.full((), self.step, dtype=torch.int64, device=self.batch.index.device)


def _first_rows(student: StudentOutput, teachers: TeacherOutput | None, rows: int) -> dict[str, Any]:
    """Returns the outputs of student and teachers for the first `rows` images, by field of `StepContext`."""

    def maps(stages: Sequence[Mapping[str, Tensor]]) -> tuple[dict[str, Tensor], ...]:
        return tuple({name: values[:rows] for name, values in own.items()} for own in stages)

    student = StudentOutput(
        student.logits[:rows], student.branch_logits[:, :rows], student.pooled[:, :rows], maps(student.stages)
    )
    if teachers is None:
        return {"student": student}
    pooled = tuple(values[:rows] for values in teachers.pooled)
    return {"student": student, "teachers": TeacherOutput(teachers.logits[:, :rows], pooled, maps(teachers.stages))}


@dataclass(frozen=True)
class TermContext:
    """Sizes, names and training images that a term is built from.

    Attributes:
        num_classes: C.
        num_branches: K.
        num_teachers: M, 0 without teachers.
        temperature: The method's T > 0, filled in by `build_method`; terms may override it by an option.
        assignment: Which teachers each branch imitates, filled in by `build_method`; None if no term uses it.
        student_features: D of a branch's pooled features.
        teacher_features: D_m of every teacher's pooled features, M numbers; 0 for a teacher without a linear head.
        student_stage_shapes: Stage name -> (channels, height, width) of a branch, in order from input to
            output.
        shared_stages: Stages of the student's trunk, whose output all branches share.
        teacher_stage_shapes: The same as `student_stage_shapes` for each of the M teachers.
        unknown_classes: The classes that each of the M teachers does not know, see `cutting.unknown_classes`; empty if
            not determined yet.
        student_name: For error messages.
        teacher_names: For error messages, M names or none.
        seed: The run's seed, for terms that draw random numbers.
        train_index: int64 [n], positions of the training images in the whole image set, ascending; None if not given.
        train_labels: int64 [n], labels of the training images; None if not given.
    """

    num_classes: int
    num_branches: int
    num_teachers: int
    temperature: float = DEFAULT_TEMPERATURE
    assignment: Assignment | None = None
    student_features: int = 0
    teacher_features: tuple[int, ...] = ()
    student_stage_shapes: Mapping[str, StageShape] = field(default_factory=dict)
    shared_stages: tuple[str, ...] = ()
    teacher_stage_shapes: tuple[Mapping[str, StageShape], ...] = ()
    unknown_classes: tuple[frozenset[int], ...] = ()
    student_name: str = "student"
    teacher_names: tuple[str, ...] = ()
    seed: int = 0
    train_index: Tensor | None = None
    train_labels: Tensor | None = None

    @classmethod
    def of(
        cls,
        student: BranchedStudent,
        teachers: Sequence[StagedNetwork] = (),
        *,
        image_size: ImageSize = 32,
        **others: Any,
    ) -> TermContext:
        """Builds the context of a student and its teachers, for `build_method`.

        Args:
            student: The branched student.
            teachers: M networks. Their weights matter only for the classes that they do not know.
            image_size: Height and width of the images in pixels, for the shapes of the stages.
            **others: Further attributes: names, seed, training images; `unknown_classes` if the networks do not have
                their weights yet.
        """
        others.setdefault("unknown_classes", tuple(unknown_to(teacher, student.num_classes) for teacher in teachers))
        return cls(
            num_classes=student.num_classes,
            num_branches=student.num_branches,
            num_teachers=len(teachers),
            student_features=student.num_features,
            teacher_features=tuple(teacher.num_features for teacher in teachers),
            student_stage_shapes=student.stage_shapes(image_size),
            shared_stages=tuple(student.trunk.stages),
            teacher_stage_shapes=tuple(teacher.stage_shapes(image_size) for teacher in teachers),
            **others,
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns all attributes except temperature, assignment and training images, as JSON-able values."""
        left_out = ("temperature", "assignment", "train_index", "train_labels")
        plain = {item.name: getattr(self, item.name) for item in fields(self) if item.name not in left_out}
        plain["unknown_classes"] = [sorted(classes) for classes in self.unknown_classes]
        return plain

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], images: Mapping[str, Tensor]) -> TermContext:
        """Rebuilds a context from what `to_dict` returned, or its JSON form.

        `images` are `train_index` and `train_labels`, or nothing.
        """

        def shapes(stages: Mapping[str, Sequence[int]]) -> dict[str, StageShape]:
            return {name: (shape[0], shape[1], shape[2]) for name, shape in stages.items()}

        changed: dict[str, Any] = {
            "student_stage_shapes": shapes(values["student_stage_shapes"]),
            "teacher_stage_shapes": tuple(shapes(one) for one in values["teacher_stage_shapes"]),
            "unknown_classes": tuple(frozenset(classes) for classes in values["unknown_classes"]),
            "teacher_features": tuple(values["teacher_features"]),
            "teacher_names": tuple(values["teacher_names"]),
            "shared_stages": tuple(values.get("shared_stages", ())),  # not written before version 0.2
        }
        return cls(**{**values, **changed, **images})

    def teacher_label(self, teacher: int) -> str:
        """Returns the name of teacher m (0-based) for messages."""
        return repr(self.teacher_names[teacher]) if self.teacher_names else f"number {teacher}"

    def teacher_width(self, teacher: int) -> int:
        """Returns D_m, the size of teacher m's pooled features.

        Raises:
            UserError: If the network does not end with a linear layer, and so has no pooled features.
        """
        if not self.teacher_features[teacher]:
            raise UserError(
                f"the teacher {self.teacher_label(teacher)} does not end with a linear layer, so it has no pooled "
                f"features and no classifier; remove the term or replace the teacher"
            )
        return self.teacher_features[teacher]

    def student_stage(self, name: str) -> str:
        """Returns the own name of a stage of the student; see `teacher_stage`."""
        return _resolve_stage(name, self.student_stage_shapes, f"the student {self.student_name!r}")

    def teacher_stage(self, teacher: int, name: str) -> str:
        """Returns one teacher's own name of a stage; `last` stands for the network's last stage.

        Raises:
            UserError: If the network has no such stage; the message lists its stages.
        """
        return _resolve_stage(name, self.teacher_stage_shapes[teacher], f"the teacher {self.teacher_label(teacher)}")


def _resolve_stage(name: str, shapes: Mapping[str, StageShape], network: str) -> str:
    own = own_stage(name, shapes) if shapes else name
    if not isinstance(name, str) or own not in shapes:  # a list of names is not hashable
        remedy = (
            "choose one of them, or set the weight of the term to 0"
            if shapes
            else "choose a method that compares no maps, e.g. kd_mean or ekd_no_feature"
        )
        raise UserError(f"{network} has no stage {name!r} (available: {', '.join(shapes) or 'none'}); {remedy}")
    return own
