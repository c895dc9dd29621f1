"""The configured pool of teachers: planned and checked first, then loaded or trained."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from ekd_lightning.data.loader import check_batch_size
from ekd_lightning.errors import UserError, few
from ekd_lightning.files import file_sha256
from ekd_lightning.methods.options import choice
from ekd_lightning.networks import (
    NetworkSpec,
    StagedNetwork,
    TeacherEnsemble,
    TeacherIdentity,
    build_network,
    load_network,
    normalization,
    state_sha256,
)
from ekd_lightning.networks.convert import KEY_MAPS, load_foreign
from ekd_lightning.networks.cutting import ABSENT, select_classes
from ekd_lightning.networks.library import PUBLISHED, from_hub, usual
from ekd_lightning.networks.library_weights import load_library_network, positions, weight_classes
from ekd_lightning.networks.own import STATISTICS, check_outputs
from ekd_lightning.networks.registry import library_version
from ekd_lightning.networks.staged import sides
from ekd_lightning.networks.weights import read_spec
from ekd_lightning.networks.zoo import find_zoo_file, zoo
from ekd_lightning.progress import track
from ekd_lightning.settings import TeacherEntry, TeacherSettings
from ekd_lightning.teachers.plan import PlannedTeacher
from ekd_lightning.teachers.store import TeacherStore
from ekd_lightning.training.steps import check_optimizer
from ekd_lightning.training.teacher_training import TeacherData, parts_sha256, train_teacher

log = logging.getLogger(__name__)


def plan_teachers(settings: TeacherSettings, data: TeacherData, accelerator: str) -> list[PlannedTeacher]:
    """Checks the first `count` members of the pool against the data set; loads and trains none.

    Raises:
        UserError: If the pool is empty, a name is unknown, or a teacher does not fit the data or returns no logits.
    """
    count = len(settings.pool) if settings.count is None else settings.count
    if count == 0:
        raise UserError("teachers.pool=[]: must name at least one teacher, as the method needs teachers")
    plans = [_plan(settings, settings.entry(m), f"teachers.pool[{m}]", data, accelerator) for m in range(count)]
    for m, plan in enumerate(plans):
        check_outputs(build_network(plan.spec), data.dataset.image_size, f"teachers.pool[{m}]")
    plans = [_of_classes(plan, f"teachers.pool[{m}]", data.dataset.num_classes) for m, plan in enumerate(plans)]
    twice = {plan.id for plan in plans if sum(other.id == plan.id for other in plans) > 1}
    if twice:
        warnings.warn(f"teachers.pool names {', '.join(sorted(twice))} more than once", stacklevel=2)
    return plans


def _of_classes(plan: PlannedTeacher, key: str, count: int) -> PlannedTeacher:
    """Returns the plan; if its teacher predicts another number of classes, as a teacher of features alone.

    One without a linear classifier, which could be replaced, is refused.
    """
    spec = plan.spec
    if spec.num_classes == count:
        return plan
    if not build_network(spec).num_features:
        raise UserError(f"{key}: {spec.name!r} predicts {spec.num_classes} classes, the data has {count}")

    def obtain() -> tuple[StagedNetwork, dict[str, Any]]:
        network, detail = plan.obtain()
        assert isinstance(network.head, nn.Linear)
        network.head = select_classes(network.head, [ABSENT] * count)
        network.spec = replace(network.spec, num_classes=count)
        return network.eval(), detail

    spec = replace(plan.spec, num_classes=count)
    return replace(plan, spec=spec, obtain=obtain, unknown=frozenset(range(count)))


def check_teachers(plans: Sequence[PlannedTeacher]) -> list[str | None]:
    """Reads the teachers that need no training, and checks that the others can be trained; changes no run.

    Returns the SHA-256 of each teacher's weights; None for one that has to be trained.

    Raises:
        UserError: If weights are missing, damaged or do not fit, or the store cannot be written.
    """
    found = {m: state_sha256(plans[m].obtain()[0]) if plans[m].is_ready() else None for m in _files_first(plans)}
    return [found[m] for m in range(len(plans))]


def _files_first(plans: Sequence[PlannedTeacher]) -> list[int]:
    """Positions of the teachers, trained ones last: a damaged file is found at once and not after hours."""
    return sorted(range(len(plans)), key=lambda m: plans[m].source == "trained")


def gather_teachers(plans: list[PlannedTeacher]) -> TeacherEnsemble:
    """Loads or trains the planned teachers and freezes them."""
    obtained = {m: plans[m].obtain() for m in track(_files_first(plans), "", "teachers")}
    members, identities = [], []
    for m, plan in enumerate(plans):
        network, detail = obtained[m]
        members.append(network)
        identities.append(
            TeacherIdentity(
                id=plan.id, sha256=state_sha256(network), source=plan.source, network=network.spec.name, detail=detail
            )
        )
    return TeacherEnsemble(members, identities)


def _plan(
    settings: TeacherSettings, entry: TeacherEntry, key: str, data: TeacherData, accelerator: str
) -> PlannedTeacher:
    settings = replace(settings, recipe=settings.recipe.changed(entry.recipe, f"{key}.recipe"))
    if entry.zoo:
        return _plan_zoo(settings, entry.zoo, key, data)
    if entry.file:
        return _plan_file(entry, key, data)
    if entry.train:
        return _plan_trained(settings, entry, str(entry.train), data, accelerator)
    return _plan_library(settings, entry, key, data, accelerator)


def _plan_zoo(settings: TeacherSettings, zoo_id: str, key: str, data: TeacherData) -> PlannedTeacher:
    known = zoo()[zoo_id]
    if known.data != data.dataset.name:
        raise UserError(f"{key}={zoo_id}: this teacher was trained on {known.data}, but data.name={data.dataset.name}")

    def find() -> Path:
        folder = Path(settings.weights_dir)
        try:
            return find_zoo_file(known, folder, settings.download)
        except UserError as error:
            if (folder / known.file).is_file():
                raise
            advice = "set teachers.weights_dir to the folder with the file, or train teachers with teachers=trained"
            raise UserError(f"{error} ({advice})") from None

    def obtain() -> tuple[StagedNetwork, dict[str, Any]]:
        return load_foreign(find(), known.spec, known.key_map), {
            "trained_on": "published",
            "file": known.file,
            "file_sha256": known.sha256,
            "published_accuracy": known.accuracy,
        }

    return PlannedTeacher(zoo_id, known.spec, "zoo", obtain)


def _plan_file(entry: TeacherEntry, key: str, data: TeacherData) -> PlannedTeacher:
    path = Path(str(entry.file))
    if not path.is_file():
        raise UserError(f"{key}.file={path}: no such file")
    detail = {"file": path.name, "file_sha256": file_sha256(path)}
    if entry.network is None:
        spec = read_spec(path)
        return PlannedTeacher(path.stem, spec, "file", lambda: (load_network(path), detail))
    if entry.key_map is None:
        raise UserError(
            f"{key}.key_map: needed to read a foreign checkpoint as {entry.network} (one of {', '.join(KEY_MAPS)})"
        )
    spec = NetworkSpec(
        entry.network,
        data.dataset.num_classes,
        normalization(entry.normalization or data.dataset.normalization),
        entry.options,
    )
    key_map = choice(f"{key}.key_map", entry.key_map, KEY_MAPS)
    return PlannedTeacher(path.stem, spec, "file", lambda: (load_foreign(path, spec, key_map), detail))


def _plan_trained(
    settings: TeacherSettings, entry: TeacherEntry, network: str, data: TeacherData, accelerator: str
) -> PlannedTeacher:
    statistics = normalization(entry.normalization or data.dataset.normalization)
    spec = NetworkSpec(network, data.dataset.num_classes, statistics, entry.options)
    build_network(spec)  # refuses an unknown network or option before other teachers are trained
    return _plan_stored(settings, entry, spec, data, accelerator, {})


def _plan_stored(
    settings: TeacherSettings,
    entry: TeacherEntry,
    spec: NetworkSpec,
    data: TeacherData,
    accelerator: str,
    initial: Mapping[str, Any],
    start: Callable[[], StagedNetwork] | None = None,
) -> PlannedTeacher:
    """Plans a teacher that is trained unless the store has it.

    `start` returns the network with its initial weights, see `train_teacher`; `initial` describes them in the key.
    """
    check_optimizer(settings.recipe, "teachers.recipe")  # before other teachers are trained
    held_out, own = data.dataset.val_index, data.train_on == "subset"
    images = (
        len(data.subset.train_index) if own else len(data.dataset.train) - len(() if held_out is None else held_out)
    )
    check_batch_size(settings.recipe.batch_size, images, recipe_key="teachers.recipe")
    everything = "all" if held_out is None else "all but those for validation"
    key = {
        "network": spec.to_dict(),
        "data": data.dataset.name,
        "images": data.dataset.train.sha256,
        "train_on": data.train_on,
        "subset": data.subset.sha256 if own else everything,
        "views": data.views.key,
        "recipe": settings.recipe.key(),
        "seed": entry.seed,
        **initial,
    }
    store = TeacherStore(Path(settings.store))

    def is_ready() -> bool:
        ready = store.has(key)
        if not ready and start is not None:
            start()
        return ready

    def obtain() -> tuple[StagedNetwork, dict[str, Any]]:
        def train(scratch: Path) -> StagedNetwork:
            options = scratch, accelerator
            head_only = entry.finetune == "head"
            return train_teacher(spec, data, settings.recipe, entry.seed, *options, start=start, head_only=head_only)

        network = store.get_or_train(key, train)
        return network, {"trained_on": data.train_on, "seed": entry.seed, "store_key": store.digest(key)}

    return PlannedTeacher(f"{spec.name}-s{entry.seed}", spec, "trained", obtain, is_ready=is_ready)


def _plan_library(
    settings: TeacherSettings, entry: TeacherEntry, key: str, data: TeacherData, accelerator: str
) -> PlannedTeacher:
    """Plans a network of another library, with its published weights or fine-tuned on the data."""
    if entry.module and not entry.normalization:
        raise UserError(
            f"{key}.normalization: must be given, as a module does not say what it was trained with: {STATISTICS}"
        )
    if not entry.hub:
        given = entry.weights not in (None, PUBLISHED)
        path = Path(str(entry.weights)) if given else None
        if path is not None and not path.is_file():
            raise UserError(f"{key}.weights={path}: no such file (or {PUBLISHED} for those of the library)")
        name = f"{entry.source}:{getattr(entry, entry.source)}"
        known = usual(name)
    else:
        name, known, path = from_hub(entry.hub)
    statistics = known.normalization if known else normalization(data.dataset.normalization)
    size = entry.image_size or (known.image_size if known else None)
    spec = NetworkSpec(
        name,
        data.dataset.num_classes,
        normalization(entry.normalization) if entry.normalization else statistics,
        {**entry.options, **({"stages": entry.stages} if entry.stages else {})},
        None if (size, size) == sides(data.dataset.image_size) else size,
    )
    linear = build_network(spec).num_features > 0
    if (entry.finetune or entry.classes) and not linear:
        raise UserError(f"{key}: {spec.name!r} does not end with a linear layer, so it has no classes to change")
    load = partial(load_library_network, spec, path, state_key=entry.state_key)
    detail = {"library": f"{entry.source} {library_version(spec.name)}".strip(), "weights": PUBLISHED}
    if path is not None:
        detail |= {"weights": path.name, "file_sha256": file_sha256(path)}
    published = path is None and entry.source != "module"
    if entry.finetune:
        # Local weights are read now, so that those that do not fit are refused before other teachers are trained.
        weights = detail if published else parts_sha256(load(fresh_head=True))
        initial = {"start": weights, "finetune": entry.finetune}
        return _plan_stored(settings, entry, spec, data, accelerator, initial, partial(load, fresh_head=True))
    predicted = weight_classes(spec, path, entry.state_key)
    classes = entry.classes
    if classes is None and predicted != spec.num_classes:
        if not linear:
            raise UserError(f"{key}: {spec.name!r} predicts {predicted} classes, the data has {spec.num_classes}")
        counts = predicted, spec.num_classes
        log.info("teacher %s predicts %d classes, the data has %d: it can teach features only", spec.name, *counts)
        classes = [ABSENT] * spec.num_classes  # terms on logits refuse it
    elif classes is not None:
        classes = positions(spec, classes, data.dataset.class_names, predicted)
        if unknown := [name for name, place in zip(data.dataset.class_names, classes, strict=True) if place == ABSENT]:
            log.info("teacher %s does not know %d of the data's classes: %s", spec.name, len(unknown), few(unknown))
    return PlannedTeacher(
        spec.name if path is None else f"{spec.name}-{path.stem}",
        spec,
        entry.source,
        lambda: (
            load(classes=classes),
            {"trained_on": "published" if published or entry.hub else "elsewhere", **detail},
        ),
        frozenset(c for c, place in enumerate(classes or ()) if place == ABSENT),
    )
