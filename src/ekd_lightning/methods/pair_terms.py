"""Pair terms, which compare a branch with a teacher: base classes, and feature losses in the style of FitNets.

Shape letters: B batch, M teachers, K branches, D features; in maps [B, C, H, W] the C is channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from ekd_lightning.errors import UserError
from ekd_lightning.methods import losses
from ekd_lightning.methods.assignment import build_assignment
from ekd_lightning.methods.context import StepContext, TermContext
from ekd_lightning.methods.losses.weights import CONFIDENCES
from ekd_lightning.methods.options import choice, count
from ekd_lightning.methods.terms import BranchTerm, Term, register_term
from ekd_lightning.networks.staged import LAST, averaged, on_grid, own_stage

POOLED = "pooled"
ADAPTERS = ("auto", "identity", "project", "conv_reg", "regressor")
REGRESSORS = ("conv_reg", "regressor")


class PairTerm(BranchTerm):
    """mean_k Σ_m A[k, m] · compare(branch k, teacher m), over all pairs that the assignment uses in some step.

    With one teacher and a plain student it is the single-teacher loss of the literature; with the assignment `mean`,
    the loss of a plain student is the mean over all teachers.
    """

    needs_labels = False
    needs_teachers = True
    uses_assignment = True

    def __init__(self, weight: float, context: TermContext, **options: Any) -> None:
        super().__init__(weight, context, **options)
        assert context.assignment is not None
        self.num_branches = context.num_branches
        self.pairs = tuple(context.assignment.pairs())

    def forward(self, context: StepContext) -> Tensor:
        """Returns the mean or sum over the branches of `compare` with their teachers."""
        # All pairs, even pairs of weight 0 in this step (random assignment): DDP needs a gradient for every
        # parameter, and selecting pairs by value would synchronise with the device.
        values = torch.stack([self.compare(context, k, m) for k, m in self.pairs])
        return self.factor * (self.pair_weights(context).to(values) * values).sum() / self.num_branches

    def pair_weights(self, context: StepContext) -> Tensor:
        """Returns A[k, m] of each pair."""
        assert context.assignment_KM is not None
        return torch.stack([context.assignment_KM[k, m] for k, m in self.pairs])

    def compare(self, context: StepContext, k: int, m: int) -> Tensor:
        """Returns the loss of branch k against teacher m, a scalar without a gradient to the teacher's outputs."""
        raise NotImplementedError


class FeatureSite:
    """A feature that a term compares in the student and in the teachers of all its pairs (branch, teacher).

    It is the pooled features, or the maps of a stage, averaged to a grid unless that is None.

    Attributes:
        name: `pooled`, `last`, or a stage's name.
        is_pooled: Whether features are vectors [B, D]; otherwise maps [B, C, H, W].
        student_shape: Shape of a branch's features, (D,) or (channels, height, width).
        teacher_shapes: Shape of the features of every teacher in `pairs`, by its number m.
        student_stages: The term's `student_stages`.
        teacher_stages: The term's `teacher_stages`; with a grid, the names of averaged maps.

    Raises:
        UserError: If a network has no such stage, or its maps are coarser than the grid.
    """

    def __init__(
        self, name: str, context: TermContext, pairs: Sequence[tuple[int, int]], grid: int | None = None
    ) -> None:
        self.name, self.is_pooled, self._context = name, name == POOLED, context
        self._grid = None if grid is None else count("grid", grid)
        self.student_stages: tuple[str, ...] = ()
        self.teacher_stages: tuple[str, ...] = ()
        teachers = sorted({m for _, m in pairs})
        if self.is_pooled:
            if self._grid is not None:
                raise UserError(f"grid={grid} is for maps, not for feature=pooled: choose a stage or `last`")
            self.student_shape: tuple[int, ...] = (context.student_features,)
            self.teacher_shapes: dict[int, tuple[int, ...]] = {m: (context.teacher_width(m),) for m in teachers}
            return
        self._student = context.student_stage(name)
        # All teachers are asked for one name, also those that teach no branch. Where the names of their last stages
        # differ, it is `last`.
        stages = [context.teacher_stage(m, name) for m in range(len(context.teacher_stage_shapes))]
        last = {own_stage(LAST, shapes) for shapes in context.teacher_stage_shapes if shapes}
        self._teacher = on_grid(name if name != LAST or len(last) > 1 else last.pop(), self._grid)
        self.student_stages = (self._student,)
        self.teacher_stages = (self._teacher,)
        own = context.student_stage_shapes[self._student]
        self.student_shape = self._shape(own, f"the student {context.student_name!r}")
        shapes = {m: context.teacher_stage_shapes[m][stages[m]] for m in teachers}
        label = context.teacher_label
        self.teacher_shapes = {m: self._shape(shape, f"the teacher {label(m)}") for m, shape in shapes.items()}

    def _shape(self, shape: tuple[int, int, int], network: str) -> tuple[int, ...]:
        if self._grid is None:
            return shape
        if self._grid > min(shape[1:]):
            size = f"{shape[1]}×{shape[2]}"
            raise UserError(
                f"grid={self._grid} is finer than the maps of {network}, {size} (feature {self.name!r}); "
                f"give a grid of at most {min(shape[1:])}"
            )
        return (shape[0], self._grid, self._grid)

    def require_equal_channels(self, reason: str) -> None:
        """Refuses a student and teachers of unequal channel counts, for losses that cannot adapt them.

        The message is `reason`, the requirement and the remedy, and the shapes of the first teacher that differs.
        """
        for m, shape in self.teacher_shapes.items():
            if self.student_shape[0] != shape[0]:
                raise UserError(
                    f"{reason}: the student {self._context.student_name!r} has shape {list(self.student_shape)},"
                    f" the teacher {self._context.teacher_label(m)} {list(shape)} (feature {self.name!r})"
                )

    def features(self, context: StepContext, k: int, m: int) -> tuple[Tensor, Tensor]:
        """Returns the features of branch k (with gradients) and of teacher m (detached)."""
        assert context.teachers is not None
        if self.is_pooled:
            return context.student.pooled[k], context.teachers.pooled[m].detach()
        maps = averaged(context.student.stages[k][self._student], self._grid)
        return maps, context.teachers.stages[m][self._teacher].detach()


class FeatureTerm(PairTerm):
    """A pair term on one or several features, whose losses are added.

    Args:
        places: The features, each `pooled`, `last` or a stage's name.
        grid: Side of a small grid, >= 1, that the maps of student and teachers are averaged to (`average_pool`)
            before they are compared; None for whole maps. Teacher tables always keep such averages: for each stage,
            teacher, image and view channels × grid² × 2 bytes and a checksum of 4 bytes.

    Raises:
        UserError: For a stage that a network lacks, a grid finer than the maps, or a grid with pooled features.
    """

    reads_logits = False

    def __init__(
        self, weight: float, context: TermContext, places: Sequence[str], *, grid: int | None = None, **options: Any
    ) -> None:
        super().__init__(weight, context, **options)
        self.sites = [FeatureSite(name, context, self.pairs, grid) for name in places]
        read_sites(self, *self.sites)

    def compare(self, context: StepContext, k: int, m: int) -> Tensor:
        """Returns the sum over the features."""
        values = [self.compare_at(i, k, m, *site.features(context, k, m)) for i, site in enumerate(self.sites)]
        return torch.stack(values).sum(0)

    def compare_at(self, place: int, k: int, m: int, student: Tensor, teacher: Tensor) -> Tensor:
        """Returns the loss of branch k against teacher m at the feature `places[place]`, a scalar.

        Features are vectors [B, D] and [B, D_m] or maps [B, C, H, W] and [B, C_m, H_m, W_m], the teacher's detached.
        """
        raise NotImplementedError


def different_stages(stages: object, least: int = 1) -> list[str]:
    """Returns the option `stages` of a term that compares maps: a list of at least `least` different stage names.

    Any other value, and the name `pooled`, is a `UserError`.
    """
    names = list(stages) if isinstance(stages, (list, tuple)) else []
    wrong = len(names) < least or len(set(map(str, names))) < len(names) or POOLED in names
    if wrong or not all(isinstance(name, str) for name in names):
        raise UserError(f"stages={stages!r} is not allowed; give a list of {least} or more different stage names")
    return names


def read_sites(term: Term, *sites: FeatureSite) -> None:
    """Sets which features and stages a term reads, from its sites."""
    term.needs_pooled = any(site.is_pooled for site in sites)
    term.student_stages = tuple(name for site in sites for name in site.student_stages)
    term.teacher_stages = tuple(dict.fromkeys(name for site in sites for name in site.teacher_stages))


def pair_key(k: int, m: int) -> str:
    """Returns the name of branch k's and teacher m's adapter in a ModuleDict."""
    return f"branch{k}_teacher{m}"


def adapted(adapter: nn.Module, features: Tensor) -> Tensor:
    """Applies an adapter; outside autocast, features are first converted to the dtype of its weights."""
    weight = next(adapter.parameters(), None)
    if weight is not None and not torch.is_autocast_enabled(features.device.type):
        features = features.to(weight.dtype)
    return cast(Tensor, adapter(features))


def errors_of_images(student: Tensor, teacher: Tensor) -> Tensor:
    """Returns the mean squared error of each image's features, [B], without a gradient to the teacher's."""
    difference = losses.at_least_float32(student) - losses.at_least_float32(teacher).detach()
    return difference.square().flatten(1).mean(1)


def make_adapter(kind: str, student: tuple[int, ...], teacher: tuple[int, ...]) -> nn.Module:
    """Builds an adapter of one of the kinds `ADAPTERS` from the student's shape to the teacher's.

    Shapes are (D,) or (C, H, W). `project` is a `Projection`; `auto` is the identity if D or C agree, else `project`.

    Raises:
        UserError: As `ConvRegressor`.
    """
    if kind in REGRESSORS:
        return ConvRegressor(student, teacher, norm=kind == "conv_reg")
    if kind == "identity" or (kind == "auto" and student[0] == teacher[0]):
        return nn.Identity()
    return Projection(student, teacher)


class Projection(nn.Sequential):
    """A linear map, for maps a 1×1 convolution, without bias, then batch norm: [B, D, ...] -> [B, D_m, ...].

    Shapes are (D,) or (D, H, W).
    """

    def __init__(self, student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
        D, D_m = student[0], teacher[0]
        if len(student) == 1:
            super().__init__(nn.Linear(D, D_m, bias=False), nn.BatchNorm1d(D_m))
        else:
            super().__init__(nn.Conv2d(D, D_m, kernel_size=1, bias=False), nn.BatchNorm2d(D_m))

    def forward(self, input: Tensor) -> Tensor:  # the name is nn.Sequential's
        """Maps [B, D, ...] to [B, D_m, ...]."""
        projected, norm = self[0](input), cast("nn.BatchNorm1d | nn.BatchNorm2d", self[1])
        if self.training and projected.numel() == projected.shape[1]:
            # A single vector has no batch statistics, but must not stop the training as its last batch.
            return functional.batch_norm(projected, norm.running_mean, norm.running_var, norm.weight, norm.bias)
        return norm(projected)


class ConvRegressor(nn.Sequential):
    """The regressor of FitNets: one convolution from the student's shape to the teacher's, then ReLU.

    It has two published forms. Romero et al. (2015, section 2.2) use no padding, a kernel of 1 + H - H_m, so that the
    sizes match, and the teacher's non-linearity. RepDistiller's ConvReg adds batch norm; if one size is twice the
    other, it uses 3×3 with stride 2, or a transposed 4×4. At equal sizes both forms are 1×1.

    Args:
        student: (C, H, W).
        teacher: (C_m, H_m, W_m).
        norm: False for Romero's form, True for RepDistiller's.

    Raises:
        UserError: If the student's maps are smaller than the teacher's (in RepDistiller's form, unless half as large).
    """

    def __init__(self, student: tuple[int, ...], teacher: tuple[int, ...], norm: bool) -> None:
        (C, *size), (C_m, *size_m) = student, teacher
        bias = not norm  # batch norm would cancel it
        conv: nn.Module
        if norm and size == [2 * length for length in size_m]:
            conv = nn.Conv2d(C, C_m, kernel_size=3, stride=2, padding=1, bias=bias)
        elif norm and size_m == [2 * length for length in size]:
            conv = nn.ConvTranspose2d(C, C_m, kernel_size=4, stride=2, padding=1, bias=bias)
        elif size[0] >= size_m[0] and size[1] >= size_m[1]:
            kernel = (1 + size[0] - size_m[0], 1 + size[1] - size_m[1])
            conv = nn.Conv2d(C, C_m, kernel, bias=bias)
        else:
            raise UserError(
                f"no regressor from the student's shape {list(student)} to the teacher's {list(teacher)}: use another "
                "feature, or adapter=project, which averages the larger maps"
            )
        super().__init__(conv, *([nn.BatchNorm2d(C_m)] if norm else []), nn.ReLU())


@register_term("feature_branch")
class FeatureBranch(FeatureTerm):
    """mean_k Σ_m A[k, m] · 1/B Σ_b w_mb MSE(r_km(h_kb), h_mb): features of a branch approach its teachers' features.

    r_km is the identity or a trained projection, which is not part of the student and is dropped after training. MSE
    is the mean over all elements, so its magnitude hardly depends on the resolution; pooled features vary less than
    maps and need a larger weight. It is the last term of the project's reconstruction of EKD (see `losses`); which
    features the paper compares could not be verified.

    Maps of unequal height or width are first averaged (`average_pool`) to the smaller of the two, so only channel
    counts must agree. The regressors of FitNets map the sizes themselves instead.

    Pairs (branch, teacher) of weight 0 have no r_km. A method may have one such term per stage, each with its own
    weight and schedule. At a stage of the trunk, which all branches share, `teachers=all` is mean_m MSE(r_m(h), h_m),
    with one adapter for each teacher.

    Args:
        feature: `pooled` (the head's input), `last` (each network's own last stage) or a stage name.
        adapter: `identity`; `project` (1×1 convolution or linear map without bias, then batch norm); `auto` (identity
            if the channel counts agree, else project); or, for maps, a regressor of FitNets: `conv_reg` (RepDistiller:
            convolution, batch norm, ReLU) or `regressor` (Romero et al.: convolution, ReLU), see `ConvRegressor`.
        teachers: `assigned` (the teachers of the assignment), `all` (the mean over all teachers), or `auto` (all at a
            stage of the trunk, the assigned ones at a branch's own stages and for pooled features).
        confidence: Weighting of teacher m for image b; None for w = 1. Otherwise w = M v, where the v_mb of an image
            sum to 1 over all M teachers: `label` (CA-MKD; larger for a smaller cross-entropy with the label, so only
            labelled images count) or `entropy` (EBKD; larger for a smaller entropy). See `losses.confidence_weights`
            and `losses.entropy_weights`.
        reduction: `mean` or `sum` over the K branches; over the teachers at a stage of the trunk that all teach.

    Raises:
        UserError: For a stage that a network lacks, `identity` between unequal channel counts, or a regressor
            for pooled features or from smaller maps to larger ones.
    """

    def __init__(
        self,
        weight: float,
        context: TermContext,
        *,
        feature: str = "pooled",
        adapter: str = "auto",
        teachers: str = "assigned",
        confidence: str | None = None,
        **options: Any,
    ) -> None:
        shared = _is_shared(feature, context)
        by_all = choice("teachers", teachers, ("assigned", "all", "auto")) == "all" or (teachers == "auto" and shared)
        K, M = 1 if shared else context.num_branches, context.num_teachers
        if by_all:
            context = replace(context, num_branches=K, assignment=build_assignment("mean", K, M))
        super().__init__(weight, context, [feature], **options)
        self.uses_assignment = not by_all
        if by_all and shared and options.get("reduction") == "sum":
            self.factor = float(M)
        self.confidence = None if confidence is None else choice("confidence", confidence, CONFIDENCES)
        self.num_teachers = M
        self.needs_labels, self.reads_logits = self.confidence == "label", self.confidence is not None
        (site,) = self.sites
        self.sizes_by_adapter = choice("adapter", adapter, ADAPTERS) in REGRESSORS
        if self.sizes_by_adapter and site.is_pooled:
            raise UserError(f"adapter={adapter} is for maps, not for feature=pooled: choose a stage or `last`")
        if adapter == "identity":
            site.require_equal_channels("adapter=identity needs equal channel counts (use auto or project)")
        self.adapters = nn.ModuleDict(
            {pair_key(k, m): make_adapter(adapter, site.student_shape, site.teacher_shapes[m]) for k, m in self.pairs}
        )

    @classmethod
    def needs_labels_with(cls, options: Mapping[str, Any]) -> bool:
        """See `Term`."""
        return options.get("confidence") == "label"

    @classmethod
    def uses_assignment_with(cls, options: Mapping[str, Any], context: TermContext) -> bool:
        """See `Term`."""
        teachers, feature = options.get("teachers"), options.get("feature", POOLED)
        return teachers != "all" and not (teachers == "auto" and _is_shared(feature, context))

    def pair_weights(self, context: StepContext) -> Tensor:
        """Returns A[k, m] of each pair, [P]; with `confidence`, A[k, m] w_mb / B, [P, B]."""
        assert context.teachers is not None
        logits_MBC, P = context.teachers.logits.detach(), len(self.pairs)
        shares_P = (
            super().pair_weights(context) if self.uses_assignment else logits_MBC.new_full((P,), 1 / self.num_teachers)
        )
        if self.confidence is None:
            return shares_P
        weights_MB = losses.image_weights(self.confidence, logits_MBC, context.batch.targets)
        weights_PB = torch.stack([weights_MB[m] for _, m in self.pairs])
        return shares_P[:, None] * self.num_teachers * weights_PB / weights_PB.shape[1]

    def compare_at(self, place: int, k: int, m: int, student: Tensor, teacher: Tensor) -> Tensor:
        """Returns the mean squared error of the adapted features, a scalar; with `confidence`, one per image, [B]."""
        if student.ndim == 4 and not self.sizes_by_adapter:
            student, teacher = losses.to_common_size(student, teacher)
        loss = losses.mse if self.confidence is None else errors_of_images
        return loss(adapted(self.adapters[pair_key(k, m)], student), teacher)


def _is_shared(feature: str, context: TermContext) -> bool:
    """Whether a feature is that of a stage of the student's trunk."""
    return feature != POOLED and context.student_stage(feature) in context.shared_stages
