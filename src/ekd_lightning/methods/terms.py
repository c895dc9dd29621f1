"""Terms, the weighted losses of a method: base classes and registry.

Shape letters: B batch, K branches.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from ekd_lightning.errors import Registry, UserError, unknown_name
from ekd_lightning.methods.context import StepContext, TermContext
from ekd_lightning.methods.options import CONSTANT, choice, number, temperature_of


class Term(nn.Module):
    """A loss of a method. Subclasses are named by `@register_term` and return a scalar from `forward`.

    A subclass's `__init__` takes (weight, context) and then keyword-only options; the options are what a user
    may write beside `weight` in the method's configuration (with `**options` those of its base classes, too). Modules
    it keeps (1×1 regressors and the like) reach the optimiser, the device and the checkpoint by themselves. The value
    that `forward` returns is unweighted.

    Attributes:
        weight: Factor of this term in the total, >= 0.
        schedule: Factor of the weight as a function of the training's progress; from the term's `schedule` in the
            configuration.
        needs_labels: Whether it reads `context.batch`'s labels: of a batch with unlabelled images it is then handed the
            labelled rows alone. False if it takes all rows, whose labels it must not look at.
        needs_teachers: Whether `context.teachers` must be there.
        needs_pooled: Whether it reads the teachers' pooled features.
        needs_networks: Whether `context.networks` must be there.
        uses_assignment: Whether the assignment has an effect on this term.
        uses_temperature: Whether the method's temperature has an effect on this term.
        captures: Whether `forward` may be recorded once as a CUDA graph and replayed in later steps: it reads nothing
            back from the device, its shapes depend on no values, it draws from `context.step_tensor()` alone (not from
            a generator), and `context.epoch`, `step` and `progress` do not decide what it computes. A replay would
            repeat the numbers of the step that was recorded.
        reads_logits: Whether it reads its teachers' logits, or asks their classifiers; counts where it needs teachers.
        accepts_masked: Whether the loss can be taken where a teacher masks classes (logits of -inf), or knows not all.
        averages_logits: Whether it takes the mean of several teachers' logits: of those assigned to a branch where it
            uses the assignment, else of all.
        least_branches: The fewest branches that a student may have.
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
        """Whether it will have `needs_labels` with these options; asked before it is built."""
        return cls.needs_labels

    @classmethod
    def uses_assignment_with(cls, options: Mapping[str, Any]) -> bool:
        """Whether it may have `uses_assignment` with these options; asked before it is built."""
        return cls.uses_assignment

    @property
    def has_constant_weight(self) -> bool:
        """Whether the weight is the same during the whole training."""
        return self.schedule is CONSTANT and type(self).weight_at is Term.weight_at

    def weight_at(self, progress: float) -> float:
        """Returns the weight at a share of the training: `weight` times the schedule.

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


class SoftTerm(Term):
    """A term with a temperature: its own or else the method's.

    Args:
        weight: Factor in the total, >= 0.
        context: The networks' sizes, the method's temperature.
        temperature: T > 0; None for the method's.
    """

    def __init__(
        self, weight: float, context: TermContext, *, temperature: float | None = None, **options: Any
    ) -> None:
        super().__init__(weight, context, **options)
        self.uses_temperature = temperature is None
        chosen = context.temperature if temperature is None else temperature
        self.temperature = temperature_of("temperature", chosen)


class BranchTerm(Term):
    """A term whose branch losses are averaged or added.

    Args:
        weight: Factor in the total, >= 0.
        context: The networks' sizes.
        reduction: `mean` or `sum` over the K branches.

    Attributes:
        factor: What a mean over the branches is multiplied with: 1 for `mean`, K for `sum`.
    """

    def __init__(self, weight: float, context: TermContext, *, reduction: str = "mean", **options: Any) -> None:
        super().__init__(weight, context, **options)
        self.factor = float(context.num_branches) if choice("reduction", reduction, ("mean", "sum")) == "sum" else 1.0


TermClass = TypeVar("TermClass", bound=type[Term])

_REGISTRY: Registry[type[Term]] = Registry("term")


def register_term(name: str) -> Callable[[TermClass], TermClass]:
    """Registers a term under a name.

    Args:
        name: What the user writes in the configuration.

    Returns:
        The decorator.

    Raises:
        ValueError: If another class has the name already (when the decorator is applied). The same class
            defined anew, as in a notebook cell that is run twice, replaces the old one.
    """
    return _REGISTRY.register(name)


def term_names() -> tuple[str, ...]:
    """Returns the names of all registered terms, sorted."""
    return tuple(_REGISTRY.names())


def term_class(name: str) -> type[Term]:
    """Finds a term.

    Args:
        name: Its registered name.

    Returns:
        The class.

    Raises:
        UserError: If there is none; offers the nearest name.
    """
    return _REGISTRY[name]


def option_defaults(name: str) -> dict[str, Any]:
    """Returns a term's options: its keyword-only parameters, and where it passes others on, those of its bases as well.

    Args:
        name: The term's registered name.

    Returns:
        Name -> default; `inspect.Parameter.empty` for those that must be given.

    Raises:
        UserError: If there is no such term.
    """
    known: dict[str, Any] = {}
    for cls in term_class(name).__mro__:
        if "__init__" not in vars(cls):
            continue
        parameters = inspect.signature(vars(cls)["__init__"]).parameters.values()
        known |= {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in known}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return known


def check_option_names(name: str, options: Mapping[str, Any]) -> None:
    """Checks that a term has all the options that were given, without building it.

    Args:
        name: The term's registered name.
        options: Option name -> value; the values are not looked at.

    Raises:
        UserError: If the term or one of the options does not exist, or a required one is missing.
    """
    known = option_defaults(name)
    for option in options:
        if option not in known:
            raise unknown_name(f"option of term {name!r}:", option, known)
    missing = [n for n, default in known.items() if default is inspect.Parameter.empty and n not in options]
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
            or a term that needs teachers, or more branches, than there are.
    """
    cls = term_class(name)
    check_option_names(name, options)
    if cls.needs_teachers and context.num_teachers < 1:
        raise UserError(f"term {name!r} needs teachers, but there are none; add teachers or set its weight to 0")
    if context.num_branches < cls.least_branches:
        raise UserError(
            f"student.branches={context.num_branches} is not allowed with this term;"
            f" give at least {cls.least_branches} branches"
        )
    return cls(weight, context, **options)
