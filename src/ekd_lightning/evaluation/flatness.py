"""Flatness of the loss around the weights: sharpness, and the loss along random directions.

Weights are named tensors, and a loss is a function of them: nothing here changes a network.
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

    The network is copied and put into eval mode, so that batch norm keeps its statistics. For a branched student
    the output is that of the ensemble.

    Attributes:
        weights: The network's parameters, detached.
        num_images: N.
    """

    def __init__(self, network: nn.Module, images: Tensor, labels: Tensor, *, batch_size: int = 500) -> None:
        """Takes a copy of the network.

        Args:
            network: Takes images [B, 3, H, W] in [0, 1]; at least one parameter.
            images: uint8 [N, 3, H, W], N >= 1, on any device.
            labels: int64 [N].
            batch_size: Images a forward pass; changes the memory that is needed, not what is computed.
        """
        if len(images) == 0:
            raise ValueError("the loss is a mean over at least one image")
        self._network = copy.deepcopy(network).eval()
        self.weights = {name: p.detach().clone() for name, p in network.named_parameters()}
        first = next(iter(self.weights.values()))
        self._device, self._dtype = first.device, first.dtype
        self._batches = list(zip(images.split(batch_size), labels.split(batch_size), strict=True))
        self.num_images = len(images)

    def value(self, weights: Weights) -> float:
        """The mean cross-entropy in nats, added up in float64."""
        with torch.no_grad():
            return sum(float(self._sum(batch, weights)) for batch in self._batches) / self.num_images

    def gradient(self, weights: Weights) -> dict[str, Tensor]:
        """The gradient of `value`; zero where a weight has no influence."""
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
    """Returns how much the loss rises after one uphill step of given length.

    L(w + ε) - L(w) with ε = ρ g / ‖g‖ (Foret et al. 2021, arXiv 2010.01412), or adaptively ε = ρ w² g / ‖|w| g‖
    (Kwon et al. 2021, arXiv 2102.11600), which does not change when a filter is scaled up and what reads it is
    scaled down. Products are element by element, norms over all weights together; as in
    https://github.com/davda54/sam, the weights of batch norm and biases take part.

    Args:
        loss: The loss, and where.
        rho: ρ > 0; usual are 0.05, and 0.5 adaptively.
        adaptive: Which of the two.
        gradient: The loss's gradient there, if it is known already.

    Returns:
        The rise; 0 where the gradient is 0.
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
    """A random direction whose filters are as long as those of the weights.

    Normal numbers; every filter (row along the first axis) is scaled to the norm of the weights' own filter;
    biases and weights of batch norm, which have one axis only, stay where they are (Li et al. 2018, arXiv
    1712.09913, and https://github.com/tomgoldstein/loss-landscape with `xignore=biasbn`).

    Args:
        weights: Where the direction starts.
        seed: Numbers are drawn on the CPU, so that they are the same on every device.
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
    """Returns the positions on a curve: `points` from -1 to 1 at equal distances, and ±0.25, ±0.5 and 0; sorted.

    Args:
        points: At least 2.
    """
    even = [2 * place / (points - 1) - 1 for place in range(points)]
    named = [-0.5, -0.25, 0.0, 0.25, 0.5]
    return sorted([*named, *(a for a in even if min(abs(a - b) for b in named) > 1e-9)])


def loss_curves(loss: DatasetLoss, alphas: Sequence[float], seeds: Sequence[int]) -> Tensor:
    """The loss at w + α d for its weights w and filter-normalised directions d.

    Args:
        loss: The loss.
        alphas: A places α.
        seeds: Of the directions, D of them.

    Returns:
        float64 [D, A].
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
    """Returns how much higher the loss is at |α| = distance than at 0: the mean over directions and both sides.

    Args:
        curves: [D, A] of `loss_curves`.
        alphas: Its places, ±distance and 0 among them.
        distance: Above 0.
    """
    middle = alphas.index(0.0)
    sides = [alphas.index(-distance), alphas.index(distance)]
    return float((curves[:, sides] - curves[:, middle, None]).mean())
