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

from ekd_lightning.methods.losses.features import *  # noqa: F403 (its `__all__`)
from ekd_lightning.methods.losses.logits import *  # noqa: F403 (its `__all__`)
from ekd_lightning.methods.losses.weights import *  # noqa: F403 (its `__all__`)
