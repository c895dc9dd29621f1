"""The flow of the solution procedure: how features of one stage go with those of the next.

Shape letters: B batch, M teachers, K branches; in maps [B, C, H, W] the C is channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from ekd_lightning.methods.losses import at_least_float32, mse
from ekd_lightning.methods.options import choice
from ekd_lightning.methods.pair_terms import PairTerm, map_sites
from ekd_lightning.methods.terms import StepContext, TermContext, register_term

POOLINGS = ("max", "average")
ELEMENTS = ("mean", "sum")


def flow_matrix(first: Tensor, second: Tensor, pooling: str = "max") -> Tensor:
    """G = F₁ᵀ F₂ / (H·W), the FSP matrix of two stages (Yim et al., CVPR 2017, equation 1).

    Args:
        first: [B, C_1, H_1, W_1], output of the earlier stage.
        second: [B, C_2, H_2, W_2], output of the later one.
        pooling: How the larger maps come to the smaller size, `max` (the paper's) or `average` (RepDistiller's).

    Returns:
        [B, C_1, C_2], float32 or wider.
    """
    first, second = at_least_float32(first), at_least_float32(second)
    size = (min(first.shape[2], second.shape[2]), min(first.shape[3], second.shape[3]))
    pool = functional.adaptive_max_pool2d if pooling == "max" else functional.adaptive_avg_pool2d
    first, second = (f if f.shape[2:] == size else pool(f, size) for f in (first, second))
    with torch.autocast(first.device.type, enabled=False):  # it would multiply in bfloat16
        return first.flatten(2) @ second.flatten(2).mT / (size[0] * size[1])


@register_term("fsp")
class FlowOfSolution(PairTerm):
    """Σ_i ‖G_i(student) - G_i(teacher)‖² over consecutive stages: Yim et al., CVPR 2017, equation 2.

    The paper's factors λ_i of the pairs of stages are equal, but their value is not given, and matrices of wider
    stages have more elements. `elements: mean`, as in RepDistiller and KD-Zoo, divides each by its C_1·C_2, so
    that all pairs count alike; `sum` is the squared norm as printed. Averaged over the batch.

    Args:
        weight: Factor in the total, >= 0.
        context: The networks' sizes and the assignment.
        stages: Two or more stages from input to output; each makes a pair with the next.
        pooling: Before the product, `max` (the paper's) or `average` (RepDistiller's); see `flow_matrix`.
        elements: `mean` or `sum` over a matrix's elements.
        reduction: `mean` or `sum` over the K branches.

    Raises:
        UserError: For a stage that a network lacks, or channel counts that differ at a stage.
    """

    def __init__(
        self,
        weight: float,
        context: TermContext,
        *,
        stages: Sequence[str] = ("stem", "stage1", "stage2", "stage3"),
        pooling: str = "max",
        elements: str = "mean",
        reduction: str = "mean",
    ) -> None:
        super().__init__(weight, context, reduction)
        self.pooling = choice("pooling", pooling, POOLINGS)
        self.elements = choice("elements", elements, ELEMENTS)
        self.sites = map_sites(stages, context, self.pairs, least=2)
        for site in self.sites:
            for m in sorted({m for _, m in self.pairs}):
                site.require_equal_channels(m, "fsp compares only networks of equal width")
        self.student_stages = tuple(name for site in self.sites for name in site.student_stages)
        self.teacher_stages = tuple(name for site in self.sites for name in site.teacher_stages)

    def compare(self, context: StepContext, k: int, m: int) -> Tensor:
        """Returns the sum over the pairs of stages."""
        student, teacher = zip(*(site.features(context, k, m) for site in self.sites), strict=True)
        losses = []
        for (s_1, s_2), (t_1, t_2) in zip(pairwise(student), pairwise(teacher), strict=True):
            G_s, G_t = flow_matrix(s_1, s_2, self.pooling), flow_matrix(t_1, t_2, self.pooling)
            size = G_s.shape[1] * G_s.shape[2] if self.elements == "sum" else 1
            losses.append(size * mse(G_s, G_t))
        return torch.stack(losses).sum()
