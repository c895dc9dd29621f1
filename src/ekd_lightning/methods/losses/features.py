"""Feature losses: attention maps, relations between images, flow matrices, Gaussian models, contrast.

No gradient flows to the teacher. Shape letters: B batch, D features; in maps [B, C, H, W] the C is channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from ekd_lightning.methods.losses.logits import at_least_float32, mse
from ekd_lightning.networks.staged import average_pool

__all__ = [
    "angle_loss",
    "angles",
    "attention_loss",
    "attention_map",
    "directions",
    "distance_loss",
    "flow_loss",
    "flow_matrix",
    "gaussian_loss",
    "noise_contrastive",
    "relative_distances",
    "similarities",
    "similarity_loss",
    "to_common_size",
]

SHORTEST = 1e-4
"""Vectors shorter than this share of the root mean square length are treated as 0."""
NCE_EPS = 1e-7
"""Epsilon of CRD's published code, added to m/n in the denominators."""


def to_common_size(
    first: Tensor, second: Tensor, pool: Callable[[Tensor, tuple[int, int]], Tensor] = average_pool
) -> tuple[Tensor, Tensor]:
    """Pools two maps, [B, C_1, H_1, W_1] and [B, C_2, H_2, W_2], to the smaller height and width.

    Vectors [B, D_1] and [B, D_2] stay unchanged.
    """
    if first.shape[2:] == second.shape[2:]:
        return first, second
    size = (min(first.shape[2], second.shape[2]), min(first.shape[3], second.shape[3]))
    first, second = (maps if maps.shape[2:] == size else pool(maps, size) for maps in (first, second))
    return first, second


def attention_map(features: Tensor) -> Tensor:
    """Q / ‖Q‖₂ with Q = mean_c f_c²: the activation-based attention map of Zagoruyko and Komodakis (2017) for p = 2.

    Maps features [B, C, H, W] to [B, H·W] >= 0, rows of length 1 (0 where all features are 0), float32 or wider;
    invariant to the order of the channels and to positive factors.
    """
    return functional.normalize(at_least_float32(features).square().mean(1).flatten(1))


def attention_loss(student: Tensor, teacher: Tensor, form: str = "squared") -> Tensor:
    """Distance between two networks' attention maps at one stage: Zagoruyko and Komodakis, ICLR 2017.

    Their code and the common reimplementations take the mean of the squared difference over all B·H·W elements. The
    paper has the norm, ½ β ‖Q_s - Q_m‖₂, where β is 1000 over the number of elements and images: `form="norm"` is
    ½ Σ_b ‖Q_s - Q_m‖₂ / (B·H·W). Both forms are meant for the weight 1000.

    Args:
        student: [B, C, H, W].
        teacher: [B, C_m, H_m, W_m], detached here; the larger maps are averaged to the smaller size.
        form: `squared` (published code) or `norm` (the paper's equation).

    Returns:
        Scalar >= 0, 0 for equal maps.
    """
    student, teacher = to_common_size(at_least_float32(student), at_least_float32(teacher).detach())
    difference = attention_map(student) - attention_map(teacher)
    if form == "squared":
        return difference.square().mean()
    return torch.linalg.vector_norm(difference, dim=1).mean() / (2 * difference.shape[1])


def directions(vectors: Tensor) -> Tensor:
    """Normalises vectors [..., D] to length 1; (nearly) zero vectors become 0, with gradient 0.

    Published code divides by max(length, 1e-12) instead, which multiplies gradients by 1e12 at 0: for two images with
    equal features, or an image whose features are all 0. Invariant to a common positive factor of all vectors.
    """
    squared = vectors.square().sum(-1, keepdim=True)
    long = squared > SHORTEST**2 * squared.detach().mean()
    return torch.where(long, vectors / torch.where(long, squared, 1.0).sqrt(), 0.0)


def relative_distances(features: Tensor) -> Tensor:
    """Distances between all pairs of images over their mean (Park et al., CVPR 2019, section 3.2.1).

    Maps features [B, D], B >= 2, to [B, B], float32 or wider, 0 on the diagonal; invariant to translation, rotation and
    scaling of the features. All 0 if all features are equal.
    """
    x = at_least_float32(features)
    # From differences, not from the Gram matrix: exact for close features, and unaffected by autocast.
    squared = (x[:, None] - x[None]).square().sum(-1)
    apart = squared > 0
    # The gradient of a square root is infinite at 0.
    distances = torch.where(apart, torch.where(apart, squared, 1.0).sqrt(), 0.0)
    mean = distances.sum() / apart.sum().clamp(min=1)
    return distances / torch.where(mean > 0, mean, 1.0)


def angles(features: Tensor) -> Tensor:
    """Cosine of the angle at image j between images i and k, for all triples (Park et al. 2019, section 3.2.2).

    Maps features [B, D] to [B, B, B], indices j, i, k; float32 or wider; 0 if i or k is j, or has the same features as
    j.
    """
    x = at_least_float32(features)
    from_j = directions(x[None] - x[:, None])
    return from_j @ from_j.transpose(1, 2)


def similarities(features: Tensor) -> Tensor:
    """Rows of the batch's Gram matrix, normalised to length 1 (Tung and Mori, ICCV 2019).

    Maps features [B, ...], flattened here, to [B, B], float32 or wider; invariant to rotation and scaling of the
    features. The row of an image whose features are all 0 is 0.
    """
    x = at_least_float32(features).flatten(1)
    return directions(x @ x.T)


def distance_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber loss between the relative distances of all pairs: RKD-D of Park et al., CVPR 2019, section 3.2.1.

    Maps features [B, D] and [B, D_m], B >= 2, the teacher's detached here, to a scalar >= 0; the Huber threshold is 1.
    It is the mean over all B² entries including the diagonal, as in the authors' code; the paper has the sum over
    pairs of different images.
    """
    return functional.smooth_l1_loss(relative_distances(student), relative_distances(teacher.detach()))


def angle_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber loss between the angles of all triples: RKD-A of Park et al., CVPR 2019, section 3.2.2.

    Maps features [B, D] and [B, D_m], the teacher's detached here, to a scalar >= 0; the Huber threshold is 1. It is
    the mean over all B³ entries, as in the authors' code; the paper has the sum over triples of different images.
    """
    return functional.smooth_l1_loss(angles(student), angles(teacher.detach()))


def similarity_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """‖S_t - S_s‖²_F / B² with the batch's similarities S: SP of Tung and Mori, ICCV 2019.

    Maps features [B, ...], which may differ in shape after B, the teacher's detached here, to a scalar >= 0. The paper
    adds it up over pairs of layers.
    """
    return functional.mse_loss(similarities(student), similarities(teacher.detach()))


def flow_matrix(first: Tensor, second: Tensor, pooling: str = "max") -> Tensor:
    """G = F₁ᵀ F₂ / (H·W), the FSP matrix of two stages (Yim et al., CVPR 2017, equation 1).

    Args:
        first: [B, C_1, H_1, W_1], output of the earlier stage.
        second: [B, C_2, H_2, W_2], output of the later one.
        pooling: How the larger maps are reduced to the smaller size: `max` (the paper) or `average` (RepDistiller).

    Returns:
        [B, C_1, C_2], float32 or wider.
    """
    pool = functional.adaptive_max_pool2d if pooling == "max" else average_pool
    first, second = to_common_size(at_least_float32(first), at_least_float32(second), pool)
    with torch.autocast(first.device.type, enabled=False):  # autocast would multiply in bfloat16
        return first.flatten(2) @ second.flatten(2).mT / first[0, 0].numel()


def flow_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], pooling: str = "max", elements: str = "mean"
) -> Tensor:
    """Σ_i ‖G_i(student) - G_i(teacher)‖² over consecutive stages: Yim et al., CVPR 2017, equation 2.

    In the paper's figure 2 both layers of a pair belong to one section of the network; pairs of the ends of
    consecutive stages are RepDistiller's. The paper gives all pairs the same factor λ_i but not its value, and matrices
    of wider stages have more elements.

    Args:
        student: Two or more maps [B, C_i, H_i, W_i], from input to output.
        teacher: As many maps, with the same channel counts; detached here.
        pooling: See `flow_matrix`.
        elements: `mean`, as in RepDistiller and KD-Zoo, divides each squared norm by its C_1·C_2 elements, so that all
            pairs have equal weight; `sum` is the squared norm of the paper.

    Returns:
        Scalar >= 0, averaged over the batch.
    """
    losses = []
    for (s_1, s_2), (t_1, t_2) in zip(pairwise(student), pairwise(teacher), strict=True):
        G_s, G_t = flow_matrix(s_1, s_2, pooling), flow_matrix(t_1, t_2, pooling)
        size = G_s.shape[1] * G_s.shape[2] if elements == "sum" else 1
        losses.append(size * mse(G_s, G_t))
    return torch.stack(losses).sum()


def gaussian_loss(mean: Tensor, variance: Tensor, target: Tensor) -> Tensor:
    """mean(½ [(μ - f)² / σ_c² + log σ_c²]): -log N(f; μ, σ²) less its constant ½ log 2π.

    VID of Ahn et al., CVPR 2019, equation 5: the negative variational bound on the mutual information, up to
    constants. The paper sums over elements; RepDistiller (after the authors' code) takes the mean, as here.

    Args:
        mean: μ, [B, C, H, W].
        variance: σ², [C], > 0.
        target: f, [B, C, H, W], detached here.

    Returns:
        Scalar in nats, float32 or wider, averaged over all elements; it may be negative.
    """
    mean, target = at_least_float32(mean), at_least_float32(target).detach()
    variance = at_least_float32(variance)[:, None, None]
    return 0.5 * ((mean - target).square() / variance + variance.log()).mean()


def noise_contrastive(
    scores: Tensor, positive: Tensor, times: Tensor, z: Tensor, negatives: int, images: int
) -> Tensor:
    """-mean_b { log[p_b+ / (p_b+ + m/n)] + Σ_j log[(m/n) / (p_bj + m/n)] } with p = exp(score) / z.

    Tian, Krishnan and Isola (ICLR 2020), equation 18, as in their code; the paper has no z.

    Args:
        scores: [B, N], inner products over τ.
        positive: int64 [B], the column of the positive.
        times: [B, N] (or [1, N]), how often each column counts as a negative; every row sums to m.
        z: Scalar > 0, the normalisation.
        negatives: m.
        images: n; the noise distribution is uniform, 1/n.

    Returns:
        Scalar >= 0 (up to the epsilon of 1e-7), in nats.
    """
    noise = negatives / images
    log_p = scores - z.log()
    log_both = (log_p.exp() + (noise + NCE_EPS)).log()
    own = (log_p - log_both).gather(1, positive[:, None])[:, 0]
    others = negatives * math.log(noise) - (times * log_both).sum(1)
    return -(own + others).mean()
