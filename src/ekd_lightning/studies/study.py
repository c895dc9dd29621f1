"""Study of rows × fractions × seeds, which `ekd-compare` writes to study.json, and its runs on disk."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from ekd_lightning.config.overrides import computing, is_hydras, is_under, key_of
from ekd_lightning.errors import UserError
from ekd_lightning.files import DamagedFileError, write_json
from ekd_lightning.runs.collection import RunEntry
from ekd_lightning.runs.directory import FORMAT, read_record
from ekd_lightning.runs.lock import LOCK_FILE
from ekd_lightning.runs.words import check_words

log = logging.getLogger(__name__)

STUDY_FILE = "study.json"
RUNS = "runs"
MATCHES = ("macs", "parameters")
Composer = Callable[..., DictConfig]
"""Composes `overrides` into a configuration, as Hydra's `compose` does."""
Runs = Mapping[str, Mapping[int, RunEntry]]
"""Row -> seed -> run."""


class LostStudyError(UserError):
    """A study whose study.json is damaged, or missing beside its runs."""

    def __init__(self, what: object) -> None:
        super().__init__(
            f"{what}; repeat the command that began the study, with its --methods, --seeds and --fractions or its "
            "--study, and its overrides: that plans it again and keeps its finished runs"
        )


@dataclass(frozen=True)
class RowPlan:
    """One row of the study.

    Attributes:
        name: A method, `method@network`, or a matched row such as `kd_mean_macs`.
        overrides: Overrides in addition to the common ones, as for ekd-train; `method=...` comes first.
        without: Keys of common overrides that do not apply to the row.
        seeds: The row's own seeds; None for those of the study.
        match: One of `MATCHES`, the cost by which its plain student was found; None for other rows and in old records.
        decides: Whether the study's question is about this row. p values of deciding rows are corrected for the number
            of deciding rows only.
    """

    name: str
    overrides: tuple[str, ...]
    without: tuple[str, ...] = ()
    seeds: tuple[int, ...] | None = None
    decides: bool = True
    match: str | None = None

    @property
    def method(self) -> str:
        """Name of the method, as in conf/method."""
        return self.overrides[0].removeprefix("method=")

    def applied(self, common: Sequence[str]) -> list[str]:
        """The common overrides that apply to the row."""
        return [word for word in common if not is_under(key_of(word), self.without)]

    @property
    def settings(self) -> str:
        """The overrides that change the method's defaults, as one text; empty without any."""
        return " ".join(self.overrides[1:])


@dataclass(frozen=True)
class Study:
    """Everything that determines the runs of a study.

    Attributes:
        rows: The rows, in the order of the tables.
        fractions: Shares of the training images in (0, 1].
        seeds: Seeds, at least 0.
        common: Overrides of all rows.
        data: Name of the data set.
        working_directory: Directory from which relative paths of its runs are resolved; empty if unknown.
        declaration: Name of the declared study that it is a part of; empty for an undeclared study.
    """

    rows: tuple[RowPlan, ...]
    fractions: tuple[float, ...]
    seeds: tuple[int, ...]
    common: tuple[str, ...] = ()
    data: str = ""
    working_directory: str = ""
    declaration: str = ""

    @property
    def deciding(self) -> frozenset[str]:
        """Names of the deciding rows."""
        return frozenset(row.name for row in self.rows if row.decides)

    def words(self, row: RowPlan, fraction: float, seed: int) -> list[str]:
        """The overrides of one run, as for ekd-train."""
        return [*row.applied(self.common), *row.overrides, f"data.fraction={fraction:g}", f"seed={seed}"]


def split_overrides(words: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Separates overrides of the runs from those of Hydra, e.g. the launcher.

    Raises:
        UserError: For a word that is no override, or that sets a key which the study varies.
    """
    hydra = tuple(word for word in words if is_hydras(word))
    common = tuple(word for word in words if word not in hydra)
    for word in common:
        if "=" not in word and not word.startswith("~"):
            raise UserError(f"{word}: not an override (KEY=VALUE), nor an option of ekd-compare")
        owner = {"method": "--methods", "seed": "--seeds", "data.fraction": "--fractions"}.get(key_of(word))
        if owner:
            raise UserError(f"{word}: a study varies this setting; give it with {owner}")
        if key_of(word) in ("data.per_class", "resume"):
            raise UserError(f"{word}: cannot be set for a study")
    return common, hydra


_NUMBERS: dict[str, tuple[Callable[[str], float], Callable[[float], bool], str]] = {
    "--seeds": (int, lambda value: 0 <= value < 2**64, "whole numbers from 0 to 2^64 - 1, e.g. 0,1,2"),
    "--fractions": (float, lambda value: 0 < value <= 1, "shares in (0, 1], e.g. 0.05,0.1"),
}


def parse_numbers(option: str, given: str | Sequence[object], where: str = "") -> tuple[Any, ...]:
    """Reads `0,1,2` or a list for `--seeds`, or `0.05,0.1` for `--fractions`; errors say `where` they stand.

    Raises:
        UserError: For anything but different numbers in the option's range.
    """
    read, fits, allowed = _NUMBERS[option]
    text = given if isinstance(given, str) else ",".join(map(str, given))
    try:
        values = [read(word) for word in text.split(",")]
    except ValueError:
        values = []
    different = {value if isinstance(value, int) else f"{value:g}" for value in values}  # as directories are named
    if not values or not all(map(fits, values)) or len(different) < len(values):
        raise UserError(f"{where or f'{option} {text}'}: give different {allowed}")
    return tuple(values)


def write_study(study: Study, folder: Path) -> None:
    """Writes study.json."""
    content = {name: value for name, value in vars(study).items() if value or name != "declaration"}
    rows = {
        row.name: {name: value for name, value in vars(row).items() if name != "name" and value not in (None, True)}
        for row in study.rows  # what is left out is read as the default
    }
    write_json(folder / STUDY_FILE, {**content, "rows": rows, "format": FORMAT})


def read_study(folder: Path) -> Study | None:
    """Reads study.json; None if the folder is new or empty.

    Raises:
        LostStudyError: If the file is damaged, or missing beside runs.
        UserError: If the folder holds something else; or if the file is of another version, or holds overrides that no
            study may have.
    """
    path = folder / STUDY_FILE
    if not path.is_file():
        if (folder / RUNS).is_dir() and any((folder / RUNS).iterdir()):
            raise LostStudyError(f"{path}: lost")
        if folder.exists() and not (folder.is_dir() and {one.name for one in folder.iterdir()} <= {LOCK_FILE}):
            raise UserError(f"--output {folder}: not a study (it has no {STUDY_FILE}) and not empty")
        return None
    try:
        content = read_record(path)
        rows = tuple(_read_row(path, name, row) for name, row in content["rows"].items())
        fractions = parse_numbers("--fractions", content["fractions"], f"{path}: damaged (fractions)")
        seeds = parse_numbers("--seeds", content["seeds"], f"{path}: damaged (seeds)")
        common, where = tuple(content["common"]), str(content.get("working_directory", ""))
        declaration = str(content.get("declaration", ""))
        study = Study(rows, fractions, seeds, common, str(content["data"]), where, declaration)
    except DamagedFileError as error:
        raise LostStudyError(error) from None
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError):
        raise LostStudyError(f"{path}: damaged") from None
    check_words(common, path)
    return study


def read_earlier(folder: Path, *, planned: bool) -> Study | None:
    """The study that a folder already holds; None if it has none, or a lost one that the command has `planned` again.

    A damaged study.json is then kept as study.json.damaged.
    """
    try:
        return read_study(folder)
    except LostStudyError:
        if not planned:
            raise
        path = folder / STUDY_FILE
        log.warning("%s: lost or damaged; this command plans the study again", path)
        if path.is_file():
            shutil.copyfile(path, path.with_name(f"{STUDY_FILE}.damaged"))
        return None


def _read_row(path: Path, name: str, row: Mapping[str, Any]) -> RowPlan:
    """Reads a row from study.json."""
    words = check_row_words(path, name, row["overrides"])
    if not words or not words[0].startswith("method="):
        raise UserError(f"{path}: damaged (a row {name!r})")
    match = row.get("match")
    if match not in (None, *MATCHES):
        raise UserError(f"{path}: damaged (match {match!r})")
    seeds = parse_numbers("--seeds", row["seeds"], f"{path}: damaged (seeds)") if "seeds" in row else None
    return RowPlan(name, words, tuple(row["without"]), seeds, bool(row.get("decides", True)), match)


def check_row_words(where: object, name: str, words: Sequence[str]) -> tuple[str, ...]:
    """Checks a row's overrides, which may set its method, student and recipe only, and its name, which is in paths.

    Raises:
        UserError: For an impossible name, or at the first override that sets anything else.
    """
    if not re.fullmatch(r"\w[\w.:+@-]*", name):
        raise UserError(f"{where}: row {name!r}: folders are named after it; use letters, digits and . : + @ _ - only")
    for word in (checked := tuple(check_words(words, where))):
        if not is_under(key_of(word), ("method", "student", "recipe")):
            raise UserError(f"{where}: {word}: the row {name} may set only its method, student and recipe")
    return checked


def continued(old: Study, words: tuple[str, ...]) -> tuple[str, ...]:
    """The common overrides of a continued study: the recorded ones, with the given ones in their places or added.

    `union` refuses those that may not change.
    """
    given = {key_of(word): word for word in words}
    return (*[given.pop(key_of(word), word) for word in old.common], *given.values())


def union(old: Study, new: Study) -> Study:
    """The old study with the rows, fractions and seeds of the new one added.

    Raises:
        UserError: If the common overrides, or the overrides of a row, differ.
    """
    ours, theirs = computing(new.common), computing(old.common)
    if ours != theirs:
        different = sorted({key_of(word) for word in set(ours) ^ set(theirs)})
        raise UserError(
            f"{', '.join(different)}: the study in this folder has the common overrides "
            f"{' '.join(theirs) or '(none)'}; other overrides need another --output"
        )
    rows = {row.name: row for row in old.rows}
    for row in new.rows:
        before = rows.setdefault(row.name, row)
        if before.overrides != row.overrides:
            raise UserError(
                f"row {row.name}: the study in this folder has {' '.join(before.overrides)}, "
                f"the command asks for {' '.join(row.overrides)}; use another --output"
            )
        if None not in (before.seeds, row.seeds):
            rows[row.name] = replace(before, seeds=tuple(sorted({*(before.seeds or ()), *(row.seeds or ())})))
    return replace(
        new,
        rows=tuple(rows.values()),
        fractions=tuple(sorted({*old.fractions, *new.fractions})),
        seeds=tuple(sorted({*old.seeds, *new.seeds})),
        working_directory=old.working_directory or new.working_directory,
        declaration=new.declaration or old.declaration,
    )


def read_runs(study: Study, folder: Path) -> dict[float, Runs]:
    """All runs that a study asks for, by fraction; rows in their order.

    Raises:
        UserError: If a run's record is damaged or of another version.
    """

    def read(name: str) -> RunEntry:
        return RunEntry.read(folder / RUNS / name, name)

    seeds = {row.name: study.seeds if row.seeds is None else row.seeds for row in study.rows}
    return {
        fraction: {name: {seed: read(f"{name}-f{fraction:g}-s{seed}") for seed in own} for name, own in seeds.items()}
        for fraction in study.fractions
    }


def every_run(found: Mapping[float, Runs]) -> list[RunEntry]:
    """All runs that `read_runs` found."""
    return [run for rows in found.values() for own in rows.values() for run in own.values()]
