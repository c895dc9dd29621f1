"""Comparison of a study's rows: which runs to launch, resume or refuse, and the table of all."""

from __future__ import annotations

import json
import logging
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.types import TaskFunction

from ekd_lightning import markdown as md
from ekd_lightning.config.config import (
    changed_keys,
    import_user_modules,
    read_config,
    to_plain,
    to_settings,
    warn_without_effect,
)
from ekd_lightning.config.edge import parse_names, print_wide
from ekd_lightning.config.overrides import key_of, may_be_given, override
from ekd_lightning.errors import UserError
from ekd_lightning.files import write_text
from ekd_lightning.progress import phase, session, track
from ekd_lightning.reporting import tables
from ekd_lightning.reporting.blocks import Block, block_of_rows
from ekd_lightning.runs.collection import RunEntry
from ekd_lightning.runs.directory import CONFIG, OVERRIDES, RunDirectory, RunState
from ekd_lightning.runs.lock import holder
from ekd_lightning.runs.words import require_named_code
from ekd_lightning.settings import Settings, is_free
from ekd_lightning.studies.launching import check_job, launch
from ekd_lightning.studies.study import MATCHES, Composer, RowPlan, Study, continued, plan_rows, union, write_study
from ekd_lightning.studies.sweep import Job, Sweep
from ekd_lightning.studies.tuned import with_tuned

log = logging.getLogger(__name__)

RUNS = "runs"
REFERENCES = ("ce", "ekd")
"""Rows that differences are taken to, where a study has them."""
_COUNTED = (RunState.FAILED, RunState.PARTIAL, RunState.STOPPED, RunState.RUNNING, RunState.PLANNED)
_COST = ("num_parameters", "num_adapter_parameters", "macs", "steps", "train_seconds")
_OWN = ("label", "method", "student", "seeds", "differences", "test_accuracy_interval", "running", "stopped")
_WIDTH = 200  # where there is no terminal

Runs = Mapping[str, Mapping[int, RunEntry]]
"""Row -> seed -> run."""


def ask(
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
    """Builds the study from the command and what the folder already holds.

    Args:
        old: What the folder holds; None if it is new.
        common: Overrides of all rows.
        composer: Composes overrides, inside an initialised Hydra.
        methods: Rows, e.g. `ce,kd_mean@resnet14`; None for those that are there.
        fractions: Shares of the training images; empty for those that are there, or that of the settings.
        seeds: Empty for those that are there, or 0, 1, 2.
        match: Costs at which plain students are added, e.g. `macs,parameters`, or `none`.
        controls: Whether the usual controls are added.
        tuned: Folder of settings from ekd-tune.

    Raises:
        UserError: For unknown names, or what contradicts the folder's study.
    """
    if methods is None and old is None:
        raise UserError("--methods: which rows? e.g. --methods ce,kd_mean,ekd")
    if old is not None:
        recorded = [*old.common, *(word for row in old.rows for word in row.overrides)]
        require_named_code(recorded, common, "the study")
        common = continued(old, common)
    cfg = composer(overrides=common)
    to_settings(cfg).check()
    import_user_modules(list(cfg.imports))
    usual = cfg.data.fraction if cfg.data.fraction is not None else 1.0
    fractions = tuple(fractions) or (old.fractions if old else (usual,))
    seeds = tuple(seeds) or (old.seeds if old else (0, 1, 2))
    rows: list[RowPlan] = []
    if methods is not None:
        matches = parse_names("--match", match or ("macs,parameters" if controls else "none"), (*MATCHES, "none"))
        rows = plan_rows(methods, [by for by in matches if by != "none"], controls, common, old, composer)
    if tuned is not None:
        rows = with_tuned(rows, tuned, cfg.data.name, fractions)
    data = old.data if old else cfg.data.name
    asked = Study(tuple(rows), fractions, seeds, common, data, str(Path.cwd()))
    return asked if old is None else union(old, asked)


def run(
    study: Study,
    folder: Path,
    composer: Composer,
    hydra_words: Sequence[str],
    task: TaskFunction,
    *,
    command: str,
    retry_failed: bool = False,
) -> None:
    """Runs the missing runs of a study.

    Args:
        study: What is asked for.
        folder: The study's folder.
        composer: Composes overrides, inside an initialised Hydra.
        hydra_words: Overrides of Hydra, e.g. the launcher.
        task: Runs one job.
        command: What continues the work if it is interrupted, for the user.
        retry_failed: Whether failed runs are tried again.

    Raises:
        UserError: If a row cannot be run as it is asked for, or a run is there with another configuration.
        KeyboardInterrupt: If the user interrupts, once everything has ended; says how it stands.
    """
    with session("plan", keep=False), phase("plan"):
        jobs, left = plan(study, folder, composer, retry_failed=retry_failed)
    write_study(study, folder)
    total = len(study.rows) * len(study.fractions) * len(study.seeds)
    resumed = sum(job.resumed for job in jobs)
    log.info("%d runs in the study, %d to be run (%d of them resumed)", total, len(jobs), resumed)
    for one in left:
        log.warning("%s failed before: %s (--retry-failed runs it again)", one.name, one.error)
    if jobs:
        whole = Sweep(folder / RUNS, tuple(jobs), working_directory=study.working_directory)
        launch(jobs, whole, hydra_words, task, command)


def read_run(folder: Path, row: str, fraction: float, seed: int) -> RunEntry:
    """A run of a study, from its directory.

    Raises:
        UserError: If its record is damaged, or none that is read here.
    """
    name = f"{row}-f{fraction:g}-s{seed}"
    return RunEntry.read(folder / RUNS / name, name)


def read_runs(study: Study, folder: Path) -> dict[float, Runs]:
    """All runs that a study asks for, by fraction; rows in their order."""
    return {
        fraction: {
            row.name: {seed: read_run(folder, row.name, fraction, seed) for seed in study.seeds} for row in study.rows
        }
        for fraction in study.fractions
    }


def plan(study: Study, folder: Path, compose: Composer, *, retry_failed: bool) -> tuple[list[Job], list[RunEntry]]:
    """Decides what to launch.

    Runs that are done are skipped. Stopped ones go on from their last checkpoint, or start again without one.
    Failed ones are left alone unless they are to be tried again, then they are treated like stopped ones.

    Returns:
        The jobs, and the failed runs that are left alone.

    Raises:
        UserError: If a row cannot be run as it is asked for, or a run is there with another configuration.
    """
    ordered: list[tuple[tuple[float, int, int], Job]] = []
    left: list[RunEntry] = []
    checked: dict[tuple[str, float], Settings] = {}
    free = [word for word in study.common if may_be_given(word)]
    for row, fraction, seed in track(list(study.every), "checking", "runs"):
        found, words = read_run(folder, row.name, fraction, seed), study.words(row, fraction, seed)
        directory = found.directory
        cfg = compose(overrides=words)
        to_settings(cfg).check()
        checkpoint = RunDirectory(directory).last_checkpoint.is_file()
        failed = found.state is RunState.FAILED
        keeps = found.is_over or found.state is RunState.STOPPED or (failed and checkpoint)
        if keeps and found.on_disk.file(CONFIG) is not None:
            _check_configuration(directory, to_plain(cfg))
        if found.is_over:
            continue
        if found.state is RunState.RUNNING:
            raise UserError(f"{directory}: in use by {holder(directory) or 'another process'}")
        if failed and not retry_failed:
            left.append(found)
            continue
        resumed = checkpoint and found.on_disk.file(OVERRIDES) is not None
        if (row.name, fraction) not in checked:
            checked[row.name, fraction] = to_settings(cfg)
            _check_row(row, checked[row.name, fraction])
        job = Job(directory, tuple(_resumed_words(directory, free) if resumed else words), resumed)
        ordered.append(((fraction, seed, -len(cfg.method.terms)), job))
    warn_without_effect([key_of(word) for word in study.common], checked.values())
    # Within a seed the methods of many terms come first: they ask most of the teachers, and fill the tables that the
    # others then read.
    return [job for _, job in sorted(ordered, key=lambda pair: pair[0])], left


def _check_configuration(directory: Path, plain: dict[str, Any]) -> None:
    """Refuses an existing run whose configuration differs, naming the keys."""
    changed = [key for key in changed_keys(read_config(directory), plain) if not is_free(key)]
    if changed:
        raise UserError(
            f"{directory}: is there with another configuration ({', '.join(changed[:5])} differ); "
            "remove it, or use another --output"
        )


def _check_row(row: RowPlan, settings: Settings) -> None:
    """Checks a row as its run would be, so that no other row trains before one is refused."""
    try:
        check_job(settings)
    except UserError as error:
        raise UserError(f"row {row.name}: {error}") from None


def _resumed_words(directory: Path, free: Sequence[str]) -> list[str]:
    """The overrides that a run was started with, except locations and the like, which may have changed since."""
    given, recorded = {key_of(word) for word in free}, RunDirectory(directory).overrides()
    require_named_code(recorded, free, directory)
    return [*(word for word in recorded if key_of(word) not in given), *free]


def commands(jobs: Sequence[Job]) -> list[str]:
    """The jobs as shell commands, for schedulers without a Hydra launcher."""
    lines = []
    for job in jobs:
        free = [word for word in job.overrides if may_be_given(word)]
        again = [override("resume", str(job.directory)), *free]
        anew = [*job.overrides, override("hydra.run.dir", str(job.directory))]
        lines.append(shlex.join(["ekd-train", *(again if job.resumed else anew)]))
    return lines


def report(study: Study, folder: Path) -> bool:
    """Writes comparison.csv, .md and .json, and prints the table.

    Returns:
        Whether all runs are done.

    Raises:
        UserError: If runs cannot be compared.
    """
    found = read_runs(study, folder)
    settings = {row.name: row.settings for row in study.rows}
    blocks = [study_block(study.data, fraction, found[fraction]) for fraction in study.fractions]
    rows = [study_rows(block) for block in blocks]
    flat = [
        one
        for fraction, block, own in zip(study.fractions, blocks, rows, strict=True)
        for one in records(block, own, found[fraction], settings)
    ]
    page = ["# Comparison\n", tables.LEGEND]
    for block, own in zip(blocks, rows, strict=True):
        page += [f"## {md.prose(block.title)}\n", tables.markdown(own, tables.STUDY, settings)]
    write_text(folder / "comparison.md", "\n".join(page))
    write_text(folder / "comparison.json", json.dumps(flat, indent=1) + "\n")
    without = [{key: value for key, value in one.items() if key != "by_seed"} for one in flat]
    write_text(folder / "comparison.csv", tables.csv_text(without))
    shown = [tables.terminal_table(block.title, own) for block, own in zip(blocks, rows, strict=True)]
    print_wide(*shown, tables.LEGEND, width=_WIDTH)
    states = Counter(one.state for rows in found.values() for row in rows.values() for one in row.values())
    print(f"{folder}: " + ", ".join(f"{count} {tables.STATE_NAMES[state]}" for state, count in states.most_common()))
    return set(states) == {RunState.DONE}


def study_block(data: str, fraction: float, runs: Runs) -> Block:
    """The rows of a study at one fraction, as a block of a report.

    Raises:
        UserError: If runs cannot be compared.
    """
    return block_of_rows(data, fraction, {row: list(own.values()) for row, own in runs.items()})


def study_rows(block: Block) -> list[tables.Row]:
    """The rows of a study's block, with the differences to those of `REFERENCES` that it has."""
    labels = [group.label for group in block.groups]
    return tables.rows(block, [name for name in REFERENCES if name in labels])


def records(
    block: Block, rows: Sequence[tables.Row], runs: Runs, settings: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """The rows of a study's block as flat records, accuracies and differences in [0, 1] and [-1, 1].

    Args:
        block: From `study_block`.
        rows: From `study_rows`.
        runs: Its runs.
        settings: By row, what it changes of its method's defaults; None if that is not known.
    """
    made = []
    for row in rows:
        full, name = tables.record(row), row.group.label
        own = runs[name]
        one: dict[str, Any] = {"data": block.data, "fraction": block.fraction, "row": name}
        one |= {key: value for key, value in full.items() if key not in _OWN}
        one |= {key: full.get(key) for key in _COST}
        for reference in row.differences:
            minus = full["differences"].get(reference) or dict.fromkeys(("mean", "n", "half_width", "p", "p_holm"))
            mean = minus.pop("mean")
            one |= {f"minus_{reference}": mean}
            one |= {f"minus_{reference}_{key}": value for key, value in minus.items()}
        chain = row.group.values("chain_stored_seconds")
        one["assistants_seconds"] = chain.mean if chain else None
        counts = Counter(other.state for other in own.values())
        one |= {tables.STATE_NAMES[state]: counts[state] for state in _COUNTED}
        one["problems"] = tables.problems(row.group) or None
        if settings is not None:
            one["settings"] = settings.get(name) or "defaults"
        one["by_seed"] = {
            str(seed): other.get("test_accuracy") if other.state is RunState.DONE else tables.STATE_NAMES[other.state]
            for seed, other in sorted(own.items())
        }
        made.append(one)
    return made
