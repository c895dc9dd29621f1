"""Commands to paste into a shell: they continue stopped runs and take the next step after finished ones."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

from ekd_lightning.config.overrides import OF_ONE_START, is_hydras, is_under, key_of, override, read_path, shell_word
from ekd_lightning.errors import STARTED_IN, UserError
from ekd_lightning.runs.words import launches, names_code


def typed(path: Path | str) -> str:
    """A path for a shell in the user's working directory: relative if it lies below, quoted if necessary."""
    return shell_word(_near(path))


def typed_override(key: str, path: Path | str) -> str:
    """`key=path` for a shell, such that Hydra's grammar reads the path."""
    near = _near(path)
    try:
        plain = read_path(f"{key}={near}") == near
    except UserError:
        plain = False
    return f"{key}={shell_word(near if plain else override(key, near).removeprefix(f'{key}='))}"


def typed_resume(directory: Path, words: Iterable[str] = (), flags: Iterable[str] = ()) -> str:
    """The command that continues a run or a sweep in a directory.

    Of the words that it was started with, those that name code are repeated, as they are not read from records, and so
    are its flags (`--config-dir` and the like). Words of Hydra in the present command that no record may hold, e.g.
    `hydra.searchpath=[...]`, are repeated, too.
    """
    hydra = (w for w in sys.argv[1:] if is_hydras(w) and not launches(w) and not is_under(key_of(w), OF_ONE_START))
    again = [*flags, typed_override("resume", directory), *filter(names_code, words), *hydra]
    return " ".join(
        [called("ekd-train"), *(word if word.startswith("resume=") else shell_word(word) for word in again)]
    )


def called(program: str) -> str:
    """A command of this package as the shell finds it: its name if it is on the PATH, else with its folder."""
    here = Path(sys.argv[0])
    own = Path(os.environ.get(STARTED_IN) or Path.cwd(), here.with_name(program))
    found = shutil.which(program)
    if not here.name.startswith("ekd-") or not own.is_file() or (found and os.path.samefile(found, own)):
        return program
    return shell_word(str(here.with_name(program)))


def report_command(places: Iterable[Path], folder: Path) -> str:
    """The command that reports on runs into a folder, with --force if that holds a report."""
    force = ["--force"] if (_there(folder) / "summary.json").is_file() else []
    return " ".join(["ekd-report", *map(typed, places), "-o", typed(folder), *force])


def compare_command(methods: str, folder: Path | str, words: Iterable[str], *options: str) -> list[str]:
    """The command that compares methods with the settings of a run; empty if it has a setting that no study may have.

    Of the run's words, keys that a study varies are left out, and settings of the run's own method, which would not be
    those of the other rows. The folder of the study gets a number if it exists.
    """
    words = list(words)
    if any(key_of(word) == "data.per_class" for word in words):
        return []
    varied = ("method", "seed", "data.fraction", "resume", "overwrite")
    kept = [shell_word(word) for word in words if not is_under(key_of(word), varied)]
    return [
        " ".join(["ekd-compare", "--methods", shell_word(methods), "--output", typed(unused(folder)), *options, *kept])
    ]


def search_path() -> list[str]:
    """`hydra.searchpath=[...]` of the present command, whose files the next commands need, too."""
    return [word for word in sys.argv[1:] if key_of(word) == "hydra.searchpath" and "=" in word]


def trusting(words: Iterable[str], trust: bool) -> list[str]:
    """Overrides quoted for a shell, and `--trust` if it was given."""
    return [*map(shell_word, words), *(["--trust"] if trust else [])]


def unused(folder: Path | str) -> Path:
    """The folder if it does not exist, else its name with the first free number."""
    names = (Path(f"{folder}{end}") for end in ("", *(f"-{number}" for number in range(2, 1000))))
    return next((name for name in names if not _there(name).exists()), Path(folder))


def print_next(*commands: str) -> None:
    """Prints the next commands, ready to be pasted."""
    print("\nnext:")
    for command in commands:
        program, _, words = command.partition(" ")
        print(f"  {called(program) if program.startswith('ekd-') else program} {words}".rstrip())


def _there(path: Path | str) -> Path:
    """A path resolved from the directory in which the user called the command."""
    return Path(os.environ.get(STARTED_IN) or Path.cwd(), path)


def _near(path: Path | str) -> str:
    path, here = Path(path), _there("")
    return path.relative_to(here).as_posix() if path.is_relative_to(here) else str(path)
