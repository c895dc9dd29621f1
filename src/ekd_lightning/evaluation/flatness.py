"""Flatness of the loss around the weights: sharpness, and the loss along random directions.

Weights are named tensors, and losses are functions of them; networks do not change.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from ekd_lightning.progress import track

Weights = Mapping[str, Tensor]


class DatasetLoss:
    """Mean cross-entropy of a network's output on fixed images, as a function of its parameters.

    The network, which maps images in [0, 1] to logits, is copied and used in eval mode, so that batch norms keep their
    statistics. The output of a branched student is that of its ensemble. Images are uint8 [N, 3, H, W], labels int64
    [N].

    Attributes:
        weights: The network's parameters, detached.
        num_images: N.

    Raises:
        ValueError: Without images.
    """

    def __init__(self, network: nn.Module, images: Tensor, labels: Tensor, *, batch_size: int = 500) -> None:
        if len(images) == 0:
            raise ValueError("the loss needs at least one image, got none")
        self._network = copy.deepcopy(network).eval()
        self.weights = {name: p.detach().clone() for name, p in network.named_parameters()}
        first = next(iter(self.weights.values()))
        self._device, self._dtype = first.device, first.dtype
        self._batches = list(zip(images.split(batch_size), labels.split(batch_size), strict=True))
        self.num_images = len(images)

    def value(self, weights: Weights) -> float:
        """Returns the mean cross-entropy in nats, summed in float64."""
        with torch.no_grad():
            return sum(float(self._sum(batch, weights)) for batch in self._batches) / self.num_images

    def gradient(self, weights: Weights) -> dict[str, Tensor]:
        """Returns the gradient of `value` by name; zero for weights without influence."""
        leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
        total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        for batch in track(self._batches, "gradient", "batches"):
            loss = self._sum(batch, leaves) / self.num_images
            found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
            for name, gradient in zip(leaves, found, strict=True):
                if gradient is not None:
                    total[name] += gradient
        return total

    def _sum(self, batch: tuple[Tensor, Tensor], weights: Weights) -> Tensor:
        pixels, labels = batch
        images = pixels.to(self._device, self._dtype).div_(255)
        images = images.contiguous(memory_format=torch.channels_last)
        logits = functional_call(self._network, dict(weights), (images,))
        losses = functional.cross_entropy(logits, labels.to(self._device), reduction="none")
        return losses.sum(dtype=torch.float64)


def sharpness(loss: DatasetLoss, *, rho: float, adaptive: bool = False, gradient: Weights | None = None) -> float:
    """Returns the rise of the loss, in nats, after one step of length ρ > 0 along the gradient; 0 if the gradient is 0.

    L(w + ε) - L(w) with ε = ρ g / ‖g‖ (Foret et al. 2021, arXiv 2010.01412), or adaptively ε = ρ w² g / ‖|w| g‖ (Kwon
    et al. 2021, arXiv 2102.11600), which is invariant to scaling a filter up and the following layer down. Products are
    element-wise, norms are over all weights; as in https://github.com/davda54/sam, weights of batch norms and biases
    are included. Usual lengths are 0.05, or 0.5 for the adaptive form. A known gradient at w can be given.
    """
    weights = loss.weights
    gradient = loss.gradient(weights) if gradient is None else gradient
    scaled = {name: weights[name].abs() * g if adaptive else g for name, g in gradient.items()}
    norm = torch.stack([part.double().square().sum() for part in scaled.values()]).sum().sqrt()
    scale = rho / (norm + 1e-12)
    moved = {}
    for name, weight in weights.items():
        step = weight.abs() * scaled[name] if adaptive else scaled[name]
        moved[name] = weight + step * scale.to(step.dtype)
    return loss.value(moved) - loss.value(weights)


def filter_normalized_direction(weights: Weights, seed: int) -> dict[str, Tensor]:
    """Draws a random direction whose filters have the norms of the weights' filters.

    Every filter (slice along the first axis) of standard normal numbers is scaled to the norm of the weights' filter.
    The direction is 0 for biases and weights of batch norms, which have one axis (Li et al. 2018, arXiv 1712.09913, and
    https://github.com/tomgoldstein/loss-landscape with `xignore=biasbn`). Numbers are drawn on the CPU and therefore
    equal on every device.
    """
    generator = torch.Generator().manual_seed(seed)
    direction = {}
    for name, weight in weights.items():
        drawn = torch.randn(weight.shape, generator=generator).to(weight)
        if weight.ndim <= 1:
            direction[name] = torch.zeros_like(weight)
            continue
        axes = tuple(range(1, weight.ndim))
        own, other = (torch.linalg.vector_norm(t, dim=axes, keepdim=True) for t in (weight, drawn))
        direction[name] = drawn * (own / (other + 1e-10))
    return direction


def curve_alphas(points: int) -> list[float]:
    """Returns the values α of a curve, ascending: `points` >= 2 evenly from -1 to 1, and ±0.25, ±0.5 and 0."""
    even = [2 * place / (points - 1) - 1 for place in range(points)]
    named = [-0.5, -0.25, 0.0, 0.25, 0.5]
    return sorted([*named, *(a for a in even if min(abs(a - b) for b in named) > 1e-9)])


def loss_curves(loss: DatasetLoss, alphas: Sequence[float], seeds: Sequence[int]) -> Tensor:
    """Computes the loss at w + α d for its weights w, A values of α, and D filter-normalised directions d.

    Each seed gives a direction. Returns float64 [D, A], in nats.
    """
    weights = loss.weights
    middle = loss.value(weights)
    curves = torch.empty(len(seeds), len(alphas), dtype=torch.float64)
    for row, seed in enumerate(track(seeds, "loss along", "directions")):
        direction = filter_normalized_direction(weights, seed)
        for column, alpha in enumerate(alphas):
            moved = {name: weight + alpha * direction[name] for name, weight in weights.items()}
            curves[row, column] = loss.value(moved) if alpha else middle
    return curves


def loss_rise(curves: Tensor, alphas: Sequence[float], distance: float) -> float:
    """Returns the rise of the loss from α = 0 to |α| = distance, averaged over directions and both signs.

    The curves [D, A] are those of `loss_curves`; the alphas include ±distance and 0.
    """
    middle = alphas.index(0.0)
    sides = [alphas.index(-distance), alphas.index(distance)]
    return float((curves[:, sides] - curves[:, middle, None]).mean())
