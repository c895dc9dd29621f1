"""What a term is: one weighted loss of a method, found by name.

Shape letters: B batch, C classes (in stage shapes: channels), M teachers, K branches, D features.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ekd_lightning.data.batch import Batch
from ekd_lightning.errors import UserError, unknown_name
from ekd_lightning.methods.assignment import Assignment
from ekd_lightning.methods.options import number
from ekd_lightning.methods.schedule import CONSTANT
from ekd_lightning.networks.outputs import NetworkOutput, StudentOutput, TeacherOutput

StageShape = tuple[int, int, int]


class LiveNetworks(Protocol):
    """The networks themselves, for the few terms that ask about more than the batch's images.

    Teachers answer in float32, whatever the format of the tables.
    """

    def ask_student(self, images: Tensor) -> StudentOutput:
        """The student's outputs for images [N, 3, H, W] in [0, 1], in its present mode, with gradients."""
        ...

    def ask_teacher(self, m: int, images: Tensor) -> NetworkOutput:
        """Teacher m's outputs (0-based), with gradients towards the images but never towards its weights."""
        ...

    def teacher_head(self, m: int) -> nn.Linear:
        """The frozen classifier [D_m -> C] of teacher m."""
        ...

    def teacher_statistics(self, m: int) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation [1, 3, 1, 1] of teacher m's normalisation."""
        ...


@dataclass(frozen=True)
class StepContext:
    """All that a term may look at in one step.

    Attributes:
        student: The student's outputs, with gradients.
        teachers: The teachers' outputs, without; None when no term of the method needs them.
        batch: The batch.
        assignment_KM: float32 [K, M], the assignment of this step; None when no term uses it.
        epoch: Counted from 0.
        step: Optimiser steps so far, counted from 0.
        progress: Share of the whole training that is done, in [0, 1].
        networks: The networks, for terms with `needs_networks`; else possibly None.
        weights: Term name -> float32 scalar on the device, weight times schedule, in place of `Term.weight_at`; None
            where numbers of the host will do.
        step_t: `step` as an int64 scalar on the device; None as for `weights`.
    """

    student: StudentOutput
    teachers: TeacherOutput | None
    batch: Batch
    assignment_KM: Tensor | None = None  # noqa: N815  # shape letters
    epoch: int = 0
    step: int = 0
    progress: float = 0.0
    networks: LiveNetworks | None = None
    weights: Mapping[str, Tensor] | None = None
    step_t: Tensor | None = None

    def step_tensor(self) -> Tensor:
        """Returns the step as an int64 scalar on the device of the batch, `step_t` where it was given."""
        if self.step_t is not None:
            return self.step_t
        return torch.full((), self.step, dtype=torch.int64, device=self.batch.index.device)


@dataclass(frozen=True)
class TermContext:
    """What a term must know about the networks to be built.

    Attributes:
        num_classes: C.
        num_branches: K.
        num_teachers: M, 0 when there are none.
        temperature: The method's T > 0; terms may override it by an option.
        assignment: Whose output each branch imitates; None when no term uses it.
        student_features: D of a branch's pooled features.
        teacher_features: D_m of every teacher's pooled features, M numbers.
        student_stage_shapes: Stage name -> (channels, height, width) of a branch, in order from input to
            output.
        teacher_stage_shapes: The same for each of the M teachers.
        student_name: For error messages.
        teacher_names: For error messages, M names or none.
        seed: Of the run, for terms that draw something.
        train_index: int64 [n], positions in the whole image set of the images trained on, ascending; None where
            nobody knows.
        train_labels: int64 [n], their labels.
    """

    num_classes: int
    num_branches: int
    num_teachers: int
    temperature: float = 4.0
    assignment: Assignment | None = None
    student_features: int = 0
    teacher_features: tuple[int, ...] = ()
    student_stage_shapes: Mapping[str, StageShape] = field(default_factory=dict)
    teacher_stage_shapes: tuple[Mapping[str, StageShape], ...] = ()
    student_name: str = "student"
    teacher_names: tuple[str, ...] = ()
    seed: int = 0
    train_index: Tensor | None = None
    train_labels: Tensor | None = None

    def teacher_label(self, teacher: int) -> str:
        """How messages call teacher m (0-based)."""
        return repr(self.teacher_names[teacher]) if self.teacher_names else f"number {teacher}"

    def student_stage(self, name: str) -> str:
        """Resolves a stage of the student; see `teacher_stage`."""
        return _resolve_stage(name, self.student_stage_shapes, f"the student {self.student_name!r}")

    def teacher_stage(self, teacher: int, name: str) -> str:
        """Resolves a stage of one teacher.

        Args:
            teacher: m, 0 .. M-1.
            name: A stage name, or `last` for the network's last stage.

        Returns:
            The stage's own name.

        Raises:
            UserError: If the network has no such stage; names stage, network and what there is.
        """
        return _resolve_stage(
            name, self.teacher_stage_shapes[teacher], f"the teacher {self.teacher_label(teacher)}"
        )


def _resolve_stage(name: str, shapes: Mapping[str, StageShape], network: str) -> str:
    if name == "last" and shapes:
        return list(shapes)[-1]
    if name not in shapes:
        raise UserError(f"{network} has no stage {name!r} (available: {', '.join(shapes) or 'none'})")
    return name


class Term(nn.Module):
    """One loss of a method. Subclass it, name it with `@register_term`, return a scalar from `forward`.

    A subclass's `__init__` takes (weight, context) and then keyword-only options; the options are what a user
    may write beside `weight` in the method's configuration. Modules it keeps (1×1 regressors and the like)
    reach the optimiser, the device and the checkpoint by themselves. The value that `forward` returns is
    unweighted.

    Attributes:
        weight: Factor of this term in the total, >= 0.
        schedule: Factor of the weight as a function of the training's progress; from the term's `schedule` in the
            configuration.
        needs_teachers: Whether `context.teachers` must be there.
        needs_pooled: Whether it reads the teachers' pooled features.
        needs_networks: Whether `context.networks` must be there.
        uses_assignment: Whether the assignment has an effect on this term.
        uses_temperature: Whether the method's temperature has an effect on this term.
        captures: Whether `forward` may be recorded once as a CUDA graph and replayed in later steps: it reads nothing
            back from the device, its shapes depend on no values, it draws from `context.step_tensor()` alone (not from
            a generator), and `context.epoch`, `step` and `progress` do not decide what it computes. A replay would
            repeat the numbers of the step that was recorded.
        teacher_stages: Names of the stage outputs that the teachers must return for this term.
        student_stages: Names of the student's stage outputs that this term reads.
    """

    needs_teachers: bool = False
    needs_pooled: bool = False
    needs_networks: bool = False
    uses_assignment: bool = False
    uses_temperature: bool = False
    captures: bool = True
    teacher_stages: tuple[str, ...] = ()
    student_stages: tuple[str, ...] = ()

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = number("weight", weight, low=0.0)
        self.schedule = CONSTANT

    def weight_at(self, progress: float) -> float:
        """Returns the factor in the total at a share of the training: `weight` times what the schedule says.

        Args:
            progress: In [0, 1].

        Returns:
            The factor, >= 0; where it is 0 the term is not computed.
        """
        return self.weight * self.schedule(progress)

    def forward(self, context: StepContext) -> Tensor:
        """Returns the unweighted value of the loss for one step.

        Args:
            context: Outputs of the student and the teachers, the batch and the time.

        Returns:
            Scalar with a gradient towards the student and this term's own parameters.
        """
        raise NotImplementedError


TermClass = TypeVar("TermClass", bound=type[Term])

_REGISTRY: dict[str, type[Term]] = {}


def register_term(name: str) -> Callable[[TermClass], TermClass]:
    """Makes a term available under a name.

    Args:
        name: What the user writes in the configuration.

    Returns:
        The decorator.

    Raises:
        ValueError: If another class has the name already (when the decorator is applied). The same class
            defined anew, as in a notebook cell that is run twice, replaces the old one.
    """

    def decorate(term: TermClass) -> TermClass:
        old = _REGISTRY.get(name)
        if old is not None and _origin(old) != _origin(term):
            raise ValueError(f"term {name!r} is registered twice: by {_origin(old)} and by {_origin(term)}")
        _REGISTRY[name] = term
        return term

    return decorate


def _origin(term: type[Term]) -> str:
    return f"{term.__module__}.{term.__qualname__}"


def term_names() -> tuple[str, ...]:
    """Returns the names of all registered terms, sorted."""
    return tuple(sorted(_REGISTRY))


def term_class(name: str) -> type[Term]:
    """Finds a term.

    Args:
        name: Its registered name.

    Returns:
        The class.

    Raises:
        UserError: If there is none; offers the nearest name.
    """
    if name not in _REGISTRY:
        raise unknown_name("term", name, _REGISTRY)
    return _REGISTRY[name]


def check_option_names(name: str, options: Mapping[str, Any]) -> None:
    """Checks that a term has all the options that were given, without building it.

    Args:
        name: The term's registered name.
        options: Option name -> value; the values are not looked at.

    Raises:
        UserError: If the term or one of the options does not exist, or a required one is missing.
    """
    parameters = inspect.signature(term_class(name)).parameters.values()
    known = {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}
    for option in options:
        if option not in known:
            raise unknown_name(f"option of term {name!r}:", option, known)
    missing = [n for n, p in known.items() if p.default is p.empty and n not in options]
    if missing:
        raise UserError(f"term {name!r} needs the option {missing[0]!r}")


def build_term(name: str, weight: float, context: TermContext, /, **options: Any) -> Term:
    """Builds a term by name.

    Args:
        name: Its registered name.
        weight: Finite, >= 0.
        context: The networks' sizes.
        **options: The term's own options.

    Returns:
        The term.

    Raises:
        UserError: For an unknown name or option, a value that is not allowed, a stage that a network lacks,
            or a term that needs teachers when there are none.
    """
    cls = term_class(name)
    check_option_names(name, options)
    if cls.needs_teachers and context.num_teachers < 1:
        raise UserError(
            f"term {name!r} needs teachers, but there are none; add teachers or set its weight to 0"
        )
    return cls(weight, context, **options)  # type: ignore[call-arg]  # subclasses take the context
