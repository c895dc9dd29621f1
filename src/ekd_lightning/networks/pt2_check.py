"""A torch.export archive is looked through before PyTorch opens it, for opening it may run what stands in it.

PyTorch falls back to a free unpickling of inputs and constants, compiles `guards_code`, and evaluates symbolic sizes
as Python. Students need none of these beyond arithmetic on the batch size, so anything else is refused.
"""

from __future__ import annotations

import io
import json
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ekd_lightning.errors import UserError

_PLAIN = re.compile(
    r"(data/(weights|constants)/((weight|tensor)_\d+|\w+_config\.json|\w+\.pt)|data/sample_inputs/\w+\.pt"
    r"|models/\w+\.json|extra/[\w.]+|extra_files/[\w.]+|archive_format|archive_version|version|byteorder"
    r"|serialized_\w+\.(json|pt)|\.data/\w+|\.format_version|\.storage_alignment)"
)
"""Members that students' archives have, by PyTorch 2.6 and later; compiled code, custom and opaque objects are not."""
_NAMES = {"Symbol", "Integer", "Add", "Mul", "Pow", "Max", "Min", "Mod", "positive", "integer", "nonnegative"}
_NAMES |= {"FloorDiv", "True", "False"}
_TARGETS = re.compile(r"torch\.ops\.aten\.(?!from_file)\w+\.\w+|_operator\.\w+|torch\.sym_\w+")


def check_archive(content: bytes, path: Path) -> None:
    """Refuses an archive that is damaged, or would run code on being opened.

    Args:
        content: The file's.
        path: Its name, for the error.

    Raises:
        UserError: Saying which.
    """
    try:
        members = _read_members(content)
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise UserError(f"{path}: not a torch.export archive, or damaged ({_line(error)})") from None
    for name, data in members.items():
        reason = _objection(name, data)
        if reason:
            raise UserError(f"{path}: refused, {reason}")


def _read_members(content: bytes) -> dict[str, bytes]:
    """Members by name, without the folder that PyTorch wraps around them; every checksum is compared."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        names = archive.namelist()
        if len(set(names)) < len(names):
            raise ValueError("a member is there twice")
        found = {name: archive.read(name) for name in names}
    inside = {name.split("/", 1)[0] for name in found if "/" in name}
    folder = f"{inside.pop()}/" if len(inside) == 1 and all("/" in name for name in found) else ""
    members = {name[len(folder) :]: data for name, data in found.items()}
    if not any(name.startswith("models/") or name.startswith("serialized_exported") for name in members):
        raise ValueError("it holds no program")
    return members


def _objection(name: str, data: bytes) -> str | None:
    if not _PLAIN.fullmatch(name):
        return f"its member {name!r} may hold code"
    if name.endswith(".pt"):
        return _unpickling(name, data)
    if name.startswith("extra") or not name.endswith(".json"):
        return None
    try:
        content = json.loads(data)
    except ValueError:
        return f"its member {name!r} is damaged"
    return next(_suspicious(content), None)


def _unpickling(name: str, data: bytes) -> str | None:
    if not data:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except Exception:  # damaged ones raise many kinds
        return f"its member {name!r} holds more than tensors: opening it would run code, or it is damaged"
    return None


def _suspicious(value: Any) -> Iterator[str]:
    """What in a program's description PyTorch would evaluate, and is not arithmetic on sizes."""
    if isinstance(value, list):
        for item in value:
            yield from _suspicious(item)
    if not isinstance(value, dict):
        return
    for key, item in value.items():
        if key == "guards_code" and item:
            yield "its guards are code"
        elif key == "use_pickle" and item:
            yield "its weights are pickled"
        elif key == "expr_str" and not _is_arithmetic(item):
            yield f"it has the size {str(item)[:40]!r}"
        elif key == "target" and isinstance(item, str) and not _is_known(value, item):
            yield f"it calls {item[:60]!r}"
        yield from _suspicious(item)


def _is_known(node: dict[str, Any], target: str) -> bool:
    # Buffers and outputs have targets, too: names of theirs, which nothing calls.
    return "inputs" not in node or bool(_TARGETS.fullmatch(target))


def _is_arithmetic(text: Any) -> bool:
    if not isinstance(text, str):
        return False
    text = re.sub(r"'[a-z]+\d+'", "", text)
    if not re.fullmatch(r"[\w\s(),=+*/-]*", text):
        return False
    return all(re.fullmatch(r"\d+|[suzb]\d+", word) or word in _NAMES for word in re.findall(r"\w+", text))


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__
