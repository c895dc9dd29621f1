"""Contrastive representation distillation (CRD): embeddings of one image attract, of images of other classes repel.

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

WHOLE_BANK_UP_TO = 32
"""`scores=auto` multiplies with the whole bank if it has at most this many times the negatives (measured on a CPU)."""
STREAM_NEGATIVES = 9  # differs from the streams of data.order
_LOW_32 = (1 << 32) - 1


class TrainingImages(nn.Module):
    """Rows of the training images in the memory banks, and random negatives of other classes.

    The rows of a bank are sorted by class, so that the images of all other classes are two slices. `index`, int64 [n],
    are ascending positions in the whole image set, `labels` is int64 [n], and the seed is that of the negatives.

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
            raise UserError(
                f"crd draws negatives from other classes, but all {len(labels)} training images are of one class; "
                "train on two classes or more"
            )
        self._key = int(splitmix64(splitmix64(torch.tensor(STREAM_NEGATIVES)) ^ seed))
        by_class = torch.argsort(labels, stable=True)
        rows = {"row_of": torch.argsort(by_class), "image_of": index[by_class], "label_of": labels[by_class]}
        classes = {"count_C": counts_C, "start_C": counts_C.cumsum(0) - counts_C}
        for name, values in {"index": index.clone(), **rows, **classes}.items():
            self.register_buffer(name, values, persistent=False)  # configuration, kept out of checkpoints

    def __len__(self) -> int:
        return len(self.index)

    def rows(self, index: Tensor) -> Tensor:
        """Returns the rows of images in the banks, int64 [B] in 0 .. n-1, from their positions in the whole image set.

        Raises:
            ValueError: On a CPU, if an image is not among the training images. On an accelerator this check would
                synchronise; there the row of such an image is n, out of range, and the next indexing fails.
        """
        place = torch.searchsorted(self.index, index).clamp(max=len(self) - 1)
        found = self.index[place] == index
        if index.device.type == "cpu" and not bool(found.all()):
            unknown = int(index[~found][0])
            raise ValueError(f"image {unknown} is not among the {len(self)} training images of the memory banks")
        return torch.where(found, self.row_of[place], len(self))

    def negatives(self, row: Tensor, number: int, step: Tensor) -> Tensor:
        """Draws `number` images of other classes, uniformly and with replacement, for each of the rows int64 [B].

        The draw is a pure function of (seed, step, image): it depends neither on the rest of the batch nor on device,
        process or resumes. The step is an int64 scalar. Returns rows in the banks, int64 [B, number].
        """
        key = splitmix64(splitmix64(step ^ self._key))
        # On a CPU a few images at a time stay in its cache: three times as fast.
        chunk = 8 if row.device.type == "cpu" else max(1, len(row))
        return torch.cat([self._negatives(part, number, key) for part in row.split(chunk)])

    def _negatives(self, row: Tensor, number: int, key: Tensor) -> Tensor:
        half = torch.arange((number + 1) // 2, device=row.device)
        bits = splitmix64(splitmix64(self.image_of[row] ^ key)[:, None] ^ half)
        # Two draws from the two halves of each 64 bits, scaled to the number of other images.
        bits = torch.cat([bits & _LOW_32, (bits >> 32) & _LOW_32], dim=1)[:, :number]
        label = self.label_of[row]
        start, count = self.start_C[label][:, None], self.count_C[label][:, None]
        place = (bits * (len(self) - count)) >> 32
        return place + count * (place >= start)  # skips the image's own class


class MemoryBank(nn.Module):
    """Memory bank: a moving average of each training image's embedding.

    `momentum` in [0, 1] is the share of the old embedding in the new one. The generator draws the initial values,
    uniform with the variance of a random unit vector's elements, as published.
    """

    bank: Tensor
    # Equal initial values, and updates from the rows of all processes; tells the trainer not to broadcast the bank.
    same_in_all_processes = True

    def __init__(self, num_images: int, features: int, momentum: float, generator: torch.Generator) -> None:
        super().__init__()
        self.momentum = momentum
        limit = math.sqrt(3 / features)
        start = torch.empty(num_images, features).uniform_(-limit, limit, generator=generator)
        self.register_buffer("bank", start)

    def scores(self, anchors: Tensor, rows: Tensor | None = None) -> Tensor:
        """Inner products of anchors [B, D] with entries of the bank: [B, N] for the rows int64 [B, N] of each anchor.

        Without rows, they are those with the whole bank, [B, n].
        """
        if rows is not None:
            return torch.bmm(self.bank[rows], anchors[:, :, None])[:, :, 0]
        # A copy: `update` changes the bank before the backward pass reads it.
        return anchors @ self.bank.clone().T

    @torch.no_grad()
    def update(self, rows: Tensor, embeddings: Tensor) -> None:
        """Moves entries of the bank, rows int64 [B], towards new embeddings [B, D] of length 1, and normalises them.

        Of an image that the batch has twice, as with few labelled images beside unlabelled ones, the first view counts.
        """
        first = (rows[:, None] == rows).int().argmax(1)  # equal rows write equal values, in whatever order
        moved = self.momentum * self.bank[rows] + (1 - self.momentum) * embeddings[first].to(self.bank)
        self.bank.index_copy_(0, rows, functional.normalize(moved))


def of_all_processes(values: Tensor) -> Tensor:
    """Gathers rows [B, ...] of all processes: [world size · B, ...], without gradient; B must be equal in all."""
    values = values.detach().contiguous()
    if not (distributed.is_available() and distributed.is_initialized()):
        return values
    gathered = [torch.empty_like(values) for _ in range(distributed.get_world_size())]
    distributed.all_gather(gathered, values)
    return torch.cat(gathered)


class Embedding(nn.Module):
    """A linear map to vectors of length 1: [B, D_in] -> [B, D]."""

    def __init__(self, inputs: int, features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, features)

    def forward(self, pooled: Tensor) -> Tensor:
        """Maps and normalises; float32 or wider."""
        return functional.normalize(at_least_float32(self.linear(pooled.to(self.linear.weight))))


class ContrastiveSide(nn.Module):
    """One network's side of the contrast: its embedding, its memory bank and the normalisation z."""

    z: Tensor

    def __init__(self, inputs: int, features: int, images: int, momentum: float, generator: torch.Generator) -> None:
        super().__init__()
        self.embed = Embedding(inputs, features)
        self.memory = MemoryBank(images, features, momentum, generator)
        # Saved in checkpoints, since it is estimated only in the first step; 0 until then.
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
        # After a resume z may be known already; `where` decides without synchronising with the device.
        z = torch.where(self.z > 0, self.z, estimate)
        if self.training:
            self.z.copy_(z)
            self._may_lack_z = False
        return z

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._may_lack_z = True


class Samples(NamedTuple):
    """Positives and negatives of one step.

    Attributes:
        rows: int64 [B], rows of the batch's images in the banks.
        positive: int64 [B], column of each positive in the scores.
        times: float32 [B, n] or [1, 1 + m], how often each column of the scores is a negative.
        scored: int64 [B, 1 + m], rows of the scored entries; None for the whole bank.
    """

    rows: Tensor
    positive: Tensor
    times: Tensor
    scored: Tensor | None


@register_term("crd")
class ContrastiveRepresentation(FeatureTerm):
    """NCE loss of student anchors against the teacher's bank plus that of teacher anchors against the student's bank.

    Tian, Krishnan and Isola, "Contrastive Representation Distillation", ICLR 2020 (equation 18).
    Both networks' pooled features are mapped to unit vectors by trained linear maps. An anchor's positive is the
    other network's bank entry of the same image, its negatives are entries of images of other classes, drawn with
    replacement (the published sampler does so when there are fewer such images than negatives). After the scores
    are computed, the batch's entries move towards the new embeddings. Only labelled images count.
    The banks and z are buffers: they are saved in checkpoints and equal in all processes.

    Args:
        features: D, size of the embeddings.
        negatives: m >= 1, for each image and step; shared by both losses and all pairs.
        tau: Temperature of the scores, > 0.
        momentum: Share of the old entry when a bank is updated, in [0, 1).
        scores: How the scores are computed, with equal results: `whole` multiplies with the whole bank, `gathered`
            with the drawn entries only, `auto` takes the cheaper way.

    Raises:
        UserError: For values outside these ranges, training images of a single class, or a context without
            `train_index` and `train_labels`.
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
            raise UserError(
                "crd keeps a memory bank of the training images, which ekd.method does not know: use ekd.distill, or "
                "build_method with a TermContext that has train_index and train_labels"
            )
        features, self.negatives = count("features", features), count("negatives", negatives)
        self.tau = number("tau", tau, above=0.0)
        momentum = number("momentum", momentum, low=0.0, below=1.0)
        self.images = TrainingImages(context.train_index, context.train_labels, context.seed)
        n = len(self.images)
        auto = "whole" if n <= WHOLE_BANK_UP_TO * self.negatives else "gathered"
        self.scores = auto if choice("scores", scores, ("auto", "whole", "gathered")) == "auto" else scores
        # Equal initial values in every process, whatever else has drawn random numbers before.
        generator = torch.Generator().manual_seed(context.seed)

        def side(inputs: int) -> ContrastiveSide:
            return ContrastiveSide(inputs, features, n, momentum, generator)

        (site,) = self.sites
        widths = {pair_key(k, m): site.teacher_shapes[m][0] for k, m in self.pairs}
        self.student_sides = nn.ModuleDict({key: side(site.student_shape[0]) for key in widths})
        self.teacher_sides = nn.ModuleDict({key: side(inputs) for key, inputs in widths.items()})
        self._samples: Samples | None = None

    def forward(self, context: StepContext) -> Tensor:
        """Returns the mean over the batch, and the mean or sum over the branches, in nats; trains the banks, too."""
        self._samples = self._draw_samples(context)
        with torch.autocast(context.batch.index.device.type, enabled=False):  # scores / τ need float32
            value = super().forward(context)
        self._samples = None
        return value

    def _draw_samples(self, context: StepContext) -> Samples:
        rows = self.images.rows(context.batch.index)
        drawn = self.images.negatives(rows, self.negatives, context.step_tensor())
        if self.scores == "gathered":
            times = torch.ones(1, 1 + self.negatives, device=rows.device)
            times[:, 0] = 0
            return Samples(rows, torch.zeros_like(rows), times, torch.cat([rows[:, None], drawn], dim=1))
        B, n = len(rows), len(self.images)
        # Counting is cheaper than gathering scores and scattering their gradients. Flat, because that is
        # deterministic on accelerators too.
        flat = (drawn + n * torch.arange(B, device=rows.device)[:, None]).flatten()
        times = torch.zeros(B * n, device=rows.device).scatter_add_(
            0, flat, torch.ones((), device=rows.device).expand(len(flat))
        )
        return Samples(rows, rows, times.view(B, n), None)

    def compare_at(self, place: int, k: int, m: int, student: Tensor, teacher: Tensor) -> Tensor:
        """Returns the sum of both losses of branch k and teacher m; in training, updates their banks."""
        samples = self._samples
        assert samples is not None
        key = pair_key(k, m)
        ours, theirs = cast(ContrastiveSide, self.student_sides[key]), cast(ContrastiveSide, self.teacher_sides[key])
        v_s, v_t = ours.embed(student), theirs.embed(teacher)
        value = self._contrast(v_s, theirs, samples) + self._contrast(v_t, ours, samples)
        if self.training:
            rows = of_all_processes(samples.rows)
            ours.memory.update(rows, of_all_processes(v_s))
            theirs.memory.update(rows, of_all_processes(v_t))
        return value

    def _contrast(self, anchors: Tensor, other: ContrastiveSide, samples: Samples) -> Tensor:
        """Returns the NCE loss of anchors [B, D] against the other network's memory bank."""
        scores = other.memory.scores(anchors.to(other.memory.bank), samples.scored) / self.tau
        times = samples.times.to(scores)
        z = other.normalisation(scores, samples.positive, times)
        return noise_contrastive(scores, samples.positive, times, z, self.negatives, len(self.images))
