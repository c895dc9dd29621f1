"""Settings that `ekd-tune` found, as the rows of a study take them."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ekd_lightning.config.overrides import key_of
from ekd_lightning.errors import UserError
from ekd_lightning.files import read_yaml
from ekd_lightning.roles import Role
from ekd_lightning.runs.protocol import Protocol
from ekd_lightning.runs.words import check_words
from ekd_lightning.settings import purpose_of
from ekd_lightning.studies.study import RowPlan

log = logging.getLogger(__name__)

SCORED_ON = "validation images"
"""What searches choose settings by; results that were scored on anything else are refused."""


def read_tuned(path: Path) -> dict[str, Any]:
    """Content of `<method>.yaml`, its `overrides` checked.

    Raises:
        UserError: If the file is missing or of another form.
    """
    try:
        content = read_yaml(path)
    except FileNotFoundError as error:
        raise UserError(f"{path}: not a result of ekd-tune ({error.strerror})") from None
    words = content.get("overrides") if isinstance(content, dict) else None
    if not isinstance(words, list) or not all(isinstance(word, str) and "=" in word for word in words):
        raise UserError(f"{path}: must hold `overrides:`, a list of KEY=VALUE")
    for word in check_words(words, path):
        purpose = purpose_of(key_of(word))
        if purpose.role in (Role.LOCATION, Role.FREE) or purpose.between_parts:
            raise UserError(f"{path}: {word}: not a setting that ekd-tune searches")
    if content.get("scored_on", SCORED_ON) != SCORED_ON:
        raise UserError(
            f"{path}: was scored on {content['scored_on']}, not on {SCORED_ON}; settings that were chosen on the test "
            "set cannot be tested on it"
        )
    return dict(content)


def _is_shared(key: str) -> bool:
    """Whether all rows of a study must share a setting; a row may have its own weights, learning rate and the like."""
    own = key.startswith(("method.", "recipe.")) and key != "method.name"
    return not own or purpose_of(key).role is not Role.COMPUTED


def warn_of_other_budgets(output: Path, facts: dict[str, Any]) -> None:
    """Warns of results in the same folder that had another budget, protocol or seeds, so comparing them is unfair."""
    for path in sorted(output.glob("*.yaml")):
        if path.stem == facts["method"]:
            continue
        try:
            other = read_yaml(path)
            differ = [name for name in ("budget", "seeds", "validation_images") if other[name] != facts[name]]
            ours, theirs = (Protocol.of(found["protocol"]) for found in (facts, other))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
        # The subset's hash says which images there were; version 0.1 recorded a rounded fraction.
        differ += [name for name in ours.differences(theirs) if name != "fraction"]
        if differ:
            log.warning("%s was tuned with another %s; comparing the two would not be fair", path, ", ".join(differ))


def with_tuned(rows: Sequence[RowPlan], folder: Path, data: str = "", fractions: Sequence[float] = ()) -> list[RowPlan]:
    """The rows with the overrides of `folder/<row>.yaml` (key `overrides`) appended.

    A row with another network (`kd_mean@resnet14`, `kd_mean_macs`) that has no file of its own takes that of its
    method; a row without any file keeps its defaults. The log tells of both, and warns of a file that was tuned on
    another data set or fraction.

    Args:
        rows: The rows.
        folder: Folder of the files.
        data: Data set of the study.
        fractions: Fractions of the study.

    Raises:
        UserError: For a missing folder, a file of another form or method, or a setting that all rows must share.
    """
    if not folder.is_dir():
        raise UserError(f"--tuned {folder}: no such folder")
    return [_with_file(row, folder, data, fractions) for row in rows]


def _with_file(row: RowPlan, folder: Path, data: str, fractions: Sequence[float]) -> RowPlan:
    names = dict.fromkeys((f"{row.name}.yaml", f"{row.method}.yaml"))
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        log.warning("%s: no %s in %s, the method's defaults are used", row.name, " or ".join(names), folder)
        return row
    content = read_tuned(path)
    for word in content["overrides"]:
        if _is_shared(key_of(word)):
            raise UserError(f"{path}: {word}: all rows of a study must share this setting; give it on the command line")
    if content.get("method", row.method) not in (row.method, row.name):
        raise UserError(f"{path}: was tuned for the method {content['method']}; the row {row.name} uses {row.method}")
    if path.stem != row.name:
        log.info("%s: takes the settings of %s, which were tuned for another network", row.name, path.name)
    _warn_of_other_data(path, content.get("protocol"), data, fractions)
    return replace(row, overrides=(*row.overrides, *content["overrides"]))


def _warn_of_other_data(path: Path, protocol: Any, data: str, fractions: Sequence[float]) -> None:
    known = protocol if isinstance(protocol, dict) else {}
    if data and known.get("data", data) != data:
        log.warning("%s was tuned on %s; the study uses %s", path, known["data"], data)
    tuned_at = known.get("fraction")
    # A share of a data set whose size it does not divide is recorded rounded: 0.1002 of 1,437 images for 0.1.
    tuned_at = tuned_at if isinstance(tuned_at, float | int) else None
    others = [f"{f:g}" for f in fractions if tuned_at and not math.isclose(tuned_at, f, rel_tol=0.01)]
    if others:
        log.warning("%s was tuned at fraction %s; the study uses it at %s", path, tuned_at, ", ".join(others))
