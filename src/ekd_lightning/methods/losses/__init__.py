"""Losses of knowledge distillation as pure functions of tensors; gradients flow to the student only.

Conventions:

- softmax is computed in float32 at least (bfloat16 logits are converted first, float64 is kept);
- teacher outputs are detached;
- KL is summed over classes, averaged over all other dimensions ("batchmean"), and multiplied by T²;
- MSE is averaged over all elements.

`docs/methods.md` lists the losses with their sources. The losses of EKD follow the project's reconstruction of Ensemble
Knowledge Distillation (Asif, Tang, Harrer, arXiv 1909.08097): the full text of the paper was not available, so the
reconstruction rests on its abstract and on secondary descriptions.
"""

from ekd_lightning.methods.losses.features import (
    angle_loss,
    angles,
    attention_loss,
    attention_map,
    directions,
    distance_loss,
    flow_loss,
    flow_matrix,
    gaussian_loss,
    noise_contrastive,
    relative_distances,
    similarities,
    similarity_loss,
    to_common_size,
)
from ekd_lightning.methods.losses.logits import (
    ambiguity,
    at_least_float32,
    combine_teachers,
    cross_entropy,
    decoupled,
    kd_divergence,
    mix_peers,
    mse,
    mutual_divergence,
    soft_cross_entropy,
    standardized,
)
from ekd_lightning.methods.losses.weights import (
    MinNormWeights,
    confidence_weights,
    cross_entropies,
    divergences,
    entropy_weights,
    image_weights,
    logit_gradients,
)

__all__ = [
    "MinNormWeights",
    "ambiguity",
    "angle_loss",
    "angles",
    "at_least_float32",
    "attention_loss",
    "attention_map",
    "combine_teachers",
    "confidence_weights",
    "cross_entropies",
    "cross_entropy",
    "decoupled",
    "directions",
    "distance_loss",
    "divergences",
    "entropy_weights",
    "flow_loss",
    "flow_matrix",
    "gaussian_loss",
    "image_weights",
    "kd_divergence",
    "logit_gradients",
    "mix_peers",
    "mse",
    "mutual_divergence",
    "noise_contrastive",
    "relative_distances",
    "similarities",
    "similarity_loss",
    "soft_cross_entropy",
    "standardized",
    "to_common_size",
]
