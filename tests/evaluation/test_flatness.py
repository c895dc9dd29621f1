"""Sharpness and loss curves against closed forms, finite differences and a loop that changes real weights."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from ekd_lightning.evaluation.flatness import (
    DatasetLoss,
    curve_alphas,
    filter_normalized_direction,
    loss_curves,
    loss_rise,
    sharpness,
)
from ekd_lightning.networks import BranchedStudent, NetworkSpec, normalization


class Quadratic:
    """½ wᵀ A w, the weights in two pieces."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        root = rng.normal(size=(5, 5))
        self.matrix = root @ root.T
        self.start = rng.normal(size=5)
        self.weights = self.pieces(self.start)

    def pieces(self, flat: np.ndarray) -> dict[str, torch.Tensor]:
        whole = torch.from_numpy(flat)
        return {"a": whole[:3], "b": whole[3:].view(2, 1)}

    def flat(self, weights) -> np.ndarray:
        return np.concatenate([weights["a"].numpy(), weights["b"].numpy().ravel()])

    def value(self, weights) -> float:
        w = self.flat(weights)
        return float(w @ self.matrix @ w / 2)

    def gradient(self, weights) -> dict[str, torch.Tensor]:
        return self.pieces(self.matrix @ self.flat(weights))


@given(seed=st.integers(0, 1000), rho=st.floats(1e-3, 2))
@settings(max_examples=40, deadline=None)
def test_sharpness_of_a_quadratic_is_in_closed_form(seed, rho):
    loss = Quadratic(seed)
    A, w = loss.matrix, loss.start
    g = A @ w
    steps = {False: rho * g / np.linalg.norm(g), True: rho * w**2 * g / np.linalg.norm(np.abs(w) * g)}
    for adaptive, step in steps.items():
        expected = step @ g + step @ A @ step / 2
        assert sharpness(loss, rho=rho, adaptive=adaptive) == pytest.approx(expected, rel=1e-9)


def test_sharpness_is_zero_where_nothing_pulls():
    loss = Quadratic(0)
    loss.weights = {name: torch.zeros_like(weight) for name, weight in loss.weights.items()}
    assert sharpness(loss, rho=0.05) == 0
    assert sharpness(loss, rho=0.5, adaptive=True) == 0


def toy(seed: int = 0) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A linear classifier in float64 with images and labels."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 5)).double()
    return network, torch.randint(256, (23, 3, 4, 4)).to(torch.uint8), torch.randint(5, (23,))


@pytest.mark.parametrize("batch_size", [1, 7, 23, 100])
def test_loss_and_gradient_of_logistic_regression(batch_size):
    network, images, labels = toy()
    loss = DatasetLoss(network, images, labels, batch_size=batch_size)
    W, b = (loss.weights[name].numpy() for name in ("1.weight", "1.bias"))
    X, Y = images.double().numpy().reshape(23, -1) / 255, np.eye(5)[labels.numpy()]
    scores = X @ W.T + b
    P = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    assert loss.value(loss.weights) == pytest.approx(-np.log((P * Y).sum(1)).mean(), rel=1e-12)
    gradient = loss.gradient(loss.weights)
    np.testing.assert_allclose(gradient["1.weight"].numpy(), (P - Y).T @ X / 23, atol=1e-12)
    np.testing.assert_allclose(gradient["1.bias"].numpy(), (P - Y).mean(0), atol=1e-12)


def network_of_convolutions() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.Flatten(), nn.Linear(8, 3)
    ).double()


def test_gradient_by_finite_differences_with_batch_norm_at_rest():
    network = network_of_convolutions()
    network(torch.rand(9, 3, 4, 4).double())  # statistics of their own; it stays in train mode
    images, labels = torch.randint(256, (6, 3, 4, 4)).to(torch.uint8), torch.randint(3, (6,))
    loss = DatasetLoss(network, images, labels, batch_size=4)
    before = copy.deepcopy(network.state_dict())
    gradient = loss.gradient(loss.weights)
    small = 1e-6
    for name, weight in loss.weights.items():
        for place in range(0, weight.numel(), 5):
            step = torch.zeros_like(weight).view(-1)
            step[place] = small
            up, down = (loss.value({**loss.weights, name: weight + sign * step.view_as(weight)}) for sign in (1, -1))
            assert (up - down) / (2 * small) == pytest.approx(float(gradient[name].view(-1)[place]), abs=1e-7)
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_sharpness_of_a_network_is_the_rise_at_the_perturbed_network():
    network, images, labels = toy()
    loss = DatasetLoss(network, images, labels, batch_size=5)

    def mean(network):
        return functional.cross_entropy(network(images.double() / 255), labels)

    for adaptive, rho in ((False, 0.05), (True, 0.5)):
        network.zero_grad()
        start = mean(network)
        start.backward()
        moved = copy.deepcopy(network)
        norm = math.sqrt(
            sum(float(((p.detach().abs() if adaptive else 1) * p.grad).square().sum()) for p in network.parameters())
        )
        with torch.no_grad():
            for ours, theirs in zip(moved.parameters(), network.parameters(), strict=True):
                ours.add_(rho / norm * theirs.grad * (theirs**2 if adaptive else 1))
            expected = float(mean(moved) - start)
        found = sharpness(loss, rho=rho, adaptive=adaptive)
        assert found == pytest.approx(expected, rel=1e-9)
        assert found > 0


class TwoLayers(nn.Module):
    """A network whose filters can be scaled up and down without a change of the output."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, bias=False), nn.Linear(4, 3)

    def forward(self, images):
        return self.second(self.first(images).relu().mean((-2, -1)))


def scaled_pair(scales: list[float]) -> tuple[DatasetLoss, DatasetLoss]:
    """The loss of a network, and of the same one with filters scaled and what reads them scaled back."""
    torch.manual_seed(1)
    network = TwoLayers().double()
    images, labels = torch.randint(256, (12, 3, 5, 5)).to(torch.uint8), torch.randint(3, (12,))
    scaled = copy.deepcopy(network)
    factors = torch.tensor(scales, dtype=torch.float64)
    with torch.no_grad():
        scaled.first.weight *= factors[:, None, None, None]
        scaled.second.weight /= factors
    return DatasetLoss(network, images, labels), DatasetLoss(scaled, images, labels)


@given(scales=st.lists(st.floats(0.1, 10), min_size=4, max_size=4))
@settings(max_examples=20, deadline=None)
def test_adaptive_sharpness_does_not_see_the_scale_of_filters(scales):
    one, other = scaled_pair(scales)
    assert one.value(one.weights) == pytest.approx(other.value(other.weights), rel=1e-12)
    adaptive = [sharpness(loss, rho=0.5, adaptive=True) for loss in (one, other)]
    assert adaptive[1] == pytest.approx(adaptive[0], rel=1e-8)


def test_plain_sharpness_sees_the_scale_of_filters():
    one, other = (sharpness(loss, rho=0.05) for loss in scaled_pair([8.0] * 4))
    assert abs(other / one - 1) > 0.5


def student(ensemble: str = "mean_logits") -> BranchedStudent:
    torch.manual_seed(0)
    spec = NetworkSpec("resnet8", 10, normalization("unit"), {"width": 0.5})
    return BranchedStudent(spec, branches=2, split_after="stage1", ensemble=ensemble)


def test_directions_have_the_lengths_of_the_filters():
    weights = DatasetLoss(student(), torch.zeros(1, 3, 32, 32, dtype=torch.uint8), torch.zeros(1).long()).weights
    direction = filter_normalized_direction(weights, seed=4)
    assert direction.keys() == weights.keys()
    for name, weight in weights.items():
        if weight.ndim == 1:
            assert not direction[name].any(), name
            continue
        for filter_, drawn in zip(weight, direction[name], strict=True):
            assert float(drawn.norm()) == pytest.approx(float(filter_.norm()), rel=1e-5)
        assert not torch.allclose(direction[name], weight)
    again, other = (filter_normalized_direction(weights, seed) for seed in (4, 5))
    name = "branches.0.head.weight"
    assert torch.equal(again[name], direction[name])
    assert not torch.equal(other[name], direction[name])


def test_a_dead_filter_stays_dead():
    weights = {"conv": torch.randn(3, 2, 1, 1)}
    weights["conv"][1] = 0
    assert not filter_normalized_direction(weights, 0)["conv"][1].any()


@pytest.mark.parametrize("ensemble", ["mean_logits", "mean_probs", "gate"])
def test_curves_by_a_loop_that_changes_the_weights(ensemble):
    network = student(ensemble)
    images, labels = torch.randint(256, (8, 3, 32, 32)).to(torch.uint8), torch.randint(10, (8,))
    network(images.float() / 255)
    network.eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    loss = DatasetLoss(network, images, labels, batch_size=3)
    alphas = [-1.0, -0.25, 0.0, 0.25, 1.0]
    found = loss_curves(loss, alphas, seeds=(7, 8))
    assert found.shape == (2, 5)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    for row, seed in zip(found, (7, 8), strict=True):
        direction = filter_normalized_direction(loss.weights, seed)
        for value, alpha in zip(row, alphas, strict=True):
            with torch.no_grad():
                for name, parameter in network.named_parameters():
                    parameter.copy_(before[name] + alpha * direction[name])
                logits = network(images.float() / 255)
            assert float(value) == pytest.approx(float(functional.cross_entropy(logits, labels)), rel=1e-4)
    assert float(found[0, 2]) == float(found[1, 2])


@given(points=st.integers(2, 60))
@settings(max_examples=60, deadline=None)
def test_places_on_a_curve(points):
    alphas = curve_alphas(points)
    assert {-1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0} <= set(alphas)
    assert (np.diff(alphas) > 1e-9).all()
    np.testing.assert_allclose(alphas, [-alpha for alpha in reversed(alphas)], atol=1e-12)
    even = np.linspace(-1, 1, points)
    assert np.abs(np.subtract.outer(even, alphas)).min(1).max() < 1e-9
    assert len(alphas) <= points + 5


def test_the_rise_is_a_mean_over_directions_and_sides():
    alphas = [-0.5, -0.25, 0.0, 0.25, 0.5]
    curves = torch.tensor([[5.0, 2, 1, 3, 9], [4.0, 1, 1, 2, 2]])
    assert loss_rise(curves, alphas, 0.25) == pytest.approx((1 + 2 + 0 + 1) / 4)
    assert loss_rise(curves, alphas, 0.5) == pytest.approx((4 + 8 + 3 + 1) / 4)


def test_no_images():
    network, images, labels = toy()
    with pytest.raises(ValueError, match="at least one image"):
        DatasetLoss(network, images[:0], labels[:0])
