"""Ensemble Knowledge Distillation on PyTorch Lightning.

Several frozen teachers teach one compact student with parallel branches
(after Asif, Tang, Harrer, ECAI 2020, arXiv 1909.08097, rebuilt from its abstract).
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
]


def __getattr__(name: str) -> Any:
    """The pieces of `ekd_lightning.api`, imported when first asked for: `import ekd_lightning` stays cheap."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ekd_lightning import api  # noqa: PLC0415

    return getattr(api, name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]


def load(path: str | Path, device: str = "cpu") -> DeployedModel:
    """Reads a student that `ekd-export` wrote; see `ekd_lightning.networks.load_deployed`."""
    from ekd_lightning.networks import load_deployed  # noqa: PLC0415 (`import ekd_lightning` stays cheap)

    return load_deployed(path, device)
