"""The rows of a study: what is asked for, the controls, students of equal cost."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from omegaconf import DictConfig

from ekd_lightning.config.config import to_settings
from ekd_lightning.errors import UserError, unknown_name
from ekd_lightning.studies.plan import RowPlan, Study, is_under, key_of

if TYPE_CHECKING:
    from ekd_lightning.networks.matching import Match

log = logging.getLogger(__name__)

CONTROLS = ("ce", "branched_ce", "kd_mean", "kd_mean_feature", "ekd_mean")
MATCHED = ("kd_mean", "kd_mean_feature")
"""Methods whose plain students are given the cost of the branched one."""
MATCHES = ("macs", "parameters")
_BRANCHING = ("student.branches", "student.split_after", "student.ensemble")

Composer = Callable[..., DictConfig]


def parse_matches(text: str) -> tuple[str, ...]:
    """Reads `macs,parameters` or `none`.

    Raises:
        UserError: For another word.
    """
    if text == "none":
        return ()
    words = tuple(dict.fromkeys(text.split(",")))
    for word in words:
        if word not in MATCHES:
            raise unknown_name("--match", word, (*MATCHES, "none"))
    return words


def plan_rows(
    methods: str,
    matches: Sequence[str],
    controls: bool,
    common: Sequence[str],
    old: Study | None,
    compose: Composer,
) -> list[RowPlan]:
    """The rows that were asked for, then the controls, then the students of equal cost.

    Args:
        methods: `ce,ekd,kd_mean@resnet14`.
        matches: Of `MATCHES`, by what plain students are given the cost of the study's branched one.
        controls: Whether `CONTROLS` are added.
        common: Overrides of all rows.
        old: The study so far: students of equal cost that it has are kept.
        compose: Composes overrides, inside an initialised Hydra.

    Raises:
        UserError: For an unknown method or network, or none.
    """
    asked = list(dict.fromkeys(word.strip() for word in methods.split(",") if word.strip()))
    if not asked:
        raise UserError("--methods: which rows? e.g. --methods ce,kd_mean,ekd")
    extra = [name for name in CONTROLS if controls and name not in asked]
    if extra:
        log.info("added as controls: %s (--no-controls leaves them out)", ", ".join(extra))
    rows = [make_row(name, compose, common) for name in [*asked, *extra]]
    recorded = {row.name for row in old.rows} if old else set()
    for by in matches:
        names = {f"{method}_{by}": method for method in MATCHED}
        new = {name: method for name, method in names.items() if name not in recorded}
        if new:  # once found, a study keeps it
            match = match_student(by, compose(overrides=common))
            log.info("%s: %s", ", ".join(new), match)
            rows += [_matched(name, make_row(method, compose), match) for name, method in new.items()]
    return rows


def make_row(name: str, compose: Composer, common: Sequence[str] = ()) -> RowPlan:
    """Makes a row of `method` or `method@network`.

    What a method's file says of the student's branching belongs to the method (one branch, ONE's gate, the place where
    a Hydra splits): common overrides of it do not apply. A row with a network of its own does not get the options of
    the common one.

    Args:
        name: The row.
        compose: Composes overrides, inside an initialised Hydra.
        common: Overrides of all rows; of those that do not reach a branched method the log tells.

    Raises:
        UserError: For an unknown method or network, with the nearest match.
    """
    from ekd_lightning.networks import network_names  # noqa: PLC0415 (slow; --help needs none)

    method, at, network = name.partition("@")
    methods = GlobalHydra.instance().config_loader().get_group_options("method", ObjectType.CONFIG)
    if method not in methods:
        raise unknown_name("method", method, methods)
    if at and network not in network_names():
        raise unknown_name("network", network, network_names())
    own = _student_keys(method)
    if compose(overrides=[f"method={method}"]).student.branches == 1:
        own = _BRANCHING
    elif kept := [word for word in common if is_under(key_of(word), own)]:
        log.info("%s has its own branching: %s does not reach it", name, " ".join(kept))
    if not at:
        return RowPlan(name, (f"method={method}",), own)
    return RowPlan(
        name, (f"method={method}", f"student.network={network}"), (*own, "student.network", "student.options")
    )


def _student_keys(method: str) -> tuple[str, ...]:
    """The keys of the student's branching that a method's file sets, or one that it is made from."""
    loaded = GlobalHydra.instance().config_loader().repository.load_config(f"method/{method}")  # type: ignore[attr-defined]
    if loaded is None:
        return ()
    own = {f"student.{key}" for key in loaded.config.get("student") or {}}
    for parent in loaded.defaults_list or []:
        name = getattr(parent, "path", None)
        if name and name != "_self_":
            own |= set(_student_keys(name))
    return tuple(key for key in _BRANCHING if key in own)


def match_student(by: str, cfg: DictConfig) -> Match:
    """The plain network whose MACs or parameters come nearest to those of the study's student.

    Args:
        by: `macs` or `parameters`.
        cfg: Composed configuration with the study's student.
    """
    from ekd_lightning.data import load_dataset  # noqa: PLC0415 (slow; --help needs none)
    from ekd_lightning.evaluation.efficiency import count_macs, count_parameters  # noqa: PLC0415
    from ekd_lightning.networks.matching import match_network  # noqa: PLC0415
    from ekd_lightning.pipeline.prepare import build_student  # noqa: PLC0415

    settings = to_settings(cfg)
    data = settings.data
    dataset = load_dataset(data.name, Path(data.root), data.download)
    student = build_student(settings, dataset)
    cost = partial(count_macs, image_size=dataset.image_size) if by == "macs" else count_parameters
    return match_network(student.spec, cost(student), cost)


def _matched(name: str, row: RowPlan, match: Match) -> RowPlan:
    options = [f"++student.options.{key}={value}" for key, value in match.options.items()]
    without = (*row.without, "student.network", "student.options")
    return replace(
        row,
        name=name,
        overrides=(*row.overrides, f"student.network={match.network}", *options),
        without=without,
    )
