"""Ensemble Knowledge Distillation on PyTorch Lightning.

Several frozen teachers teach one compact student with parallel branches
(after Asif, Tang, Harrer, ECAI 2020, arXiv 1909.08097, rebuilt from its abstract).
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from ekd_lightning.api import (
        BranchedStudent,
        Distiller,
        ImageDataModule,
        RecipeSettings,
        Run,
        TeacherEnsemble,
        distill,
        method,
    )
    from ekd_lightning.networks import DeployedModel

try:
    __version__ = version("ekd-lightning")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0.0.0+unknown"

__all__ = [
    "BranchedStudent",
    "Distiller",
    "ImageDataModule",
    "RecipeSettings",
    "Run",
    "TeacherEnsemble",
    "__version__",
    "distill",
    "load",
    "method",
    "push",
    "read_images",
]


def __getattr__(name: str) -> Any:
    """Imports names of `ekd_lightning.api` at their first use, so that `import ekd_lightning` stays fast."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ekd_lightning import api  # noqa: PLC0415

    return getattr(api, name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]


def load(name: str | Path, device: str = "cpu", *, revision: str | None = None) -> DeployedModel:
    """Loads an exported student for inference; no code of the file is executed.

    Args:
        name: A file that `ekd-export` wrote, the name of a student in the package (`resnet8-ekd-cifar10`), or USER/REPO
            on the Hugging Face hub, whose `student.safetensors` is read.
        device: Device of the model.
        revision: Branch, tag or commit of the repository.

    Returns:
        The model: `model(images)` gives logits [B, C] for images [B, 3, H, W] in [0, 1].

    Raises:
        UserError: If there is no such student, the hub cannot be reached, or a package is missing.
    """
    from ekd_lightning.networks.deployed import load_deployed  # noqa: PLC0415 (`import ekd_lightning` stays cheap)
    from ekd_lightning.networks.hub import find_student  # noqa: PLC0415 (`import ekd_lightning` stays cheap)

    return load_deployed(find_student(name, revision), device)


def push(folder: str | Path, repository: str, *, private: bool = True) -> str:
    """Uploads an exported student to the Hugging Face hub; see `ekd_lightning.networks.hub.push`."""
    from ekd_lightning.networks import hub  # noqa: PLC0415 (`import ekd_lightning` stays cheap)

    return hub.push(folder, repository, private=private)


def read_images(files: str | Path | Iterable[str | Path], size: int | tuple[int, int]) -> Tensor:
    """Reads image files for a loaded student; see `ekd_lightning.data.decoding.read_images`."""
    from ekd_lightning.data import decoding  # noqa: PLC0415 (`import ekd_lightning` stays cheap)

    return decoding.read_images(files, size)
