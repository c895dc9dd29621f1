"""Recovery of a study whose study.json is lost or damaged, from the records of its runs."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shlex
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ekd_lightning.config.overrides import computing, key_of, may_be_given
from ekd_lightning.errors import UserError
from ekd_lightning.runs.directory import RunDirectory
from ekd_lightning.studies.rows import MATCHED, POOLED
from ekd_lightning.studies.study import (
    MATCHES,
    RUNS,
    STUDY_FILE,
    LostStudyError,
    RowPlan,
    Study,
    check_row_words,
    parse_numbers,
    read_study,
)

if TYPE_CHECKING:
    from ekd_lightning.studies.declaration import Declaration

log = logging.getLogger(__name__)


def read_or_recover(folder: Path, declared: Declaration | None = None) -> tuple[Study | None, bool]:
    """The study of a folder, and whether it had to be recovered because its study.json is lost or damaged.

    Args:
        folder: Folder of the study.
        declared: The declared study that it is a part of; None for an undeclared study.

    Raises:
        UserError: If no run tells what the study was, or two runs contradict each other.
    """
    try:
        return read_study(folder), False
    except LostStudyError as lost:
        study = _recovered(folder)
        if study is None:
            raise UserError(f"{lost.what}, and no run in {folder / RUNS} records how it was started") from None
        if declared is not None:
            study = _as_declared(study, declared)
        elif (name := _declared_in(folder, study)) is not None:
            again = shlex.join(["ekd-compare", "--study", name, "--output", str(folder.parent)])
            raise UserError(f"{lost.what}; it is a part of a declared study, so {again} makes it again") from None
        names = ", ".join(row.name for row in study.rows)
        log.warning("%s; it is rebuilt from the runs of the rows %s", lost.what, names)
        return replace(study, recovered=True), True


def _declared_in(folder: Path, study: Study) -> str | None:
    """What `--study` must name for a lost study that looks like a part of a declared one; None for other studies.

    The study.json of another part names the declaration; the package's own ones are known by what they declare.
    """
    from ekd_lightning.studies.declaration import read_declaration, shipped  # noqa: PLC0415 (slow; rarely needed)

    rows, common = {row.name for row in study.rows}, _shared(study.common)
    for path in sorted(folder.parent.glob(f"*/{STUDY_FILE}")):
        with contextlib.suppress(UserError):
            other = read_study(path.parent)
            if other and other.declaration and common <= _shared(other.common):
                return other.declaration if other.declaration in shipped() else f"{other.declaration}.yaml"
    for name in shipped():
        declared = read_declaration(name)
        parts = [part for part in declared.parts if (part.name, (part.fraction,)) == (folder.name, study.fractions)]
        words = _shared(declared.overrides)
        keys = {key_of(word) for word in words}
        same = {word for word in common if key_of(word) in keys} <= words  # a row may have been given fewer
        if parts and rows <= {row.name for row in declared.rows} and same:
            return name
    return None


def _shared(common: Sequence[str]) -> set[str]:
    """The overrides that all parts of a declared study share and that affect results."""
    return {word for word in computing(common) if key_of(word) not in ("data", "recipe.epochs")}


def set_aside(folder: Path) -> None:
    """Renames a damaged study.json, which a new one will replace."""
    if (path := folder / STUDY_FILE).is_file():
        os.replace(path, path.with_name(f"{STUDY_FILE}.damaged"))


def _recovered(folder: Path) -> Study | None:
    """The study that the runs in a folder were planned for; None if no run has a record of its overrides."""
    rows: dict[str, tuple[str, ...]] = {}
    common: dict[str, dict[str, str]] = defaultdict(dict)
    fractions, seeds, runs = set[float](), set[int](), list[RunDirectory]()
    for path in sorted((folder / RUNS).glob("*")):  # none without such a folder
        named = re.fullmatch(r"(.+)-f([\d.e+-]+)-s(\d+)", path.name)
        words = RunDirectory(path).overrides() if named else []
        if named is None or not words:
            continue
        name, own, shared = named[1], *_split(words)
        if (first := rows.setdefault(name, check_row_words(path, name, own))) != own:
            raise UserError(f"{path}: was started with {' '.join(own)}, other runs of its row with {' '.join(first)}")
        common[name] |= {key_of(word): word for word in shared}
        fractions |= {*parse_numbers("--fractions", named[2])}
        seeds |= {*parse_numbers("--seeds", named[3])}
        runs.append(RunDirectory(path))
    if not runs:
        return None
    shared_words = {key: word for words in common.values() for key, word in words.items()}
    made = [_row(name, own, common[name], shared_words) for name, own in rows.items()]
    where = next((str(place) for run in runs if (place := run.provenance().get("working_directory"))), "")
    data = str(runs[0].section("data").get("name"))
    return Study(tuple(made), tuple(sorted(fractions)), tuple(sorted(seeds)), tuple(shared_words.values()), data, where)


def _split(words: Sequence[str]) -> tuple[tuple[str, ...], list[str]]:
    """A run's overrides as `Study.words` joins them, and a resumed run extends them: those of its row, and the others.

    Overrides of the row begin with its method and end before the share of the images.
    """
    keys = [key_of(word) for word in words]
    begin = keys.index("method") if "method" in keys else len(keys)
    end = keys.index("data.fraction", begin) if "data.fraction" in keys[begin:] else len(keys)
    others = [word for word in words[end:] if key_of(word) not in ("data.fraction", "seed")]
    return tuple(words[begin:end]), [*words[:begin], *others]


def _row(name: str, own: tuple[str, ...], words: Mapping[str, str], common: Mapping[str, str]) -> RowPlan:
    """A row; overrides of other rows that it was not given, and that no continuation may add, do not apply to it."""
    without = tuple(key for key, word in common.items() if key not in words and not may_be_given(word))
    match = {f"{method}_{by}": by for method in (*MATCHED, *POOLED.values()) for by in MATCHES}.get(name)
    return RowPlan(name, own, without, match=match)


def _as_declared(study: Study, declared: Declaration) -> Study:
    """A recovered part of a declared study: what no run records comes from the declaration."""
    known = {row.name: row for row in declared.rows}
    rows = [
        replace(row, seeds=known[row.name].seeds, decides=known[row.name].decides, match=known[row.name].match)
        if row.name in known
        else replace(row, seeds=study.seeds, decides=False)
        for row in study.rows
    ]
    return replace(study, rows=tuple(rows), declaration=declared.name)
