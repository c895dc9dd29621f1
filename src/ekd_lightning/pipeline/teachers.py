"""Teachers, of a run or on their own: obtain them, choose one, test them, fill the tables of their outputs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ekd_lightning.data import Dataset
from ekd_lightning.errors import UserError
from ekd_lightning.evaluation.efficiency import count_parameters
from ekd_lightning.evaluation.predict import predict
from ekd_lightning.evaluation.scores import score_logits
from ekd_lightning.files import write_json
from ekd_lightning.networks import TeacherEnsemble, TeacherIdentity, load_network
from ekd_lightning.networks.cutting import unknown_classes
from ekd_lightning.networks.weights import answers_sha256
from ekd_lightning.pipeline.prepare import (
    Prepared,
    check_settings,
    prepare,
    prepare_data,
    validation_images,
    with_teachers,
)
from ekd_lightning.progress import advance, part, phase, track
from ekd_lightning.runs.directory import RunDirectory
from ekd_lightning.runs.writer import is_rank_zero
from ekd_lightning.settings import Settings
from ekd_lightning.teachers.store import TeacherStore
from ekd_lightning.teachers.tabled import TabledTeachers
from ekd_lightning.tracking.loggers import TeacherCurves
from ekd_lightning.training.pool import check_teachers, gather_teachers, plan_teachers
from ekd_lightning.training.teacher_training import TeacherData

log = logging.getLogger(__name__)


def obtain_teachers(
    settings: Settings, directory: Path, *, on_start: Callable[[], None] | None = None
) -> list[dict[str, Any]]:
    """Reads, downloads or trains the first `count` teachers of the pool and tests each.

    Without `teachers.fill`, only the groups data and teachers of the settings matter. Global rank 0 writes
    teachers.json into the directory. `on_start` is called once all checks have passed; nothing is written before.

    Returns:
        One record per teacher, see `score_teachers`.

    Raises:
        UserError: If a setting does not fit, before anything is trained.
    """
    check_settings(settings)
    accelerator = str(settings.trainer.get("accelerator", "auto"))
    with phase("data"):
        to_fill = None if settings.teachers.fill == "none" else prepare(settings, accelerator)
        if to_fill and not to_fill.source.tables:
            raise UserError(
                f"teachers.fill={settings.teachers.fill}: this configuration keeps no teacher tables, e.g. because "
                f"method={settings.method.name} compares whole maps; method=ekd_pooled and kd_mean keep tables"
            )
        dataset, subset, views = prepare_data(settings)
    curves = TeacherCurves(settings.logger, directory)
    data = TeacherData(dataset, subset, views, settings.teachers.train_on, curves, settings.capture)
    plans = plan_teachers(settings.teachers, data, accelerator)
    check_teachers(plans)
    if on_start:
        on_start()
    with phase("teachers"):
        teachers = gather_teachers(plans)
    on_gpu = torch.cuda.is_available() and accelerator in ("auto", "gpu", "cuda")
    device = torch.device("cuda" if on_gpu else "cpu")
    with phase("test", len(plans), None):
        rows = score_teachers(settings, dataset, teachers, device)
    record: dict[str, Any] = {"data": dataset.name, "teachers": rows}
    if to_fill is not None:
        with phase("table"):
            found, computed = fill_tables(settings, to_fill, device)
        record["table"] = {"rows_found": found, "rows_computed": computed}
    if is_rank_zero():
        write_json(directory / "teachers.json", record)
    return rows


def choose_teacher(settings: Settings, prepared: Prepared, device: torch.device | str = "cpu") -> Prepared:
    """Chooses the best teacher on the validation split, if `method.teacher=best` leaves more than one.

    The best teacher has the highest accuracy; of equal ones, e.g. teachers that were trained on these images, the one
    with the lowest negative log-likelihood.

    This loads or trains all candidates, so it comes after all cheap checks. The validation split is part of the run's
    training subset, never of the test set. Published teachers were trained on its images, so their accuracies on it
    say which one fits best, not how well it generalises.

    Returns `prepared` with one teacher and the method for it; unchanged if there is nothing to choose.
    """
    if not prepared.candidates:
        return prepared
    held_out = validation_images(prepared.dataset, prepared.subset)
    batch_size = settings.data.eval_batch_size
    rows: list[dict[str, Any]] = []
    networks = gather_teachers(list(prepared.candidates)).members
    for plan, network in zip(prepared.candidates, networks, strict=True):
        outputs = predict(network.to(device), held_out, batch_size=batch_size, device=device)
        scores = score_logits(outputs.logits, held_out.labels)
        rows.append({"id": plan.id, "val_accuracy": float(scores["accuracy"]), "val_nll": float(scores["nll"])})
    best = max(range(len(rows)), key=lambda m: (rows[m]["val_accuracy"], -rows[m]["val_nll"], -m))
    shown = ", ".join(f"{r['id']} {100 * r['val_accuracy']:.2f} % NLL {r['val_nll']:.4f}" for r in rows)
    log.info("method.teacher=best: %s (on the validation split: %s)", rows[best]["id"], shown)
    chosen = with_teachers(settings, prepared, [prepared.candidates[best]])
    return replace(chosen, candidates=(), candidate_scores=rows)


def score_teachers(
    settings: Settings, dataset: Dataset, teachers: TeacherEnsemble, device: torch.device
) -> list[dict[str, Any]]:
    """Returns each teacher's id, hash, source, network and test scores (accuracy in [0, 1], NLL in nats).

    The scores of a teacher of features alone are None.
    """
    store = TeacherStore(Path(settings.teachers.store))
    rows = []
    for network, identity in zip(teachers.members, teachers.identities, strict=True):
        answers = answers_sha256(identity.sha256, identity.network)
        scores: dict[str, Any] = {}
        if len(unknown_classes(network.head)) < teachers.num_classes:
            with part(identity.id):
                scores = store.test_scores(network, answers, dataset.test, settings.data.eval_batch_size, device)
        advance()
        rows.append(
            {
                "id": identity.id,
                "sha256": identity.sha256,
                "source": identity.source,
                "network": identity.network,
                "trained_on": identity.detail.get("trained_on", identity.source),
                "num_parameters": count_parameters(network),
                "test_accuracy": scores.get("accuracy"),
                "test_nll": scores.get("nll"),
            }
        )
    return rows


def keep_chain_cost(run: RunDirectory, teacher: TeacherIdentity) -> None:
    """Marks the assistants that the store lacked in an earlier part of a resumed run, so that their cost stays its own.

    The links of `teacher`, the last assistant, are changed by the run's record of the earlier part; a teacher without a
    chain is not.
    """
    recorded = [link for entry in run.provenance().get("teachers") or [] for link in entry.get("chain") or []]
    missing = {link["sha256"] for link in recorded if not link["found"]}
    for link in teacher.detail.get("chain", ()):
        link["found"] &= link["sha256"] not in missing


def describe_chain(
    settings: Settings, dataset: Dataset, teacher: TeacherIdentity, device: torch.device
) -> dict[str, Any]:
    """Returns the fields of the result about the chain of the last assistant, with test scores of each assistant.

    Returns:
        `chain`, one mapping per assistant, with test_accuracy in [0, 1] and test_nll in nats; `chain_seconds` and
        `chain_steps`, the cost of the assistants that the store lacked when this run needed them (even if another run
        trained them); `chain_stored_seconds`, the cost of all assistants.
    """
    store = TeacherStore(Path(settings.teachers.store))
    links = []
    for link in teacher.detail["chain"]:
        network = load_network(store.weights(link["store_key"]))
        answers = answers_sha256(link["sha256"], network.spec.name)
        scores = store.test_scores(network, answers, dataset.test, settings.data.eval_batch_size, device)
        links.append({**link, "test_accuracy": scores["accuracy"], "test_nll": scores["nll"]})
    missing = [link for link in links if not link["found"]]
    return {
        "chain": links,
        "chain_seconds": sum(link["train_seconds"] or 0.0 for link in missing),
        "chain_steps": sum(link["steps"] or 0 for link in missing),
        "chain_stored_seconds": sum(link["train_seconds"] or 0.0 for link in links),
    }


def fill_tables(settings: Settings, prepared: Prepared, device: torch.device) -> tuple[int, int]:
    """Computes the missing rows of the tables for one run (`teachers.fill=run`) or for every view (`all`).

    It may be stopped and started again: stored rows are not computed twice. With `run`, epochs, batch size and seed
    determine the rows. Returns the rows found and the rows computed, counted per teacher.

    Raises:
        UserError: If rows cannot be stored, e.g. because the disk is full.
    """
    prepared = choose_teacher(settings, prepared, device)
    source = prepared.source.open(gather_teachers(prepared.teachers).to(device))
    assert isinstance(source, TabledTeachers)
    parts = list(_epochs(settings, prepared) if settings.teachers.fill == "run" else _views(prepared))
    source.plan(sum(len(index) for index, _ in parts))
    gather = partial(prepared.datamodule.training_images, device=device)
    for index, view in track(parts, "", "epochs" if settings.teachers.fill == "run" else "views"):
        source.prepare_epoch(index, view, gather, {prepared.source.stages: len(index)})
        if not source.keeping:
            raise UserError(
                f"teachers.store={settings.teachers.store}: teacher tables cannot be written there; make space, or "
                "choose another folder"
            )
    return source.hits, source.misses


def _epochs(settings: Settings, prepared: Prepared) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields index and view of every epoch of the run."""
    loader = prepared.datamodule.train_dataloader()
    for epoch in range(settings.recipe.epochs):
        loader.set_epoch(epoch)
        yield loader.distinct_rows()


def _views(prepared: Prepared) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields all training images in one view after another."""
    unlabelled = prepared.datamodule.unlabelled
    index = prepared.subset.train_index
    if unlabelled is not None:
        index = torch.cat((index, unlabelled.index))
    for view in range(prepared.views.num_views):
        yield index, torch.full_like(index, view)
