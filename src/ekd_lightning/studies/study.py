"""Study of rows × fractions × seeds, which `ekd-compare` writes to study.json."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from ekd_lightning.config import internals
from ekd_lightning.config.config import to_settings
from ekd_lightning.config.overrides import computing, is_hydras, is_under, key_of, may_be_given, override
from ekd_lightning.errors import UserError, unknown_name
from ekd_lightning.files import read_json, write_json
from ekd_lightning.runs.directory import FORMAT, require_format
from ekd_lightning.runs.lock import LOCK_FILE
from ekd_lightning.runs.words import check_words

if TYPE_CHECKING:
    from ekd_lightning.networks.registry import Match

log = logging.getLogger(__name__)

STUDY_FILE = "study.json"
CONTROLS = ("ce", "branched_ce", "kd_mean", "kd_mean_feature", "ekd_mean")
CONTROLS_WITHOUT_LABELS = ("pseudo_labels", *CONTROLS[2:])
"""The controls with unlabelled images, which methods on labels alone cannot use."""
MATCHED = ("kd_mean", "kd_mean_feature")
"""Methods that get a row with a plain student of the branched student's cost."""
MATCHES = ("macs", "parameters")
_BRANCHING = ("student.branches", "student.split_after", "student.branch_width", "student.ensemble")
Composer = Callable[..., DictConfig]
"""Composes `overrides` into a configuration, as Hydra's `compose` does."""


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
    def every(self) -> Iterator[tuple[RowPlan, float, int]]:
        """All runs as (row, fraction, seed), seed by seed."""
        for fraction in self.fractions:
            for seed in self.seeds:
                for row in self.rows:
                    if seed in self.seeds_of(row):
                        yield row, fraction, seed

    def seeds_of(self, row: RowPlan) -> tuple[int, ...]:
        """The seeds of a row."""
        return self.seeds if row.seeds is None else row.seeds

    @property
    def deciding(self) -> frozenset[str]:
        """Names of the deciding rows."""
        return frozenset(row.name for row in self.rows if row.decides)

    def words(self, row: RowPlan, fraction: float, seed: int) -> list[str]:
        """The overrides of one run, as for ekd-train."""
        common = [word for word in self.common if not is_under(key_of(word), row.without)]
        return [*common, *row.overrides, f"data.fraction={fraction:g}", f"seed={seed}"]


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


def parse_numbers(option: str, text: str) -> tuple[Any, ...]:
    """Reads `0,1,2` for `--seeds`, or `0.05,0.1` for `--fractions`.

    Raises:
        UserError: For anything but different numbers in the option's range.
    """
    read, fits, allowed = _NUMBERS[option]
    try:
        values = [read(word) for word in text.split(",")]
    except ValueError:
        values = []
    different = {value if isinstance(value, int) else f"{value:g}" for value in values}  # as directories are named
    if not values or not all(map(fits, values)) or len(different) < len(values):
        raise UserError(f"{option} {text}: give different {allowed}")
    return tuple(values)


def write_study(study: Study, folder: Path) -> None:
    """Writes study.json."""
    rows = {row.name: _row_record(row) for row in study.rows}
    content = {"rows": rows, "fractions": list(study.fractions), "seeds": list(study.seeds)}
    content |= {"common": list(study.common), "data": study.data}
    content |= {"declaration": study.declaration} if study.declaration else {}
    write_json(folder / STUDY_FILE, {**content, "working_directory": study.working_directory, "format": FORMAT})


def _row_record(row: RowPlan) -> dict[str, Any]:
    made: dict[str, Any] = {"overrides": list(row.overrides), "without": list(row.without)}
    if row.seeds is not None:
        made["seeds"] = list(row.seeds)
    if row.match is not None:
        made["match"] = row.match
    return made if row.decides else {**made, "decides": False}


def read_study(folder: Path) -> Study | None:
    """Reads study.json; None if the folder is new or empty.

    Raises:
        UserError: If the folder holds something else; or if the file is damaged, of another version, or holds
            overrides that no study may have.
    """
    path = folder / STUDY_FILE
    if not path.is_file():
        if folder.exists() and not (folder.is_dir() and _is_empty(folder)):
            raise UserError(f"--output {folder}: not a study (it has no {STUDY_FILE}) and not empty")
        return None
    try:
        content = read_json(path)
        require_format(path, content)
        rows = tuple(_read_row(path, name, row) for name, row in content["rows"].items())
        fractions, seeds = (_read_numbers(path, name, content[name]) for name in ("fractions", "seeds"))
        common, where = tuple(content["common"]), str(content.get("working_directory", ""))
        declaration = str(content.get("declaration", ""))
        study = Study(rows, fractions, seeds, common, str(content["data"]), where, declaration)
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: damaged") from None
    check_words(common, path)
    return study


def _read_row(path: Path, name: str, row: Mapping[str, Any]) -> RowPlan:
    """Reads a row from study.json."""
    words = check_row_words(path, name, row["overrides"])
    if not words or not words[0].startswith("method="):
        raise UserError(f"{path}: damaged (a row {name!r})")
    match = row.get("match")
    if match not in (None, *MATCHES):
        raise UserError(f"{path}: damaged (match {match!r})")
    seeds = _read_numbers(path, "seeds", row["seeds"]) if "seeds" in row else None
    return RowPlan(name, words, tuple(row["without"]), seeds, bool(row.get("decides", True)), match)


def check_row_words(where: object, name: str, words: Sequence[str]) -> tuple[str, ...]:
    """Checks a row's overrides, which may set its method, student and recipe only, and its name, which is in paths.

    Args:
        where: The file that holds the row, for error messages.
        name: Name of the row.
        words: Its overrides.

    Raises:
        UserError: For an impossible name, or at the first override that sets anything else.
    """
    if not re.fullmatch(r"\w[\w.+@-]*", name):
        raise UserError(f"{where}: row {name!r}: folders are named after it; use letters, digits and . + @ _ - only")
    for word in (checked := tuple(check_words(words, where))):
        if not is_under(key_of(word), ("method", "student", "recipe")):
            raise UserError(f"{where}: {word}: the row {name} may set only its method, student and recipe")
    return checked


def _read_numbers(path: Path, name: str, values: Sequence[object]) -> tuple[Any, ...]:
    try:
        return parse_numbers(f"--{name}", ",".join(map(str, values)))
    except UserError as error:
        raise UserError(f"{path}: damaged ({error})") from None


def continued(old: Study, words: tuple[str, ...]) -> tuple[str, ...]:
    """The common overrides of a continued study: the recorded ones and the given ones, if these may change.

    If another setting is given, the given overrides alone; `union` then compares them with the recorded ones.
    """
    if not all(may_be_given(word) for word in words):
        return words
    given = {key_of(word) for word in words}
    return (*(word for word in old.common if key_of(word) not in given), *words)


def _is_empty(folder: Path) -> bool:
    return all(path.name == LOCK_FILE for path in folder.iterdir())


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
    return Study(
        tuple(rows.values()),
        tuple(sorted({*old.fractions, *new.fractions})),
        tuple(sorted({*old.seeds, *new.seeds})),
        new.common,
        new.data,
        old.working_directory or new.working_directory,
        new.declaration or old.declaration,
    )


def plan_rows(
    methods: str, matches: Sequence[str], controls: bool, common: Sequence[str], old: Study | None, compose: Composer
) -> list[RowPlan]:
    """The rows of `--methods`, then the controls, then plain students of equal cost.

    Args:
        methods: E.g. `ce,ekd,kd_mean@resnet14`.
        matches: Those of `MATCHES` by which plain students of equal cost are added.
        controls: Whether `CONTROLS`, or `CONTROLS_WITHOUT_LABELS`, are added.
        common: Overrides of all rows.
        old: The study so far, whose students of equal cost are kept; None if it is new.
        compose: Composes overrides, inside an initialised Hydra.

    Raises:
        UserError: For an unknown method or network, or if `methods` is empty or names a row twice.
    """
    names = [word.strip() for word in methods.split(",") if word.strip()]
    if not names or len(set(names)) < len(names):
        raise UserError(f"--methods {methods}: must name different rows, e.g. ce,kd_mean,ekd")
    unlabelled = compose(overrides=common).data.unlabelled is not None
    usual = CONTROLS_WITHOUT_LABELS if unlabelled else CONTROLS
    extra = [name for name in usual if controls and name not in names]
    if extra:
        log.info("added as controls: %s (--no-controls leaves them out)", ", ".join(extra))
    rows = [make_row(name, compose, common) for name in [*names, *extra]]
    recorded = {row.name for row in old.rows} if old else set()
    for by in matches:
        matched = {f"{method}_{by}": method for method in MATCHED}
        new = {name: method for name, method in matched.items() if name not in recorded}
        if new:  # a study keeps the network that was found first
            cfg = compose(overrides=common)
            match = match_student(by, cfg)
            log.info("%s: %s", ", ".join(new), match)
            if match.network == cfg.student.network and match.options == dict(cfg.student.options or {}):
                log.warning("%s: left out, because the match is the student's own network unchanged", ", ".join(new))
                continue
            network = match_overrides(match)
            rows += [matched_row(name, make_row(method, compose), by, network) for name, method in new.items()]
    return rows


def make_row(name: str, compose: Composer, common: Sequence[str] = ()) -> RowPlan:
    """Makes a row of `method` or `method@network`.

    Branching that a method's file sets belongs to the method (one branch, ONE's gate, the split of a Hydra): common
    overrides of it do not apply to the row. Options of the common network do not apply to a row with another network.

    Args:
        name: The row, `method` or `method@network`.
        compose: Composes overrides, inside an initialised Hydra.
        common: Overrides of all rows; the log names those that do not apply to a branched method.

    Raises:
        UserError: For an unknown method or network, with the nearest match.
    """
    from ekd_lightning.networks.registry import require_network  # noqa: PLC0415 (slow; --help needs none)

    method, at, network = name.partition("@")
    methods = internals.options_of("method")
    if method not in methods:
        raise unknown_name("method", method, methods)
    if at:
        require_network(network)
    set_by = internals.keys_set_by(f"method/{method}", "student")
    own = tuple(key for key in _BRANCHING if key in set_by)
    if compose(overrides=[f"method={method}"]).student.branches == 1:
        own = _BRANCHING
    elif kept := [word for word in common if is_under(key_of(word), own)]:
        log.info("%s sets its own branching, so %s does not apply to it", name, " ".join(kept))
    if not at:
        return RowPlan(name, (f"method={method}",), own)
    return RowPlan(
        name, (f"method={method}", f"student.network={network}"), (*own, "student.network", "student.options")
    )


def match_student(by: str, cfg: DictConfig) -> Match:
    """The plain network whose MACs or parameters are nearest to those of the study's student.

    Args:
        by: `macs` or `parameters`.
        cfg: Composed configuration with the study's student.
    """
    from ekd_lightning.data import open_dataset  # noqa: PLC0415 (slow; --help needs none)
    from ekd_lightning.evaluation.efficiency import count_macs, count_parameters  # noqa: PLC0415
    from ekd_lightning.networks.registry import CLOSE, match_network  # noqa: PLC0415
    from ekd_lightning.pipeline.prepare import build_student  # noqa: PLC0415

    settings = to_settings(cfg)
    dataset = open_dataset(settings.data)
    student = build_student(settings, dataset)
    cost = partial(count_macs, image_size=dataset.image_size) if by == "macs" else count_parameters
    match = match_network(student.spec, cost(student), cost)
    if abs(match.off) > CLOSE:
        log.warning("no plain %s has the %s of the study's student; the nearest is %s", student.spec.name, by, match)
    return match


def match_overrides(match: Match) -> tuple[str, ...]:
    """The overrides that choose the matched network."""
    options = (override(f"++student.options.{key}", value) for key, value in match.options.items())
    return f"student.network={match.network}", *options


def matched_row(name: str, row: RowPlan, by: str, network: Sequence[str]) -> RowPlan:
    """A row with the plain student of equal cost.

    Args:
        name: Name of the new row.
        row: The row of its method, without the match.
        by: One of `MATCHES`.
        network: Overrides that choose the student.
    """
    without = (*row.without, "student.network", "student.options")
    return replace(row, name=name, overrides=(*row.overrides, *network), without=without, match=by)
