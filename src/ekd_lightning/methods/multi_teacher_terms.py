"""Multi-teacher terms with one weight per teacher and image or batch: EBKD, CA-MKD and AE-KD.

The logit terms act on the student's ensemble output z̄ and use all teachers, whatever the assignment.
Shape letters: B batch, C classes, M teachers, K branches, D features, T temperature.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ekd_lightning.errors import UserError
from ekd_lightning.methods import losses
from ekd_lightning.methods.context import StepContext, TermContext
from ekd_lightning.methods.options import choice, number
from ekd_lightning.methods.pair_terms import (
    POOLED,
    FeatureSite,
    adapted,
    errors_of_images,
    make_adapter,
    pair_key,
    read_sites,
)
from ekd_lightning.methods.terms import SoftTerm, Term, register_term

SCALES = ("normalized", "published_code")


class _WeightedDistillation(SoftTerm):
    """Base of 1/B Σ_b Σ_m w_mb T² KL(p_T(t_mb) ‖ p_T(z̄_b)); subclasses define the weights w."""

    needs_labels = False
    needs_teachers = True

    def teacher_weights(self, context: StepContext) -> Tensor:
        """Returns weights [M, B] or [M, 1], detached."""
        raise NotImplementedError

    def forward(self, context: StepContext) -> Tensor:
        """Returns the mean over the batch of the weighted sum over the teachers, in nats."""
        losses_MB = losses.divergences(context.student.logits, context.teacher_logits, self.temperature)
        return (self.teacher_weights(context) * losses_MB).sum(0).mean()


@register_term("kd_ebkd")
class EntropyDistillation(_WeightedDistillation):
    """1/B Σ_b Σ_m w_mb T² KL(p_T(t_mb) ‖ p_T(z̄_b)) with w_mb = (1 - H(p_mb) / Σ_j H(p_jb)) / (M - 1).

    EBKD, the multi-teacher form of Kwon et al. (ICASSP 2020); see `losses.entropy_weights`. With one
    teacher it is plain distillation.

    Args:
        temperature: T > 0 of the distillation (entropies are taken at T = 1); None for the method's.
        scale: `normalized`: the weights of an image sum to 1; or `published_code`: (1 - H / Σ H) / M as in the CA-MKD
            repository, whose sum is (M - 1) / M.

    Raises:
        UserError: For an unknown scale, or `published_code` with one teacher, whose weight would be 0.
    """

    def __init__(self, weight: float, context: TermContext, *, scale: str = "normalized", **options: Any) -> None:
        super().__init__(weight, context, **options)
        M, self.factor = context.num_teachers, 1.0
        if choice("scale", scale, SCALES) == "published_code":
            if M == 1:
                raise UserError("scale=published_code gives a single teacher the weight 0; use scale=normalized")
            self.factor = (M - 1) / M

    def teacher_weights(self, context: StepContext) -> Tensor:
        """Returns weights [M, B]; columns sum to 1, or to (M - 1) / M with `published_code`."""
        return self.factor * losses.entropy_weights(context.teacher_logits)


@register_term("kd_camkd")
class ConfidenceDistillation(_WeightedDistillation):
    """1/B Σ_b Σ_m w_mb T² KL(p_T(t_mb) ‖ p_T(z̄_b)) with w_mb = (1 - softmax_m(CE_mb)) / (M - 1).

    The logit term of CA-MKD (Zhang, Chen and Wang, ICASSP 2022, arXiv 2201.00007). CE_mb is teacher m's
    cross-entropy with the label (the soft label of a mixed image) at T = 1. With one teacher w = 1. Only labelled
    images count.

    Args:
        scale: `normalized`, as in the paper: the weights of an image sum to 1; or `published_code`, divided once more
            by M as in the authors' repository.

    Raises:
        UserError: For an unknown scale.
    """

    needs_labels = True

    def __init__(self, weight: float, context: TermContext, *, scale: str = "normalized", **options: Any) -> None:
        super().__init__(weight, context, **options)
        self.factor = _confidence_factor(scale, context.num_teachers)

    def teacher_weights(self, context: StepContext) -> Tensor:
        """Returns weights [M, B]; columns sum to 1, or to 1 / M with `published_code`."""
        return self.factor * losses.image_weights("label", context.teacher_logits, context.batch.targets)


@register_term("kd_aekd")
class AdaptiveDistillation(_WeightedDistillation):
    """Σ_m w_m · 1/B Σ_b T² KL(p_T(t_mb) ‖ p_T(z̄_b)) with the weights w that minimise the combined gradient.

    AE-KD (Du et al., "Agree to Disagree: Adaptive Ensemble Knowledge Distillation in Gradient Space", NeurIPS
    2020): w = argmin ½ ‖Σ_m w_m g_m‖², Σ_m w_m = 1, 0 <= w_m <= tolerance, where g_m is the gradient of teacher
    m's loss to the student's logits. It has the closed form T (p_T(z̄) - p_T(t_m)), and the quadratic programme is
    solved exactly (the authors' code uses a one-class support vector machine on the CPU). Under DDP every process
    computes the weights of its own part of the batch.

    Args:
        tolerance: Largest weight of one teacher, in [1/M, 1]; 1/M makes all weights equal. The smaller, the more
            weight a disagreeing teacher keeps. Without effect with one teacher.
        gradient: `batch_mean`: g_m [C] is the mean over the images, as in the authors' code. `images`: g_m
            [B·C] keeps the images apart, the gradient of the batch's loss to all of its logits.

    Raises:
        UserError: If `tolerance * M` < 1, or there are too many teachers for the exact solution.
    """

    def __init__(
        self,
        weight: float,
        context: TermContext,
        *,
        tolerance: float = 0.6,
        gradient: str = "batch_mean",
        **options: Any,
    ) -> None:
        super().__init__(weight, context, **options)
        self.gradient = choice("gradient", gradient, ("batch_mean", "images"))
        self.solve = losses.MinNormWeights(context.num_teachers, number("tolerance", tolerance, above=0.0))

    def teacher_weights(self, context: StepContext) -> Tensor:
        """Returns weights [M, 1], which sum to 1."""
        gradients = losses.logit_gradients(context.student.logits, context.teacher_logits, self.temperature)
        vectors = gradients.mean(1) if self.gradient == "batch_mean" else gradients.flatten(1)
        return self.solve(vectors)[:, None]


@register_term("feature_camkd")
class ConfidenceFeatures(Term):
    """mean_k 1/B Σ_b Σ_m v_kmb MSE(r_km(h_kb), h_mb) with v_kmb = (1 - softmax_m(CE_kmb)) / (M - 1).

    The feature term of CA-MKD (Zhang, Chen and Wang, ICASSP 2022, arXiv 2201.00007). CE_kmb is the cross-entropy
    of teacher m's frozen classifier on the student's projected features, so a teacher counts more if its classifier
    already works on them. r_km is a 1×1 convolution, batch norm and ReLU, as published, one for every branch and
    teacher. Each branch has a loss of its own, and their mean has the scale of a plain student's loss. MSE is the mean
    over an image's elements. Maps of unequal size are averaged to the smaller size (the authors' code enlarges a
    smaller student map instead). Only labelled images count.

    Args:
        feature: `last`, the maps of the last stage, as published; or `pooled`, their average over space, which teacher
            tables always hold.
        grid: Side of a small grid that the maps are averaged to first, as in `pair_terms.FeatureTerm`; None for whole
            maps.
        scale: `normalized`, as in the paper; or `published_code`, divided once more by M.
        detach_weights: Whether v is a constant. The paper does not specify it; the authors' code lets gradients flow
            through v, which rewards the student for making a teacher's classifier fail where its features fit badly.

    Raises:
        UserError: For an unknown feature or scale, a grid that does not fit, or a teacher without a linear classifier.
    """

    needs_teachers = True
    needs_networks = True

    def __init__(
        self,
        weight: float,
        context: TermContext,
        *,
        feature: str = "last",
        grid: int | None = None,
        scale: str = "normalized",
        detach_weights: bool = True,
    ) -> None:
        super().__init__(weight)
        K, M = context.num_branches, context.num_teachers
        self.num_branches, self.num_teachers = K, M
        self.factor = _confidence_factor(scale, M)
        self.detach_weights = detach_weights
        pairs = [(k, m) for k in range(K) for m in range(M)]
        self.site = FeatureSite(choice("feature", feature, ("last", POOLED)), context, pairs, grid)
        read_sites(self, self.site)
        for m in range(context.num_teachers):
            context.teacher_width(m)  # raises for a teacher without a linear classifier
        site = self.site
        self.adapters = nn.ModuleDict(
            {pair_key(k, m): make_adapter("project", site.student_shape, site.teacher_shapes[m]) for k, m in pairs}
        )

    def forward(self, context: StepContext) -> Tensor:
        """Returns the mean over branches and images of the weighted sum over the teachers."""
        return torch.stack([self._branch(context, k) for k in range(self.num_branches)]).mean()

    def _branch(self, context: StepContext, k: int) -> Tensor:
        distances, errors = [], []
        for m in range(self.num_teachers):
            student, teacher = losses.to_common_size(*self.site.features(context, k, m))
            # The last stage of the package's networks ends with a ReLU, and so must the projection.
            projected = functional.relu(adapted(self.adapters[pair_key(k, m)], student))
            distances.append(errors_of_images(projected, teacher))
            errors.append(self._error(context, m, projected))
        weights_MB = self.factor * losses.confidence_weights(torch.stack(errors))
        return (weights_MB * torch.stack(distances)).sum(0).mean()

    def _error(self, context: StepContext, m: int, projected: Tensor) -> Tensor:
        """Cross-entropy [B] of teacher m's classifier on projected features [B, D_m] or [B, D_m, H, W]."""
        assert context.networks is not None
        features = projected.detach() if self.detach_weights else projected
        with torch.autocast(features.device.type, enabled=False):
            logits = context.networks.classify(m, features)
        return losses.cross_entropies(logits[None], context.batch.targets)[0]


def _confidence_factor(scale: str, num_teachers: int) -> float:
    return 1.0 / num_teachers if choice("scale", scale, SCALES) == "published_code" else 1.0
