"""Python interface: a whole run in one call, and its parts for your own Trainer or training loop."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from types import NoneType
from typing import Any

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from pytorch_lightning import Callback
from pytorch_lightning.strategies.launchers import _SubprocessScriptLauncher

from ekd_lightning.config.config import build_callbacks, compose_settings, import_user_modules, write_config
from ekd_lightning.config.directory import (
    DIRECTORY,
    agree,
    is_started_rank,
    new_directory,
    passed_to_ranks,
    remove_unused,
)
from ekd_lightning.config.edge import OnScreen, logged_as_by_commands
from ekd_lightning.config.internals import initialized, options_of
from ekd_lightning.config.mistakes import config_error
from ekd_lightning.config.overrides import override
from ekd_lightning.data.datamodule import ImageDataModule
from ekd_lightning.errors import UserError, quiet, require_type
from ekd_lightning.methods import Method, TermContext, build_method
from ekd_lightning.networks import BranchedStudent, TeacherEnsemble, load_student
from ekd_lightning.networks.own import check_outputs
from ekd_lightning.networks.staged import ImageSize
from ekd_lightning.pipeline.run import run
from ekd_lightning.progress import reported_by
from ekd_lightning.runs.directory import STUDENT
from ekd_lightning.runs.result import Result
from ekd_lightning.runs.writer import is_rank_zero
from ekd_lightning.settings import RecipeSettings, Settings
from ekd_lightning.training.distiller import Distiller
from ekd_lightning.training.trainer import build_trainer, check_trainer

__all__ = [
    "BranchedStudent",
    "Distiller",
    "ImageDataModule",
    "RecipeSettings",
    "Run",
    "TeacherEnsemble",
    "distill",
    "method",
]

_begun: list[Path] = []
"""Directories of the runs that this process has begun."""


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        result: The content of result.json.
        directory: The run's directory, for `ekd-evaluate`, `ekd-report` and `ekd-export`.
    """

    result: Result
    directory: Path

    @property
    def student(self) -> BranchedStudent:
        """The student with its last weights, on the CPU, in eval mode."""
        return load_student(self.directory / STUDENT)


def distill(
    data: str | Path = "cifar10",
    teachers: Sequence[str | Mapping[str, Any]] | None = None,
    student: str | None = None,
    *,
    branches: int | None = None,
    split_after: str | None = None,
    method: str | None = None,
    epochs: int | None = None,
    seed: int | None = None,
    overrides: Sequence[str] = (),
    directory: str | Path | None = None,
    callbacks: Sequence[Callback] = (),
) -> Run:
    """Trains one student as `ekd-train` does, with the same defaults and checks; None keeps a setting's default.

    A run on several devices (`trainer.devices`) must be the first of its process: Lightning starts the script again for
    each further device, and these processes end with the run.

    Args:
        data: A configured data set (`cifar10`, `cifar100`, `digits`, ...), or a folder of images with one subfolder per
            class.
        teachers: Members of the pool: names of the zoo, or mappings as in `teachers.pool`, e.g. `{"timm": "resnet18",
            "weights": "mine.safetensors"}`.
        student: Name of the student's network.
        branches: The number of branches, K.
        split_after: The last stage that the branches share, or `none`.
        method: Name of a method.
        epochs: Epochs of the student's training.
        seed: The run's seed.
        overrides: Further settings as on the command line, e.g. `["data.fraction=0.1", "trainer.devices=2"]`.
        directory: The run's directory; by default `outputs/<data>/<method>/<time>`.
        callbacks: Additional Lightning callbacks.

    Returns:
        The finished run, with its result, student and directory.

    Raises:
        UserError: For an invalid setting, before anything is written; or for a loss that is not finite.
    """
    if not isinstance(data, (str, Path)):
        raise UserError(
            f"data: must be the name of a data set or a folder, not a {type(data).__name__}: register_dataset gives "
            "one of your own a name, and a Distiller takes any data loader"
        )
    _check_networks(teachers, student)
    require_type("method", method, str, NoneType)
    _check_lists(overrides=(overrides, str), callbacks=(callbacks, Callback))
    given = {
        "student.network": student,
        "student.branches": branches,
        "student.split_after": split_after,
        "recipe.epochs": epochs,
        "seed": seed,
    }
    words = [] if method is None else [f"method={method}"]
    words += [override(key, value) for key, value in given.items() if value is not None]
    settings = _compose(*_data_words(data), *words, *overrides)
    if settings.resume is not None:
        raise UserError(f"resume={settings.resume}: distill() starts new runs; ekd-train resume=DIR continues one")
    if teachers is not None:
        pool = [one if isinstance(one, str) else dict(one) for one in teachers]
        settings = replace(settings, teachers=replace(settings.teachers, pool=pool, count=None))
    import_user_modules(settings.imports)
    if _begun:
        _refuse_rerun(settings)
    config = asdict(settings)
    place = _place(settings, directory)

    def start() -> None:
        _begun.append(place)
        if is_rank_zero():
            write_config(config, place)

    with passed_to_ranks(place), logged_as_by_commands(), reported_by(OnScreen()):
        try:
            all_callbacks = [*build_callbacks(settings), *callbacks]
            result = run(settings, place, config=config, callbacks=all_callbacks, on_start=start)
        finally:
            remove_unused()
    if is_started_rank():
        sys.exit()  # the rest of the script is for the process that started it
    return Run(result, place)


def method(
    name: str,
    student: BranchedStudent,
    teachers: TeacherEnsemble | None = None,
    *,
    image_size: ImageSize = 32,
    overrides: Sequence[str] = (),
) -> Method:
    """Builds a configured method for a student and its teachers, for a `Distiller` or your own training loop.

    Args:
        name: The method, e.g. `ekd`.
        student: The student to train.
        teachers: The M teachers; None for methods without teachers.
        image_size: Side of the images in pixels, or (height, width).
        overrides: Settings as on the command line, e.g. `["method.terms.maps1.weight=0"]`.

    Raises:
        UserError: For an unknown name, a method that does not fit the networks, or a network that does not return
            logits for images of this size.
    """
    require_type("name", name, str)
    require_type("student", student, BranchedStudent)
    require_type("teachers", teachers, TeacherEnsemble, NoneType)
    _check_lists(overrides=(overrides, str))
    settings = _compose(f"method={name}", *overrides).method
    members = () if teachers is None else teachers.members
    names = () if teachers is None else tuple(identity.id for identity in teachers.identities)
    check_outputs(student, image_size, "student")
    for member, own in zip(members, names, strict=True):
        check_outputs(member, image_size, f"teacher {own!r}")
    context = TermContext.of(
        student, members, image_size=image_size, student_name=student.spec.name, teacher_names=names
    )
    return build_method(
        settings.name, settings.terms, context, temperature=settings.temperature, assignment=settings.assignment
    )


def _check_lists(**arguments: tuple[Any, type]) -> None:
    """Refuses arguments that are no lists of a type; each is given with it."""
    for name, (value, kind) in arguments.items():
        if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(one, kind) for one in value):
            raise UserError(f"{name}={value!r}: must be a list of {kind.__name__}")


def _check_networks(teachers: Any, student: Any) -> None:
    own = "; for a network of your own see register_network, or {module: PACKAGE.FUNCTION} for a teacher"
    if not isinstance(student, (str, type(None))):
        raise UserError(f"student: must be the name of a network, not a {type(student).__name__}{own}")
    if isinstance(teachers, str) or not isinstance(teachers, (Sequence, NoneType)):
        raise UserError(f"teachers={teachers!r}: must be a list")
    for one in teachers or ():
        if not isinstance(one, (str, Mapping)):
            raise UserError(f"teachers: must be names or mappings as in teachers.pool, not a {type(one).__name__}{own}")


def _compose(*words: str) -> Settings:
    try:
        return compose_settings(*words)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(config_error(error)) from None


def _data_words(data: str | Path) -> list[str]:
    path = Path(data).absolute()
    with initialized(None):
        configured = options_of("data")
    if isinstance(data, Path) or (data not in configured and path.is_dir()):
        if not path.is_dir():
            raise UserError(f"data={data}: no such folder")
        return ["data=folder", override("data.root", path), override("data.name", path.name)]
    return [f"data={data}"]


def _place(settings: Settings, directory: str | Path | None) -> Path:
    """The run's directory, the same in all processes that Lightning, torchrun or SLURM start."""
    if is_started_rank():
        return Path(os.environ[DIRECTORY])
    if directory is not None:
        return Path(directory).absolute()
    wanted = Path("outputs", settings.data.name, settings.method.name, f"{datetime.now():%Y-%m-%d_%H-%M-%S}")
    return agree("directory", lambda: new_directory(wanted.absolute(), numbered=True))


def _refuse_rerun(settings: Settings) -> None:
    """Refuses a run for which Lightning would start this script again, whose first call would be another run."""
    check_trainer(settings.trainer)
    with quiet("pytorch_lightning.utilities.rank_zero"):
        trainer = build_trainer({**settings.trainer, "max_epochs": 1}, Path(), [], [])
    if isinstance(trainer.strategy.launcher, _SubprocessScriptLauncher):
        raise UserError(
            f"trainer.devices={settings.trainer['devices']}: a run on several devices must be the first distill() of "
            "its process, as Lightning starts the script again for each device; start one process per run"
        )
