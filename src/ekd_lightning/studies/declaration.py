"""Declared studies of conf/study: their form, and the study of each part."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from ekd_lightning.config.config import import_user_modules, to_settings
from ekd_lightning.config.overrides import is_under, key_of
from ekd_lightning.errors import UserError, unknown_name
from ekd_lightning.files import read_yaml
from ekd_lightning.roles import COUNT, COUNT_OR_NONE, SHARE, check_name, check_value, is_of, name_of_type
from ekd_lightning.runs.words import check_words, require_named_code
from ekd_lightning.studies.rows import make_row, match_overrides, match_student, matched_row, with_tuned
from ekd_lightning.studies.study import MATCHES, Composer, Study, check_row_words, parse_numbers

_FORM: dict[str, Any] = {
    "overrides": list[str],
    "least": dict[str, int],
    "parts": dict[str, dict[str, Any]],
    "decide": dict[str, Any],
    "others": dict[str, Any],
}
_OF_THE_STUDY = ("method", "data", "data.fraction", "data.per_class", "recipe.epochs", "seed", "resume")
"""Keys that a declared study sets itself, by its parts, rows, seeds and `least`."""


class Part(NamedTuple):
    """A part of a declared study, run as a study in its own folder: one data set, one share of its images, all rows."""

    name: str
    data: str
    fraction: float


class DeclaredRow(NamedTuple):
    """A row of a declared study: a method, with further overrides or with a plain student of equal cost."""

    name: str
    method: str
    words: tuple[str, ...]
    match: str | None
    seeds: tuple[int, ...]
    decides: bool


@dataclass(frozen=True)
class Declaration:
    """A declared study.

    Attributes:
        overrides: Overrides of all runs.
        steps: Least number of optimiser steps of a run.
        epochs: Least number of epochs of a run.
        parts: In the order in which they are run.
        rows: Deciding rows first.
        name: Name of the file, without its ending.
    """

    overrides: tuple[str, ...]
    steps: int
    epochs: int
    parts: tuple[Part, ...]
    rows: tuple[DeclaredRow, ...]
    name: str = ""

    def only(self, names: Sequence[str], seeds: Sequence[int]) -> Declaration:
        """The study with some of its parts, rows and seeds.

        Args:
            names: Parts and rows; without a part all parts are kept, without a row all rows.
            seeds: Seeds; all if empty.

        Raises:
            UserError: For a name that is neither a part nor a row, or if no seed is left.
        """
        parts, rows = {part.name: part for part in self.parts}, {row.name: row for row in self.rows}
        for name in names:
            if name not in parts and name not in rows:
                raise unknown_name("part or row", name, [*parts, *rows])
        kept = [row for row in self.rows if row.name in names] or self.rows
        known = sorted({seed for row in kept for seed in row.seeds})
        kept = [row._replace(seeds=tuple(s for s in row.seeds if not seeds or s in seeds)) for row in kept]
        if not any(row.seeds for row in kept):
            raise UserError(f"--seeds {','.join(map(str, seeds))}: the declared seeds are {','.join(map(str, known))}")
        left = [part for part in self.parts if part.name in names] or self.parts
        return replace(self, parts=tuple(left), rows=tuple(row for row in kept if row.seeds))

    def epochs_of(self, images: int, batch_size: int) -> int:
        """The fewest epochs with at least `steps` steps and `epochs` epochs; a smaller last batch is left out."""
        return max(self.epochs, math.ceil(self.steps / (images // batch_size)))


def read_declaration(name: str) -> Declaration:
    """Reads a declared study: a file of conf/study by its name, or a YAML file by its path.

    Raises:
        UserError: If there is no such file, its content has another form, or an override is not allowed in a study.
    """
    folder = Path(str(resources.files("ekd_lightning.conf"))) / "study"
    path = Path(name) if name.endswith(".yaml") else folder / f"{name}.yaml"
    if not path.is_file():
        if path.parent != folder:
            raise UserError(f"--study {name}: no such file")
        raise unknown_name("study", name, [one.stem for one in folder.glob("*.yaml")])
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: must be a mapping with the keys parts and decide (overrides, least, others)")
    _check_keys(path, content, _FORM, required=("parts", "decide"))
    least = {"steps": 0, "epochs": 1, **content.get("least", {})}
    _check_keys(f"{path}: least", least, {"steps": int, "epochs": int})
    check_value(f"{path}: least: steps", least["steps"], COUNT_OR_NONE)
    check_value(f"{path}: least: epochs", least["epochs"], COUNT)
    parts = [_read_part(f"{path}: parts: {part}", str(part), own) for part, own in content["parts"].items()]
    if not parts:
        raise UserError(f"{path}: parts: is empty; declare at least one part, NAME: {{data: ..., fraction: ...}}")
    common = check_common(content.get("overrides", ()), f"{path}: overrides")
    rows = [row for kind in ("decide", "others") for row in _read_rows(f"{path}: {kind}", content.get(kind), kind)]
    if twice := [name for name, count in Counter(row.name for row in rows).items() if count > 1]:
        raise UserError(f"{path}: the row {twice[0]} is declared twice")
    return Declaration(common, least["steps"], least["epochs"], tuple(parts), tuple(rows), path.stem)


def check_common(words: Sequence[str], where: object) -> tuple[str, ...]:
    """Checks overrides of a declared study; errors begin with `where` they stand.

    Raises:
        UserError: At the first word that is no override, or sets a key of `_OF_THE_STUDY`.
    """
    for word in (checked := tuple(check_words(words, where))):
        if key_of(word) in _OF_THE_STUDY:
            raise UserError(f"{where}: {word}: the study sets this itself, by its parts, rows, seeds or `least`")
    return checked


def _read_part(where: str, name: str, own: Mapping[str, Any]) -> Part:
    check_name(where, name)
    _check_keys(where, own, {"data": str, "fraction": float}, required=("data", "fraction"))
    check_value(f"{where}: fraction", own["fraction"], SHARE)
    return Part(name, own["data"], float(own["fraction"]))


def _read_rows(where: str, content: Mapping[str, Any] | None, kind: str) -> Iterable[DeclaredRow]:
    if content is None:
        return
    _check_keys(where, content, {"seeds": list[int], "rows": dict[str, Any]}, required=("seeds", "rows"))
    seeds = parse_numbers("--seeds", content["seeds"], f"{where}: seeds={content['seeds']}")
    if not content["rows"]:
        raise UserError(f"{where}: rows: is empty; declare at least one row, METHOD: {{}}")
    for name, own in content["rows"].items():
        if not isinstance(name, str) or not isinstance(own, dict):
            raise UserError(f"{where}: rows: {name}={own!r:.60}: must be METHOD: {{}} or NAME: {{method: METHOD, ...}}")
        _check_keys(f"{where}: {name}", own, {"method": str, "with": list[str], "match": str})
        if own.get("match", MATCHES[0]) not in MATCHES:
            raise UserError(f"{where}: {name}: match={own['match']}: must be {' or '.join(MATCHES)}")
        words = check_common(check_row_words(where, name, own.get("with", ())), f"{where}: {name}")
        if chosen := [word for word in words if own.get("match") and is_under(key_of(word), ("student",))]:
            raise UserError(f"{where}: {name}: {chosen[0]}: cannot be combined with match, which chooses the student")
        yield DeclaredRow(name, own.get("method", name), words, own.get("match"), seeds, kind == "decide")


def _check_keys(
    where: object, content: Mapping[str, Any], form: Mapping[str, Any], required: Sequence[str] = ()
) -> None:
    for key, value in content.items():
        if key not in form:
            raise UserError(f"{where}: {unknown_name('key', key, form)}")
        if not is_of(value, form[key]):
            raise UserError(f"{where}: {key}={value!r:.60}: must be {name_of_type(form[key])}")
    if missing := [key for key in required if key not in content]:
        raise UserError(f"{where}: the key {missing[0]} is missing")


def study_of(
    declared: Declaration,
    part: Part,
    words: Sequence[str],
    old: Study | None,
    composer: Composer,
    tuned: Path | None = None,
) -> Study:
    """The study of one part, to be joined with `old`, the one in its folder, whose plain students of equal cost stay.

    Raises:
        UserError: For unknown names, settings that do not fit, or another version of the declaration in the folder.
    """
    from ekd_lightning.pipeline.prepare import prepare_data  # noqa: PLC0415 (slow; --help needs none)

    given = (*declared.overrides, *check_common(words, "the command"))
    if old is not None:
        require_declared(old, declared, part)
        require_named_code([*old.common, *(word for row in old.rows for word in row.overrides)], given, "the study")
    common = (f"data={part.data}", *given)
    settings = to_settings(composer(overrides=[*common, f"data.fraction={part.fraction:g}"]))
    settings.check()
    import_user_modules(settings.imports)
    images = len(prepare_data(settings)[1].train_index)
    if images < settings.recipe.batch_size:
        batch = settings.recipe.batch_size
        raise UserError(f"part {part.name}: {images} training images are fewer than recipe.batch_size={batch}")
    common = (*common, f"recipe.epochs={declared.epochs_of(images, settings.recipe.batch_size)}")
    known = {row.name: row for row in old.rows} if old else {}
    matches: dict[str, tuple[str, ...]] = {}
    rows = []
    for row in declared.rows:
        made = make_row(row.method, composer, common)
        if row.match:
            before = known[row.name].overrides if row.name in known else ()
            network = tuple(word for word in before if is_under(key_of(word), ("student",)))
            if not network and row.match not in matches:  # a study keeps the network that was found first
                match = match_student(row.match, composer(overrides=common))
                matches[row.match] = match_overrides(match, common, composer)
            network = network or matches[row.match]
            made = matched_row(row.name, made, row.match, network)
        overrides = (*made.overrides, *row.words)
        rows.append(replace(made, name=row.name, overrides=overrides, seeds=row.seeds, decides=row.decides))
    seeds = sorted({seed for row in rows for seed in row.seeds or ()})
    data, fractions = settings.data.name, (part.fraction,)
    if tuned is not None:
        rows = with_tuned(rows, tuned, composer, data, fractions)
    return Study(tuple(rows), fractions, tuple(seeds), common, data, str(Path.cwd()), declared.name)


def require_declared(old: Study, declared: Declaration, part: Part) -> None:
    """Refuses a part's study that was begun with another version of the declaration."""
    if part.fraction not in old.fractions:
        shares = ", ".join(f"{fraction:g}" for fraction in old.fractions)
        raise UserError(
            f"part {part.name}: the study in this folder has fraction={shares}, the declaration now "
            f"fraction={part.fraction:g}; use another --output"
        )
    known = {row.name: row for row in old.rows}
    for row in declared.rows:
        if (before := known.get(row.name)) is None:
            continue
        was = {"method": before.method, "match": before.match or row.match, "decides": before.decides}
        now = {"method": row.method.partition("@")[0], "match": row.match, "decides": row.decides}
        if key := next((key for key in was if was[key] != now[key]), None):
            raise UserError(
                f"part {part.name}: row {row.name}: the study in this folder has {key}={was[key]}, the declaration "
                f"now {key}={now[key]}; use another --output"
            )
