"""Boundary distillation (BSS): a loss on images that are moved just across the teacher's decision boundary.

Shape letters: B batch, N attacked images, C classes, M teachers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed

from ekd_lightning.methods.context import StepContext, TermContext
from ekd_lightning.methods.losses import at_least_float32, soft_cross_entropy
from ekd_lightning.methods.options import count, number
from ekd_lightning.methods.terms import SoftTerm, register_term

GAP_EPS = 1e-4
_STREAM = 5  # keeps these random numbers apart from others that are drawn by (seed, step)


def choose_base(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, limit: int) -> Tensor:
    """Selects the images to attack: images that both networks classify correctly, largest disagreement first.

    The disagreement is Σ_c (p_t - p_s)² over all classes except the true one. Returns positions in the batch, int64 [N]
    with N <= limit, for logits [B, C] and labels int64 [B].
    """
    right = (student_logits.argmax(1) == labels) & (teacher_logits.argmax(1) == labels)
    squared = (at_least_float32(teacher_logits).softmax(1) - at_least_float32(student_logits).softmax(1)).square()
    score = squared.sum(1) - squared.gather(1, labels[:, None])[:, 0]
    # The number of images sets the shapes, so this synchronises with the device, as the attack does anyway.
    base = right.nonzero()[:, 0]
    return base[score[base].argsort(descending=True, stable=True)[:limit]]


def draw_targets(teacher_logits: Tensor, uniform: Tensor) -> Tensor:
    """Draws target classes, int64 [N], in proportion to the teacher's probabilities, excluding its predicted class.

    Logits are [N, C] with C >= 2; `uniform` are random numbers [N] in [0, 1).
    """
    score, classes = at_least_float32(teacher_logits).softmax(1).sort(1, descending=True)
    cumulated = score[:, 1:].cumsum(1)
    wanted = uniform.to(cumulated)[:, None] * cumulated[:, -1:]
    place = (cumulated < wanted).sum(1).clamp(max=cumulated.shape[1] - 1)
    return classes[:, 1:].gather(1, place[:, None])[:, 0]


def attack(
    teacher: Callable[[Tensor], Tensor], images: Tensor, target: Tensor, std: Tensor, steps: int, step_size: float
) -> Tensor:
    """Moves images towards a target class until the teacher's prediction changes (Heo et al., AAAI 2019, and code).

    A step is step_size · (z_first - z_target + 1e-4) · g / ‖g‖₂ with g the gradient of z_target - z_first, in the
    normalised units of the teacher; an image whose predicted class has changed is not moved further. In the normalised
    units (x - mean) / std the gradient is std · ∇ₓ, and a step of length d there moves the pixels by std · d.

    Pixels stay in [0, 1]. The published code clips at 2.5 standard deviations to approximate that range: with
    CIFAR-10's statistics this is [-0.06, 1.0] and dims white images, with other statistics it is far from the range.

    Args:
        teacher: Maps images [n, 3, H, W] in [0, 1] to the teacher's logits [n, C], each row from its image alone;
            called with n <= N, which decreases.
        images: [N, 3, H, W] in [0, 1].
        target: int64 [N], target classes.
        std: Standard deviation of the teacher's normalisation, [1, 3, 1, 1].
        steps: The largest number of steps.
        step_size: > 0.

    Returns:
        [N, 3, H, W] in [0, 1], without gradient.
    """
    moved = images.detach().clone()
    rows, x, first = torch.arange(len(moved), device=moved.device), moved, torch.empty(0)
    for step in range(steps):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            logits = teacher(x)
            if step == 0:
                first = logits.argmax(1)
            gap = (logits.gather(1, target[:, None]) - logits.gather(1, first[:, None]))[:, 0]
            (gradient,) = torch.autograd.grad(gap.sum(), x)
        # This synchronises with the device, but most images soon change class and need no further steps.
        left = (logits.argmax(1) == first).nonzero()[:, 0]
        if not len(left):
            break
        rows, target, first = rows[left], target[left], first[left]
        gradient = gradient[left] * std  # in normalised units
        length = gradient.flatten(1).norm(dim=1).clamp(min=1e-12)
        size = step_size * (GAP_EPS - gap.detach()[left]) / length
        x = (x.detach()[left] + std * size[:, None, None, None] * gradient).clamp(0.0, 1.0)
        moved[rows] = x
    return moved


@register_term("boundary")
class BoundaryDistillation(SoftTerm):
    """H(p_T(t(x')), p_T(z̄(x'))) on attacked images x'; no T², as published.

    Heo et al., "Knowledge Distillation with Adversarial Samples Supporting Decision Boundary", AAAI 2019. The
    outputs of the student (coupled) and of the teacher for x' are computed in the step. Each teacher is attacked, and
    the mean over the teachers is taken. Only labelled images count; the label of a mixed image is the class with the
    larger share.

    In training mode the student's batch norms normalise the attacked images by their own statistics and add these to
    the running statistics, as in the authors' code.

    Args:
        images: The largest number of attacked images in a batch, >= 1.
        steps: The largest number of steps of an attack, >= 1.
        step_size: > 0, in normalised units.

    Raises:
        UserError: For values outside these ranges.
    """

    needs_teachers = True
    needs_networks = True
    captures = False  # the number of attacked images and of steps depends on the networks' outputs

    def __init__(
        self,
        weight: float,
        context: TermContext,
        *,
        images: int = 64,
        steps: int = 10,
        step_size: float = 0.3,
        **options: Any,
    ) -> None:
        super().__init__(weight, context, **options)
        self.images, self.steps = count("images", images), count("steps", steps)
        self.step_size = number("step_size", step_size, above=0.0)
        self.num_teachers, self.seed = context.num_teachers, context.seed

    def forward(self, context: StepContext) -> Tensor:
        """Returns the mean over the attacked images and the teachers, in nats; 0 without attacked images."""
        zero = 0.0 * context.student.logits.sum()
        generator = np.random.default_rng((_STREAM, self.seed, context.step))
        uniform = torch.from_numpy(generator.random(len(context.batch.labels))).to(zero.device)
        parts = [self._teacher_loss(context, m, uniform) for m in range(self.num_teachers)]
        return zero + torch.stack([zero if part is None else part for part in parts]).mean()

    def _teacher_loss(self, context: StepContext, m: int, uniform: Tensor) -> Tensor | None:
        networks, teacher_logits = context.networks, context.teacher_logits[m]
        assert networks is not None
        student_logits, labels = context.student.logits.detach(), context.batch.hard_labels
        base = choose_base(student_logits, teacher_logits, labels, self.images)
        if not len(base):
            return _keep_in_step(context)
        attacked = attack(
            lambda images: networks.teacher_outputs(m, images).logits,
            context.batch.images[base],
            draw_targets(teacher_logits[base], uniform[base]),
            networks.teacher_statistics(m)[1],
            self.steps,
            self.step_size,
        )
        with torch.no_grad():
            target = networks.teacher_outputs(m, attacked).logits
        if len(attacked) == 1:
            # Batch norm refuses a single value per channel (one image, maps of 1×1); a copy leaves the mean as it is.
            attacked, target = attacked.repeat(2, 1, 1, 1), target.repeat(2, 1)
        return soft_cross_entropy(networks.student_outputs(attacked).logits, target, self.temperature)


def _keep_in_step(context: StepContext) -> Tensor | None:
    """Runs the student on two images in DDP, so that a process without images to attack joins synchronised batch norms.

    Returns 0 with a gradient of 0; None without DDP.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    assert context.networks is not None
    return 0.0 * context.networks.student_outputs(context.batch.images[:2]).logits.sum()
