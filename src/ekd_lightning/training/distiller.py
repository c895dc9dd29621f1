"""Distiller: a branched student, a method and frozen teachers as one LightningModule."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ekd_lightning.data.datamodule import ImageDataModule
from ekd_lightning.data.loader import Batch, IndexBatch, TrainLoader
from ekd_lightning.errors import UserError, one_line, require_type
from ekd_lightning.evaluation.efficiency import count_macs
from ekd_lightning.methods import Method, Term
from ekd_lightning.methods.assignment import make_assignment
from ekd_lightning.methods.build import rebuild_method
from ekd_lightning.networks import BranchedStudent, NetworkSpec, TeacherEnsemble
from ekd_lightning.networks.frozen import NetworkAccess
from ekd_lightning.networks.own import unknown_to
from ekd_lightning.networks.projection import reuse_classifiers
from ekd_lightning.networks.staged import ImageSize, StudentOutput
from ekd_lightning.settings import RecipeSettings
from ekd_lightning.teachers.hardware import compiled_or_not
from ekd_lightning.teachers.source import LiveTeachers, TeacherSource
from ekd_lightning.training.checkpoints import read_checkpoint
from ekd_lightning.training.module import TrainingModule
from ekd_lightning.training.recorded_step import StepValues

COMPILE_STUDENT_MACS = {"cpu": 1e13, "cuda": 5e14}
"""Multiply-accumulates of a training (three forward passes per step) from which compiling the student pays. On two
cores it takes 15 to 35 s, or 2 s from torch's cache, and saves a fifth to a quarter of the step; on an H200, with the
step recorded as a graph, it took 8 to 30 s and saved a sixth to a quarter."""


class Distiller(TrainingModule):
    """Trains a branched student by a method, with or without frozen teachers.

    The teachers are a submodule, so that they follow the device, but expose no submodules, parameters or state. A
    checkpoint holds their hashes, and can be resumed with the same teachers only. Without the teachers that its method
    needs, a Distiller validates, tests and predicts, but does not train.

    Args:
        student: The branched student.
        method: Weighted loss terms; its adapters are trained with the student.
        recipe: Optimiser and schedule.
        teachers: The frozen ensemble; None for methods without teachers, or if nothing will be trained.
        make_source: Builds the source of teacher outputs from the ensemble, in every process when training
            starts (a memory-mapped table must not travel between processes).
        channels_last: Memory format of images, student, and the teachers of terms that use other images.
        fold_teachers: Whether batch norms of these teachers are folded into the convolutions.
        compile_student: Whether the student's forward and backward pass in training go through torch.compile:
            "auto" (in long runs, where it was measured to pay), "always" or "never". The first step then takes long;
            without a working compiler it warns and trains uncompiled.
        capture: Whether steps are recorded as CUDA graphs, see `Settings.capture`.
        recipe_key: Dotted key of the recipe in the configuration, for messages.

    Raises:
        UserError: If an argument is of another class, the recipe has an impossible value, or the method compares
            classes that a teacher does not know or was built for other numbers of branches and teachers.
    """

    def __init__(
        self,
        student: BranchedStudent,
        method: Method,
        recipe: RecipeSettings,
        *,
        teachers: TeacherEnsemble | None = None,
        make_source: Callable[[TeacherEnsemble], TeacherSource] = LiveTeachers,
        channels_last: bool = True,
        fold_teachers: bool = True,
        compile_student: str = "auto",
        capture: str = "auto",
        recipe_key: str = "recipe",
    ) -> None:
        require_type("student", student, BranchedStudent)
        require_type("method", method, Method)
        require_type("recipe", recipe, RecipeSettings)
        require_type("teachers", teachers, TeacherEnsemble, NoneType)
        RecipeSettings().changed(asdict(recipe), recipe_key)  # checks it
        super().__init__(student, method, recipe, channels_last=channels_last, capture=capture, recipe_key=recipe_key)
        if method.needs_teachers and teachers is not None:  # a method may be built before they are loaded
            method.check_sizes(student.num_branches, teachers.num_teachers)
            unknown = [unknown_to(member, student.num_classes) for member in teachers.members]
            names = [repr(identity.id) for identity in teachers.identities]
            method.check_classes(unknown, names, student.num_classes)
        if student.spec.projection is not None and teachers is not None:
            sizes = (student.num_branches, len(teachers.members))
            reuse_classifiers(
                student.branches,
                teachers.members,
                method.assignment.mean_KM if method.assignment else make_assignment("one_to_one", *sizes),
            )
        self._compile_student = compile_student
        self._student_outputs: Callable[[Tensor], StudentOutput] | None = None
        self.teachers = teachers
        self._live_networks = NetworkAccess(self.student, teachers, fold=fold_teachers, channels_last=channels_last)
        self._make_source = make_source
        self.teacher_source: TeacherSource | None = None
        self._spare_broadcasts()
        identities = [] if teachers is None else teachers.identities
        description = {
            "student": student.arguments(),
            "method": method.origin,
            "recipe": asdict(recipe),
            "teachers": [{"id": t.id, "network": t.network, "sha256": t.sha256} for t in identities],
            "channels_last": channels_last,
            "fold_teachers": fold_teachers,
            "compile_student": compile_student,
            "capture": capture,
        }
        self.save_hyperparameters(description, logger=False)

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]  # no pickles, no hyperparameters of another kind
        cls,
        checkpoint_path: str | Path,
        map_location: torch.device | str = "cpu",
        *,
        teachers: TeacherEnsemble | None = None,
        method: Method | None = None,
        **options: Any,
    ) -> Distiller:
        """Rebuilds a module from a checkpoint of a Trainer or a run; no code in the file is run.

        Args:
            checkpoint_path: The checkpoint, e.g. `checkpoints/last.ckpt` of a run.
            map_location: Device of the module.
            teachers: The same teachers, to train further; not needed to validate, test and predict.
            method: The method, needed only if it is not recorded: not made by `build_method`, or with options that are
                not plain values.
            **options: Further arguments of the constructor, in place of the recorded ones.

        Returns:
            The module, in train mode.

        Raises:
            UserError: If the file is missing or damaged, has no such module, was taught by other teachers, or names a
                network or a term that is not registered in this process.
        """
        path = Path(checkpoint_path)
        checkpoint = read_checkpoint(path)
        known = checkpoint.get("hyper_parameters") or {}
        if method is None and known.get("method") == {}:
            raise UserError(
                f"{path}: its method is not recorded (not made by build_method, or with options that are not plain "
                "values): pass method=..."
            )
        try:
            arguments = {**known["student"], "spec": NetworkSpec.from_dict(known["student"]["spec"])}
            student = BranchedStudent(**arguments)
            own = {name: known[name] for name in ("channels_last", "fold_teachers", "compile_student", "capture")}
            own["recipe"] = RecipeSettings().changed(known["recipe"], "recipe")
            if teachers is not None:
                _require_same([identity.sha256 for identity in teachers.identities], checkpoint)
            method = method or rebuild_method(known["method"])
            module = cls(student, method, **{**own, "teachers": teachers, **options})
            if teachers is None:
                module.hparams["teachers"] = known["teachers"]
            module.on_load_checkpoint(checkpoint)
            module.load_state_dict(checkpoint["state_dict"])
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise UserError(f"{path}: not a checkpoint of a Distiller ({one_line(error)})") from None
        return module.to(map_location)

    def _spare_broadcasts(self) -> None:
        """Excludes buffers that are equal in all processes from DDP's broadcast in every step."""
        same = [name for name, module in self.named_modules() if getattr(module, "same_in_all_processes", False)]
        prefixes = tuple(f"{name}." for name in same)
        named = (*self.named_parameters(), *self.named_buffers())
        names = [name for name, _ in named if name.startswith(prefixes)]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, names)

    def setup(self, stage: str) -> None:
        """Refuses to train without the teachers that the method needs; warns of settings without effect."""
        if stage == "fit" and self.method.needs_teachers and self.teachers is None:
            raise UserError(f"the method {self.method.name!r} needs teachers to train: pass teachers=...")
        if stage == "fit" and (self.trainer.max_epochs or 0) > self.recipe.epochs:
            warnings.warn(
                f"max_epochs={self.trainer.max_epochs} of the Trainer, but the recipe has epochs={self.recipe.epochs}: "
                "the learning rate stays at its last value after them",
                stacklevel=2,
            )
        mixed = self.recipe.mixed(self.recipe_key)
        if stage == "fit" and mixed and getattr(getattr(self.trainer, "datamodule", None), "mixing", None) is None:
            warnings.warn(f"{mixed} has no effect: ImageDataModule(mixing=...) mixes images", stacklevel=2)

    def on_fit_start(self) -> None:
        """Opens the source of teacher outputs in this process."""
        if self.teachers is not None and self.method.needs_teachers:
            self.teacher_source = self._make_source(self.teachers)

    def prepare_epoch(self, loader: TrainLoader, data: ImageDataModule) -> None:
        """Lets the source of teacher outputs prepare the epoch."""
        source = self.teacher_source
        if source is None:
            return
        batches = per_epoch = int(self.trainer.num_training_batches)
        if self.trainer.max_steps >= 0:  # it may end the training within this epoch
            left = self.trainer.max_steps - self.global_step
            batches = min(batches, max(1, left * self.trainer.accumulate_grad_batches))
        size, rows = loader.batch_size // loader.world_size, loader.distinct_rows(batches)
        source.plan(per_epoch * size * self.recipe.epochs, loader.repeats)  # also where `max_steps` ends this part
        images_of = partial(data.training_images, device=self.device)
        source.prepare_epoch(*rows, images_of, self._stage_counts(range(batches), size))
        if self.current_epoch + 1 < self.recipe.epochs:
            counts = self._stage_counts(range(per_epoch, 2 * per_epoch), size)
            source.prefetch_epoch(*loader.distinct_rows(per_epoch, ahead=1), counts)

    def _stage_counts(self, batches: range, size: int) -> Counter[tuple[str, ...]]:
        """Returns how many images need each set of teacher stages, in a range of batches counted from now."""
        if not self.method.changes:
            needed, stages = self.method.teacher_needs(self.progress())
            return +Counter({stages: needed * size * len(batches)})
        counts: Counter[tuple[str, ...]] = Counter()
        for batch in batches:
            needed, stages = self.method.teacher_needs(self.progress(batch))
            counts[stages] += needed * size
        return +counts

    def bytes_on_device(self) -> dict[str, int]:
        """Returns the bytes of the teachers' weights and of their stored outputs."""
        rows = self.teacher_source.held_bytes if self.teacher_source else 0
        weights = sum(p.nbytes for one in (self.teachers.members if self.teachers else ()) for p in one.parameters())
        return {"teachers": weights, "teacher outputs (teachers.table)": rows}

    def why_not_recorded(self) -> str | None:
        """Returns which term or source of teacher outputs rules recording out; None if none does."""
        for name, term in self.method.named_terms():
            if not term.captures:
                return f"method.terms.{name} needs the host in every step"
            own = type(term)
            if not own.__module__.startswith("ekd_lightning.") and "captures" not in vars(own):
                return f"method.terms.{name} does not declare that it can be recorded ({own.__name__}.captures = True)"
        source = self.teacher_source
        if source is not None and not all(source.captured(stages) for stages in self.method.needed_stage_sets):
            return "teacher outputs pass through the host"
        return None

    def teacher_to_blame(self, step: int, term: str) -> str | None:
        """Recomputes the teachers' outputs for the step's images; see the base class."""
        loader, data = self.trainer.train_dataloader, getattr(self.trainer, "datamodule", None)
        needed, stages = self.method.teacher_needs(self.progress())
        source, teachers = self.teacher_source, self.teachers
        if not isinstance(loader, TrainLoader) or not isinstance(data, ImageDataModule):
            return None
        if not needed or source is None or teachers is None:
            return None
        labels, index, view = (values[step] for values in loader.epoch(step + 1))
        rows = IndexBatch(labels, index, view, torch.ones_like(index, dtype=torch.bool))
        output = source.outputs(data.gather_training(rows, self.device), stages)
        masking = term not in self.method.terms or cast(Term, self.method.terms[term]).accepts_masked
        for m, identity in enumerate(teachers.identities):
            pooled = {"pooled features": output.pooled[m]} if output.pooled else {}
            maps = output.stages[m] if output.stages else {}
            for name, values in {"logits": output.logits[m], **pooled, **maps}.items():
                wrong = ~values.isfinite() & ~(values.isneginf() & (masking and name == "logits"))
                if wrong.any():
                    image = int(rows.index[wrong.flatten(1).any(1).cpu()][0])
                    value = float(values[wrong][0])
                    masked = value == -math.inf
                    why = "it masks classes, which this loss cannot compare" if masked else "use another teacher"
                    return f"teacher {identity.id!r} is the cause: its {name} of image {image} are {value}; {why}"
        return None

    def _student_forward(self, image_size: ImageSize) -> Callable[[Tensor], StudentOutput]:
        """Returns the student's forward pass for training, with the method's stages; compiled or not."""
        # Without `self`, as the compiler would check a whole LightningModule in every step.
        student, stages = self.student, tuple(self.method.student_stages)

        def outputs(images: Tensor) -> StudentOutput:
            return student.outputs(images, stages)

        compiled = self._compile_student == "always"
        # Compiled steps are slower in float32 on a CPU, and bound by launches on a GPU unless recorded.
        pays = "bf16" in str(self.trainer.precision) if self.device.type == "cpu" else self._recorded is not None
        if self._compile_student == "auto" and pays:
            images = self.recipe.epochs * int(self.trainer.num_training_batches) * self.recipe.batch_size
            from_macs = COMPILE_STUDENT_MACS.get(self.device.type, float("inf"))
            compiled = 3 * count_macs(self.student, image_size) * images >= from_macs
        return compiled_or_not(outputs) if compiled else outputs

    def losses(self, batch: Batch, values: StepValues | None = None) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Computes the method's total and terms for a batch; see the base class."""
        if self._student_outputs is None:
            self._student_outputs = self._student_forward(batch.images.shape[-2:])
        student = self._student_outputs(batch.images)
        progress = self.progress()
        needed, stages = self.method.teacher_needs(progress)
        assert self.teacher_source is not None or not needed  # opened when the fit started
        teachers = self.teacher_source.outputs(batch, stages) if needed and self.teacher_source else None
        result = self.method(
            student,
            teachers,
            batch,
            epoch=self.current_epoch,
            step=self.global_step,
            progress=progress,
            networks=self._live_networks,
            weights=values and values.weights,
            assignment_KM=values and values.assignment_KM,
            step_t=values and values.step,
        )
        return result.total, result.terms, student.logits

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Records the teachers' hashes in place of their weights."""
        checkpoint["teachers"] = self._teacher_hashes()
        self._flush()

    def on_fit_end(self) -> None:
        """Waits for pending writes of the source of teacher outputs."""
        super().on_fit_end()
        self._flush()

    def _flush(self) -> None:
        if self.teacher_source is not None:
            self.teacher_source.flush()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses to continue with teachers other than those of the checkpoint, or in another order."""
        _require_same(self._teacher_hashes(), checkpoint)

    def _teacher_hashes(self) -> list[str]:
        return [teacher["sha256"] for teacher in self.hparams["teachers"]]


def _require_same(hashes: list[str], checkpoint: dict[str, Any]) -> None:
    if checkpoint.get("teachers") != hashes:
        raise UserError(
            f"the checkpoint needs the teachers that it was trained with, of SHA-256 {checkpoint.get('teachers')}, "
            f"in this order; given: {hashes}"
        )
