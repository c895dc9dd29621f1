"""Weights of teachers: by entropy, by cross-entropy, and by agreement of their gradients.

Shape letters: B batch, C classes, M teachers, T temperature. All weights are detached.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional

from ekd_lightning.errors import UserError
from ekd_lightning.methods.losses.logits import at_least_float32, without_masked

__all__ = [
    "MinNormWeights",
    "confidence_weights",
    "cross_entropies",
    "divergences",
    "entropy_weights",
    "image_weights",
    "logit_gradients",
]

MAX_FACES = 60_000
RIDGE = 1e-10
FEASIBLE = 1e-9


def divergences(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T² · KL(softmax(t_m / T) ‖ softmax(z / T)) of every teacher and image: [M, B] in nats, float32 or wider.

    The student's logits are [B, C], the teachers' [M, B, C], detached here. Classes of -inf have probability 0 and
    contribute 0.
    """
    student = functional.log_softmax(at_least_float32(student_logits) / temperature, dim=-1)
    teacher = functional.log_softmax(at_least_float32(teacher_logits).detach() / temperature, dim=-1)
    teacher, student = without_masked(teacher, student.expand_as(teacher))
    pointwise = functional.kl_div(student, teacher, reduction="none", log_target=True)
    return temperature**2 * pointwise.sum(-1)


def cross_entropies(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy [M, B] of every teacher on every image, in nats, from logits [M, B, C]; float32 or wider.

    Targets are classes, int64 [B], or probabilities [B, C]; inf where a teacher masks (-inf) the class of the label.
    """
    log_probs = functional.log_softmax(at_least_float32(logits), dim=-1)
    if targets.is_floating_point():
        shares = targets.to(log_probs)
        return -torch.where(shares > 0, shares * log_probs, 0.0).sum(-1)
    return -log_probs.gather(-1, targets.expand(len(logits), -1)[..., None]).squeeze(-1)


def entropy_weights(teacher_logits: Tensor) -> Tensor:
    """(1 - H(p_m) / Σ_j H(p_j)) / (M - 1): the lower a teacher's entropy on an image, the larger its weight.

    The entropy weighting of Kwon et al. (ICASSP 2020, "Adaptive Knowledge Distillation Based on Entropy"), as
    implemented in the CA-MKD repository, at T = 1. 1 - H / Σ H sums to M - 1 over the teachers, hence the division.

    Args:
        teacher_logits: [M, B, C].

    Returns:
        [M, B], float32 or wider; every column sums to 1. Uniform where all teachers are certain; 1 for M = 1.
    """
    M = len(teacher_logits)
    log_probs = functional.log_softmax(at_least_float32(teacher_logits).detach(), dim=-1)
    # With `tiny`, entropies that underflow to 0 in all teachers are equal; otherwise it has no effect.
    finite, _ = without_masked(log_probs, log_probs)
    entropies = torch.finfo(log_probs.dtype).tiny - (log_probs.exp() * finite).sum(-1)
    return _one_minus(entropies / entropies.sum(0), M)


def confidence_weights(errors: Tensor) -> Tensor:
    """(1 - softmax_m(CE_m)) / (M - 1): the better a teacher predicts an image's label, the larger its weight.

    Zhang, Chen and Wang, "Confidence-Aware Multi-Teacher Knowledge Distillation" (ICASSP 2022, arXiv 2201.00007).

    Args:
        errors: Cross-entropies [M, B] in nats; may be inf. If all errors of an image are inf, its weights are equal.

    Returns:
        [M, B]; every column sums to 1. 1 for M = 1.
    """
    finite = errors.clamp(max=torch.finfo(errors.dtype).max)  # inf - inf is nan
    return _one_minus(finite.softmax(0), len(errors))


CONFIDENCES = ("label", "entropy")


def image_weights(kind: str, teacher_logits: Tensor, targets: Tensor) -> Tensor:
    """Returns the weights of all teachers for each image, by one of the `CONFIDENCES`.

    Args:
        kind: `label` (`confidence_weights`, of CA-MKD) or `entropy` (`entropy_weights`, of EBKD).
        teacher_logits: [M, B, C], detached here.
        targets: int64 [B], or probabilities [B, C]; used only by `label`.

    Returns:
        [M, B], float32 or wider; every column sums to 1.
    """
    if kind == "label":
        return confidence_weights(cross_entropies(teacher_logits.detach(), targets))
    return entropy_weights(teacher_logits)


def _one_minus(shares: Tensor, num_teachers: int) -> Tensor:
    return torch.ones_like(shares) if num_teachers == 1 else (1.0 - shares) / (num_teachers - 1)


def logit_gradients(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T (softmax(z / T) - softmax(t_m / T)): the gradient of each image's T² KL(t_m ‖ z) to the student's logits.

    Maps logits [B, C] and [M, B, C] to [M, B, C], detached, float32 or wider.
    """
    student = functional.softmax(at_least_float32(student_logits).detach() / temperature, dim=-1)
    teacher = functional.softmax(at_least_float32(teacher_logits).detach() / temperature, dim=-1)
    return temperature * (student - teacher)


class MinNormWeights(nn.Module):
    """Solves min_w ½ ‖Σ_m w_m g_m‖² subject to Σ_m w_m = 1 and 0 <= w_m <= tolerance, exactly.

    The solution lies in the interior of some face of the polytope (some weights are 0, some equal the tolerance, the
    rest are free), where it solves linear equations. All faces are solved in one small batch and the best feasible
    point is taken; unlike an iterative solver this never synchronises with the device. A ridge of 1e-10 of the mean
    squared norm picks the most even of several solutions: two equal teachers share their weight, and weights are
    uniform if all gradients vanish.

    Args:
        num_teachers: M.
        tolerance: Largest weight of one teacher, > 0, with `tolerance * M` >= 1. No effect for M = 1.

    Raises:
        UserError: If `tolerance * M` < 1, or if the polytope has more than 60,000 faces.
    """

    is_zero_FM: Tensor  # noqa: N815  # shape letters
    is_full_FM: Tensor  # noqa: N815  # shape letters

    def __init__(self, num_teachers: int, tolerance: float) -> None:
        super().__init__()
        self.tolerance = min(tolerance, 1.0) if num_teachers > 1 else 1.0
        if self.tolerance * num_teachers < 1.0 - FEASIBLE:
            raise UserError(
                f"tolerance={tolerance!r} is not allowed with {num_teachers} teachers: their weights could not sum"
                f" to 1; give a number >= {1 / num_teachers:.4g}"
            )
        faces = list(itertools.islice(_faces(num_teachers, self.tolerance), MAX_FACES + 1))
        if len(faces) > MAX_FACES:
            raise UserError(
                f"tolerance={tolerance!r} with {num_teachers} teachers is too costly to solve exactly "
                f"(more than {MAX_FACES:,} cases); use fewer teachers or a larger tolerance"
            )
        kinds_FM = torch.tensor(faces)
        self.register_buffer("is_zero_FM", kinds_FM == 0, persistent=False)
        self.register_buffer("is_full_FM", kinds_FM == 2, persistent=False)

    def forward(self, gradients: Tensor) -> Tensor:
        """Computes the weights [M], detached, from gradients [M, N], one vector for each teacher, in their dtype."""
        with torch.no_grad(), torch.autocast(gradients.device.type, enabled=False):
            vectors = gradients.detach().double()
            gram_MM = vectors @ vectors.T
            # The solution does not depend on the scale, which is removed before the ridge is added.
            gram_MM = gram_MM / (gram_MM.diagonal().mean() + torch.finfo(torch.float64).tiny)
            gram_MM = gram_MM + RIDGE * torch.eye(len(gram_MM), dtype=torch.float64, device=gram_MM.device)
            return self._best(gram_MM).to(gradients.dtype)

    def _best(self, gram_MM: Tensor) -> Tensor:
        """Returns the best feasible point [M] among the stationary points of all faces."""
        weights_FM = self._stationary(gram_MM)
        outside_F = torch.maximum(-weights_FM, weights_FM - self.tolerance).amax(1)
        values_F = (weights_FM @ gram_MM * weights_FM).sum(1)
        fits_F = (outside_F <= FEASIBLE) & values_F.isfinite()
        best = torch.where(fits_F, values_F, torch.inf).argmin()
        # index_select, because indexing with a device tensor may read its value back.
        weights_M = weights_FM.index_select(0, best[None])[0].clamp(0.0, self.tolerance)
        return weights_M / weights_M.sum()

    def _stationary(self, gram_MM: Tensor) -> Tensor:
        """Returns the stationary point of each face, [F, M]: the solution of G w + λ 1 = 0, Σ w = 1 in free weights."""
        F, M = self.is_zero_FM.shape
        free_FM = ~(self.is_zero_FM | self.is_full_FM)
        system = torch.zeros(F, M + 1, M + 1, dtype=torch.float64, device=gram_MM.device)
        identity = torch.eye(M, dtype=torch.float64, device=gram_MM.device)
        system[:, :M, :M] = torch.where(free_FM[..., None], gram_MM, identity)
        system[:, :M, M] = free_FM.double()
        system[:, M, :M] = 1.0
        right = torch.ones(F, M + 1, dtype=torch.float64, device=gram_MM.device)
        right[:, :M] = self.tolerance * self.is_full_FM.double()
        # solve_ex, because solve reads an error code back from the device.
        return torch.linalg.solve_ex(system, right).result[:, :M]


def _faces(num_teachers: int, tolerance: float) -> itertools.chain[tuple[int, ...]]:
    """Yields all faces that contain weights of sum 1; each teacher is 0 (zero), 1 (free) or 2 (at the tolerance)."""

    def with_full(full: tuple[int, ...]) -> list[tuple[int, ...]]:
        kinds = [(2,) if m in full else (0, 1) for m in range(num_teachers)]
        room = 1.0 - tolerance * len(full)
        return [
            face
            for face in itertools.product(*kinds)
            if 1 in face and -FEASIBLE <= room <= tolerance * face.count(1) + FEASIBLE
        ]

    most = int(1.0 / tolerance + FEASIBLE)
    return itertools.chain.from_iterable(
        with_full(full)
        for count in range(min(most, num_teachers - 1) + 1)
        for full in itertools.combinations(range(num_teachers), count)
    )
