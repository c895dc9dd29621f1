"""Rows of a study: the requested ones, the usual controls, plain students of equal cost, and tuned settings."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from ekd_lightning.config import internals
from ekd_lightning.config.config import to_settings
from ekd_lightning.config.overrides import is_under, key_of, override
from ekd_lightning.errors import UserError, unknown_name
from ekd_lightning.files import read_yaml
from ekd_lightning.keys import purpose_of
from ekd_lightning.reporting.blocks import SUBJECTS
from ekd_lightning.roles import Role
from ekd_lightning.runs.protocol import Protocol
from ekd_lightning.runs.words import check_words
from ekd_lightning.studies.study import Composer, RowPlan, Study, check_row_words

if TYPE_CHECKING:
    from ekd_lightning.networks.registry import Match

log = logging.getLogger(__name__)

CONTROLS = ("ce", "branched_ce", "kd_mean", "kd_mean_maps", "ekd_mean")
CONTROLS_WITHOUT_LABELS = ("pseudo_labels", *CONTROLS[2:])
"""The controls with unlabelled images, which methods on labels alone cannot use."""
MATCHED = ("kd_mean", "kd_mean_maps")
"""Methods that get a row with a plain student of the branched student's cost."""
POOLED = {"kd_mean_maps": "kd_mean_feature"}
"""What takes the place of a control beside `ekd_pooled`, which imitates other features than `ekd`."""
_BRANCHING = tuple(
    f"student.{name}" for name in ("branches", "split_after", "branch_width", "branch_gradients", "ensemble")
)
_NETWORK = ("student.network", "student.options")
SCORED_ON = "validation images"
"""What searches choose settings by; results that were scored on anything else are refused."""


def plan_rows(
    methods: str, matches: Sequence[str], controls: bool, common: Sequence[str], old: Study | None, compose: Composer
) -> list[RowPlan]:
    """The rows of `--methods`, then the controls of the first branched one, then plain students of its cost.

    Declared rows and plain students of equal cost that `old` has are kept.

    Raises:
        UserError: For an unknown method or network, or if `methods` is empty or names a row twice.
    """
    names = [word.strip() for word in methods.split(",") if word.strip()]
    if not names or len(set(names)) < len(names):
        raise UserError(f"--methods {methods}: must name different rows, e.g. ce,kd_mean,ekd")
    for name in names:
        check_row_words("--methods", name, ())
    recorded = {row.name: row for row in old.rows} if old else {}
    declared = recorded if old and old.declaration else {}
    rows = [declared.get(name) or make_row(name, compose, common) for name in names]
    subject = _subject(rows, common, compose)
    beside = POOLED if subject is not None and subject.method == "ekd_pooled" else {}
    unlabelled = compose(overrides=common).data.unlabelled is not None
    usual = [beside.get(name, name) for name in (CONTROLS_WITHOUT_LABELS if unlabelled else CONTROLS)]
    extra = [name for name in usual if controls and name not in names]
    if extra:
        log.info("added as controls: %s (--no-controls leaves them out)", ", ".join(extra))
    for name in extra:
        rows.append(declared.get(name) or _with_split(make_row(name, compose, common), subject, common, compose))
    for by in matches:
        matched = {f"{method}_{by}": method for method in (beside.get(name, name) for name in MATCHED)}
        rows += [declared[name] for name in matched if name in declared]
        new = {name: method for name, method in matched.items() if name not in recorded}
        if new:  # a study keeps the network that was found first
            cfg = compose(overrides=_words(subject, common))
            match = match_student(by, cfg)
            log.info("%s: %s", ", ".join(new), match)
            if match.network == cfg.student.network and match.options == dict(cfg.student.options or {}):
                log.info("%s: left out, because the match is the student's own network unchanged", ", ".join(new))
                continue
            network = match_overrides(match, common, compose)
            rows += [matched_row(name, make_row(method, compose, common), by, network) for name, method in new.items()]
    return rows


def _words(row: RowPlan | None, common: Sequence[str]) -> list[str]:
    """The overrides of a row's runs but for seed and share; the common ones without a row."""
    return [*common] if row is None else [*row.applied(common), *row.overrides]


def _subject(rows: Sequence[RowPlan], common: Sequence[str], compose: Composer) -> RowPlan | None:
    """The row that controls are for: the first branched one, of EKD if there is any; None if all are plain."""
    branched = [row for row in rows if compose(overrides=_words(row, common)).student.branches > 1]
    return next((row for row in branched if row.method in SUBJECTS), next(iter(branched), None))


def _with_split(row: RowPlan, subject: RowPlan | None, common: Sequence[str], compose: Composer) -> RowPlan:
    """A control with the split of the row that it is compared with, if it is branched and has another one."""
    student, theirs = (compose(overrides=_words(one, common)).student for one in (row, subject))
    if student.branches == 1 or student.split_after == theirs.split_after:
        return row
    return replace(row, overrides=(*row.overrides, f"student.split_after={theirs.split_after}"))


def make_row(name: str, compose: Composer, common: Sequence[str] = ()) -> RowPlan:
    """Makes a row of `method` or `method@network`.

    Branching that a method's file sets belongs to the method (one branch, ONE's gate, the split of a Hydra): common
    overrides of it do not apply to the row. Neither do settings of terms that the method does not have, which would
    make it another method, and options of the common network in a row with another one. The log names what does not
    apply.

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
    plain = compose(overrides=[f"method={method}"])
    if plain.student.branches == 1:
        own = _BRANCHING
    elif kept := [word for word in common if is_under(key_of(word), own)]:
        log.info("%s sets its own branching, so %s does not apply to it", name, " ".join(kept))
    if lacking := _of_other_terms(common, [f"method={method}"], compose):
        log.info("%s has no such term, so %s does not apply to it", name, " ".join(lacking))
    own += tuple(dict.fromkeys(key_of(word) for word in lacking))
    if not at:
        return RowPlan(name, (f"method={method}",), own)
    chosen = (f"student.network={network}", *_reset_options(common, compose))
    return RowPlan(name, (f"method={method}", *chosen), (*own, *_NETWORK))


def _of_other_terms(words: Sequence[str], own: Sequence[str], compose: Composer) -> list[str]:
    """The overrides among `words` that set a value of a term which the method of the overrides `own` lacks."""
    keys = {word: key_of(word).split(".") for word in words if is_under(key_of(word), ("method.terms",))}
    terms = compose(overrides=own).method.terms if keys else {}
    return [word for word, key in keys.items() if len(key) > 3 and key[2] not in terms]


def _reset_options(common: Sequence[str], compose: Composer) -> list[str]:
    """The overrides that remove options of the common network which a file sets; those of overrides do not apply."""
    files = [word for word in common if not is_under(key_of(word), _NETWORK)]
    return [f"~student.options.{key}" for key in compose(overrides=files).student.options]


def match_student(by: str, cfg: DictConfig) -> Match:
    """The plain network whose `macs` or `parameters` are nearest to those of the study's student."""
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


def match_overrides(match: Match, common: Sequence[str], compose: Composer) -> tuple[str, ...]:
    """The overrides that choose the matched network in place of that of the common overrides."""
    options = (override(f"++student.options.{key}", value) for key, value in match.options.items())
    return f"student.network={match.network}", *_reset_options(common, compose), *options


def matched_row(name: str, row: RowPlan, by: str, network: Sequence[str]) -> RowPlan:
    """A row of its own name with the plain student of equal cost, which the overrides `network` choose."""
    without = (*row.without, *_NETWORK)
    return replace(row, name=name, overrides=(*row.overrides, *network), without=without, match=by)


def read_tuned(path: Path) -> dict[str, Any]:
    """Content of `<method>.yaml`, its `overrides` checked.

    Raises:
        UserError: If the file is missing or of another form.
    """
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name a method's file in it, e.g. {path / 'ekd.yaml'}")
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


def with_tuned(
    rows: Sequence[RowPlan], folder: Path, compose: Composer, data: str = "", fractions: Sequence[float] = ()
) -> list[RowPlan]:
    """The rows with the overrides of `folder/<row>.yaml` (key `overrides`) appended.

    A row with another network (`kd_mean@resnet14`, `kd_mean_macs`) that has no file of its own takes that of its
    method; a row without any file keeps its defaults. The log tells of both, and warns of a file that was tuned on
    another data set or fraction, or that sets a term which the method does not have.

    Raises:
        UserError: For a missing folder, a file of another form or method, or a setting that all rows must share.
    """
    if not folder.is_dir():
        raise UserError(f"--tuned {folder}: no such folder")
    return [_with_file(row, folder, compose, data, fractions) for row in rows]


def _with_file(row: RowPlan, folder: Path, compose: Composer, data: str, fractions: Sequence[float]) -> RowPlan:
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
    own = [word for word in row.overrides if is_under(key_of(word), ("method",))]
    if foreign := _of_other_terms(content["overrides"], own, compose):
        log.warning("%s: %s has no such term, so %s adds one", path, row.method, " ".join(foreign))
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
