"""Commands as one would type them here in a shell: to continue what was stopped, and to go on from what is done."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

from ekd_lightning.config.overrides import key_of, override, read_path, shell_word
from ekd_lightning.errors import STARTED_IN, UserError
from ekd_lightning.runs.words import names_code


def typed(path: Path | str) -> str:
    """A path as one would type it here in a shell: relative where that is shorter, quoted where that is needed."""
    return shell_word(_near(path))


def typed_override(key: str, path: Path | str) -> str:
    """`key=path` as one would type it here in a shell, for Hydra's grammar."""
    near = _near(path)
    try:
        plain = read_path(f"{key}={near}") == near
    except UserError:
        plain = False
    return f"{key}={shell_word(near if plain else override(key, near).removeprefix(f'{key}='))}"


def typed_resume(directory: Path, words: Iterable[str] = (), flags: Iterable[str] = ()) -> str:
    """The command that continues a run or a sweep, as one would type it here.

    Args:
        directory: Of the run or sweep.
        words: Overrides that it was started with: those that name code are given again, as no record may.
        flags: `--config-dir` and the like that it was started with.
    """
    again = [*flags, typed_override("resume", directory), *filter(names_code, words)]
    return " ".join(
        [called("ekd-train"), *(word if word.startswith("resume=") else shell_word(word) for word in again)]
    )


def called(program: str) -> str:
    """A command of this package as it is called here: by its name where the shell finds it, else with its folder."""
    here = Path(sys.argv[0])
    own = Path(os.environ.get(STARTED_IN) or Path.cwd(), here.with_name(program))
    found = shutil.which(program)
    if not here.name.startswith("ekd-") or not own.is_file() or (found and os.path.samefile(found, own)):
        return program
    return shell_word(str(here.with_name(program)))


def report_command(places: Iterable[Path], folder: Path) -> str:
    """The command that reports on runs into a folder, over the earlier report that it may hold."""
    force = ["--force"] if (_there(folder) / "summary.json").is_file() else []
    return " ".join(["ekd-report", *map(typed, places), "-o", typed(folder), *force])


def compare_command(methods: str, folder: Path | str, words: Iterable[str], *options: str) -> list[str]:
    """The command that compares methods as a run was set up; none where a study cannot be set up so.

    Args:
        methods: For `--methods`.
        folder: Of the study; numbered where it is there already.
        words: Overrides of the run; those of what a study varies are left out.
        options: Further options.
    """
    words = list(words)
    if any(key_of(word) == "data.per_class" for word in words):
        return []
    varied = ("method", "seed", "data.fraction", "resume", "overwrite")
    kept = [shell_word(word) for word in words if key_of(word) not in varied]
    return [
        " ".join(["ekd-compare", "--methods", shell_word(methods), "--output", typed(unused(folder)), *options, *kept])
    ]


def trusting(words: Iterable[str], trust: bool) -> list[str]:
    """Overrides as one would type them here, and `--trust` if it was given."""
    return [*map(shell_word, words), *(["--trust"] if trust else [])]


def unused(folder: Path | str) -> Path:
    """The folder; with a number where there is one of that name."""
    names = (Path(f"{folder}{end}") for end in ("", *(f"-{number}" for number in range(2, 1000))))
    return next((name for name in names if not _there(name).exists()), Path(folder))


def print_next(*commands: str) -> None:
    """Prints commands that may come next, ready to be pasted."""
    print("\nnext:")
    for command in commands:
        program, _, words = command.partition(" ")
        print(f"  {called(program) if program.startswith('ekd-') else program} {words}".rstrip())


def _there(path: Path | str) -> Path:
    """A path as it is meant where the command was called."""
    return Path(os.environ.get(STARTED_IN) or Path.cwd(), path)


def _near(path: Path | str) -> str:
    path, here = Path(path), _there("")
    return path.relative_to(here).as_posix() if path.is_relative_to(here) else str(path)
