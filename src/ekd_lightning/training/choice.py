"""Which teacher of the pool teaches, for methods that know only one."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch

from ekd_lightning.data import Dataset, ImageSet, Subset
from ekd_lightning.evaluation.evaluate import score_network
from ekd_lightning.training.prepare import Prepared, with_teachers
from ekd_lightning.training.settings import Settings
from ekd_lightning.training.teachers import PlannedTeacher, gather_teachers

log = logging.getLogger(__name__)


def choose_teacher(settings: Settings, prepared: Prepared, device: torch.device | str = "cpu") -> Prepared:
    """Leaves the best teacher on the validation split, where `method.teacher=best` leaves a choice.

    Loads, or trains, all candidates, so this comes after all cheap checks. The validation split is the run's own:
    part of the training subset, and never the test set. Published teachers have seen its images, so their
    accuracies on it say which one fits best, not how well it generalises.

    Args:
        settings: The run's.
        prepared: What `prepare` returned.
        device: Where to compute.

    Returns:
        `prepared` with one teacher and the method for it; unchanged where nothing is left to choose.
    """
    if not prepared.candidates:
        return prepared
    accuracies = {}
    held_out = _validation_set(prepared.dataset, prepared.subset)
    for position, network in enumerate(gather_teachers(list(prepared.candidates)).networks()):
        scores = score_network(network, held_out, batch_size=settings.data.eval_batch_size, device=device)
        accuracies[position] = float(scores["accuracy"])
    best = max(accuracies, key=lambda position: (accuracies[position], -position))
    chosen = prepared.candidates[best]
    shown = ", ".join(f"{plan.id} {100 * accuracies[m]:.2f}" for m, plan in enumerate(prepared.candidates))
    log.info("method.teacher=best: %s (validation accuracies: %s)", chosen.id, shown)
    named = _by_id(prepared.candidates, accuracies)
    return replace(with_teachers(settings, prepared, [chosen]), candidates=(), validation_accuracies=named)


def _by_id(plans: tuple[PlannedTeacher, ...], accuracies: dict[int, float]) -> dict[str, float]:
    """The accuracies by the teachers' names; of two with one name, the first one's."""
    return {plan.id: accuracies[m] for m, plan in reversed(list(enumerate(plans)))}


def _validation_set(dataset: Dataset, subset: Subset) -> ImageSet:
    index = subset.val_index
    train = dataset.train
    return replace(train, split="validation", images=train.images[index], labels=train.labels[index])
