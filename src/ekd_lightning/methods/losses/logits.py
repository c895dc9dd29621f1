"""Losses of logits: cross-entropy and published forms of distillation.

Shape letters: B batch, C classes, M teachers, K branches, T temperature (dimensionless).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

__all__ = [
    "ambiguity",
    "at_least_float32",
    "combine_teachers",
    "cross_entropy",
    "decoupled",
    "kd_divergence",
    "mix_peers",
    "mse",
    "mutual_divergence",
    "soft_cross_entropy",
    "standardized",
]

STD_EPS = 1e-7
"""Added to the standard deviation of the logits, as in the published code."""


def at_least_float32(x: Tensor) -> Tensor:
    """Converts half-precision tensors of any shape to float32 and returns wider ones unchanged."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy with the labels, averaged over the batch.

    Args:
        logits: [..., B, C]; the mean is also taken over leading dimensions (branches).
        labels: int64 [B], 0 .. C-1; or probabilities [B, C], rows summing to 1.
        label_smoothing: Probability mass spread evenly over all classes, in [0, 1).

    Returns:
        Scalar, float32 or wider, in nats.
    """
    rows = at_least_float32(logits).flatten(0, -2)
    targets = labels.expand(*logits.shape[:-2], *labels.shape).reshape(-1, *labels.shape[1:])
    if targets.is_floating_point():
        targets = targets.to(rows)
    return functional.cross_entropy(rows, targets, label_smoothing=label_smoothing)


def without_masked(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Makes masked classes (log p is -inf) contribute 0 to Σ_c p_c (log p_c - log q_c), whatever log q is.

    Both tensors, of one shape, are set to 0 where log p is -inf, so that no gradient flows there.
    """
    masked = log_p.isneginf()
    return log_p.masked_fill(masked, 0.0), log_q.masked_fill(masked, 0.0)


def kd_divergence(student_logits: Tensor, teacher_logits: Tensor, temperature: float, *, detach: bool = True) -> Tensor:
    """T² · KL(softmax(t / T) ‖ softmax(s / T)): Hinton, Vinyals and Dean (2015), section 2.

    The factor T² keeps the scale of the gradient: for large T the loss tends to ½ · Σ_c (s_c - t_c)² / C of the
    centred logits, which does not depend on T (their equation 4).

    Args:
        student_logits: [..., B, C].
        teacher_logits: The same shape. For a mixture of probabilities as the target, pass the result of
            `combine_teachers(..., combine="probabilities")`. Masked classes (-inf) have probability 0 and contribute 0.
        temperature: T > 0.
        detach: False lets gradients flow to the teacher's logits as well.

    Returns:
        Scalar >= 0 (up to rounding), float32 or wider, in nats: summed over classes, averaged over all leading
        dimensions.

    Raises:
        ValueError: If the shapes differ (PyTorch would broadcast them silently).
    """
    _require_same_shape(student_logits, teacher_logits)
    target = teacher_logits.detach() if detach else teacher_logits
    student = functional.log_softmax(at_least_float32(student_logits) / temperature, dim=-1)
    teacher = functional.log_softmax(at_least_float32(target) / temperature, dim=-1)
    # Both sides in log space: probabilities that underflow would otherwise give 0 · log 0.
    teacher, student = without_masked(teacher, student)
    divergence = functional.kl_div(
        student.flatten(0, -2), teacher.flatten(0, -2), reduction="batchmean", log_target=True
    )
    return temperature**2 * divergence


def soft_cross_entropy(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """H(p_T(t), p_T(s)) averaged over the images, without T²: Romero et al. (ICLR 2015, equation 2), BSS (AAAI 2019).

    Maps logits [B, C] of both, the teacher's detached here, to a scalar >= 0 in nats, float32 or wider; its gradient is
    that of `kd_divergence` over T².
    """
    teacher = (at_least_float32(teacher_logits).detach() / temperature).softmax(-1)
    return functional.cross_entropy(at_least_float32(student_logits) / temperature, teacher)


def mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error over all elements, of logits (Ba and Caruana, NeurIPS 2014) or of features (hints).

    Args:
        student: Any shape.
        teacher: The same shape, detached here.

    Returns:
        Scalar >= 0, float32 or wider.

    Raises:
        ValueError: If the shapes differ.
    """
    _require_same_shape(student, teacher)
    return functional.mse_loss(at_least_float32(student), at_least_float32(teacher).detach())


def combine_teachers(
    teacher_logits: Tensor, weights: Tensor, temperature: float = 1.0, combine: str = "logits"
) -> Tensor:
    """Averages M teachers into one target per row of weights, returned as logits.

    The two means differ: the mean of the logits is a geometric mean of the probabilities and sharper than the mean of
    the probabilities. A method that *sums* logits on both sides (M teachers, M branches) at temperature T equals the
    mean at T / M with the weight of the term multiplied by M², because of the T² factor. If only the teachers' logits
    are summed and not the student's, no temperature makes the two equal.

    A class that any teacher of weight > 0 masks (-inf) has probability 0 in the mean of the logits (a geometric mean);
    in the mean of the probabilities only the masking teacher's share of it is 0. At least one class must be unmasked.

    Args:
        teacher_logits: [M, B, C].
        weights: [M] or [K, M], non-negative, each row summing to 1. Teachers of weight 0 have no influence.
        temperature: T > 0 at which probabilities are mixed; no effect on `logits`.
        combine: `logits` for Σ_m w_m t_m; `probabilities` for T · log Σ_m w_m softmax(t_m / T), logits whose
            softmax at T is the mixture of the teachers' probabilities at T.

    Returns:
        [B, C] or [K, B, C], detached, float32 or wider.
    """
    teacher = at_least_float32(teacher_logits).detach()
    # Multiply and add, not einsum: autocast would compute a matrix product in bfloat16.
    weights = weights.to(teacher)[..., None, None]
    if combine == "logits":
        # 0 · -inf is nan.
        return torch.where(weights > 0, weights * teacher, 0.0).sum(-3)
    log_probs = functional.log_softmax(teacher / temperature, dim=-1)
    return temperature * torch.logsumexp(log_probs + weights.log(), dim=-3)


def decoupled(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """T² TCKD and T² NCKD, the two parts of decoupled distillation (Zhao et al., CVPR 2022).

    TCKD = KL(b_t ‖ b_s) with b = (p_y, 1 - p_y): the target class against all others. NCKD = KL(p̂_t ‖ p̂_s) with
    p̂ the softmax over the other classes. For every image KL(p_t ‖ p_s) = TCKD + (1 - p_ty) NCKD. The published code
    masks the target class by subtracting 1000 from its logit; here it is removed, which is equal up to rounding.

    Args:
        student_logits: [..., B, C] with C >= 2.
        teacher_logits: The same shape, detached here. Classes of -inf have probability 0 and contribute 0.
        labels: int64 [B].
        temperature: T > 0.

    Returns:
        Two scalars >= 0 (up to rounding) in nats, averaged over all leading dimensions.
    """
    student = at_least_float32(student_logits) / temperature
    teacher = at_least_float32(teacher_logits).detach() / temperature
    labels = labels.expand(student.shape[:-1])
    ours, theirs = _parts(student, labels), _parts(teacher, labels)
    (own_t, own_s), (rest_t, rest_s), (others_t, others_s) = map(without_masked, theirs, ours)
    p_own, p_rest, p_others = (log_p.exp() for log_p in theirs)
    tckd = p_own * (own_t - own_s) + p_rest * (rest_t - rest_s)
    nckd = (p_others * (others_t - others_s)).sum(-1)
    return temperature**2 * tckd.mean(), temperature**2 * nckd.mean()


def _parts(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log p_y [...], log(1 - p_y) [...], and log p̂ of the other classes [..., C - 1]."""
    place = torch.arange(logits.shape[-1] - 1, device=logits.device)
    others = logits.gather(-1, place + (place >= labels[..., None]))
    whole, rest = logits.logsumexp(-1), others.logsumexp(-1)
    own = logits.gather(-1, labels[..., None])[..., 0]
    # If all other classes are masked, each of them has probability 0.
    return own - whole, rest - whole, others - rest[..., None].clamp(min=torch.finfo(rest.dtype).min)


def standardized(logits: Tensor) -> Tensor:
    """(z - mean(z)) / (std(z) + 1e-7) over the classes, with the sample standard deviation, as in the authors' code.

    Sun et al., "Logit Standardization in Knowledge Distillation", CVPR 2024, section 4.3. Their algorithm 1 has the
    standard deviation with 1/C and without the 1e-7, so its result is larger by the factor √(C / (C-1)). Invariant, up
    to the 1e-7, to affine maps of an image's logits with a positive factor. Keeps the shape [..., C], C >= 2; float32
    or wider.
    """
    wide = at_least_float32(logits)
    return (wide - wide.mean(-1, keepdim=True)) / (wide.std(-1, keepdim=True) + STD_EPS)


def mutual_divergence(branch_logits: Tensor, temperature: float) -> Tensor:
    """mean_k 1/(K-1) Σ_{l≠k} T² KL(p_T(z_l) ‖ p_T(z_k)): every network imitates all others.

    Deep Mutual Learning (Zhang, Xiang, Hospedales and Lu, CVPR 2018), which has T = 1. For more than two networks the
    authors' code leaves out the paper's factor 1/(K-1). Maps logits [K, B, C], K >= 2, detached where they are targets,
    to a scalar >= 0 in nats.
    """
    K = len(branch_logits)
    # A stack of views: indexing by a list would copy the indices to the device in every step.
    rows = [torch.stack([branch_logits[other] for other in range(K) if other != k]) for k in range(K)]
    targets = torch.stack(rows)
    return kd_divergence(branch_logits[:, None].expand_as(targets), targets, temperature)


def mix_peers(peer_logits: Tensor, log_attention: Tensor, temperature: float, combine: str = "logits") -> Tensor:
    """Σ_b α_ab z_b: the targets of the peers in the first level of OKDDip (Chen et al., AAAI 2020).

    Args:
        peer_logits: [P, B, C], float32 or wider.
        log_attention: log α [P, P, B]; α sums to 1 over the second dimension.
        temperature: T > 0 at which probabilities are mixed; no effect on `logits`.
        combine: What α mixes: `logits`, as in the authors' code, or `probabilities` at T.

    Returns:
        [P, B, C], the targets as logits for `kd_divergence`.
    """
    if combine == "logits":
        return (log_attention.exp()[..., None] * peer_logits[None]).sum(1)
    log_probs = functional.log_softmax(peer_logits / temperature, dim=-1)
    return temperature * torch.logsumexp(log_attention[..., None] + log_probs[None], dim=1)


def ambiguity(branch_logits: Tensor) -> Tensor:
    """mean_k KL(p_geo ‖ p_k), the gain in log-likelihood of the averaged logits over the mean branch.

    p_geo = softmax(mean_k z_k) is the normalised geometric mean of the branches. For it the ambiguity decomposition
    NLL(ensemble) = mean_k NLL_k - ambiguity is exact for every label. Maps logits [K, B, C] to a scalar >= 0 (up to
    rounding) in nats, averaged over the batch; it is 0 if the probabilities of all branches are equal.
    """
    log_probs_KBC = functional.log_softmax(at_least_float32(branch_logits), dim=-1)
    # log p_geo = m - logsumexp(m) with m = mean_k log p_k, so mean_k KL(p_geo ‖ p_k) = -logsumexp(m).
    return -log_probs_KBC.mean(0).logsumexp(-1).mean()


def _require_same_shape(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise ValueError(f"student {list(student.shape)} and teacher {list(teacher.shape)} must have the same shape")
