"""Reading the official python batches without letting a pickle run anything."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from ekd_lightning.errors import UserError


def _encode(text: str, encoding: str) -> bytes:
    """The one use of codecs.encode in array pickles; any other codec is refused."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"codec {encoding!r}")
    return text.encode("latin1")


# All that an array needs, under the module names of old and new NumPy.
_RECONSTRUCT = np.empty(0).__reduce__()[0]
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _encode,
}


class _ArrayUnpickler(pickle.Unpickler):
    """Knows numbers, text, containers and NumPy arrays, nothing else."""

    def __init__(self, data: bytes, path: Path) -> None:
        super().__init__(io.BytesIO(data), encoding="latin1")
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        """Looks a global up in the list of allowed ones; raises UserError for any other."""
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise UserError(
                f"{self._path} asks to load {module}.{name}, which a CIFAR batch never needs: delete this "
                "file and get the official one"
            ) from None

    def persistent_load(self, pid: Any) -> Any:
        """Refuses persistent references, which the official files do not have."""
        raise pickle.UnpicklingError("persistent reference")


def read_pickled_dict(data: bytes, path: Path) -> dict[str, Any]:
    """Reads a pickled dict of plain values and arrays.

    Args:
        data: The file's bytes.
        path: Where they came from, for messages.

    Returns:
        The dict.

    Raises:
        UserError: The pickle needs any global beyond NumPy arrays, is damaged, or is not a dict.
    """
    try:
        value = _ArrayUnpickler(data, path).load()
    except UserError:
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise UserError(f"{path} is not a readable CIFAR batch ({type(error).__name__}: {error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, not the dict of a CIFAR batch")
    return value
