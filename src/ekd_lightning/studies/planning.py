"""Planning of a study: the requested runs, the remaining jobs, and how they are started."""

from __future__ import annotations

import json
import logging
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ekd_lightning.config.config import (
    changes,
    import_user_modules,
    read_config,
    to_plain,
    to_settings,
    warn_without_effect,
)
from ekd_lightning.config.edge import parse_names
from ekd_lightning.config.overrides import key_of, may_be_given, override
from ekd_lightning.errors import UserError, few
from ekd_lightning.keys import is_free
from ekd_lightning.progress import track
from ekd_lightning.reporting.estimates import plural
from ekd_lightning.reporting.report import kind_of_machine
from ekd_lightning.runs.collection import RunEntry
from ekd_lightning.runs.directory import CONFIG, RunDirectory, RunState
from ekd_lightning.runs.words import require_named_code
from ekd_lightning.runs.writer import provenance
from ekd_lightning.settings import Settings
from ekd_lightning.studies.checking import check_job, read_teachers
from ekd_lightning.studies.cost import remaining_cost, training_cost
from ekd_lightning.studies.rows import plan_rows, with_tuned
from ekd_lightning.studies.study import MATCHES, RUNS, Composer, RowPlan, Study, continued, every_run, read_runs
from ekd_lightning.studies.sweep import Job

if TYPE_CHECKING:
    from ekd_lightning.data import Dataset, Unlabelled

log = logging.getLogger(__name__)


def build_study(
    old: Study | None,
    common: tuple[str, ...],
    composer: Composer,
    *,
    methods: str | None,
    fractions: Sequence[float],
    seeds: Sequence[int],
    match: str | None = None,
    controls: bool = True,
    tuned: Path | None = None,
) -> Study:
    """Builds the study that the command asks for, to be joined with the study that its folder already holds.

    Args:
        old: The folder's study; None if the folder is new.
        common: Overrides of all rows.
        composer: Composes overrides, inside an initialised Hydra.
        methods: Rows, e.g. `ce,kd_mean@resnet14`; None keeps those of `old`.
        fractions: Shares of the training images; empty for those of `old`, else that of the settings.
        seeds: Empty for those of `old`, else 0, 1, 2.
        match: Costs at which plain students are added, e.g. `macs,parameters`, or `none`.
        controls: Whether the usual controls are added to a new study; those of `old` were settled when it was new.
        tuned: Folder of settings from ekd-tune.

    Raises:
        UserError: For unknown names.
    """
    if methods is None and old is None:
        raise UserError("--methods: must be given, e.g. --methods ce,kd_mean,ekd")
    if old is not None:
        recorded = [*old.common, *(word for row in old.rows for word in row.overrides)]
        require_named_code(recorded, common, "the study")
        common = continued(old, common)
    cfg = composer(overrides=common)
    to_settings(cfg).check()
    import_user_modules(list(cfg.imports))
    usual = cfg.data.fraction if cfg.data.fraction is not None else 1.0
    declared = {row.name for row in old.rows} if old and old.declaration else set()
    own = {row.name for row in old.rows if row.seeds is not None} if old and seeds else set()
    more = tuple(seeds)
    fractions = tuple(fractions) or (old.fractions if old else (usual,))
    seeds = tuple(seeds) or (old.seeds if old else (0, 1, 2))
    rows = [row for row in old.rows if row.name in own] if old else []
    if methods is not None:
        controls &= old is None
        matches = parse_names("--match", match or ("macs,parameters" if controls else "none"), (*MATCHES, "none"))
        rows = plan_rows(methods, [by for by in matches if by != "none"], controls, common, old, composer)
    kept, rows = [row for row in rows if row.name in declared], [row for row in rows if row.name not in declared]
    if tuned is not None:
        rows = with_tuned(rows, tuned, composer, cfg.data.name, fractions)
    if declared:  # rows that its declaration lacks do not decide
        rows = [replace(row, seeds=seeds, decides=False) for row in rows]
    rows = [replace(row, seeds=more) if row.name in own else row for row in (*kept, *rows)]
    data = old.data if old else cfg.data.name
    return Study(tuple(rows), fractions, seeds, common, data, str(Path.cwd()))


def plan(study: Study, folder: Path, compose: Composer, *, retry_failed: bool, asked: Study | None = None) -> list[Job]:
    """The jobs to launch; logs how many. They are those of `asked`, a part of the study, or without it of all runs.

    Finished runs are skipped, and so are runs of other processes. Stopped runs continue from their last checkpoint, or
    start again without one. Failed runs are skipped, or with `retry_failed` treated like stopped ones.

    Raises:
        UserError: If a row cannot be run, or a directory holds a run with another configuration.
    """
    found = read_runs(study, folder)
    every = every_run(found)
    wanted = {run.directory for run in (every if asked is None else every_run(read_runs(asked, folder)))}
    others = [run for run in every if run.directory not in wanted and not run.is_over]
    running = sum(run.state is RunState.RUNNING and run.directory in wanted for run in every)
    failed = [run for run in every if run.state is RunState.FAILED and run.directory in wanted and not retry_failed]
    checked = _Runs(study, compose)
    # Rows are counted, as the further seeds of a checked row take no time.
    for fraction, row in track(list(product(study.fractions, study.rows)), "checking", "rows"):
        checked.add(row, fraction, found[fraction][row.name], [*others, *failed])
    checked.check_together()
    jobs = checked.jobs()
    rest = f", {running} left to other processes, which are running them" if running else ""
    rest += f", {len(others)} not asked for" if others else ""
    again = sum(job.resumed for job in jobs)
    planned = plural(len(every), "run")
    log.info("%s in the study, %d to be run (%d of them resumed)%s", planned, len(jobs), again, rest)
    for one in failed:
        log.warning("%s failed earlier and is skipped: %s (--retry-failed runs it again)", one.name, one.error)
    _warn_of_other_machines([run for run in every if run.is_over])
    known = {run.directory for run in every}
    if left := sorted(path.name for path in (folder / RUNS).glob("*-f*-s*") if path not in known):
        log.warning("%s: holds runs that are not in the study: %s", folder / RUNS, few(left))
    return jobs


class _Runs:
    """The runs of a study: those on record are compared with its configuration, and the others become jobs."""

    def __init__(self, study: Study, compose: Composer) -> None:
        self._study, self._compose = study, compose
        self._jobs: list[tuple[tuple[float, int, int], Job]] = []
        self._recorded, self._checked, self._teachers = list[RunEntry](), list[Settings](), set[str]()
        self._images: dict[float | None, tuple[Settings, Dataset, Unlabelled | None]] = {}
        self._free = [word for word in study.common if may_be_given(word)]

    def add(self, row: RowPlan, fraction: float, runs: Mapping[int, RunEntry], skipped: Sequence[RunEntry]) -> None:
        """Adds the runs of a row at a share of the images; refuses a row that cannot be run, or an other run there."""
        config = self._compose(overrides=self._study.words(row, fraction, next(iter(runs))))
        settings = to_settings(config)
        settings.check()
        whole: dict[str, int] | None = None
        for seed, run in runs.items():
            words = self._study.words(row, fraction, seed)
            keeps = run.is_over or run.state is RunState.STOPPED
            keeps |= run.state is RunState.FAILED and run.on_disk.last_checkpoint.is_file()
            if keeps and run.on_disk.file(CONFIG) is not None:
                _check_configuration(run.directory, to_plain(self._compose(overrides=words)))
                self._recorded.append(run)
            if run.is_over or run.state is RunState.RUNNING or run in skipped:
                continue
            if whole is None:
                whole = self._check(row, settings)
            resumed = run.on_disk.can_resume()
            own = tuple(_resumed_words(run.directory, self._free) if resumed else words)
            cost = remaining_cost(run, settings, whole) if resumed else whole
            job = Job(run.directory, own, resumed, row.name, **cost)
            self._jobs.append(((fraction, seed, -len(config.method.terms)), job))

    def _check(self, row: RowPlan, settings: Settings) -> dict[str, int]:
        """Checks a row as its run would, so that a refused row ends the study before another trains; returns its cost.

        Rows with the same share have the same images.
        """
        try:
            prepared = check_job(settings)
            read_teachers(settings, prepared, self._teachers)
            cost = training_cost(settings, prepared)
        except UserError as error:
            raise UserError(f"row {row.name}: {error}") from None
        self._checked.append(settings)
        images = settings, prepared.dataset, prepared.datamodule.unlabelled
        self._images.setdefault(settings.data.fraction, images)
        return cost

    def check_together(self) -> None:
        """Refuses images other than those of existing runs, and warns of overrides without effect."""
        _refuse_other_images(self._images.values(), self._recorded)
        warn_without_effect([key_of(word) for word in self._study.common], self._checked)

    def jobs(self) -> list[Job]:
        """The jobs by share and seed.

        Within a seed the methods with many terms come first: they need most teacher outputs, and fill the tables that
        the others then read.
        """
        return [job for _, job in sorted(self._jobs, key=lambda pair: pair[0])]


def _warn_of_other_machines(done: Sequence[RunEntry]) -> None:
    """Warns of finished runs from another kind of machine, which one table will join with runs of this machine."""
    here = kind_of_machine(provenance())
    for kind, count in Counter(kind_of_machine(run.provenance) for run in done).items():
        if kind != here:
            log.warning("%s made on another kind of machine, %s; this one is %s", plural(count, "run"), kind, here)


def _check_configuration(directory: Path, plain: dict[str, Any]) -> None:
    """Refuses an existing run whose configuration differs, naming the keys."""
    changed = [key for key in changes(read_config(directory), plain) if not is_free(key)]
    if changed:
        raise UserError(
            f"{directory}: holds a run with another configuration ({', '.join(changed[:5])} differ); "
            "remove it, or use another --output"
        )


def _refuse_other_images(images: Iterable[tuple[Settings, Dataset, Unlabelled | None]], runs: list[RunEntry]) -> None:
    """Refuses images that differ from those of existing runs.

    Unlabelled images that are the rest of a data set depend on the share, so they are compared within one only.
    """
    from ekd_lightning.pipeline.context import refuse_other_images  # noqa: PLC0415 (slow; a report needs none)

    records = {json.dumps(data, sort_keys=True): run for run in runs if (data := run.provenance.get("data"))}
    for settings, dataset, unlabelled in images:
        for run in records.values():
            same = run.setting("data.fraction") == settings.data.fraction or (unlabelled and unlabelled.kind == "own")
            refuse_other_images(run.on_disk, settings, dataset, unlabelled if same else None)


def _resumed_words(directory: Path, free: Sequence[str]) -> list[str]:
    """The overrides that a run was started with, and the given ones in place of those that may change."""
    given, recorded = {key_of(word) for word in free}, RunDirectory(directory).overrides()
    require_named_code(recorded, free, directory)
    return [*(word for word in recorded if key_of(word) not in given), *free]


def commands(jobs: Sequence[Job], search: Sequence[str]) -> list[str]:
    """The jobs as shell commands, for schedulers that have no Hydra launcher.

    The words `search` say where the user's configuration files are.
    """
    lines = []
    for job in jobs:
        free = [word for word in job.overrides if may_be_given(word)]
        again = [override("resume", str(job.directory)), *free]
        anew = [*job.overrides, override("hydra.run.dir", str(job.directory))]
        lines.append(shlex.join(["ekd-train", *search, *(again if job.resumed else anew)]))
    return lines
