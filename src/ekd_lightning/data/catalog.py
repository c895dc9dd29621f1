"""Data sets by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ekd_lightning.data.cifar import find_cifar, read_cifar
from ekd_lightning.data.cifar_official import cifar_spec
from ekd_lightning.data.digits import read_digits
from ekd_lightning.data.download import obtain
from ekd_lightning.data.images import Dataset
from ekd_lightning.errors import unknown_name

Loader = Callable[[Path, bool], Dataset]

_LOADERS: dict[str, Loader] = {}
_LOADED: dict[tuple[str, Path], Dataset] = {}


def register_dataset(name: str) -> Callable[[Loader], Loader]:
    """Makes a data set known by a name.

    Args:
        name: What `load_dataset` and `data.name` will call it.

    Returns:
        A decorator for the loader: `loader(root, download)` returns the Dataset, and raises UserError where
        the data are missing or damaged.

    Raises:
        ValueError: The name is taken.
    """

    def register(loader: Loader) -> Loader:
        if name in _LOADERS:
            old, new = (f"{fn.__module__}.{fn.__qualname__}" for fn in (_LOADERS[name], loader))
            raise ValueError(f"data set {name!r} is registered twice, by {old} and by {new}")
        _LOADERS[name] = loader
        return loader

    return register


def dataset_names() -> tuple[str, ...]:
    """The registered names, sorted."""
    return tuple(sorted(_LOADERS))


def load_dataset(name: str, root: str | Path, download: bool = False) -> Dataset:
    """Loads a data set, once a process: a sweep in one process does not read the files again.

    Args:
        name: A registered name.
        root: The folder with the data.
        download: Whether missing data may be fetched.

    Returns:
        The data set; the same object for the same name and root.

    Raises:
        UserError: Unknown name, missing or damaged data.
    """
    if name not in _LOADERS:
        raise unknown_name("data set", name, _LOADERS)
    key = name, Path(root).expanduser().resolve()
    if key not in _LOADED:
        _LOADED[key] = _LOADERS[name](key[1], download)
    return _LOADED[key]


def _load_cifar(name: str, root: Path, download: bool) -> Dataset:
    spec = cifar_spec(name)
    if download and find_cifar(spec, root) is None:
        obtain(name, root)
    return read_cifar(spec, root)


@register_dataset("cifar10")
def _load_cifar10(root: Path, download: bool) -> Dataset:
    return _load_cifar("cifar10", root, download)


@register_dataset("cifar100")
def _load_cifar100(root: Path, download: bool) -> Dataset:
    return _load_cifar("cifar100", root, download)


@register_dataset("digits")
def _load_digits(root: Path, download: bool) -> Dataset:
    return read_digits()
