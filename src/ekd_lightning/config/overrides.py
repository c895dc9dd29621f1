"""Overrides as Hydra reads them on a command line: their keys, and values written so that they are read back."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TypeAlias

Scalar: TypeAlias = "bool | int | float | str | None"

_WORDS = ("null", "true", "false", "nan", "inf")
_FLAGS = ("--config-name", "-cn", "--config-dir", "-cd", "--config-path", "-cp")


def key_of(word: str) -> str:
    """The key of an override: `student.options` of `+student.options={width: 0.5}`."""
    return word.split("=", 1)[0].lstrip("+~").split("@", 1)[0]


def is_under(key: str, prefixes: Iterable[str]) -> bool:
    """Whether a dotted key is one of the prefixes or lies below one."""
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)


def is_hydras(word: str) -> bool:
    """Whether an override sets something of Hydra itself, e.g. the launcher."""
    return key_of(word).startswith(("hydra.", "hydra/"))


def override(key: str, value: Scalar) -> str:
    """`key=value` as Hydra reads it back to the same value."""
    if value is None:
        return f"{key}=null"
    if isinstance(value, bool):
        return f"{key}={str(value).lower()}"
    if isinstance(value, str):
        plain = re.fullmatch(r"[A-Za-z/][\w./@-]*", value, re.ASCII) and value.lower() not in _WORDS
        return f"{key}={value}" if plain else f"{key}='{_escaped(value)}'"
    return f"{key}={value!r}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("'", "\\'")


def config_flags(argv: list[str]) -> list[str]:
    """`--config-name x`, `--config-dir=y` and their short forms: no overrides, but part of what is composed."""
    flags: list[str] = []
    words = iter(argv[1:])
    for word in words:
        if word.split("=", 1)[0] in _FLAGS:
            flags.append(word)
            if "=" not in word:
                flags.append(next(words, ""))
    return flags
