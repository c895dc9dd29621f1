"""Contrastive terms (representation distillation, CRD): an image's two embeddings agree, those of other classes do not.

Shape letters: B batch, N scores of one anchor, D features, M teachers, K branches; n is the number of training
images.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from ekd_lightning.errors import UserError
from ekd_lightning.methods.context import StepContext, TermContext
from ekd_lightning.methods.contrast_memory import MemoryBank, TrainingImages, of_all_processes
from ekd_lightning.methods.losses import at_least_float32, noise_contrastive
from ekd_lightning.methods.options import choice, count, number
from ekd_lightning.methods.pair_terms import POOLED, FeatureSite, PairTerm, pair_key
from ekd_lightning.methods.terms import register_term

SCORES = ("auto", "whole", "gathered")
WHOLE_BANK_UP_TO = 32
"""Multiplying with a whole bank is cheaper up to so many times the number of negatives (measured on a processor)."""


class Embedding(nn.Module):
    """A linear map to vectors of length 1: [B, D_in] -> [B, D].

    Args:
        inputs: D_in.
        features: D.
    """

    def __init__(self, inputs: int, features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, features)

    def forward(self, pooled: Tensor) -> Tensor:
        """Maps and normalises; float32 or wider."""
        return functional.normalize(at_least_float32(self.linear(pooled.to(self.linear.weight))))


class ContrastiveSide(nn.Module):
    """One network's embeddings: how they are computed, the bank of them, and z of the scores against the bank.

    Args:
        inputs: Size of the network's pooled features.
        features: D.
        images: n.
        momentum: Of the bank.
        generator: Draws the bank's start.
    """

    z: Tensor

    def __init__(self, inputs: int, features: int, images: int, momentum: float, generator: torch.Generator) -> None:
        super().__init__()
        self.embed = Embedding(inputs, features)
        self.memory = MemoryBank(images, features, momentum, generator)
        # In the checkpoint, as it is estimated once, in the first step; 0 until then.
        self.register_buffer("z", torch.zeros(()))
        self._may_lack_z = True

    @torch.no_grad()
    def normalisation(self, scores: Tensor, positive: Tensor, times: Tensor) -> Tensor:
        """Returns z = n · mean of exp(score) over the positives and negatives of the first training step."""
        if not self._may_lack_z:
            return self.z.clone()
        p = scores.exp()
        total = (times * p).sum(1) + p.gather(1, positive[:, None])[:, 0]
        estimate = len(self.memory.bank) * of_all_processes(total / (times.sum(1) + 1)).mean()
        # After a resume z is known; whether it is would have to be read from the device, so it is not asked.
        z = torch.where(self.z > 0, self.z, estimate)
        if self.training:
            self.z.copy_(z)
            self._may_lack_z = False
        return z

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._may_lack_z = True


class Draw(NamedTuple):
    """One step's positives and negatives: the batch's rows [B] in the banks; columns and counts of the scores."""

    rows: Tensor
    positive: Tensor
    times: Tensor
    gathered: Tensor | None  # int64 [B, 1 + m], rows of the scored images; None for the whole bank


@register_term("crd")
class ContrastiveRepresentation(PairTerm):
    """NCE of student anchors against the teacher's bank plus NCE of teacher anchors against the student's.

    Tian, Krishnan and Isola, "Contrastive Representation Distillation", ICLR 2020 (section 3.2; equations 18, 19).
    Both networks' pooled features are mapped to unit vectors by trained linear maps. An anchor's positive is the
    other network's bank entry of the same image, its negatives are entries of images of other classes, drawn with
    replacement (the published sampler does so when there are fewer such images than negatives). After the scores
    are computed the batch's entries move towards its new embeddings. All of this, and z, is state: it travels with
    the device and the checkpoint, and is the same in all processes.

    Args:
        weight: Factor in the total, >= 0.
        context: The networks' sizes, the assignment, the training images and their labels, the seed of the draws.
        features: D, size of the embeddings.
        negatives: m >= 1, for each image and step; the same ones for both sums and all pairs.
        tau: Temperature of the scores, > 0.
        momentum: Share of the old entry when a bank is updated, in [0, 1).
        scores: How the same numbers are computed: `whole`, one product with the whole bank, or `gathered`, with
            the drawn entries only; `auto` takes the cheaper one.
        reduction: `mean` or `sum` over the K branches.

    Raises:
        UserError: For values outside these ranges, or when nobody says which images are trained on.
    """

    needs_pooled = True

    def __init__(
        self,
        weight: float,
        context: TermContext,
        *,
        features: int = 128,
        negatives: int = 16384,
        tau: float = 0.07,
        momentum: float = 0.5,
        scores: str = "auto",
        **options: Any,
    ) -> None:
        super().__init__(weight, context, **options)
        if context.train_index is None or context.train_labels is None:
            raise UserError("crd keeps a bank of the training images: give train_index and train_labels")
        features, self.negatives = count("features", features), count("negatives", negatives)
        self.tau = number("tau", tau, above=0.0)
        if number("momentum", momentum, low=0.0) >= 1.0:
            raise UserError(f"momentum={momentum!r} is not allowed; give a number in [0, 1)")
        self.images = TrainingImages(context.train_index, context.train_labels, context.seed)
        n = len(self.images)
        auto = "whole" if n <= WHOLE_BANK_UP_TO * self.negatives else "gathered"
        self.scores = auto if choice("scores", scores, SCORES) == "auto" else scores
        self.site = FeatureSite(POOLED, context, self.pairs)
        # The same start in every process, whatever else has drawn before.
        generator = torch.Generator().manual_seed(context.seed)

        def side(inputs: int) -> ContrastiveSide:
            return ContrastiveSide(inputs, features, n, momentum, generator)

        teachers = [(pair_key(k, m), self.site.teacher_shape(m)[0]) for k, m in self.pairs]
        self.student_sides = nn.ModuleDict({key: side(self.site.student_shape()[0]) for key, _ in teachers})
        self.teacher_sides = nn.ModuleDict({key: side(inputs) for key, inputs in teachers})
        self._draw: Draw | None = None

    def forward(self, context: StepContext) -> Tensor:
        """Returns the mean over the batch, and updates the banks when training."""
        self._draw = self._drawn(context)
        with torch.autocast(context.batch.index.device.type, enabled=False):  # scores / τ need float32
            value = super().forward(context)
        self._draw = None
        return value

    def _drawn(self, context: StepContext) -> Draw:
        rows = self.images.rows(context.batch.index)
        drawn = self.images.negatives(rows, self.negatives, context.step_tensor())
        if self.scores == "gathered":
            times = torch.ones(1, 1 + self.negatives, device=rows.device)
            times[:, 0] = 0
            return Draw(rows, torch.zeros_like(rows), times, torch.cat([rows[:, None], drawn], dim=1))
        B, n = len(rows), len(self.images)
        # Counting is cheaper than gathering scores and scattering their gradients. Flat, so that it is
        # deterministic on accelerators too.
        flat = (drawn + n * torch.arange(B, device=rows.device)[:, None]).flatten()
        times = torch.zeros(B * n, device=rows.device).scatter_add_(
            0, flat, torch.ones((), device=rows.device).expand(len(flat))
        )
        return Draw(rows, rows, times.view(B, n), None)

    def compare(self, context: StepContext, k: int, m: int) -> Tensor:
        """Returns the sum of both directions for branch k and teacher m."""
        assert self._draw is not None
        student = cast(ContrastiveSide, self.student_sides[pair_key(k, m)])
        teacher = cast(ContrastiveSide, self.teacher_sides[pair_key(k, m)])
        f_s, f_t = self.site.features(context, k, m)
        v_s, v_t = student.embed(f_s), teacher.embed(f_t)
        value = self._against(v_s, teacher) + self._against(v_t, student)
        if self.training:
            rows = of_all_processes(self._draw.rows)
            student.memory.update(rows, of_all_processes(v_s))
            teacher.memory.update(rows, of_all_processes(v_t))
        return value

    def _against(self, anchors: Tensor, other: ContrastiveSide) -> Tensor:
        """The loss of anchors [B, D] against the other network's bank."""
        assert self._draw is not None
        draw, anchors = self._draw, anchors.to(other.memory.bank)
        if draw.gathered is None:
            scores = other.memory.scores(anchors) / self.tau
        else:
            scores = other.memory.gathered_scores(anchors, draw.gathered) / self.tau
        times = draw.times.to(scores)
        z = other.normalisation(scores, draw.positive, times)
        return noise_contrastive(scores, draw.positive, times, z, self.negatives, len(self.images))
