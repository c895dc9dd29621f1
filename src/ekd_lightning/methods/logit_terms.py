"""Logit terms: cross-entropy and distillation, of the ensemble output and of the branches.

Four of them belong to the project's reconstruction of EKD,

    L = α [ CE(z̄, y) + λ mean_k CE(z_k, y) ] + β [ T² KL(p_T(t̄) ‖ p_T(z̄)) + mean_k T² KL(p_T(t_a(k)) ‖
    p_T(z_k)) ] + ...

The paper's text was not available; the formula follows its abstract and secondary descriptions. Decoupled (DKD) and
standardised distillation are other forms of the last term shown.
Shape letters: B batch, C classes, M teachers, K branches, T temperature.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ekd_lightning.errors import UserError
from ekd_lightning.methods import losses
from ekd_lightning.methods.context import StepContext, TermContext
from ekd_lightning.methods.losses.weights import CONFIDENCES
from ekd_lightning.methods.options import choice, number
from ekd_lightning.methods.terms import BranchTerm, SoftTerm, Term, register_term


class _CrossEntropy(Term):
    """Base of both cross-entropies, on labelled images alone, with the option `label_smoothing` in [0, 1).

    The targets y of mixed images are their soft labels.
    """

    def __init__(self, weight: float, context: TermContext, *, label_smoothing: float = 0.0, **options: Any) -> None:
        super().__init__(weight, context, **options)
        self.label_smoothing = number("label_smoothing", label_smoothing, low=0.0, below=1.0)


@register_term("ce_ensemble")
class CrossEntropyEnsemble(_CrossEntropy):
    """CE(z̄, y): cross-entropy of the student's coupled prediction."""

    def forward(self, context: StepContext) -> Tensor:
        """Returns the mean over the batch, in nats."""
        return losses.cross_entropy(context.student.logits, context.batch.targets, self.label_smoothing)


@register_term("ce_branch")
class CrossEntropyBranch(BranchTerm, _CrossEntropy):
    """mean_k CE(z_k, y): cross-entropy of every branch on its own."""

    def forward(self, context: StepContext) -> Tensor:
        """Returns the mean over the batch and the mean or sum over the branches, in nats."""
        value = losses.cross_entropy(context.student.branch_logits, context.batch.targets, self.label_smoothing)
        return self.factor * value


@register_term("pseudo_labels")
class PseudoLabels(Term):
    """CE(z̄, argmax_c t̄_c): cross-entropy with the most likely class of the teachers' mean logits as the label.

    All images count, labelled or not; labels are not used.
    """

    needs_labels = False
    needs_teachers = True
    averages_logits = True

    def forward(self, context: StepContext) -> Tensor:
        """Returns the mean over the batch, in nats."""
        return losses.cross_entropy(context.student.logits, context.teacher_logits.float().mean(0).argmax(-1), 0.0)


class _Distillation(SoftTerm):
    """Base of both distillation terms: the loss against a combination of teachers.

    Args:
        combine: What is averaged over several teachers, `logits` or `probabilities`. For sums of logits see
            `losses.combine_teachers`.
        loss: `kl`; `kl_plain`, without the factor T²; or `mse_logits`, the mean squared error of the logits (without
            T and T²). A student whose ensemble averages probabilities returns log-probabilities as logits; use `kl`
            for it.

    Raises:
        UserError: For an unknown value, or `mse_logits` with a temperature or combine=probabilities.
    """

    needs_labels = False
    needs_teachers = True

    def __init__(
        self,
        weight: float,
        context: TermContext,
        *,
        temperature: float | None = None,
        combine: str = "logits",
        loss: str = "kl",
        **options: Any,
    ) -> None:
        super().__init__(weight, context, temperature=temperature, **options)
        self.combine = choice("combine", combine, ("logits", "probabilities"))
        self.loss = choice("loss", loss, ("kl", "kl_plain", "mse_logits"))
        if self.loss == "mse_logits" and (self.combine != "logits" or temperature is not None):
            raise UserError(
                "loss=mse_logits takes no temperature and no combine=probabilities; remove these options or use loss=kl"
            )
        self.accepts_masked = self.loss != "mse_logits"
        self.averages_logits = self.combine == "logits"
        self.uses_temperature = temperature is None and self.accepts_masked

    def _value(self, student_logits: Tensor, context: StepContext, weights: Tensor) -> Tensor:
        assert context.teachers is not None
        target = losses.combine_teachers(context.teachers.logits, weights, self.temperature, self.combine)
        if self.loss == "mse_logits":
            return losses.mse(student_logits, target)
        value = losses.kd_divergence(student_logits, target, self.temperature)
        return value / self.temperature**2 if self.loss == "kl_plain" else value


@register_term("kd_ensemble")
class DistillationEnsemble(_Distillation):
    """T² KL(p_T(t̄) ‖ p_T(z̄)): the student's coupled prediction imitates the mean of all teachers."""

    def forward(self, context: StepContext) -> Tensor:
        """Returns the mean over the batch, in nats (or squared logits)."""
        assert context.teachers is not None
        M = len(context.teachers.logits)
        # Created on the device, to avoid a copy from the host in every step.
        weights_M = torch.full((M,), 1.0 / M, device=context.teachers.logits.device)
        return self._value(context.student.logits, context, weights_M)


@register_term("kd_branch")
class DistillationBranch(BranchTerm, _Distillation):
    """mean_k T² KL(p_T(t_a(k)) ‖ p_T(z_k)): every branch imitates its assigned teachers.

    With `confidence` it is mean_k Σ_m A[k, m] 1/B Σ_b M v_mb T² KL(p_T(t_mb) ‖ p_T(z_kb)): each teacher is compared
    separately, with a weight for every image.

    Args:
        confidence: Weights v_mb, which sum to 1 over all M teachers for each image: `label` (CA-MKD; only labelled
            images count) or `entropy` (EBKD); None for equal weights. See `losses.image_weights`.

    Raises:
        UserError: For `confidence` with combine=probabilities or loss=mse_logits.
    """

    uses_assignment = True

    def __init__(self, weight: float, context: TermContext, *, confidence: str | None = None, **options: Any) -> None:
        super().__init__(weight, context, **options)
        self.confidence = None if confidence is None else choice("confidence", confidence, CONFIDENCES)
        if self.confidence is not None:
            if self.combine != "logits" or self.loss == "mse_logits":
                raise UserError(
                    f"confidence={confidence} needs combine=logits and loss=kl or kl_plain, because it compares a "
                    "branch with each of its teachers separately"
                )
            self.needs_labels, self.averages_logits = self.confidence == "label", False

    @classmethod
    def needs_labels_with(cls, options: Mapping[str, Any]) -> bool:
        """See `Term`."""
        return options.get("confidence") == "label"

    def forward(self, context: StepContext) -> Tensor:
        """Returns the mean over the batch and the mean or sum over branches, in nats (or squared logits)."""
        assert context.assignment_KM is not None
        branches_KBC, A_KM = context.student.branch_logits, context.assignment_KM
        if self.confidence is None:
            return self.factor * self._value(branches_KBC, context, A_KM)
        teachers_MBC = context.teacher_logits
        weights_MB = len(teachers_MBC) * losses.image_weights(self.confidence, teachers_MBC, context.batch.targets)
        losses_KMB = torch.stack([losses.divergences(z_BC, teachers_MBC, self.temperature) for z_BC in branches_KBC])
        value = (A_KM.to(losses_KMB) * (weights_MB * losses_KMB).mean(-1)).sum() / len(branches_KBC)
        return self.factor * (value / self.temperature**2 if self.loss == "kl_plain" else value)


@register_term("dkd")
class DecoupledDistillation(SoftTerm, BranchTerm):
    """mean_k T² (α TCKD + β NCKD): Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022; see `losses.decoupled`.

    The logits of several teachers of one branch are averaged. Only labelled images count; the target of a mixed image
    is the class with the larger share.

    Args:
        alpha: Weight of the target class's part, >= 0.
        beta: Weight of the other classes' part, >= 0.
    """

    needs_teachers = True
    uses_assignment = True
    averages_logits = True

    def __init__(
        self, weight: float, context: TermContext, *, alpha: float = 1.0, beta: float = 8.0, **options: Any
    ) -> None:
        super().__init__(weight, context, **options)
        self.alpha, self.beta = number("alpha", alpha, low=0.0), number("beta", beta, low=0.0)

    def forward(self, context: StepContext) -> Tensor:
        """Returns the mean over the batch and the mean or sum over the branches, in nats."""
        branches, labels = context.student.branch_logits, context.batch.hard_labels
        tckd, nckd = losses.decoupled(branches, context.assigned_logits, labels, self.temperature)
        return self.factor * (self.alpha * tckd + self.beta * nckd)


@register_term("kd_standardized")
class StandardizedDistillation(SoftTerm, BranchTerm):
    """mean_k T² KL(p_T(s(t)) ‖ p_T(s(z_k))) with standardised logits s(z); see `losses.standardized`."""

    needs_labels = False
    needs_teachers = True
    uses_assignment = True
    averages_logits = True
    accepts_masked = False  # it takes the mean over the classes, which -inf would make infinite

    def forward(self, context: StepContext) -> Tensor:
        """Returns the mean over the batch and the mean or sum over the branches, in nats."""
        pair = losses.standardized(context.student.branch_logits), losses.standardized(context.assigned_logits)
        return self.factor * losses.kd_divergence(*pair, self.temperature)
