"""From settings to the parts of a run, cheap checks first, before anything expensive starts."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ekd_lightning.data import Dataset, ImageSet, Mixing, Subset, ViewFamily, open_unlabelled
from ekd_lightning.data.catalog import open_images
from ekd_lightning.data.datamodule import ImageDataModule
from ekd_lightning.data.loader import rows_of_batch
from ekd_lightning.data.views import configured_views
from ekd_lightning.errors import UserError, quiet
from ekd_lightning.evaluation.efficiency import count_macs, count_parameters
from ekd_lightning.methods import Method, TermContext, build_method, needs_teachers, terms_with_labels, uses_assignment
from ekd_lightning.networks import BranchedStudent, NetworkSpec, TeacherEnsemble, build_network, normalization
from ekd_lightning.networks.library import fixed_size
from ekd_lightning.networks.own import check_outputs
from ekd_lightning.networks.projection import classifier_width, own_teachers
from ekd_lightning.networks.registry import is_of_library, require_network, thinned
from ekd_lightning.networks.staged import sides
from ekd_lightning.networks.zoo import zoo
from ekd_lightning.runs.writer import is_rank_zero
from ekd_lightning.settings import Settings
from ekd_lightning.teachers.plan import PlannedTeacher, SourcePlan, plan_source
from ekd_lightning.tracking.loggers import TeacherCurves
from ekd_lightning.training.chain import Chain, plan_chain
from ekd_lightning.training.pool import plan_teachers
from ekd_lightning.training.steps import check_optimizer
from ekd_lightning.training.teacher_training import TeacherData
from ekd_lightning.training.trainer import check_trainer

log = logging.getLogger(__name__)

PLAIN_METHODS = (
    *("aekd", "attention", "bss", "camkd", "camkd_maps", "ce", "ce_label_smoothing", "crd", "dkd", "ebkd", "fitnet"),
    *("fitnet_two_stage", "fsp", "kd", "kd_logit_std", "kd_mean", "kd_mean_feature", "kd_mean_maps", "pseudo_labels"),
    *("rkd", "sp", "takd", "vid"),
)
"""Methods of `conf/method` that are meant for a student with one branch."""


@dataclass(frozen=True)
class Prepared:
    """The checked parts of a run. Teachers are planned, not loaded."""

    dataset: Dataset
    subset: Subset
    views: ViewFamily
    datamodule: ImageDataModule
    student: BranchedStudent
    method: Method
    teachers: list[PlannedTeacher]
    source: SourcePlan
    """Source of the teachers' outputs."""
    candidates: tuple[PlannedTeacher, ...] = ()
    """Teachers among which `teachers.choose_teacher` has still to choose; `teachers` and `method` are those of one."""
    candidate_scores: list[dict[str, Any]] = field(default_factory=list)
    """Scores for that choice: id, val_accuracy in [0, 1] and val_nll in nats of every candidate."""
    chain: Chain | None = None
    """Assistants between pool and student; if any, `teachers` is the last one, and candidates teach the first one."""

    @property
    def pool(self) -> tuple[PlannedTeacher, ...]:
        """The teachers of the settings, also those among which a choice is to be made; no assistants."""
        return self.candidates or (self.chain.origins if self.chain else tuple(self.teachers))


def prepare(settings: Settings, accelerator: str, curves: TeacherCurves | None = None) -> Prepared:
    """Builds all cheap parts of a run and makes all possible checks.

    The student's initial weights depend on `settings.seed` and the student's settings alone. `curves` are loggers of
    the teachers and assistants that have to be trained.

    Raises:
        UserError: At the first setting that does not fit.
    """
    check_settings(settings)
    needs = needs_teachers(settings.method.terms)
    dataset, subset, views = prepare_data(settings)
    unlabelled = open_unlabelled(settings.data, dataset, subset)
    datamodule = ImageDataModule(
        dataset,
        subset,
        views,
        batch_size=settings.recipe.batch_size,
        eval_batch_size=settings.data.eval_batch_size,
        seed=settings.seed,
        mixing=Mixing(settings.recipe.mixup, settings.recipe.cutmix),
        unlabelled=unlabelled,
    )
    teacher_data = TeacherData(dataset, subset, views, settings.teachers.train_on, curves, settings.capture)
    plans = plan_teachers(settings.teachers, teacher_data, accelerator) if needs else []
    student = build_student(settings, dataset, plans[:1] if settings.method.teacher == "first" else plans)
    candidates = _candidates(settings, plans, subset)
    assisted = bool(settings.method.assistants)
    chain = plan_chain(settings, dataset, subset, views, plans, student, accelerator, curves) if assisted else None
    # The widest candidate comes last, so that its tables, the largest, are planned.
    order = sorted(candidates, key=lambda plan: build_network(plan.spec).num_features)
    possible = [[chain.last()]] if chain else [[plan] for plan in order] or [plans]
    for taught_by in possible:
        method = _build_method(settings, dataset, subset, student, taught_by)
    _log_unlabelled(settings, datamodule)
    source = plan_source(settings, dataset, subset, views, taught_by, method, unlabelled) if needs else SourcePlan()
    return Prepared(dataset, subset, views, datamodule, student, method, taught_by, source, candidates, chain=chain)


def check_settings(settings: Settings) -> None:
    """Makes the checks that need neither the images nor this machine, so that a sweep makes them for all its jobs.

    Raises:
        UserError: At the first setting that does not fit.
    """
    settings.check()
    check_trainer(settings.trainer)
    check_optimizer(settings.recipe, "recipe")
    if settings.data.unlabelled is not None and terms_with_labels(settings.method.terms)[1]:
        raise UserError(
            f"data.unlabelled={settings.data.unlabelled}: has no effect, as all terms of the method "
            f"{settings.method.name!r} need labels"
        )
    needs, built = needs_teachers(settings.method.terms), {"student.network": settings.student.network}
    if needs and settings.teachers.count == 0:
        raise UserError(f"teachers.count=0: the method {settings.method.name!r} needs teachers")
    entries = [settings.teachers.entry(m) for m in range(len(settings.teachers.pool) if needs else 0)]
    built |= {f"teachers.pool[{m}].train": entry.train for m, entry in enumerate(entries) if entry.train}
    for key, name in built.items():
        try:
            require_network(name)
        except UserError as error:
            raise UserError(f"{key}: {error}") from None
    for name in (entry.zoo for entry in entries if entry.zoo):
        zoo()[name]  # raises for an unknown name
    with quiet():  # `prepare` reports settings without effect
        configured_views(settings.data, settings.data.padding or 0)


def _log_unlabelled(settings: Settings, data: ImageDataModule) -> None:
    """Logs how many images have no labels, and which terms ignore them."""
    if data.unlabelled is None or not is_rank_zero():
        return
    labelled, unlabelled = rows_of_batch(data.batch_size, data.num_train_images, data.unlabelled)
    log.info(
        "%d images without labels (%s): %d images of a batch of %d; terms that use only the %d with labels: %s",
        len(data.unlabelled),
        data.unlabelled.source,
        unlabelled,
        data.batch_size,
        labelled,
        ", ".join(terms_with_labels(settings.method.terms)[0]) or "none",
    )


def with_teachers(settings: Settings, prepared: Prepared, plans: list[PlannedTeacher]) -> Prepared:
    """Returns the same run with other teachers and the method for them; a `UserError` if it does not fit them."""
    if prepared.chain is not None:  # the method depends only on the last assistant, which stays the same
        chain = prepared.chain.taught_by(plans)
        return replace(prepared, teachers=[chain.last()], chain=chain)
    method = _build_method(settings, prepared.dataset, prepared.subset, prepared.student, plans)
    return replace(prepared, teachers=plans, method=method)


def _candidates(settings: Settings, plans: list[PlannedTeacher], subset: Subset) -> tuple[PlannedTeacher, ...]:
    """Returns the teachers among which `method.teacher=best` has to choose; shortens `plans` to one for `first`."""
    choice, assignment = settings.method.teacher, settings.method.assignment
    if choice is not None and not plans:
        warnings.warn(f"method.teacher={choice} has no effect: the method needs no teachers", stacklevel=3)
    elif choice is not None and _chosen(settings) is None:
        warnings.warn(f"method.teacher=mean has no effect with method.assignment={assignment}", stacklevel=3)
    if choice == "first":
        del plans[1:]
    if choice != "best" or len(plans) < 2:
        return ()
    if not len(subset.val_index):
        raise UserError("method.teacher=best needs validation images: set data.val_fraction, or method.teacher=first")
    if mute := [plan.id for plan in plans if len(plan.unknown) == plan.spec.num_classes]:
        why = f"method.teacher=best compares accuracies, but {mute[0]!r} predicts no class of the data"
        raise UserError(f"{why}: set method.teacher=first")
    return tuple(plans)


def _chosen(settings: Settings) -> str | None:
    """Returns `method.teacher`; None where an assignment stands in place of the mean."""
    choice = settings.method.teacher
    return None if choice == "mean" and settings.method.assignment is not None else choice


def prepare_data(settings: Settings) -> tuple[Dataset, Subset, ViewFamily]:
    """Returns the images, the subset that a run may see, and their augmentation.

    Raises:
        UserError: As `open_images`, or if a part of the evaluation cannot use the images.
    """
    found = open_images(settings.data)
    height, width = sides(found[0].image_size)
    if height != width and "corruptions" in settings.evaluation.parts:
        raise UserError(f"evaluation.parts: corruptions need square images, these are {height}×{width}; leave them out")
    return found


def validation_images(dataset: Dataset, subset: Subset) -> ImageSet:
    """Returns the images of the validation split as a set of their own."""
    train, index = dataset.train, subset.val_index
    return replace(train, split="validation", images=train.images[index], labels=train.labels[index])


def build_student(
    settings: Settings, dataset: Dataset, teachers: Sequence[PlannedTeacher] | None = None
) -> BranchedStudent:
    """Builds the student, whose initial weights depend on the seed alone.

    A network with a fixed input size gets images resized to it. With `student.reuse_classifier` the student fits the
    classifiers of the teachers; without teachers (None) it keeps its own classifier, e.g. to measure its cost.

    Raises:
        UserError: If `student.reuse_classifier` is set and the teachers have no classifier to reuse.
    """
    student = settings.student
    statistics = normalization(student.normalization or dataset.normalization)
    spec = NetworkSpec(student.network, dataset.num_classes, statistics, student.options)
    if student.branch_width is not None and student.branches > 1:
        spec = thinned(spec, student.split_after, student.branch_width)
    size = fixed_size(spec) if is_of_library(spec.name) else None
    if size is not None and (size, size) != sides(dataset.image_size):
        spec = replace(spec, image_size=size)
    if student.reuse_classifier and teachers is not None:
        if not teachers or settings.method.assistants:
            why = "has assistants" if teachers else "has no teachers"
            raise UserError(f"student.reuse_classifier=true: the method {settings.method.name!r} {why}")
        with quiet():
            networks = [build_network(plan.spec) for plan in teachers]
        if partly := [plan.id for plan in teachers if plan.unknown]:
            what = f"the teacher {partly[0]!r} does not know all classes of the data"
            raise UserError(f"student.reuse_classifier=true: {what}")
        width = classifier_width(networks, [plan.id for plan in teachers], dataset.num_classes)
        spec = replace(spec, projection=width)
    torch.manual_seed(settings.seed)
    if student.branches == 1 and student.split_after != "none" and student.ensemble == "gate":
        warnings.warn("student.ensemble=gate has no effect with student.branches=1", stacklevel=2)
    if student.branches > 1 and settings.method.name in PLAIN_METHODS:
        warnings.warn(
            f"student.branches={student.branches} gives branches to the student of {settings.method.name}, a method "
            "for plain students, so that it costs more and is not a plain control (student.branches=1 is)",
            stacklevel=2,
        )
    made = BranchedStudent(
        spec,
        branches=student.branches,
        split_after=student.split_after,
        ensemble=student.ensemble,
        branch_gradients=student.branch_gradients,
    )
    check_outputs(made, dataset.image_size, "student.network")
    return made


def _build_method(
    settings: Settings, dataset: Dataset, subset: Subset, student: BranchedStudent, plans: list[PlannedTeacher]
) -> Method:
    terms, assignment = settings.method.terms, settings.method.assignment
    networks = [build_network(plan.spec) for plan in plans]  # for their shapes; the weights come later
    # Adapters depend on the seed alone: not on the student, nor on how many teachers were candidates.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        context = TermContext.of(
            student,
            networks,
            image_size=dataset.image_size,
            student_name=settings.student.network,
            teacher_names=tuple(plan.id for plan in plans),
            unknown_classes=tuple(plan.unknown for plan in plans),
            seed=settings.seed,
            train_index=subset.train_index,
            train_labels=dataset.train.labels[subset.train_index],
        )
        if _chosen(settings) == "mean" and uses_assignment(terms, context):
            assignment = "mean"
        temperature = settings.method.temperature
        method = build_method(settings.method.name, terms, context, temperature=temperature, assignment=assignment)
    if student.spec.projection is not None and method.assignment is not None:
        own_teachers(method.assignment.mean_KM)  # raises now, before teachers are loaded
    return method


def describe_run(settings: Settings, prepared: Prepared) -> dict[str, Any]:
    """Returns the fields of the result that are known before training."""
    student, unlabelled = prepared.student, prepared.datamodule.unlabelled
    return {
        "method": settings.method.name,
        "data": prepared.dataset.name,
        "student": settings.student.network,
        "num_teachers": len(prepared.teachers),
        "assistants": [a.spec.name for a in prepared.chain.assistants] if prepared.chain else [],
        "num_branches": student.num_branches,
        "split_after": settings.student.split_after if student.num_branches > 1 else None,
        "ensemble": settings.student.ensemble,
        "temperature": settings.method.temperature,
        "assignment": settings.method.assignment if prepared.teachers else None,
        "fraction": prepared.subset.fraction,
        "num_train_images": len(prepared.subset.train_index),
        "num_val_images": len(prepared.subset.val_index),
        "num_unlabelled_images": 0 if unlabelled is None else len(unlabelled),
        "unlabelled_sha256": unlabelled and unlabelled.sha256,
        "unlabelled_share": unlabelled and unlabelled.share,
        "unlabelled_from": unlabelled and unlabelled.kind,
        "epoch_over": settings.data.epoch,
        "subset_sha256": prepared.subset.sha256,
        "subset_seed": settings.data.subset_seed,
        "seed": settings.seed,
        "epochs": settings.recipe.epochs,
        "batch_size": settings.recipe.batch_size,
        "views": prepared.views.key,
        "mixup": settings.recipe.mixup,
        "cutmix": settings.recipe.cutmix,
        "num_parameters": count_parameters(student),
        "num_adapter_parameters": count_parameters(prepared.method),
        "macs": count_macs(student, prepared.dataset.image_size),
        "tags": list(settings.tags),
        "partial": _is_partial(settings.trainer),
        **{f"weight_{name}": term["weight"] for name, term in settings.method.terms.items()},
    }


def describe_teacher(settings: Settings, prepared: Prepared) -> dict[str, Any]:
    """Returns the fields of the result about the choice of a teacher, once it is made."""
    pool = prepared.chain.origins if prepared.chain else prepared.teachers
    one = settings.method.teacher in ("best", "first") and len(pool) == 1
    return {
        "teacher_choice": _chosen(settings) if prepared.teachers else None,
        "teacher": pool[0].id if one else None,
        "pool_teachers": [plan.id for plan in pool],
        "teacher_candidates": prepared.candidate_scores,
        "num_adapter_parameters": count_parameters(prepared.method),
    }


def origin(prepared: Prepared, teachers: TeacherEnsemble | None) -> dict[str, Any]:
    """Returns hashes of data and teachers, for the provenance."""
    identities = [] if teachers is None else teachers.identities
    unlabelled = prepared.datamodule.unlabelled
    without = unlabelled and {"source": unlabelled.source, "images": len(unlabelled), "sha256": unlabelled.sha256}
    return {
        "data": {
            "name": prepared.dataset.name,
            "source": prepared.dataset.source,
            "train_sha256": prepared.dataset.train.sha256,
            "test_sha256": prepared.dataset.test.sha256,
            "class_names": list(prepared.dataset.class_names),
            "image_size": prepared.dataset.image_size,
            "subset_sha256": prepared.subset.sha256,
            "unlabelled": without,
        },
        "teachers": [
            {"id": t.id, "sha256": t.sha256, "source": t.source, "network": t.network, **t.detail} for t in identities
        ],
    }


def _is_partial(flags: Mapping[str, Any]) -> bool:
    """Whether Lightning uses only part of the data, so that results do not count."""
    limits = [flags.get(f"limit_{part}_batches") for part in ("train", "val", "test")]
    # For Lightning, 1.0 is all of the data and 1 is one batch.
    limited = any(limit is not None and (limit != 1.0 or isinstance(limit, int)) for limit in limits)
    return bool(flags.get("fast_dev_run") or flags.get("overfit_batches")) or limited
