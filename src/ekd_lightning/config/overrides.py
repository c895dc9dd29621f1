"""Overrides of Hydra's command line: reading, quoting and checking them, and `resume=`.

`resume=DIR` expands to the overrides of the run in DIR, which then writes to DIR again.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ekd_lightning.config import internals
from ekd_lightning.config.config import PLACES, TEACHER_PLACES, changes, read_config
from ekd_lightning.errors import UserError
from ekd_lightning.files import DamagedFileError
from ekd_lightning.keys import is_free, is_place, keys_where, may_change_between_parts
from ekd_lightning.runs.directory import CONFIG, OVERRIDES, RunDirectory
from ekd_lightning.runs.words import names_code, require_named_code
from ekd_lightning.runs.writer import RunWriter
from ekd_lightning.settings import Settings

SWEEP_FILE = "sweep.json"
"""The plan of a sweep, in its folder."""

Scalar: TypeAlias = "bool | int | float | str | None"

_WORDS = ("null", "true", "false", "nan", "inf")
_FLAGS = ("--config-name", "-cn", "--config-dir", "-cd", "--config-path", "-cp")


def key_of(word: str) -> str:
    """The key that an override sets: `student.options` of `+student.options={width: 1}`, `a.b` of `group@a.b=file`."""
    return word.split("=", 1)[0].lstrip("+~").rpartition("@")[2]


def is_under(key: str, prefixes: Iterable[str]) -> bool:
    """Whether a dotted key is one of the prefixes or lies below one."""
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)


OF_ONE_START = ("hydra.mode", "hydra.sweep", "hydra.run", "hydra.output_subdir", "hydra.job", "hydra.sweeper.params")
"""Keys that a command which continues a run or a sweep sets itself."""


def is_hydras(word: str) -> bool:
    """Whether an override sets a key of Hydra itself, e.g. the launcher."""
    return key_of(word).startswith(("hydra.", "hydra/"))


def anchored_search(word: str) -> str:
    """`hydra.searchpath=[...]` with absolute folders; any other word unchanged."""
    if key_of(word) != "hydra.searchpath" or "=" not in word:
        return word
    value = internals.parse_override(word).value()
    places = value if isinstance(value, list) else [value]
    folders = [str(place).removeprefix("file://") for place in places]
    absolute = [folder if "://" in folder else f"file://{Path(folder).absolute()}" for folder in folders]
    return f"{word.partition('=')[0]}=[{','.join(_quoted(place) for place in absolute)}]"


def override(key: str, value: Scalar | Path) -> str:
    """`key=value`, quoted such that Hydra reads the same value."""
    if value is None:
        return f"{key}=null"
    if isinstance(value, bool):
        return f"{key}={str(value).lower()}"
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, str):
        plain = re.fullmatch(r"[A-Za-z/][\w./@-]*", value, re.ASCII) and value.lower() not in _WORDS
        return f"{key}={value}" if plain else f"{key}={_quoted(value)}"
    return f"{key}={value!r}"


def literal(text: str) -> str:
    """A text escaped for OmegaConf, which would read `${` as an interpolation."""
    return re.sub(r"(\\*)\$\{", lambda match: rf"{2 * match[1]}\${{", text)


def _quoted(text: str) -> str:
    quoted = re.sub(r"(\\*)('|$)", lambda match: 2 * match[1] + (r"\'" if match[2] else ""), literal(text))
    return f"'{quoted}'"


def check_typed(words: Sequence[str]) -> None:
    """Refuses settings typed as options (`--fraction 0.1`) and texts that lack quotes, showing how they are typed.

    The words are those of a command line without its own options.
    """
    for position, word in enumerate(words):
        if word.startswith("--") and word.split("=")[0] not in internals.option_names():  # nor an abbreviation
            raise UserError(_no_option(word, next(iter(words[position + 1 :]), "")))
        key, sign, text = word.partition("=")
        if word.startswith("-") or not sign or not text or text[0] in "[{(" or key == "resume":
            continue  # `resume=` is read as a path
        if re.fullmatch(r"[\w.,:+/@%-]*", text, re.ASCII):
            continue  # plain for Hydra's grammar
        try:
            internals.parse_override(word)
        except HydraException:
            place = os.path.expanduser(text) if key_of(word) in PLACES else text
            wanted = shell_word(override(key, place))
            raise UserError(f"cannot read the override {word!r}; its text must be quoted: {wanted}") from None


def _no_option(word: str, following: str) -> str:
    """The message for a setting that was typed as an option: `--fraction 0.1` instead of `data.fraction=0.1`."""
    name, sign, text = word[2:].replace("-", "_").partition("=")
    value = text if sign else "" if "=" in following or following.startswith("-") else following
    known = [*keys_where(lambda key: True), *vars(Settings())]
    keys = sorted((key for key in known if key == name or key.endswith(f".{name}")), key=lambda key: key.count("."))
    if not keys:
        return f"{word}: not an option of this command; settings are typed KEY=VALUE, e.g. seed=0"
    return f"{word}: not an option of this command; settings are typed KEY=VALUE, here {keys[0]}={value or '...'}"


def config_flags(argv: list[str]) -> list[str]:
    """The flags of a command line that select configuration files: `--config-name x`, `--config-dir=y` and the like."""
    flags: list[str] = []
    words = iter(argv[1:])
    for word in words:
        if word.split("=", 1)[0] in _FLAGS:
            flags.append(word)
            if "=" not in word:
                flags.append(next(words, ""))
    return flags


def split_config_dir(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """The absolute folder of `--config-dir` (None without), and the other words of a command line."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-dir", "-cd", type=os.path.abspath)
    known, words = parser.parse_known_args(argv[1:])
    return known.config_dir, words


def read_path(word: str) -> str | None:
    """The path in an override `key=path`, read by Hydra's grammar; None for null and for an empty value.

    Raises:
        UserError: If Hydra cannot read the value, or reads several.
    """
    key, _, text = word.partition("=")
    try:
        parsed = internals.parse_override(word)
        value: Any = None if parsed.is_sweep_override() else parsed.value()
        if not parsed.is_sweep_override() and not isinstance(value, (dict, list)):
            if value is None or text == "":
                return None
            # A number or truth value is a folder's name, as it was typed.
            return str(OmegaConf.create({"value": value}).value) if isinstance(value, str) else text.strip()
    except (HydraException, OmegaConfBaseException):
        pass
    wanted = shell_word(override(key, text))
    raise UserError(f"{key}: cannot read {text!r} as a path; Hydra needs quotes around it: {wanted}")


def shell_word(text: str) -> str:
    """A text as one word for a shell, in double quotes if that is easier to read."""
    plain = not set(text) & set('"$`!\n') and "\\\\" not in text and not text.endswith("\\")
    return f'"{text}"' if "'" in text and plain else shlex.quote(text)


def resume_word(argv: Sequence[str]) -> Path | None:
    """The absolute folder of the last `resume=` on a command line; None without, or for `resume=null`.

    Raises:
        UserError: If Hydra's grammar does not read it as one path, or it has another form, such as `+resume=`.
    """
    for word in argv[1:]:
        if "=" in word and key_of(word) == "resume" and not word.startswith("resume="):
            raise UserError(f"{word}: must be typed resume=DIR")
    path = next((read_path(word) for word in reversed(argv[1:]) if word.startswith("resume=")), None)
    return None if path is None else Path(path).absolute()


def named_sweep(argv: Sequence[str]) -> Path | None:
    """The folder that `resume=` names, if it holds a sweep; None for a run, or without `resume=`.

    Raises:
        UserError: For a sweep without a plan.
    """
    folder = resume_word(argv)
    if folder is None or RunDirectory(folder).file(CONFIG) is not None:
        return None
    if (folder / SWEEP_FILE).is_file():
        return folder
    if (folder / "multirun.yaml").is_file():
        raise UserError(
            f"resume={folder}: this sweep has no plan ({SWEEP_FILE}), because its sweeper is not Hydra's own; "
            "resume its runs one by one"
        )
    return None


def expand_resume(argv: list[str]) -> list[str]:
    """Replaces `resume=DIR` by the overrides that the run in DIR was started with, and its directory.

    Other overrides of the command line come after them, so they take precedence. A command line without `resume=` is
    returned unchanged.

    Raises:
        UserError: If DIR is not a stopped run.
    """
    directory = resume_word(argv)
    if directory is None:
        return argv
    read_config(directory, "resume=")
    if not (run := RunWriter(directory)).is_held():  # else its lock refuses it, or this process is one of its ranks
        epochs = run.section("recipe").get("epochs")
        if not isinstance(epochs, int):
            raise DamagedFileError(f"{directory / CONFIG}: damaged (recipe.epochs is {epochs!r})")
        run.refuse_complete(epochs)
    if "-m" in argv or "--multirun" in argv:
        raise UserError("resume: continues one run; it cannot be combined with --multirun")
    if run.file(OVERRIDES) is None:
        raise UserError(f"resume={directory}: has no {OVERRIDES}, which records the overrides to start it with")
    first, flags = run.overrides(), config_flags(argv)
    require_named_code(first, argv[1:], f"resume={directory}")
    given = [word for word in argv[1:] if word not in (*first, *flags) and not word.startswith(_OF_THIS_RUN)]
    own = [override("resume", directory), override("hydra.run.dir", directory), "hydra.mode=RUN"]
    # Flags come before all overrides: argparse accepts no positionals on both sides of a flag.
    return [argv[0], *flags, *first, *map(_anchored_here, given), *own]


_OF_THIS_RUN = ("resume=", "hydra.run.dir=", "hydra.output_subdir=", "hydra.mode=")


def anchored(word: str) -> str:
    """An override of a location with an absolute path; any other override unchanged."""
    if not names_place(word):
        return word
    return override(word.partition("=")[0], Path(read_path(word) or ".").absolute())


def _anchored_here(word: str) -> str:
    """Like `anchored`, for files of a pool of teachers as well."""
    pool = key_of(word) == "teachers.pool" and "=" in word
    return internals.with_absolute(word, TEACHER_PLACES) if pool else anchored(word)


def names_place(word: str) -> bool:
    """Whether an override sets the path of a location; the content there is compared by its hash."""
    key = key_of(word)
    return key in PLACES and "=" in word and is_place(key, read_path(word))


def computing(words: Iterable[str], is_free: Callable[[str], bool] = is_free) -> list[str]:
    """The overrides that affect the results, sorted; an override of a location is given by its key only.

    `is_free` tells whether the setting of a key may change without changing the results.
    """
    kept = [word for word in words if not is_free(key_of(word))]
    return sorted(f"{key_of(word)}=" if names_place(word) else word for word in kept)


def may_be_given(word: str) -> bool:
    """Whether an override may change when a study continues: a free setting, a location, or the name of code."""
    return is_free(key_of(word)) or names_code(word) or names_place(word)


def check_place(resume: str, directory: Path) -> None:
    """Refuses a `resume` outside this job's directory, which `expand_resume` has not expanded.

    It stands in a configuration file, for example.
    """
    if Path(resume).resolve() != directory.resolve():
        raise UserError(
            f"resume={resume}: must be given on the command line, which then sets the run's directory to it; "
            f"this run's directory is {directory}"
        )


def check_unchanged(directory: Path, plain: dict[str, Any]) -> None:
    """Refuses to resume a run with settings that would change its results, naming them and what restores them."""
    if changed := changed_settings(directory, plain):
        words = " ".join(map(shell_word, restoring(read_config(directory), changed)))
        raise UserError(
            f"resume={directory}: {', '.join([*changed][:5])} differ from the recorded run; "
            f"a resumed run must keep its settings{words and f'; it goes on with {words}'}"
        )


def changed_settings(directory: Path, plain: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The settings that may not change while a run is stopped and have changed: recorded and new value by dotted key.

    Weights of teachers may have moved: the checkpoint knows them by their hash.
    """
    recorded, here = (_without_weight_files(config) for config in (read_config(directory, "resume="), plain))
    return {key: both for key, both in changes(recorded, here).items() if not may_change_between_parts(key)}


def restoring(recorded: dict[str, Any], changed: dict[str, tuple[Any, Any]]) -> list[str]:
    """The overrides that give changed settings their recorded values; empty if that takes more than a few scalars."""
    of_features = any(key.startswith("method.terms.feature_branch") for key in changed)
    if of_features and recorded["method"].get("name") == "ekd":  # before `ekd` compared maps
        return ["method=ekd_pooled", "method.name=ekd", "student.branch_gradients=mean"]
    scalar = all(isinstance(was, bool | int | float | str) and now is not None for was, now in changed.values())
    return [override(key, was) for key, (was, _) in changed.items()] if scalar and len(changed) <= _FEW else []


def _without_weight_files(config: dict[str, Any]) -> dict[str, Any]:
    """A copy of a plain configuration whose pool of teachers does not say where files of weights are."""
    teachers = config.get("teachers")
    if not isinstance(teachers, dict) or not isinstance(teachers.get("pool"), list):
        return config
    pool = [
        {key: "" if key in _WEIGHT_FILES and value not in (None, "DEFAULT") else value for key, value in entry.items()}
        if isinstance(entry, dict)
        else entry
        for entry in teachers["pool"]
    ]
    return {**config, "teachers": {**teachers, "pool": pool}}


_FEW = 5
_WEIGHT_FILES = ("file", "weights")
"""Keys of a pool entry that name a file."""
