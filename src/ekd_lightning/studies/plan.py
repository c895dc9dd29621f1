"""What `ekd-compare` is asked for: rows × fractions × seeds, written down in study.json."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ekd_lightning.errors import UserError
from ekd_lightning.files import write_json

STUDY_FILE = "study.json"
LOCK_FILE = ".lock"

# Common settings that say how a run is carried out or where things lie, not what it computes.
FREE = (
    "resume",
    "evaluation",
    "trainer.enable_progress_bar",
    "logger",
    "tags",
    "metric",
    "data.root",
    "data.download",
    "teachers.weights_dir",
    "teachers.download",
    "teachers.store",
)


@dataclass(frozen=True)
class RowPlan:
    """One row of the study.

    Attributes:
        name: A method, `method@network`, or `kd_mean_macs` and the like.
        overrides: What the row adds to the common overrides, for ekd-train; `method=...` comes first.
        without: Keys of common overrides that do not apply to the row.
    """

    name: str
    overrides: tuple[str, ...]
    without: tuple[str, ...] = ()

    @property
    def method(self) -> str:
        """The method's name in conf/method."""
        return self.overrides[0].removeprefix("method=")

    @property
    def settings(self) -> str:
        """What the row changes of its method's defaults, as overrides; empty for nothing."""
        return " ".join(self.overrides[1:])


@dataclass(frozen=True)
class Study:
    """Everything that determines the runs of a study.

    Attributes:
        rows: By order.
        fractions: Shares of the training images in (0, 1].
        seeds: Not negative.
        common: Overrides of all rows.
        data: Name of the data set.
    """

    rows: tuple[RowPlan, ...]
    fractions: tuple[float, ...]
    seeds: tuple[int, ...]
    common: tuple[str, ...] = field(default=())
    data: str = ""

    def words(self, row: RowPlan, fraction: float, seed: int) -> list[str]:
        """The overrides of one run, as for ekd-train."""
        common = [word for word in self.common if not is_under(key_of(word), row.without)]
        return [*common, *row.overrides, f"data.fraction={fraction:g}", f"seed={seed}"]


def key_of(word: str) -> str:
    """The key of an override: `student.options` of `+student.options={width: 0.5}`."""
    return word.split("=", 1)[0].lstrip("+~").split("@", 1)[0]


def is_under(key: str, prefixes: Iterable[str]) -> bool:
    """Whether a dotted key is one of the prefixes or lies below one."""
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)


def split_overrides(words: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Separates overrides of the runs from those of Hydra, which say how runs are launched.

    Raises:
        UserError: For a word that is no override, or that sets what the study itself varies.
    """
    hydra = tuple(word for word in words if key_of(word).startswith(("hydra.", "hydra/")))
    common = tuple(word for word in words if word not in hydra)
    for word in common:
        if "=" not in word and not word.startswith("~"):
            raise UserError(f"{word}: not an override (KEY=VALUE), nor an option of ekd-compare")
        owner = {"method": "--methods", "seed": "--seeds", "data.fraction": "--fractions"}.get(key_of(word))
        if owner:
            raise UserError(f"{word}: a study varies it, give it with {owner}")
        if key_of(word) in ("data.per_class", "resume"):
            raise UserError(f"{word}: cannot be set in a study")
    return common, hydra


def parse_seeds(text: str) -> tuple[int, ...]:
    """Reads `0,1,2`.

    Raises:
        UserError: For anything but different whole numbers that are not negative.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words) or len({int(word) for word in words}) < len(words):
        raise UserError(f"--seeds {text}: give different whole numbers from 0 on, e.g. 0,1,2")
    return tuple(int(word) for word in words)


def parse_fractions(text: str) -> tuple[float, ...]:
    """Reads `0.05,0.1`.

    Raises:
        UserError: For anything but different numbers in (0, 1].
    """
    try:
        values = tuple(float(word) for word in text.split(","))
    except ValueError:
        values = ()
    short = {f"{value:g}" for value in values}  # as directories are named
    if not values or not all(0 < value <= 1 for value in values) or len(short) < len(values):
        raise UserError(f"--fractions {text}: give different shares in (0, 1], e.g. 0.05,0.1")
    return values


def write_study(study: Study, folder: Path) -> None:
    """Writes study.json."""
    rows = {row.name: {"overrides": list(row.overrides), "without": list(row.without)} for row in study.rows}
    content = {"rows": rows, "fractions": list(study.fractions), "seeds": list(study.seeds)}
    write_json(folder / STUDY_FILE, {**content, "common": list(study.common), "data": study.data})


def read_study(folder: Path) -> Study | None:
    """Reads study.json; None if the folder is new or empty.

    Raises:
        UserError: If the folder holds something else, or the file is damaged.
    """
    path = folder / STUDY_FILE
    if not path.is_file():
        if folder.exists() and not (folder.is_dir() and _is_empty(folder)):
            raise UserError(f"--output {folder}: not a study (it has no {STUDY_FILE}) and not empty")
        return None
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        rows = tuple(
            RowPlan(name, tuple(row["overrides"]), tuple(row["without"]))
            for name, row in content["rows"].items()
        )
        fractions, seeds = tuple(content["fractions"]), tuple(content["seeds"])
        return Study(rows, fractions, seeds, tuple(content["common"]), str(content["data"]))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: damaged") from None


def continued(old: Study, words: tuple[str, ...]) -> tuple[str, ...]:
    """The common overrides of a study that is called again: its own, where only places and the like are given."""
    if not all(is_under(key_of(word), FREE) for word in words):
        return words
    given = {key_of(word) for word in words}
    return (*(word for word in old.common if key_of(word) not in given), *words)


def _is_empty(folder: Path) -> bool:
    return all(path.name == LOCK_FILE for path in folder.iterdir())


def union(old: Study, new: Study) -> Study:
    """The study with further rows, fractions and seeds.

    Raises:
        UserError: If the common overrides differ, or a row is asked for in another way than before.
    """
    ours, theirs = (
        [word for word in study.common if not is_under(key_of(word), FREE)] for study in (new, old)
    )
    if sorted(ours) != sorted(theirs):
        different = sorted({key_of(word) for word in set(ours) ^ set(theirs)})
        raise UserError(
            f"{', '.join(different)}: the study has common overrides {' '.join(theirs) or '(none)'}; "
            "other ones need another --output"
        )
    rows = {row.name: row for row in old.rows}
    for row in new.rows:
        before = rows.setdefault(row.name, row)
        if before.overrides != row.overrides:
            raise UserError(
                f"row {row.name}: the study has it with {' '.join(before.overrides)}, "
                f"now it is {' '.join(row.overrides)}; another --output, please"
            )
    return Study(
        tuple(rows.values()),
        tuple(sorted({*old.fractions, *new.fractions})),
        tuple(sorted({*old.seeds, *new.seeds})),
        new.common,
        new.data,
    )
