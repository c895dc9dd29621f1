"""Training of one network on one device: a teacher by cross-entropy, or an assistant of a chain by distillation."""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from ekd_lightning.data import Dataset, Mixing, Subset, ViewFamily
from ekd_lightning.data.datamodule import ImageDataModule
from ekd_lightning.errors import UserError
from ekd_lightning.files import write_json
from ekd_lightning.methods import DEFAULT_TEMPERATURE, Method, TermContext, build_method
from ekd_lightning.networks import BranchedStudent, NetworkSpec, StagedNetwork, TeacherEnsemble, build_network
from ekd_lightning.progress import part
from ekd_lightning.runs.directory import LAST
from ekd_lightning.settings import RecipeSettings, Settings
from ekd_lightning.teachers.hardware import device_type_of, resolve_precision, teacher_dtype
from ekd_lightning.teachers.plan import SourcePlan
from ekd_lightning.teachers.store import COST
from ekd_lightning.tracking.loggers import TeacherCurves, open_curves
from ekd_lightning.training.checkpoints import CheckpointWriter, checkpoint_callbacks, read_checkpoint
from ekd_lightning.training.distiller import Distiller
from ekd_lightning.training.processes import slurm_environment
from ekd_lightning.training.trainer import EpochReport, EpochSeed

log = logging.getLogger(__name__)

_CROSS_ENTROPY = {"ce": {"type": "ce_ensemble", "weight": 1.0}}
"""Terms of teachers that are trained on demand."""


@dataclass(frozen=True)
class TeacherData:
    """Data, loggers and step options of teachers that are trained on demand."""

    dataset: Dataset
    subset: Subset
    views: ViewFamily
    train_on: str
    curves: TeacherCurves | None = None
    capture: str = "auto"
    """See `Settings.capture`."""

    def index(self) -> Tensor:
        """Returns the teacher's training images, int64: the student's, or all but the data's validation split."""
        if self.train_on == "subset":
            return self.subset.train_index
        chosen = torch.ones(len(self.dataset.train), dtype=torch.bool)
        if self.dataset.val_index is not None:
            chosen[self.dataset.val_index] = False
        return chosen.nonzero()[:, 0]


def train_teacher(
    spec: NetworkSpec,
    data: TeacherData,
    recipe: RecipeSettings,
    seed: int,
    scratch: Path,
    accelerator: str = "auto",
    *,
    start: Callable[[], StagedNetwork] | None = None,
    head_only: bool = False,
) -> StagedNetwork:
    """Trains one network by cross-entropy on one device; returns it with its last weights, in eval mode on the CPU.

    A training that was killed continues from its last whole epoch, whose checkpoint is in `scratch`.

    Args:
        spec: Network to build.
        data: Images it may see, and their augmentation.
        recipe: Optimiser and schedule.
        seed: Seed of initialisation, order and views.
        scratch: Folder of the checkpoints.
        accelerator: Lightning's flag.
        start: Returns the network whose weights, without its head, are the initial ones; None for random weights.
        head_only: Whether only the head is trained; all else stays as it is, statistics of batch norm included.
    """
    index = data.index()
    log.info("training teacher %s (seed %d) on %s images", spec.name, seed, f"{len(index):,}")
    method = build_method("teacher", _CROSS_ENTROPY, TermContext(spec.num_classes, num_branches=1, num_teachers=0))
    options = {"capture": data.capture, "compile_student": "never", "recipe_key": "teachers.recipe"}
    images = _images(data.dataset, index, data.views, recipe, seed)
    facts = {"network": spec.to_dict(), "seed": seed, "train_on": data.train_on, "recipe": asdict(recipe)}
    with open_curves(data.curves, "teacher", f"{spec.name}-s{seed}", facts) as loggers:
        flags = {"accelerator": accelerator, "logger": loggers}
        student = _fresh(spec, seed)
        callbacks = []
        if start is not None:
            _parts(student).load_state_dict(_parts(start()).state_dict())
        if head_only:
            callbacks.append(KeepFixed(_parts(student)))
        network, _ = _train(student, seed, method, recipe, images, scratch, options, flags, callbacks)
    return network


class KeepFixed(pl.Callback):
    """Freezes a module while others are trained: no gradients, batch norm and dropout as in inference."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module.requires_grad_(False)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Undoes the trainer's `.train()`."""
        self._module.eval()


def _fresh(spec: NetworkSpec, seed: int) -> BranchedStudent:
    """Builds a plain network as a student of one branch, without advancing the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BranchedStudent(spec, branches=1, split_after="none")


def parts_sha256(network: StagedNetwork) -> str:
    """Returns the SHA-256 of a network's weights without its head, in hex."""
    digest = hashlib.sha256()
    for name, tensor in _parts(network).state_dict().items():
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _parts(network: BranchedStudent | StagedNetwork) -> nn.ModuleList:
    """Returns stages and neck of a plain network: everything but its head."""
    owner = network.branches[0] if isinstance(network, BranchedStudent) else network
    return nn.ModuleList([owner.stages, owner.neck])  # type: ignore[list-item]


_FLAGS = ("accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm")
"""Trainer flags of the run that change what is learned, so that assistants are trained with them, too."""


@dataclass(frozen=True)
class LinkTraining:
    """Settings that all links of a chain share."""

    settings: Settings
    """Settings of the run, with the recipe of the assistants in place of the student's."""
    dataset: Dataset
    subset: Subset
    views: ViewFamily
    terms: Mapping[str, Mapping[str, Any]]
    temperature: float | None
    accelerator: str
    source: SourcePlan = field(default_factory=SourcePlan)
    """Source of the outputs of a link's teachers."""
    curves: TeacherCurves | None = None
    """Loggers of the assistants; None for none."""

    @property
    def precision(self) -> str:
        """Lightning's precision, the same as the student's."""
        return str(resolve_precision(self.settings.trainer.get("precision"), self.accelerator) or "32-true")

    def flags(self) -> dict[str, Any]:
        """Returns the trainer flags that change what is learned, without those at their default."""
        given = {name: self.settings.trainer.get(name) for name in _FLAGS}
        if given["accumulate_grad_batches"] == 1:
            del given["accumulate_grad_batches"]
        return {name: value for name, value in given.items() if value is not None}

    def key(self, spec: NetworkSpec, seed: int, teachers: Sequence[str]) -> dict[str, Any]:
        """Returns an assistant's key in the store; `teachers` are the SHA-256 of its teachers."""
        return {
            "kind": "assistant",
            "network": spec.to_dict(),
            "data": self.dataset.name,
            "images": self.dataset.train.sha256,
            "subset": self.subset.sha256,
            "views": self.views.key,
            "recipe": self.settings.recipe.key(),
            "seed": seed,
            "teachers": list(teachers),
            "terms": {name: dict(term) for name, term in self.terms.items()},
            "temperature": float(DEFAULT_TEMPERATURE if self.temperature is None else self.temperature),
            "precision": self.precision,
            "teachers_precision": str(
                teacher_dtype(self.settings.teachers.precision, device_type_of(self.accelerator))
            ),
            "trainer": self.flags(),
        }


def link_method(training: LinkTraining, num_teachers: int, *, seed: int, **known: Any) -> Method:
    """Builds (1 - λ) CE + λ T² KL for a plain network; `known` are further attributes of the terms' context.

    Raises:
        UserError: If an option of a term is impossible, or a teacher has no logits for the data's classes.
    """
    context = TermContext(training.dataset.num_classes, num_branches=1, num_teachers=num_teachers, seed=seed, **known)
    return build_method("assistant", training.terms, context, temperature=training.temperature)


def train_assistant(
    training: LinkTraining, spec: NetworkSpec, seed: int, teachers: TeacherEnsemble, scratch: Path
) -> StagedNetwork:
    """Distils the teachers into one network on one device, as the run does with a plain student.

    It sees the student's training images in the student's views, and with the student's seed and recipe also in the
    same batches. A training that was killed continues from its last whole epoch, whose checkpoint is in `scratch`; the
    cost is written there. Returns the network with its last weights, in eval mode on the CPU.
    """
    recipe = training.settings.recipe
    names = ", ".join(identity.id for identity in teachers.identities)
    log.info("training assistant %s (seed %d), taught by %s", spec.name, seed, names)
    method = link_method(training, teachers.num_teachers, seed=seed)
    options = {
        "teachers": teachers,
        "make_source": training.source.open,
        "channels_last": training.settings.channels_last,
        "capture": training.settings.capture,
        "fold_teachers": training.settings.teachers.fold,
        "compile_student": training.settings.student.compile,
    }
    images = _images(training.dataset, training.subset.train_index, training.views, recipe, seed)
    facts = {"network": spec.to_dict(), "seed": seed, "taught_by": names, "recipe": asdict(recipe)}
    with open_curves(training.curves, "assistant", f"{spec.name}-s{seed}", facts) as loggers:
        flags = {"accelerator": training.accelerator, "logger": loggers, "precision": training.precision}
        flags |= training.flags()
        network, cost = _train(_fresh(spec, seed), seed, method, recipe, images, scratch, options, flags)
    write_json(scratch / COST, cost)
    return network


def _images(dataset: Dataset, index: Tensor, views: ViewFamily, recipe: RecipeSettings, seed: int) -> ImageDataModule:
    """Builds a data module without validation images: nothing is selected by validation."""
    share = len(index) / len(dataset.train)
    subset = Subset(index, index[:0], sha256="", fraction=share, per_class=None, seed=seed)
    mixing = Mixing(recipe.mixup, recipe.cutmix)
    return ImageDataModule(dataset, subset, views, batch_size=recipe.batch_size, seed=seed, mixing=mixing)


def _train(
    student: BranchedStudent,
    seed: int,
    method: Method,
    recipe: RecipeSettings,
    images: ImageDataModule,
    scratch: Path,
    options: Mapping[str, Any],
    flags: Mapping[str, Any],
    callbacks: Sequence[pl.Callback] = (),
) -> tuple[StagedNetwork, dict[str, Any]]:
    """Trains a network on one device, continuing a killed training; returns network and cost.

    `options` go to the Distiller, `flags` to the Trainer.
    """
    with torch.random.fork_rng(devices=[]):  # the student's randomness must not depend on the store's content
        torch.manual_seed(seed)
        module = Distiller(student, method, replace(recipe, ema=0.0), **options)
        name = f"{student.spec.name}-s{seed}"
        report = EpochReport(recipe.batch_size, name)
        trainer = pl.Trainer(
            devices=1,
            max_epochs=recipe.epochs,
            default_root_dir=scratch,
            callbacks=[*checkpoint_callbacks(scratch.absolute(), with_best=False), EpochSeed(seed), report, *callbacks],
            plugins=[CheckpointWriter(lambda: scratch.name), *filter(None, [slurm_environment()])],
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            **flags,
        )
        with part(name) as report.task:
            trainer.fit(module, datamodule=images, ckpt_path=_last_checkpoint(scratch), weights_only=True)
        network = build_network(student.spec)
        _parts(network).load_state_dict(_parts(student).state_dict())
        network.head.load_state_dict(student.branches[0].head.state_dict())  # type: ignore[union-attr]
    return network.eval(), {"train_seconds": report.train_seconds, "steps": trainer.global_step}


def _last_checkpoint(scratch: Path) -> Path | None:
    """Returns the checkpoint of a killed training; None if there is none, or it cannot be read."""
    path = scratch / LAST
    if not path.is_file():
        return None
    try:
        found = read_checkpoint(path)
        if "teachers" not in found:
            raise UserError(f"{path}: a checkpoint of another version")
    except UserError as error:
        warnings.warn(f"{error}; this training starts from the beginning", stacklevel=2)
        path.unlink()
        return None
    log.info("continuing from %s at step %d", path, int(found["global_step"]))
    return path
