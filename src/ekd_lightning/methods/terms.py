"""Terms, the weighted losses of a method: base classes and registry.

Shape letters: B batch, K branches.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from ekd_lightning.errors import Registry, UserError
from ekd_lightning.methods.context import StepContext, TermContext
from ekd_lightning.methods.options import CONSTANT, choice, number, temperature_of
from ekd_lightning.roles import check_keywords, parameters_of


class Term(nn.Module):
    """Base class of the losses of a method. A subclass registers its name with `@register_term`.

    A subclass's `__init__` takes (weight, context) and then keyword-only options: the keys that a user may write beside
    `weight` in the method's configuration (with `**options` also the options of its base classes). Its submodules
    (1×1 regressors and the like) are trained, moved and saved with the method. `forward` returns the unweighted loss,
    a scalar.

    Attributes:
        weight: Factor of this term in the total, >= 0.
        schedule: Factor of the weight as a function of the training's progress; from the term's `schedule` in the
            configuration.
        needs_labels: Whether it reads the labels of the batch. If so, it receives only the labelled rows; if not, it
            receives all rows and must not read their labels.
        needs_teachers: Whether it reads `context.teachers`.
        needs_pooled: Whether it reads the teachers' pooled features.
        needs_networks: Whether it reads `context.networks`.
        uses_assignment: Whether the assignment has an effect on this term.
        uses_temperature: Whether the method's temperature has an effect on this term.
        captures: Whether `forward` may be recorded once as a CUDA graph and replayed in later steps. It then must read
            nothing back from the device, have shapes that depend on no values, derive random numbers from
            `context.step_tensor()` instead of a generator, and not depend on `context.epoch`, `step` and `progress`,
            whose values in a replay would be those of the recorded step.
        reads_logits: Whether it reads its teachers' logits or applies their classifiers; ignored without
            `needs_teachers`.
        accepts_masked: Whether the loss is defined for a teacher that does not know all classes (logits of -inf).
        averages_logits: Whether it takes the mean of several teachers' logits: of the teachers assigned to a branch if
            it uses the assignment, else of all teachers.
        least_branches: The smallest number of branches that the student may have.
        knows_images: Whether it reads `TermContext.train_index` and `train_labels`.
        teacher_stages: Names of the stage outputs that the teachers must return for this term.
        student_stages: Names of the student's stage outputs that this term reads.
    """

    needs_labels: bool = True
    needs_teachers: bool = False
    needs_pooled: bool = False
    needs_networks: bool = False
    uses_assignment: bool = False
    uses_temperature: bool = False
    captures: bool = True
    reads_logits: bool = True
    accepts_masked: bool = True
    averages_logits: bool = False
    least_branches: int = 1
    knows_images: bool = False
    teacher_stages: tuple[str, ...] = ()
    student_stages: tuple[str, ...] = ()

    def __init__(self, weight: float, context: TermContext | None = None) -> None:
        super().__init__()
        self.weight = number("weight", weight, low=0.0)
        self.schedule = CONSTANT

    @classmethod
    def needs_labels_with(cls, options: Mapping[str, Any]) -> bool:
        """Whether a term with these options will have `needs_labels`; callable before the term is built."""
        return cls.needs_labels

    @classmethod
    def uses_assignment_with(cls, options: Mapping[str, Any], context: TermContext) -> bool:
        """Whether a term with these options will have `uses_assignment`; callable before the term is built."""
        return cls.uses_assignment

    @property
    def has_constant_weight(self) -> bool:
        """Whether the weight is the same during the whole training."""
        return self.schedule is CONSTANT and type(self).weight_at is Term.weight_at

    def weight_at(self, progress: float) -> float:
        """Returns the weight, >= 0, at a share of the training in [0, 1]; the term is not computed while it is 0."""
        return self.weight * self.schedule(progress)

    def forward(self, context: StepContext) -> Tensor:
        """Returns the unweighted loss of one step, a scalar with gradients to the student and the term's parameters."""
        raise NotImplementedError


class SoftTerm(Term):
    """A term with a temperature: its own, or the method's.

    Args:
        temperature: T, in [0.001, 1000]; None for the method's.

    Raises:
        UserError: For a temperature out of range.
    """

    def __init__(
        self, weight: float, context: TermContext, *, temperature: float | None = None, **options: Any
    ) -> None:
        super().__init__(weight, context, **options)
        self.uses_temperature = temperature is None
        chosen = context.temperature if temperature is None else temperature
        self.temperature = temperature_of("temperature", chosen)


class BranchTerm(Term):
    """A term whose losses of the branches are averaged or summed.

    Args:
        reduction: `mean` or `sum` over the K branches.

    Attributes:
        factor: Multiplier of the mean over the branches: 1 for `mean`, K for `sum`.
    """

    def __init__(self, weight: float, context: TermContext, *, reduction: str = "mean", **options: Any) -> None:
        super().__init__(weight, context, **options)
        self.factor = float(context.num_branches) if choice("reduction", reduction, ("mean", "sum")) == "sum" else 1.0


TermClass = TypeVar("TermClass", bound=type[Term])

TERMS: Registry[type[Term]] = Registry("term")


def register_term(name: str) -> Callable[[TermClass], TermClass]:
    """Returns a decorator that registers a term under the name that users write; see `errors.Registry.register`."""
    return TERMS.register(name)


def options_of(name: str) -> dict[str, inspect.Parameter]:
    """Returns a term's options: its keyword-only parameters and, if it takes `**options`, those of its base classes.

    An unknown term is a `UserError`.
    """
    known: dict[str, inspect.Parameter] = {}
    for cls in TERMS[name].__mro__:
        if "__init__" not in vars(cls):
            continue
        parameters = parameters_of(vars(cls)["__init__"]).values()
        known |= {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in known}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return known


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
        UserError: For an unknown name or option, a value that is not allowed, a stage that a network lacks, missing
            teachers, or too few branches.
    """
    cls = TERMS[name]
    check_keywords(f"term {name!r}", options, options_of(name))
    if cls.needs_teachers and context.num_teachers < 1:
        raise UserError(f"term {name!r} needs teachers, but the run has none; add teachers or set its weight to 0")
    if context.num_branches < cls.least_branches:
        raise UserError(
            f"student.branches={context.num_branches} is not allowed with the term {name!r}; "
            f"give at least {cls.least_branches} branches"
        )
    return cls(weight, context, **options)
