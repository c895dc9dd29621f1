"""Contrastive representation distillation (CRD): each image's two embeddings attract, other classes' repel.

Shape letters: B batch, N scores of one anchor, C classes, D features, M teachers, K branches; n is the number of
training images.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional

from ekd_lightning.data.order import splitmix64
from ekd_lightning.errors import UserError
from ekd_lightning.methods.context import StepContext, TermContext
from ekd_lightning.methods.losses import at_least_float32, noise_contrastive
from ekd_lightning.methods.options import choice, count, number
from ekd_lightning.methods.pair_terms import POOLED, FeatureTerm, pair_key
from ekd_lightning.methods.terms import register_term

SCORES = ("auto", "whole", "gathered")
WHOLE_BANK_UP_TO = 32
"""Multiplying with a whole bank is cheaper up to so many times the number of negatives (measured on a processor)."""
STREAM_NEGATIVES = 9  # a number of its own among the streams of data.order
_LOW_32 = (1 << 32) - 1


class TrainingImages(nn.Module):
    """The training images: their rows in the memory banks, and draws of negatives from other classes.

    Rows of the banks are sorted by class, so that all images of other classes are two slices.

    Args:
        index: int64 [n], positions in the whole image set, ascending.
        labels: int64 [n].
        seed: Of the draws.

    Raises:
        UserError: If all images are of one class, so that there are no negatives.
    """

    same_in_all_processes = True
    index: Tensor
    row_of: Tensor
    image_of: Tensor
    label_of: Tensor
    count_C: Tensor  # noqa: N815  # shape letters
    start_C: Tensor  # noqa: N815

    def __init__(self, index: Tensor, labels: Tensor, seed: int) -> None:
        super().__init__()
        counts_C = torch.bincount(labels)
        if int(counts_C.max()) == len(labels):
            raise UserError("contrast needs training images of at least two classes, and there is one")
        self._key = int(splitmix64(splitmix64(torch.tensor(STREAM_NEGATIVES)) ^ seed))
        by_class = torch.argsort(labels, stable=True)
        rows = {"row_of": torch.argsort(by_class), "image_of": index[by_class], "label_of": labels[by_class]}
        classes = {"count_C": counts_C, "start_C": counts_C.cumsum(0) - counts_C}
        for name, values in {"index": index.clone(), **rows, **classes}.items():
            self.register_buffer(name, values, persistent=False)  # configuration, kept out of checkpoints

    def __len__(self) -> int:
        return len(self.index)

    def rows(self, index: Tensor) -> Tensor:
        """Returns the rows of images in the banks.

        Args:
            index: int64 [B], positions in the whole image set.

        Returns:
            int64 [B], 0 .. n-1.

        Raises:
            ValueError: On a processor, if an image is not among the training images. On an accelerator, where
                looking would wait for the device, such an image gets the row n, at which the device stops.
        """
        place = torch.searchsorted(self.index, index).clamp(max=len(self) - 1)
        found = self.index[place] == index
        if index.device.type == "cpu" and not bool(found.all()):
            stranger = int(index[~found][0])
            raise ValueError(f"image {stranger} is not among the {len(self)} training images of the banks")
        return torch.where(found, self.row_of[place], len(self))

    def negatives(self, row: Tensor, number: int, step: Tensor) -> Tensor:
        """Draws images of other classes, uniformly and with replacement.

        The draw of an image is a pure function of (seed, step, image): the same whatever else is in the batch, on
        whatever device and in whichever process, and after a resume.

        Args:
            row: int64 [B], rows in the banks.
            number: How many for each.
            step: Optimiser steps so far, an int64 scalar.

        Returns:
            int64 [B, number], rows in the banks.
        """
        key = splitmix64(splitmix64(step ^ self._key))
        # On a processor a few images at a time, which then stay in its cache: three times as fast.
        at_once = 8 if row.device.type == "cpu" else max(1, len(row))
        return torch.cat([self._negatives(part, number, key) for part in row.split(at_once)])

    def _negatives(self, row: Tensor, number: int, key: Tensor) -> Tensor:
        half = torch.arange((number + 1) // 2, device=row.device)
        bits = splitmix64(splitmix64(self.image_of[row] ^ key)[:, None] ^ half)
        # Two draws from the two halves of each 64 bits, scaled to the number of other images.
        both = torch.cat([bits & _LOW_32, (bits >> 32) & _LOW_32], dim=1)[:, :number]
        label = self.label_of[row]
        start, count = self.start_C[label][:, None], self.count_C[label][:, None]
        place = (both * (len(self) - count)) >> 32
        return place + count * (place >= start)


class MemoryBank(nn.Module):
    """Memory bank: a moving average of each training image's embedding.

    Args:
        num_images: n.
        features: D.
        momentum: Share of the old embedding in the new one, in [0, 1].
        generator: Draws the start, uniform with the variance of a random unit vector's elements, as published.
    """

    bank: Tensor
    same_in_all_processes = True  # drawn alike, and `update` gathers; tells the trainer not to broadcast it

    def __init__(self, num_images: int, features: int, momentum: float, generator: torch.Generator) -> None:
        super().__init__()
        self.momentum = momentum
        limit = math.sqrt(3 / features)
        start = torch.empty(num_images, features).uniform_(-limit, limit, generator=generator)
        self.register_buffer("bank", start)

    def scores(self, anchors: Tensor, rows: Tensor | None = None) -> Tensor:
        """Inner products of anchors [B, D] with rows of the bank, int64 [B, N], or with all: [B, N] or [B, n]."""
        if rows is not None:
            return torch.bmm(self.bank[rows], anchors[:, :, None])[:, :, 0]
        # A copy, since the gradient needs the bank of this step and `update` comes before it.
        return anchors @ self.bank.clone().T

    @torch.no_grad()
    def update(self, rows: Tensor, embeddings: Tensor) -> None:
        """Moves the embeddings of some images and brings them back to length 1.

        Args:
            rows: int64 [B], each once.
            embeddings: [B, D], of length 1.
        """
        moved = self.momentum * self.bank[rows] + (1 - self.momentum) * embeddings.to(self.bank)
        self.bank.index_copy_(0, rows, functional.normalize(moved))


def of_all_processes(values: Tensor) -> Tensor:
    """Returns the rows of all processes, [world size · B, ...], without gradient; B is the same in each."""
    values = values.detach().contiguous()
    if not (distributed.is_available() and distributed.is_initialized()):
        return values
    gathered = [torch.empty_like(values) for _ in range(distributed.get_world_size())]
    distributed.all_gather(gathered, values)
    return torch.cat(gathered)


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
    """One network's side of the contrast: its embedding, its memory bank and the normalisation z.

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
    """Positives and negatives of a step: rows [B] of the batch in the banks; columns and counts of the scores."""

    rows: Tensor
    positive: Tensor
    times: Tensor
    gathered: Tensor | None  # int64 [B, 1 + m], rows of the scored images; None for the whole bank


@register_term("crd")
class ContrastiveRepresentation(FeatureTerm):
    """NCE of student anchors against the teacher's bank plus NCE of teacher anchors against the student's.

    Tian, Krishnan and Isola, "Contrastive Representation Distillation", ICLR 2020 (section 3.2; equations 18, 19).
    Both networks' pooled features are mapped to unit vectors by trained linear maps. An anchor's positive is the
    other network's bank entry of the same image, its negatives are entries of images of other classes, drawn with
    replacement (the published sampler does so when there are fewer such images than negatives). After the scores
    are computed the batch's entries move towards its new embeddings. Only labelled images count.
    All of this, and z, is state: it travels with the device and the checkpoint, and is the same in all processes.

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

    knows_images = True
    needs_labels = True

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
        super().__init__(weight, context, (POOLED,), **options)
        if context.train_index is None or context.train_labels is None:
            raise UserError("crd keeps a bank of the training images: give train_index and train_labels")
        features, self.negatives = count("features", features), count("negatives", negatives)
        self.tau = number("tau", tau, above=0.0)
        momentum = number("momentum", momentum, low=0.0, below=1.0)
        self.images = TrainingImages(context.train_index, context.train_labels, context.seed)
        n = len(self.images)
        auto = "whole" if n <= WHOLE_BANK_UP_TO * self.negatives else "gathered"
        self.scores = auto if choice("scores", scores, SCORES) == "auto" else scores
        # The same start in every process, whatever else has drawn before.
        generator = torch.Generator().manual_seed(context.seed)

        def side(inputs: int) -> ContrastiveSide:
            return ContrastiveSide(inputs, features, n, momentum, generator)

        (site,) = self.sites
        widths = {pair_key(k, m): site.teacher_shapes[m][0] for k, m in self.pairs}
        self.student_sides = nn.ModuleDict({key: side(site.student_shape[0]) for key in widths})
        self.teacher_sides = nn.ModuleDict({key: side(inputs) for key, inputs in widths.items()})
        self._draw: Draw | None = None

    def forward(self, context: StepContext) -> Tensor:
        """Returns the mean over the batch, and updates the banks when training."""
        self._draw = self._draw_samples(context)
        with torch.autocast(context.batch.index.device.type, enabled=False):  # scores / τ need float32
            value = super().forward(context)
        self._draw = None
        return value

    def _draw_samples(self, context: StepContext) -> Draw:
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

    def compare_at(self, place: int, k: int, m: int, student: Tensor, teacher: Tensor) -> Tensor:
        """Returns the sum of both directions for branch k and teacher m."""
        assert self._draw is not None
        key = pair_key(k, m)
        ours, theirs = cast(ContrastiveSide, self.student_sides[key]), cast(ContrastiveSide, self.teacher_sides[key])
        v_s, v_t = ours.embed(student), theirs.embed(teacher)
        value = self._direction(v_s, theirs, self._draw) + self._direction(v_t, ours, self._draw)
        if self.training:
            rows = of_all_processes(self._draw.rows)
            ours.memory.update(rows, of_all_processes(v_s))
            theirs.memory.update(rows, of_all_processes(v_t))
        return value

    def _direction(self, anchors: Tensor, other: ContrastiveSide, draw: Draw) -> Tensor:
        """Returns the loss of anchors [B, D] against the other network's memory bank."""
        scores = other.memory.scores(anchors.to(other.memory.bank), draw.gathered) / self.tau
        times = draw.times.to(scores)
        z = other.normalisation(scores, draw.positive, times)
        return noise_contrastive(scores, draw.positive, times, z, self.negatives, len(self.images))
