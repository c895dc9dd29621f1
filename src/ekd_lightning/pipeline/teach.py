"""Teachers without a student: obtain a pool and test each member."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ekd_lightning.data import Dataset
from ekd_lightning.evaluation.efficiency import count_parameters
from ekd_lightning.files import write_json
from ekd_lightning.networks import TeacherEnsemble, TeacherIdentity, load_network
from ekd_lightning.pipeline.fill import fill_tables, prepare_fill
from ekd_lightning.pipeline.prepare import prepare_data
from ekd_lightning.settings import Settings
from ekd_lightning.teachers.store import TeacherStore
from ekd_lightning.tracking.loggers import check_loggers
from ekd_lightning.tracking.teacher_curves import TeacherCurves
from ekd_lightning.training.pool import TeacherData, gather_teachers, plan_teachers


def obtain_teachers(settings: Settings, directory: Path) -> list[dict[str, Any]]:
    """Reads, downloads or trains the first `count` teachers of the pool and tests each.

    Args:
        settings: The groups data and teachers are read, and all that a run reads with `teachers.fill`.
        directory: Receives teachers.json.

    Returns:
        One record per teacher, see `score_teachers`.

    Raises:
        UserError: For a user's mistake, before anything is trained.
    """
    settings.check()
    check_loggers(settings.logger)
    accelerator = str(settings.trainer.get("accelerator", "auto"))
    to_fill = prepare_fill(settings, accelerator)
    dataset, subset, views = prepare_data(settings)
    curves = TeacherCurves(settings.logger, directory)
    data = TeacherData(dataset, subset, views, settings.teachers.train_on, curves)
    teachers = gather_teachers(plan_teachers(settings.teachers, data, accelerator))
    on_gpu = torch.cuda.is_available() and accelerator in ("auto", "gpu", "cuda")
    device = torch.device("cuda" if on_gpu else "cpu")
    rows = score_teachers(settings, dataset, teachers, device)
    record: dict[str, Any] = {"data": dataset.name, "teachers": rows}
    if to_fill is not None:
        found, computed = fill_tables(settings, to_fill, device)
        record["table"] = {"rows_found": found, "rows_computed": computed}
    write_json(directory / "teachers.json", record)
    return rows


def score_teachers(
    settings: Settings, dataset: Dataset, teachers: TeacherEnsemble, device: torch.device
) -> list[dict[str, Any]]:
    """Each teacher's id, hash, origin, training images, and own test scores (accuracy in [0, 1], NLL in nats)."""
    store = TeacherStore(Path(settings.teachers.store))
    rows = []
    for network, identity in zip(teachers.networks(), teachers.identities, strict=True):
        scores = store.test_scores(
            network, identity.sha256, dataset.test, settings.data.eval_batch_size, device
        )
        rows.append(
            {
                "id": identity.id,
                "sha256": identity.sha256,
                "source": identity.source,
                "trained_on": identity.detail.get("trained_on", identity.source),
                "num_parameters": count_parameters(network),
                "test_accuracy": scores["accuracy"],
                "test_nll": scores["nll"],
            }
        )
    return rows


def describe_chain(
    settings: Settings, dataset: Dataset, teacher: TeacherIdentity, device: torch.device
) -> dict[str, Any]:
    """The chain's part of the record, with each link's test scores.

    Args:
        settings: The run's.
        dataset: For its test set.
        teacher: The last assistant as `gather_teachers` identified it.
        device: Where to compute.

    Returns:
        `chain`, one mapping per link, with test_accuracy in [0, 1] and test_nll in nats; `chain_seconds` and
        `chain_steps`, what training them cost this run (0 for links that the store had; a run that only waited for
        another one's training counts it, too); `chain_stored_seconds`, what all links cost whenever they were
        trained.
    """
    store = TeacherStore(Path(settings.teachers.store))
    links = []
    for link in teacher.detail["chain"]:
        network = load_network(store.weights(link["store_key"]))
        scores = store.test_scores(
            network, link["sha256"], dataset.test, settings.data.eval_batch_size, device
        )
        links.append({**link, "test_accuracy": scores["accuracy"], "test_nll": scores["nll"]})
    here = [link for link in links if not link["found"]]
    return {
        "chain": links,
        "chain_seconds": sum(link["train_seconds"] or 0.0 for link in here),
        "chain_steps": sum(link["steps"] or 0 for link in here),
        "chain_stored_seconds": sum(link["train_seconds"] or 0.0 for link in links),
    }
