"""Reopening of a finished run: its data, checked against the record, and its teachers, never trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ekd_lightning.errors import UserError
from ekd_lightning.networks import (
    BranchedStudent,
    StagedNetwork,
    TeacherEnsemble,
    TeacherIdentity,
    load_network,
    load_student,
    state_sha256,
)
from ekd_lightning.pipeline.evaluation import EvaluationContext
from ekd_lightning.pipeline.prepare import prepare_data
from ekd_lightning.runs.directory import RunDirectory
from ekd_lightning.settings import Settings
from ekd_lightning.teachers.store import TeacherStore
from ekd_lightning.training.pool import TeacherData, plan_teachers

_OWN = ("id", "sha256", "source", "network")


def open_context(
    run: RunDirectory, settings: Settings, device: torch.device, student: BranchedStudent | None = None
) -> EvaluationContext:
    """What the parts of an evaluation need of a finished run.

    Args:
        run: The run.
        settings: Those it ran with, but for where things are by now.
        device: Where to compute.
        student: Moved to `device`; None for the run's own, with the weights after the last epoch.

    Raises:
        UserError: If the run is not done, a file of it is damaged, or the data are missing, or others than the run's.
    """
    started = run.started()  # first: a run that takes its place meanwhile is noticed
    result, record = run.finished_result(), run.provenance()
    if student is None:
        student = load_student(run.student)
    dataset, subset, views = prepare_data(settings)
    recorded = record.get("data") or {}
    for name, found in (("train", dataset.train.sha256), ("test", dataset.test.sha256)):
        if recorded.get(f"{name}_sha256", found) != found:
            raise UserError(f"data.root={settings.data.root}: its {name} images are not those of the run {run.path}")
    if result.subset_sha256 not in (None, subset.sha256):
        raise UserError(f"{run.path}: its settings no longer choose the images that it was trained on")
    data = TeacherData(dataset, subset, views, settings.teachers.train_on)
    entries = record.get("teachers") or []
    return EvaluationContext(
        settings,
        result,
        student.eval().to(device),
        dataset,
        subset,
        device,
        gather=(lambda: recorded_teachers(settings, entries, data)) if entries else None,
        started=started,
    )


def recorded_teachers(settings: Settings, entries: Iterable[Mapping[str, Any]], data: TeacherData) -> TeacherEnsemble:
    """Loads the teachers that a run's provenance names; none is ever trained here.

    Args:
        settings: The run's, with places where the teachers are now.
        entries: `teachers` of its provenance.json.
        data: The run's.

    Raises:
        UserError: If one is no longer there, or is another network than the run's.
    """
    networks, identities = [], []
    for entry in entries:
        network = _load(settings, entry, data)
        if state_sha256(network) != entry["sha256"]:
            raise UserError(f"teacher {entry['id']!r} is not the one that taught this run (its weights differ)")
        detail = {name: value for name, value in entry.items() if name not in _OWN}
        networks.append(network)
        identities.append(TeacherIdentity(**{name: entry[name] for name in _OWN}, detail=detail))
    return TeacherEnsemble(networks, identities)


def _load(settings: Settings, entry: Mapping[str, Any], data: TeacherData) -> StagedNetwork:
    if "store_key" in entry:
        weights = TeacherStore(Path(settings.teachers.store)).weights(entry["store_key"])
        if not weights.is_file():
            raise UserError(
                f"teachers.store={settings.teachers.store}: teacher {entry['id']!r} of the run is not there; "
                "name the store that the run used"
            )
        return load_network(weights)
    for plan in plan_teachers(settings.teachers, data, "cpu"):
        if (plan.id, plan.source) == (entry["id"], entry["source"]):
            network, detail = plan.obtain()
            if detail.get("file_sha256") == entry.get("file_sha256"):
                return network
    raise UserError(f"teacher {entry['id']!r} of the run is not in its pool any more")
