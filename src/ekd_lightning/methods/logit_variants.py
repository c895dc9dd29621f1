"""Distillation of logits in other forms than Hinton's: decoupled (DKD), and of standardised logits.

Shape letters: B batch, C classes, M teachers, K branches, T temperature.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ekd_lightning.methods import losses
from ekd_lightning.methods.logit_terms import branch_factor
from ekd_lightning.methods.losses import at_least_float32
from ekd_lightning.methods.options import number
from ekd_lightning.methods.terms import StepContext, Term, TermContext, register_term

STD_EPS = 1e-7
"""Of the published code: what is added to the standard deviation of the logits."""


def decoupled(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """T² TCKD and T² NCKD, the two parts of decoupled distillation (Zhao et al., CVPR 2022, equations 4 to 7).

    TCKD = KL(b_t ‖ b_s) with b = (p_y, 1 - p_y): the target class against all others. NCKD = KL(p̂_t ‖ p̂_s) with
    p̂ the softmax over the other classes. KL(p_t ‖ p_s) = TCKD + (1 - p_ty) NCKD, image by image. The published code
    masks the target by subtracting 1000 from its logit; here it is left out, which is the same up to rounding.

    Args:
        student_logits: [..., B, C] with C >= 2.
        teacher_logits: The same shape, detached here.
        labels: int64 [B].
        temperature: T > 0.

    Returns:
        Two scalars >= 0 (up to rounding) in nats, averaged over all leading dimensions.
    """
    student = at_least_float32(student_logits) / temperature
    teacher = at_least_float32(teacher_logits).detach() / temperature
    labels = labels.expand(student.shape[:-1])
    own_s, rest_s, others_s = _parts(student, labels)
    own_t, rest_t, others_t = _parts(teacher, labels)
    tckd = own_t.exp() * (own_t - own_s) + rest_t.exp() * (rest_t - rest_s)
    nckd = (others_t.exp() * (others_t - others_s)).sum(-1)
    return temperature**2 * tckd.mean(), temperature**2 * nckd.mean()


def _parts(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log p_y [...], log(1 - p_y) [...], and log p̂ of the other classes [..., C - 1]."""
    place = torch.arange(logits.shape[-1] - 1, device=logits.device)
    others = logits.gather(-1, place + (place >= labels[..., None]))
    whole, rest = logits.logsumexp(-1), others.logsumexp(-1)
    own = logits.gather(-1, labels[..., None])[..., 0]
    return own - whole, rest - whole, others - rest[..., None]


def standardized(logits: Tensor) -> Tensor:
    """(z - mean(z)) / (std(z) + 1e-7) over the classes, with the sample standard deviation, as published.

    Sun et al., "Logit Standardization in Knowledge Distillation", CVPR 2024, section 4.2. An affine map of an image's
    logits with a positive factor makes no difference (but for the 1e-7).

    Args:
        logits: [..., C] with C >= 2.

    Returns:
        The same shape, float32 or wider.
    """
    wide = at_least_float32(logits)
    return (wide - wide.mean(-1, keepdim=True)) / (wide.std(-1, keepdim=True) + STD_EPS)


class _BranchLogits(Term):
    """What both share: every branch against the teachers that are assigned to it."""

    needs_teachers = True
    uses_assignment = True

    def __init__(
        self, weight: float, context: TermContext, temperature: float | None, reduction: str
    ) -> None:
        super().__init__(weight)
        self.uses_temperature = temperature is None
        chosen = context.temperature if temperature is None else temperature
        self.temperature = number("temperature", chosen, above=0.0)
        self.factor = branch_factor(reduction, context.num_branches)

    def target(self, context: StepContext) -> Tensor:
        """Logits [K, B, C] that the branches imitate."""
        assert context.teachers is not None
        assert context.assignment_KM is not None
        return losses.combine_teachers(context.teachers.logits, context.assignment_KM)


@register_term("dkd")
class DecoupledDistillation(_BranchLogits):
    """mean_k T² (α TCKD + β NCKD): Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022; see `decoupled`.

    Several teachers of a branch are combined by the mean of their logits. Of a mixed image the class with the larger
    share counts as the target.

    Args:
        weight: Factor in the total, >= 0.
        context: The networks' sizes, the method's temperature, the assignment.
        alpha: Weight of the target class's part, >= 0.
        beta: Weight of the other classes' part, >= 0.
        temperature: T > 0; None for the method's.
        reduction: `mean` or `sum` over the K branches.
    """

    def __init__(
        self,
        weight: float,
        context: TermContext,
        *,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: float | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__(weight, context, temperature, reduction)
        self.alpha, self.beta = number("alpha", alpha, low=0.0), number("beta", beta, low=0.0)

    def forward(self, context: StepContext) -> Tensor:
        """Returns the mean over the batch and the mean or sum over the branches, in nats."""
        soft = context.batch.soft_labels
        labels = context.batch.labels if soft is None else soft.argmax(-1)
        target, branches = self.target(context), context.student.branch_logits
        tckd, nckd = decoupled(branches, target, labels, self.temperature)
        return self.factor * (self.alpha * tckd + self.beta * nckd)


@register_term("kd_standardized")
class StandardizedDistillation(_BranchLogits):
    """mean_k T² KL(p_T(s(t)) ‖ p_T(s(z_k))) with standardised logits s(z); see `standardized`.

    Args:
        weight: Factor in the total, >= 0.
        context: The networks' sizes, the method's temperature, the assignment.
        temperature: T > 0; None for the method's.
        reduction: `mean` or `sum` over the K branches.
    """

    def __init__(
        self,
        weight: float,
        context: TermContext,
        *,
        temperature: float | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__(weight, context, temperature, reduction)

    def forward(self, context: StepContext) -> Tensor:
        """Returns the mean over the batch and the mean or sum over the branches, in nats."""
        student, teacher = standardized(context.student.branch_logits), standardized(self.target(context))
        return self.factor * losses.kd_divergence(student, teacher, self.temperature)


def soft_cross_entropy(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """H(p_T(t), p_T(s)) averaged over the images, in nats and without T²: what some methods call distillation.

    Args:
        student_logits: [B, C].
        teacher_logits: [B, C], detached here.
        temperature: T > 0.

    Returns:
        Scalar; its gradient is that of `losses.kd_divergence` over T².
    """
    teacher = (at_least_float32(teacher_logits).detach() / temperature).softmax(-1)
    return functional.cross_entropy(at_least_float32(student_logits) / temperature, teacher)
