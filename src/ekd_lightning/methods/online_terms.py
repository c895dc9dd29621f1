"""Online distillation terms, whose branches teach each other: mutual learning, ONE, OKDDip.

None of them needs a teacher. Shape letters: B batch, C classes, K branches, D features, T temperature.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ekd_lightning.methods import losses
from ekd_lightning.methods.context import StepContext, TermContext
from ekd_lightning.methods.options import choice, number
from ekd_lightning.methods.terms import BranchTerm, SoftTerm, register_term

LEADER_AND_PEERS = 3


@register_term("mutual")
class Mutual(SoftTerm, BranchTerm):
    """mean_k 1/(K-1) Σ_{l≠k} T² KL(p_T(z_l) ‖ p_T(z_k)), targets detached: every branch imitates all others.

    Deep Mutual Learning (Zhang, Xiang, Hospedales and Lu, CVPR 2018), which has T = 1; see `losses.mutual_divergence`.
    Here all branches are updated at once; the authors' code updates them in turn.

    Args:
        reduction: `mean` or `sum` over the K branches; `sum` gives each network its own loss unscaled.
    """

    needs_labels = False
    least_branches = 2

    def forward(self, context: StepContext) -> Tensor:
        """Returns the mean over the batch, the other branches, and the mean or sum over branches, in nats."""
        return self.factor * losses.mutual_divergence(context.student.branch_logits, self.temperature)


@register_term("self_distillation")
class SelfDistillation(SoftTerm, BranchTerm):
    """mean_k T² KL(p_T(z̄) ‖ p_T(z_k)), target detached: every branch imitates the student's ensemble output.

    ONE (Lan, Zhu and Gong, "Knowledge Distillation by On-the-Fly Native Ensemble", NeurIPS 2018), where z̄ is the
    gated sum of the branches' logits (`student.ensemble=gate`). As the target is detached, the gate learns only from
    the cross-entropy of z̄.
    """

    needs_labels = False
    least_branches = 2

    def forward(self, context: StepContext) -> Tensor:
        """Returns the mean over the batch and the mean or sum over branches, in nats."""
        branches, logits = context.student.branch_logits, context.student.logits
        return self.factor * losses.kd_divergence(branches, logits.expand_as(branches), self.temperature)


@register_term("peer_attention")
class PeerAttention(SoftTerm, BranchTerm):
    """mean_a T² KL(p_T(t_a) ‖ p_T(z_a)) over the K-1 peers, where t_a = Σ_b α_ab z_b mixes the peers' logits.

    The first level of OKDDip (Chen, Mei, Wang, Feng and Chen, "Online Knowledge Distillation with Diverse Peers",
    AAAI 2020): α_ab = softmax_b(Wq h_a · Wk h_b) over all peers b, a itself included, from pooled features h, with
    Wq and Wk two linear maps D -> D / 8 without bias. The last branch is the leader and takes no part.

    Gradients: the authors' code detaches nothing, so a peer also receives gradients as a target of other peers, and
    Wq and Wk learn only through the targets. Here the logits and features in a target are detached, but α is not:
    peers receive gradients only as imitators, and Wq and Wk the same gradient as in the authors' code. Both thus have
    a gradient in every step, as DDP requires.

    Args:
        reduction: `mean` or `sum` over the K-1 peers.
        combine: What α mixes: `logits`, as in the authors' code, or `probabilities` at T.
        divisor: D over the width of Wq and Wk, >= 1; 8 in the authors' code.
        detach_targets: False lets gradients flow into the targets, as in the authors' code.
    """

    needs_labels = False
    least_branches = LEADER_AND_PEERS

    def __init__(
        self,
        weight: float,
        context: TermContext,
        *,
        combine: str = "logits",
        divisor: float = 8,
        detach_targets: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(weight, context, **options)
        self.factor = min(self.factor, context.num_branches - 1.0)  # the leader is no peer
        self.combine = choice("combine", combine, ("logits", "probabilities"))
        self.detach_targets = detach_targets
        D = context.student_features
        width = max(1, int(D / number("divisor", divisor, low=1.0)))
        self.query = nn.Linear(D, width, bias=False)
        self.key = nn.Linear(D, width, bias=False)

    def log_attention(self, features_PBD: Tensor) -> Tensor:
        """Returns the logarithm of each peer's attention to every peer, itself included, from features [P, B, D].

        It is log α [P, P, B], float32 or wider; α sums to 1 over the second dimension.
        """
        # float32: autocast would take the scores, and so the softmax, from bfloat16 products.
        with torch.autocast(features_PBD.device.type, enabled=False):
            features = features_PBD.to(self.query.weight.dtype)
            queries, keys = self.query(features), self.key(features)
            scores = (queries[:, None] * keys[None]).sum(-1)
        return scores.log_softmax(1)

    def forward(self, context: StepContext) -> Tensor:
        """Returns the mean over the batch and the mean or sum over the peers, in nats."""
        logits_PBC = losses.at_least_float32(context.student.branch_logits[:-1])
        features_PBD, sources = context.student.pooled[:-1], logits_PBC
        if self.detach_targets:
            features_PBD, sources = features_PBD.detach(), sources.detach()
        log_attention = self.log_attention(features_PBD).to(sources)
        target = losses.mix_peers(sources, log_attention, self.temperature, self.combine)
        return self.factor * losses.kd_divergence(logits_PBC, target, self.temperature, detach=False)


@register_term("leader")
class Leader(SoftTerm):
    """T² KL(p_T(mean_a z_a) ‖ p_T(z_K)): the last branch, the leader, imitates the mean logits of its K-1 peers.

    The second level of OKDDip (Chen et al., AAAI 2020); the leader is the network to be deployed.

    Args:
        detach_targets: False lets gradients flow into the peers, as in the authors' code.
    """

    needs_labels = False
    least_branches = LEADER_AND_PEERS

    def __init__(self, weight: float, context: TermContext, *, detach_targets: bool = True, **options: Any) -> None:
        super().__init__(weight, context, **options)
        self.detach_targets = detach_targets

    def forward(self, context: StepContext) -> Tensor:
        """Returns the mean over the batch, in nats."""
        logits_KBC = losses.at_least_float32(context.student.branch_logits)
        target, detach = logits_KBC[:-1].mean(0), self.detach_targets
        return losses.kd_divergence(logits_KBC[-1], target, self.temperature, detach=detach)
