"""Which teacher of the pool teaches, for methods that know only one."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from ekd_lightning.data import Dataset, ImageSet, Subset
from ekd_lightning.evaluation.scores import score_network
from ekd_lightning.networks import StagedNetwork
from ekd_lightning.pipeline.prepare import Prepared, with_teachers
from ekd_lightning.settings import Settings
from ekd_lightning.training.pool import gather_teachers

log = logging.getLogger(__name__)


def choose_teacher(settings: Settings, prepared: Prepared, device: torch.device | str = "cpu") -> Prepared:
    """Leaves the best teacher on the validation split, where `method.teacher=best` leaves a choice.

    The best has the most images right; of equal ones, as networks are that were trained on these very images, the
    one with the lowest negative log-likelihood.

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
    held_out = _validation_set(prepared.dataset, prepared.subset)
    batch_size = settings.data.eval_batch_size
    rows: list[dict[str, Any]] = []
    for plan, network in zip(prepared.candidates, _networks(prepared), strict=True):
        scores = score_network(network, held_out, batch_size=batch_size, device=device)
        rows.append(
            {"id": plan.id, "val_accuracy": float(scores["accuracy"]), "val_nll": float(scores["nll"])}
        )
    best = max(range(len(rows)), key=lambda m: (rows[m]["val_accuracy"], -rows[m]["val_nll"], -m))
    shown = ", ".join(f"{r['id']} {100 * r['val_accuracy']:.2f} % NLL {r['val_nll']:.4f}" for r in rows)
    log.info("method.teacher=best: %s (on the validation split: %s)", rows[best]["id"], shown)
    chosen = with_teachers(settings, prepared, [prepared.candidates[best]])
    return replace(chosen, candidates=(), candidate_scores=rows)


def _networks(prepared: Prepared) -> Iterator[StagedNetwork]:
    return gather_teachers(list(prepared.candidates)).networks()


def _validation_set(dataset: Dataset, subset: Subset) -> ImageSet:
    index = subset.val_index
    train = dataset.train
    return replace(train, split="validation", images=train.images[index], labels=train.labels[index])
