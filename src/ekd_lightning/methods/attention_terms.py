"""Attention transfer: where a network looks, stage by stage.

Shape letters: B batch, M teachers, K branches; in maps [B, C, H, W] the C is channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ekd_lightning.methods.losses import at_least_float32
from ekd_lightning.methods.options import choice
from ekd_lightning.methods.pair_terms import PairTerm, map_sites, to_common_size
from ekd_lightning.methods.terms import StepContext, TermContext, register_term

FORMS = ("squared", "norm")


def attention_map(features: Tensor) -> Tensor:
    """Q / ‖Q‖₂ with Q = mean_c f_c², the attention map of Zagoruyko and Komodakis (2017, section 3.1) for p = 2.

    Args:
        features: [B, C, H, W].

    Returns:
        [B, H·W], rows of length 1 (0 where all features are 0), float32 or wider, >= 0. The order of the channels
        and a positive factor make no difference.
    """
    return functional.normalize(at_least_float32(features).square().mean(1).flatten(1))


def attention_loss(student: Tensor, teacher: Tensor, form: str = "squared") -> Tensor:
    """The distance of two networks' attention maps at one stage.

    Args:
        student: [B, C, H, W].
        teacher: [B, C_m, H_m, W_m], detached here; the larger maps are averaged to the smaller size.
        form: `squared` or `norm`; see `Attention`.

    Returns:
        Scalar >= 0, 0 for equal maps.
    """
    student, teacher = to_common_size(at_least_float32(student), at_least_float32(teacher).detach())
    difference = attention_map(student) - attention_map(teacher)
    if form == "squared":
        return difference.square().mean()
    return torch.linalg.vector_norm(difference, dim=1).mean() / (2 * difference.shape[1])


@register_term("attention")
class Attention(PairTerm):
    """Σ_stages mean((Q_s - Q_m)²) with attention maps of length 1: Zagoruyko and Komodakis, ICLR 2017.

    Their code, and all others, square the difference and take the mean over all B·H·W elements. Their equation
    (2) has ½ β ‖Q_s - Q_m‖₂, not squared, where β is 1000 over the number of elements and images: `form: norm`
    is ½ Σ_b ‖Q_s - Q_m‖₂ / (B·H·W). Both are meant for the weight 1000. Summed over stages, averaged over branches
    and teachers as in every `PairTerm`.

    Args:
        weight: Factor in the total, >= 0; the paper's β.
        context: The networks' sizes and the assignment.
        stages: Stages to compare; channel counts and sizes may differ.
        form: `squared` (published code) or `norm` (the paper's equation).
        reduction: `mean` or `sum` over the K branches.

    Raises:
        UserError: For a stage that a network lacks.
    """

    def __init__(
        self,
        weight: float,
        context: TermContext,
        *,
        stages: Sequence[str] = ("stage1", "stage2", "stage3"),
        form: str = "squared",
        reduction: str = "mean",
    ) -> None:
        super().__init__(weight, context, reduction)
        self.form = choice("form", form, FORMS)
        self.sites = map_sites(stages, context, self.pairs)
        self.student_stages = tuple(name for site in self.sites for name in site.student_stages)
        self.teacher_stages = tuple(name for site in self.sites for name in site.teacher_stages)

    def compare(self, context: StepContext, k: int, m: int) -> Tensor:
        """Returns the sum over the stages."""
        losses = [attention_loss(*site.features(context, k, m), self.form) for site in self.sites]
        return torch.stack(losses).sum()
