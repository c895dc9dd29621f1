"""Pure loss functions of knowledge distillation.

Shape letters: B batch, C classes, M teachers, K branches, T temperature (dimensionless).

Conventions, the same everywhere:

- softmax is taken in float32 at least (bfloat16 logits are converted first, float64 stays);
- whatever comes from a teacher is detached, so a target never receives a gradient;
- KL is summed over classes and averaged over everything else ("batchmean"), and carries T²;
- MSE is averaged over all elements.

The formulas are those of the project's reconstruction of Ensemble Knowledge Distillation (Asif, Tang, Harrer,
arXiv 1909.08097). The full text of the paper was not available: the reconstruction rests on its abstract and
on secondary descriptions.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy with the ground truth, averaged over the batch.

    Args:
        logits: [..., B, C]; leading dimensions (branches) are averaged over too.
        labels: int64 [B], 0 .. C-1; or probabilities [B, C], rows summing to 1.
        label_smoothing: Probability mass spread evenly over all classes, in [0, 1).

    Returns:
        Scalar, float32 or wider, in nats.
    """
    rows = at_least_float32(logits).flatten(0, -2)
    repeats = (len(rows) // max(len(labels), 1),) + (1,) * (labels.ndim - 1)
    targets = labels.repeat(repeats)
    if targets.is_floating_point():
        targets = targets.to(rows)
    return functional.cross_entropy(rows, targets, label_smoothing=label_smoothing)


def kd_divergence(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T² · KL(softmax(t / T) ‖ softmax(s / T)), the distillation loss of Hinton, Vinyals and Dean (2015).

    T² keeps the gradient's scale: for large T the loss tends to ½ · Σ_c (s_c - t_c)² / C of the centred
    logits, whatever T is.

    Args:
        student_logits: [..., B, C].
        teacher_logits: The same shape, detached here. To imitate a mixture of probabilities, pass
            what `combine_teachers(..., combine="probabilities")` returns.
        temperature: T > 0.

    Returns:
        Scalar, float32 or wider, in nats: summed over classes, averaged over all leading dimensions.

    Raises:
        ValueError: If the shapes differ (they would broadcast silently otherwise).
    """
    _require_same_shape(student_logits, teacher_logits)
    student = functional.log_softmax(at_least_float32(student_logits) / temperature, dim=-1)
    teacher = functional.log_softmax(at_least_float32(teacher_logits).detach() / temperature, dim=-1)
    # Both sides in log space: probabilities that underflow at T = 1 would otherwise give 0 · log 0.
    divergence = functional.kl_div(
        student.flatten(0, -2), teacher.flatten(0, -2), reduction="batchmean", log_target=True
    )
    return temperature**2 * divergence


def mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error over all elements; the teacher's side is detached.

    Args:
        student: Any shape.
        teacher: The same shape.

    Returns:
        Scalar, float32 or wider.

    Raises:
        ValueError: If the shapes differ.
    """
    _require_same_shape(student, teacher)
    return functional.mse_loss(at_least_float32(student), at_least_float32(teacher).detach())


def ambiguity(branch_logits: Tensor) -> Tensor:
    """mean_k KL(p_geo ‖ p_k), the diversity that averaging logits turns into a lower loss.

    p_geo = softmax(mean_k z_k) is the normalised geometric mean of the branches. The ambiguity decomposition
    is exact for it: NLL(ensemble) = mean_k NLL_k - ambiguity, for every label.

    Args:
        branch_logits: [K, B, C].

    Returns:
        Scalar >= 0 (up to rounding) in nats, float32 or wider, averaged over the batch; 0 when all branches
        agree.
    """
    log_probs_KBC = functional.log_softmax(at_least_float32(branch_logits), dim=-1)
    # log p_geo = m - logsumexp(m) with m = mean_k log p_k, so mean_k KL(p_geo ‖ p_k) = -logsumexp(m).
    return -log_probs_KBC.mean(0).logsumexp(-1).mean()


def combine_teachers(
    teacher_logits: Tensor, weights: Tensor, temperature: float = 1.0, combine: str = "logits"
) -> Tensor:
    """Merges M teachers into one target per row of weights, given as logits.

    Which mean is taken matters: the mean of the logits is a geometric mean of probabilities and sharper than
    the mean of the probabilities. A method that *sums* logits on both sides (M teachers, M branches)
    at temperature T equals the mean at T / M with the weight of the term multiplied by M², because of the T²
    factor. Where only the teachers are summed and the student is not, no temperature makes the two equal.

    Args:
        teacher_logits: [M, B, C].
        weights: [M] or [K, M], non-negative, each row summing to 1.
        temperature: T > 0 at which probabilities are mixed; no effect on `logits`.
        combine: `logits` for Σ_m w_m t_m; `probabilities` for T · log Σ_m w_m softmax(t_m / T), logits whose
            softmax at T is the mixture of the teachers' probabilities at T.

    Returns:
        [B, C] or [K, B, C], detached, float32 or wider.
    """
    teacher = at_least_float32(teacher_logits).detach()
    # Multiply and add, not einsum: autocast would turn a matrix product into bfloat16.
    weights = weights.to(teacher)[..., None, None]
    if combine == "logits":
        return (weights * teacher).sum(-3)
    log_probs = functional.log_softmax(teacher / temperature, dim=-1)
    return temperature * torch.logsumexp(log_probs + weights.log(), dim=-3)


def at_least_float32(x: Tensor) -> Tensor:
    """Converts half-precision tensors to float32 and leaves wider ones alone.

    Args:
        x: Floating point, any shape.

    Returns:
        The same values, float32 or float64.
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _require_same_shape(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise ValueError(f"student {list(student.shape)} and teacher {list(teacher.shape)} differ in shape")
