"""Ways in which a file on disk is spoilt: by a kill, by the disk, by an editor, or by somebody who means harm."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import yaml

EXECUTED = "EXECUTED"
"""A file of this name appears in the working directory where something in a record was run."""
Change = Callable[[bytes, Random], bytes]
_OTHERS: tuple[Any, ...] = ({}, [], None, True, -1, 0, 3.5, 10**400, "", "x", "../../x", "a\nb", [{}], {"a": {"b": []}})


def _cut(content: bytes, draw: Random) -> bytes:
    return content[: draw.randrange(len(content))]


def _bit(content: bytes, draw: Random) -> bytes:
    changed = bytearray(content)
    changed[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _digit(content: bytes, draw: Random) -> bytes:
    """Another digit in place of one: what still is a document of the same form."""
    places = [place for place, byte in enumerate(content) if 48 <= byte < 58]
    changed = bytearray(content)
    if places:
        at = draw.choice(places)
        changed[at] = 48 + (changed[at] - 48 + draw.randrange(1, 10)) % 10
    return bytes(changed)


def _bytes(content: bytes, draw: Random) -> bytes:
    changed = bytearray(content)
    for _ in range(draw.randrange(1, 20)):
        changed[draw.randrange(len(content))] = draw.randrange(256)
    return bytes(changed)


def _zeros(content: bytes, draw: Random) -> bytes:
    at = draw.randrange(len(content))
    length = min(512, len(content) - at)
    return content[:at] + bytes(length) + content[at + length :]


def _node(content: bytes, draw: Random) -> bytes:
    """One value of a document of JSON or YAML, at any depth, becomes one of another kind, or is gone."""
    try:
        document = yaml.safe_load(content)
    except (yaml.YAMLError, UnicodeDecodeError):
        return b"{}"
    places: list[tuple[Any, Any]] = []

    def walk(part: Any) -> None:
        pairs = part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list) else ()
        for key, value in pairs:
            places.append((part, key))
            walk(value)

    walk(document)
    if not places:
        return json.dumps(draw.choice(_OTHERS)).encode()
    parent, key = draw.choice(places)
    if draw.random() < 0.2:
        del parent[key]
    else:
        parent[key] = draw.choice([other for other in _OTHERS if type(other) is not type(parent[key])])
    return json.dumps(document, default=str).encode()  # which is YAML, too


def _fixed(text: str) -> Change:
    return lambda content, draw: text.encode()


CHANGES: dict[str, Change] = {
    "cut": _cut,
    "end": lambda content, draw: content[: -draw.randrange(1, min(60, len(content)))],
    "bit": _bit,
    "digit": _digit,
    "bytes": _bytes,
    "zeros": _zeros,
    "all zeros": lambda content, draw: bytes(len(content)),
    "noise": lambda content, draw: draw.randbytes(len(content)),
    "tail": lambda content, draw: content + draw.randbytes(draw.randrange(1, 40)),
    "twice": lambda content, draw: content + content,
    "empty": _fixed(""),
    "node": _node,
    "node again": _node,
    "node once more": _node,
    "{}": _fixed("{}"),
    "[]": _fixed("[]"),
    "scalar": _fixed("3"),
    "text": _fixed('"text"'),
    "null": _fixed("null"),
    "nan": _fixed("NaN"),
    "lists": _fixed("[1, [2]]"),
    "tag": _fixed(f"!!python/object/apply:os.system ['touch {EXECUTED}']"),
    "tag inside": _fixed(f"a: !!python/object/apply:os.system ['touch {EXECUTED}']\nb: 1\n"),
    "tag of a name": _fixed(f"- !!python/object/new:pathlib.Path ['{EXECUTED}']\n"),
    "pickle": _fixed(f"cos\nsystem\n(S'touch {EXECUTED}'\ntR."),
    "deep": _fixed("[" * 100_000),
    "deep mapping": _fixed('{"a":' * 20_000),
    "aliases": _fixed("a: &a [x, x]\n" + "".join(f"b{i}: &b{i} [*{f'b{i - 1}' if i else 'a'}, x]\n" for i in range(9))),
    "long number": lambda content, draw: b'{"state": ' + b"9" * 9000 + b"}",
    "latin": lambda content, draw: b"\xff\xfe{\x00}\x00 \xe9",
}
"""Name -> content and a generator of numbers -> other content; content is not empty."""


def _link(target: str) -> Callable[[Path, Path], None]:
    return lambda path, other: path.symlink_to(target)


LINKS: dict[str, Callable[[Path, Path], object]] = {
    "zero": _link("/dev/zero"),
    "null device": _link("/dev/null"),
    "dangling": _link("/nowhere/at/all"),
    "loop": lambda path, other: path.symlink_to(path.name),
    "folder": lambda path, other: path.mkdir(),
    "link to a folder": _link("/usr"),
    "pipe": lambda path, other: os.mkfifo(path),
    "gone": lambda path, other: None,
    "of another": lambda path, other: path.symlink_to(other),
    "copy of another": lambda path, other: shutil.copy(other, path),
}
"""Name -> what takes the place of the removed file; the second path is the same file of something else."""
DAMAGES = (*CHANGES, *LINKS)


def damage(name: str, path: Path, other: Path, draw: Random) -> None:
    """Spoils a file.

    Args:
        name: One of `DAMAGES`.
        path: The file, whole.
        other: The same file of another run, or the like.
        draw: Where what is random comes from.
    """
    if name in CHANGES:
        content = CHANGES[name](path.read_bytes(), draw)
        path.write_bytes(content)
    else:
        path.unlink()
        LINKS[name](path, other)
