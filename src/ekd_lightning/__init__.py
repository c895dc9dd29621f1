"""Ensemble Knowledge Distillation on PyTorch Lightning.

Several frozen teachers teach one compact student with parallel branches
(after Asif, Tang, Harrer, ECAI 2020, arXiv 1909.08097, rebuilt from its abstract).
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("ekd-lightning")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0.0.0+unknown"

__all__ = ["__version__"]
