"""Turns errors of Hydra and OmegaConf about a user's configuration into one line."""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_type_hints

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, ListConfig, ValueNode
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, ConfigTypeError, OmegaConfBaseException
from omegaconf.errors import ValidationError as WrongValueError
from yaml import MarkedYAMLError

from ekd_lightning.errors import unknown_name, users_line
from ekd_lightning.roles import what_is_allowed
from ekd_lightning.settings import Settings

_MERGING = "Error merging override "
_DEFAULTS = "the defaults list names options of groups, e.g. `defaults: [override /method: ekd]`"
_READS = re.compile(r"hydra[/\\](core[/\\]default_element|_internal[/\\]config_repository)\.py$")
"""Files of Hydra that read defaults lists."""


def line_of(error: BaseException, words: Sequence[str] | None = None) -> str | None:
    """The line on a user's mistake in some overrides, by default those of this process; None for a bug."""
    if isinstance(error, (HydraException, OmegaConfBaseException)):
        return config_error(error)
    return _not_an_option(error, sys.argv[1:] if words is None else words) or _not_yaml(error) or users_line(error)


def config_error(error: Exception) -> str:
    """The line of Hydra's or OmegaConf's message that names the mistake, with its key."""
    if isinstance(error, MissingConfigException):
        return _missing_config(error)
    told = re.match(r"In '(.*?)': \w+ raised while composing", str(error))
    cause = error.__cause__ or (error.__context__ if told else None) or error
    lines = [line.strip() for line in f"{error}\n{cause}".splitlines() if line.strip()]
    override = lines[0].removeprefix(_MERGING) if lines[0].startswith(_MERGING) else ""
    if line := _unknown_key(cause) or _wrong_value(cause, override):
        return f"{told[1]}.yaml: {line}" if told else line
    kept = [line for line in lines if not line.startswith(("object_type=", "reference_type=", "To append"))]
    key = next((line.removeprefix("full_key: ") for line in kept if line.startswith("full_key: ")), None)
    telling = [line for line in dict.fromkeys(kept) if not line.startswith("full_key: ")]
    text = "; ".join(telling[:2])
    if text.startswith("Could not override 'study'"):
        text = "study=...: not a setting of a run; declared studies: ekd-compare --study full --output FOLDER"
    elif text.startswith("Could not append") and (plain := re.search(r"remove \+ prefix: '(.*)'", text)):
        text = f"+{plain[1]}: there is such a key already; type it without the +"
    elif isinstance(error, OverrideParseException):
        text = f"cannot read the override {error.override!r}: {telling[0]}"
    return f"{key}: {text}" if key and key not in text else text


def _missing_config(error: MissingConfigException) -> str:
    wanted, options = error.missing_cfg_file, error.options
    if not wanted or not options:
        return str(error).splitlines()[0]  # without the search path
    group, _, name = str(wanted).removesuffix(".yaml").rpartition("/")
    return str(unknown_name(group or "configuration", name, options))


def _unknown_key(error: BaseException) -> str | None:
    if not (isinstance(error, (ConfigKeyError, ConfigAttributeError)) and isinstance(error.parent_node, DictConfig)):
        return None
    parent, dot, _ = str(error.full_key or "").rpartition(".")
    return str(unknown_name("key", error.full_key, [parent + dot + str(key) for key in error.parent_node]))


def _wrong_value(error: BaseException, override: str) -> str | None:
    """Key, value, and what is allowed there, for a value of another type; None if the schema does not say it.

    `override` is the one that holds the value; empty for a value in a file.
    """
    if not isinstance(error, (WrongValueError, ConfigTypeError)):
        return None
    if override.startswith("~"):
        return f"{override}: a setting cannot be removed, only set"
    key, (given, _, typed) = str(error.full_key), override.partition("=")
    if not key:  # in a file
        return _wrong_container(error)
    allowed = _allowed(error.object_type, error.key, error.ref_type)
    if allowed is None:
        return None
    typed = (typed if given.lstrip("+") == key else as_typed(error.value)) or "''"
    source = re.search(r"interpolation '(.*?)'", str(error))
    return f"{key}={typed}{f' (from {source[1]})' if source else ''}: must be {allowed}"


def _wrong_container(error: BaseException) -> str | None:
    """The line for a value in a file that is no mapping, or no list; only where it was merged says which and where."""
    merging = [frame.f_locals for frame, _ in traceback.walk_tb(error.__traceback__)][-1]
    wanted, found = merging.get("self"), merging.get("other", merging.get("src"))
    if not isinstance(wanted, (DictConfig, ListConfig)):
        return None
    if not (key := wanted._get_full_key(None)):
        return "the file is a list and must be a mapping" if isinstance(found, ListConfig) else None
    option = isinstance(wanted, DictConfig) and "." not in key  # it may be an option of a group: `method: ekd`
    advice = f"; {_DEFAULTS}" if option else ""
    return f"{key}={as_typed(found)}: must be a {'list' if isinstance(wanted, ListConfig) else 'mapping'}{advice}"


def _allowed(owner: Any, name: Any, hint: Any) -> str | None:
    """What the schema allows for a field of a dataclass, or in a list or mapping; None if it does not say it.

    `owner` is the type of what holds the value, `hint` its annotated type; the name is None for the whole.
    """
    if isinstance(owner, type) and is_dataclass(owner):
        metadata = {one.name: one.metadata for one in fields(owner)}
        return what_is_allowed(get_type_hints(owner)[name], metadata[name]) if name in metadata else None
    inner = get_args(hint)
    return what_is_allowed(hint if name is None else inner[-1], {}) if inner else None


def as_typed(value: Any) -> str:
    """A value as it is typed in an override."""
    value = value._value() if isinstance(value, ValueNode) else value
    if isinstance(value, (list, ListConfig)):
        return f"[{', '.join(map(as_typed, value))}]"
    if isinstance(value, (dict, DictConfig)):
        return f"{{{', '.join(f'{key!s}: {as_typed(one)}' for key, one in value.items())}}}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _not_an_option(error: BaseException, words: Sequence[str]) -> str | None:
    """The line for a group set to a number, a list, a truth value or null, for which Hydra raises a plain error."""
    told = str(error)
    if (where := _wrong_defaults(error)) is not None:
        return f"{where}{_DEFAULTS}"
    number = isinstance(error, ValueError) and told.startswith("Config group override must be")
    listed = isinstance(error, TypeError) and told.startswith("argument of type") and told.endswith("not iterable")
    if not (number or listed):
        return None
    value = r"\[.*" if listed else r"(null|true|false|[\d.eE+-]+)"
    no_groups = [
        name for name, usual in vars(Settings()).items() if not (is_dataclass(usual) or isinstance(usual, dict))
    ]
    found = [word for word in words if re.fullmatch(rf"\+?(?!({'|'.join(no_groups)})=)[\w/@]*={value}", word)]
    if listed and not found:
        return None
    subject = f"{' or '.join(found)}: " if found else ""  # in a file, whose error does not say where
    return f"{subject}a configuration group takes the name of one of its options, see --help"


def _wrong_defaults(error: BaseException) -> str | None:
    """What a file has in place of a defaults list, or an item of it, as far as Hydra tells; None for other errors."""
    told = str(error)
    if isinstance(error, ValueError):
        if found := re.match(r"Invalid defaults list in '(.*)', defaults must be a list \(got (\w+)\)", told):
            return f"{found[1]}.yaml: defaults is no list, but {found[2]}; "
        if found := re.match(r"In (\S+): (?:Too many keys|Missing group name) in (?:default item )?(.*)", told):
            return f"{found[1]}.yaml: {found[2]} is no item of a defaults list; "
        if found := re.match(r"Unsupported (?:item value|type) in defaults : (\w+)", told):
            return f"a file's defaults list holds {found[1]}; "
    frames = traceback.extract_tb(error.__traceback__) if isinstance(error, AssertionError) else []
    return (
        "a file's defaults list has an item of another form; "
        if frames and _READS.search(frames[-1].filename)
        else None
    )


def _not_yaml(error: BaseException) -> str | None:
    """The line for a configuration file that is no YAML."""
    if not isinstance(error, MarkedYAMLError) or error.problem_mark is None:
        return None
    mark = error.problem_mark
    return f"{mark.name}: not YAML: {error.problem} (line {mark.line + 1}, column {mark.column + 1})"
