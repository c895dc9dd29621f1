"""Ensemble Knowledge Distillation on PyTorch Lightning.

Several frozen teachers teach one compact student with parallel branches
(after Asif, Tang, Harrer, ECAI 2020, arXiv 1909.08097, rebuilt from its abstract).
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
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
    from ekd_lightning.data.decoding import read_images
    from ekd_lightning.networks.deploy import save
    from ekd_lightning.networks.hub import load, push

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
    "save",
]
_OUTSIDE_API = {
    "load": "networks.hub",
    "push": "networks.hub",
    "read_images": "data.decoding",
    "save": "networks.deploy",
}


def __getattr__(name: str) -> Any:
    """Imports names at their first use, so that `import ekd_lightning` stays fast and `load` needs no Lightning."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_OUTSIDE_API.get(name, 'api')}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
