"""Boundary distillation (BSS): a loss on images moved just across the teacher's decision boundary.

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
_STREAM = 5  # apart from other draws by (seed, step)


def choose_base(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, most: int) -> Tensor:
    """Selects the images to attack: those that both networks classify correctly, largest disagreement first.

    The difference is Σ_c (p_t - p_s)² over the classes but the true one.

    Args:
        student_logits: [B, C].
        teacher_logits: [B, C].
        labels: int64 [B].
        most: Number of images at most.

    Returns:
        int64 [N], N <= most, positions in the batch.
    """
    right = (student_logits.argmax(1) == labels) & (teacher_logits.argmax(1) == labels)
    squared = (at_least_float32(teacher_logits).softmax(1) - at_least_float32(student_logits).softmax(1)).square()
    score = squared.sum(1) - squared.gather(1, labels[:, None])[:, 0]
    # How many there are decides about shapes, so this waits for the accelerator: the attack itself loops.
    base = right.nonzero()[:, 0]
    return base[score[base].argsort(descending=True, stable=True)[:most]]


def draw_targets(teacher_logits: Tensor, uniform: Tensor) -> Tensor:
    """Draws target classes in proportion to the teacher's probabilities, its own prediction excluded.

    Args:
        teacher_logits: [N, C] with C >= 2.
        uniform: [N] in [0, 1).

    Returns:
        int64 [N], never the teacher's own first class.
    """
    score, classes = at_least_float32(teacher_logits).softmax(1).sort(1, descending=True)
    cumulated = score[:, 1:].cumsum(1)
    wanted = uniform.to(cumulated)[:, None] * cumulated[:, -1:]
    place = (cumulated < wanted).sum(1).clamp(max=cumulated.shape[1] - 1)
    return classes[:, 1:].gather(1, place[:, None])[:, 0]


def attack(
    teacher: Callable[[Tensor], Tensor], images: Tensor, target: Tensor, std: Tensor, steps: int, step_size: float
) -> Tensor:
    """Moves images towards a target class until the teacher's prediction changes (Heo et al. 2019, algorithm 1).

    A step is step_size · (z_first - z_target + 1e-4) · g / ‖g‖₂ with g the gradient of z_target - z_first, in the
    normalised units of the teacher; an image that has changed class stays where it is. As a normalised image is
    (x - mean) / std, the gradient there is std · ∇ₓ, and a step there is one of std times its length here.

    Pixels stay in [0, 1]. The published code clips at 2.5 standard deviations, a stand-in for that range: under
    CIFAR-10's statistics it is [-0.06, 1.0] and dims white images, under others it is far outside.

    Args:
        teacher: Images [n, 3, H, W] in [0, 1] -> the teacher's logits [n, C], each image's its own; n <= N falls.
        images: [N, 3, H, W].
        target: int64 [N].
        std: Standard deviation of the teacher's normalisation, [1, 3, 1, 1].
        steps: At most so many.
        step_size: > 0.

    Returns:
        [N, 3, H, W] in [0, 1], without gradient.
    """
    moved = images.detach().clone()
    at, x, goal, first = torch.arange(len(moved), device=moved.device), moved, target, torch.empty(0)
    for step in range(steps):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            logits = teacher(x)
            if step == 0:
                first = logits.argmax(1)
            gap = (logits.gather(1, goal[:, None]) - logits.gather(1, first[:, None]))[:, 0]
            (gradient,) = torch.autograd.grad(gap.sum(), x)
        # An accelerator waits here, but is spared the images that have changed class: most of them, soon.
        on = (logits.argmax(1) == first).nonzero()[:, 0]
        if not len(on):
            break
        at, goal, first = at[on], goal[on], first[on]
        gradient = gradient[on] * std  # in normalised units
        length = gradient.flatten(1).norm(dim=1).clamp(min=1e-12)
        size = step_size * (GAP_EPS - gap.detach()[on]) / length
        x = (x.detach()[on] + std * size[:, None, None, None] * gradient).clamp(0.0, 1.0)
        moved[at] = x
    return moved


@register_term("boundary")
class BoundaryDistillation(SoftTerm):
    """H(p_T(t(x')), p_T(z̄(x'))) on attacked images x'; no T², as published.

    Heo et al., "Knowledge Distillation with Adversarial Samples Supporting Decision Boundary", AAAI 2019. The
    outputs of the student (coupled) and of the teacher for x' are computed in the step. Where the weight's schedule
    has come to 0 nothing is computed. With several teachers each is attacked, and the mean is taken. Only labelled
    images count; of a mixed image the class with the larger share is the label.

    The student stays in its present mode: its batch norms take their statistics from the attacked images, and
    remember them, as in the authors' code.

    Args:
        weight: Factor in the total, >= 0.
        context: The networks' sizes, the method's temperature, the seed.
        temperature: T > 0; None for the method's.
        images: Attacked images of a batch, at most; >= 1.
        steps: Steps of an attack, at most; >= 1.
        step_size: > 0, in normalised units.
    """

    needs_teachers = True
    needs_networks = True
    captures = False  # how many images are attacked, and for how long, depends on what the networks answer

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
        """Returns the mean over the attacked images and the teachers; 0 if there are none."""
        nothing = 0.0 * context.student.logits.sum()
        if self.weight_at(context.progress) == 0.0:
            return nothing
        generator = np.random.default_rng((_STREAM, self.seed, context.step))
        uniform = torch.from_numpy(generator.random(len(context.batch.labels))).to(nothing.device)
        parts = [self._teacher_loss(context, m, uniform) for m in range(self.num_teachers)]
        return nothing + torch.stack([nothing if part is None else part for part in parts]).mean()

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
            # One image has no batch statistics where maps are 1×1; twice the same has, and the same mean.
            attacked, target = attacked.repeat(2, 1, 1, 1), target.repeat(2, 1)
        return soft_cross_entropy(networks.student_outputs(attacked).logits, target, self.temperature)


def _keep_in_step(context: StepContext) -> Tensor | None:
    """Runs the student on two images, so that processes without an image to attack join synchronised batch norms."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    assert context.networks is not None
    return 0.0 * context.networks.student_outputs(context.batch.images[:2]).logits.sum()
