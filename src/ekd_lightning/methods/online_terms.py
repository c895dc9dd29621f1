"""Terms of students whose branches teach each other: mutual learning, ONE's self-distillation, OKDDip.

None of them needs a teacher. Shape letters: B batch, C classes, K branches, D features, T temperature.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from ekd_lightning.errors import UserError
from ekd_lightning.methods import losses
from ekd_lightning.methods.logit_terms import branch_factor
from ekd_lightning.methods.options import choice, number
from ekd_lightning.methods.terms import StepContext, Term, TermContext, register_term

LEADER_AND_PEERS = 3


class _BranchesTeach(Term):
    """What the terms below share: a temperature, and a least number of branches."""

    least_branches = 2

    def __init__(self, weight: float, context: TermContext, temperature: float | None) -> None:
        super().__init__(weight)
        K, least = context.num_branches, self.least_branches
        if least > K:
            raise UserError(
                f"student.branches={K} is not allowed with this term; give at least {least} branches"
            )
        self.uses_temperature = temperature is None
        chosen = context.temperature if temperature is None else temperature
        self.temperature = number("temperature", chosen, above=0.0)


@register_term("mutual")
class Mutual(_BranchesTeach):
    """mean_k 1/(K-1) Σ_{l≠k} T² KL(p_T(z_l) ‖ p_T(z_k)), targets detached: every branch imitates all others.

    Deep Mutual Learning (Zhang, Xiang, Hospedales and Lu, CVPR 2018, equations 4 to 6 and their extension to
    more networks), with T = 1 there. All networks are updated at once, the authors' code updates them in turn.

    Args:
        weight: Factor in the total, >= 0.
        context: The networks' sizes, the method's temperature.
        temperature: T > 0; None for the method's.
        reduction: `mean` or `sum` over the K branches; `sum` gives each network its own loss unscaled.

    Raises:
        UserError: With fewer than two branches.
    """

    def __init__(
        self,
        weight: float,
        context: TermContext,
        *,
        temperature: float | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__(weight, context, temperature)
        K = context.num_branches
        self.factor = branch_factor(reduction, K)
        self.others = [[other for other in range(K) if other != k] for k in range(K)]

    def forward(self, context: StepContext) -> Tensor:
        """Returns the mean over the batch, the other branches, and the mean or sum over branches, in nats."""
        logits_KBC = context.student.branch_logits
        # stack of views, not indexing by a list: that would copy the indices to the device in every step.
        targets = torch.stack([torch.stack([logits_KBC[i] for i in row]) for row in self.others])
        return self.factor * losses.kd_divergence(
            logits_KBC[:, None].expand_as(targets), targets, self.temperature
        )


@register_term("self_distillation")
class SelfDistillation(_BranchesTeach):
    """mean_k T² KL(p_T(z̄) ‖ p_T(z_k)), target detached: every branch imitates the student's ensemble output.

    ONE (Lan, Zhu and Gong, "Knowledge Distillation by On-the-Fly Native Ensemble", NeurIPS 2018), where z̄ is the
    gated sum of the branches' logits (`student.ensemble=gate`). The target being detached, the gate learns from
    the cross-entropy of z̄ alone.

    Args:
        weight: Factor in the total, >= 0.
        context: The networks' sizes, the method's temperature.
        temperature: T > 0; None for the method's.
        reduction: `mean` or `sum` over the K branches.

    Raises:
        UserError: With one branch, which is its own ensemble.
    """

    def __init__(
        self,
        weight: float,
        context: TermContext,
        *,
        temperature: float | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__(weight, context, temperature)
        self.factor = branch_factor(reduction, context.num_branches)

    def forward(self, context: StepContext) -> Tensor:
        """Returns the mean over the batch and the mean or sum over branches, in nats."""
        student = context.student
        target = student.logits.expand_as(student.branch_logits)
        return self.factor * losses.kd_divergence(student.branch_logits, target, self.temperature)


@register_term("peer_attention")
class PeerAttention(_BranchesTeach):
    """mean_a T² KL(p_T(t_a) ‖ p_T(z_a)) over the K-1 peers, where t_a = Σ_b α_ab z_b mixes the peers' logits.

    The first level of OKDDip (Chen, Mei, Wang, Feng and Chen, "Online Knowledge Distillation with Diverse Peers",
    AAAI 2020): α_ab = softmax_b(Wq h_a · Wk h_b) over all peers b, a itself included, from pooled features h, with
    Wq and Wk two linear maps D -> D / 8 without bias. The last branch is the leader and takes no part.

    What learns from what. The authors' code detaches nothing, so that a peer is also moved as the target of
    others, and Wq and Wk learn from this loss through the targets alone. Here the logits and features that make
    up a target are detached, but α is not: peers are moved as imitators only, and Wq and Wk get the very gradient
    of the authors' code. So both have a gradient in every step, as DDP demands.

    Args:
        weight: Factor in the total, >= 0.
        context: The networks' sizes, the method's temperature.
        temperature: T > 0; None for the method's.
        reduction: `mean` or `sum` over the K-1 peers.
        combine: What α mixes: `logits`, as in the authors' code, or `probabilities` at T.
        divisor: D over the width of Wq and Wk, >= 1; 8 in the authors' code.
        detach_targets: False lets gradients flow into the targets, as in the authors' code.

    Raises:
        UserError: With fewer than three branches (two peers and a leader).
    """

    least_branches = LEADER_AND_PEERS

    def __init__(
        self,
        weight: float,
        context: TermContext,
        *,
        temperature: float | None = None,
        reduction: str = "mean",
        combine: str = "logits",
        divisor: float = 8,
        detach_targets: bool = True,
    ) -> None:
        super().__init__(weight, context, temperature)
        self.factor = branch_factor(reduction, context.num_branches - 1)
        self.combine = choice("combine", combine, ("logits", "probabilities"))
        self.detach_targets = bool(detach_targets)
        D = context.student_features
        width = max(1, int(D / number("divisor", divisor, low=1.0)))
        self.query = nn.Linear(D, width, bias=False)
        self.key = nn.Linear(D, width, bias=False)

    def log_attention(self, features_PBD: Tensor) -> Tensor:
        """How much each peer listens to each other, as a logarithm.

        Args:
            features_PBD: Pooled features of the P peers, [P, B, D].

        Returns:
            log α [P, P, B], float32 or wider; α sums to 1 over the second dimension.
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
        target = self._mix(self.log_attention(features_PBD).to(sources), sources)
        return self.factor * _divergence(logits_PBC, target, self.temperature)

    def _mix(self, log_attention_PPB: Tensor, logits_PBC: Tensor) -> Tensor:
        """Targets [P, B, C], as logits."""
        if self.combine == "logits":
            return (log_attention_PPB.exp()[..., None] * logits_PBC[None]).sum(1)
        log_probs = functional.log_softmax(logits_PBC / self.temperature, dim=-1)
        return self.temperature * torch.logsumexp(log_attention_PPB[..., None] + log_probs[None], dim=1)


@register_term("leader")
class Leader(_BranchesTeach):
    """T² KL(p_T(mean_a z_a) ‖ p_T(z_K)): the last branch, the leader, imitates the mean logits of its K-1 peers.

    The second level of OKDDip (Chen et al., AAAI 2020); the leader is the network to be deployed.

    Args:
        weight: Factor in the total, >= 0.
        context: The networks' sizes, the method's temperature.
        temperature: T > 0; None for the method's.
        detach_targets: False lets gradients flow into the peers, as in the authors' code.

    Raises:
        UserError: With fewer than three branches (two peers and a leader).
    """

    least_branches = LEADER_AND_PEERS

    def __init__(
        self,
        weight: float,
        context: TermContext,
        *,
        temperature: float | None = None,
        detach_targets: bool = True,
    ) -> None:
        super().__init__(weight, context, temperature)
        self.detach_targets = bool(detach_targets)

    def forward(self, context: StepContext) -> Tensor:
        """Returns the mean over the batch, in nats."""
        logits_KBC = losses.at_least_float32(context.student.branch_logits)
        target = logits_KBC[:-1].mean(0)
        if self.detach_targets:
            target = target.detach()
        return _divergence(logits_KBC[-1], target, self.temperature)


def _divergence(logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """`losses.kd_divergence` of tensors [..., B, C] whose target may have a gradient."""
    student = functional.log_softmax(logits / temperature, dim=-1).flatten(0, -2)
    wanted = functional.log_softmax(target / temperature, dim=-1).flatten(0, -2)
    return temperature**2 * functional.kl_div(student, wanted, reduction="batchmean", log_target=True)
