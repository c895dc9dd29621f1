"""The runs of a study on disk: what is done, what is to be run, resumed, or refused."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from ekd_lightning.config.config import CONFIG_FILE, changed_keys, read_config, to_plain
from ekd_lightning.errors import UserError
from ekd_lightning.reporting.comparison import Run
from ekd_lightning.studies.plan import FREE, RowPlan, Study, is_under, key_of

if TYPE_CHECKING:
    from ekd_lightning.settings import Settings

RUNS = "runs"


@dataclass(frozen=True)
class Job:
    """A run to be launched.

    Attributes:
        directory: The run's directory.
        words: Its overrides, as for ekd-train.
        resumed: Whether it goes on from its last checkpoint.
    """

    directory: Path
    words: tuple[str, ...]
    resumed: bool = False


def every(study: Study) -> Iterator[tuple[RowPlan, float, int]]:
    """All runs of a study, seed by seed."""
    for fraction in study.fractions:
        for seed in study.seeds:
            for row in study.rows:
                yield row, fraction, seed


def read_run(folder: Path, row: str, fraction: float, seed: int) -> Run:
    """What is known of a run from its directory."""
    run = Run(row, fraction, seed, "missing")
    directory = folder / RUNS / run.name
    status = _json(directory / "status.json")
    if status is None:
        started = (directory / ".hydra").is_dir() or (directory / CONFIG_FILE).is_file()
        return Run(row, fraction, seed, "failed", error="ended before it had a record") if started else run
    result = _json(directory / "result.json")
    if status["state"] == "done" and result is not None:
        return Run(row, fraction, seed, "partial" if result.get("partial") else "done", result)
    if status["state"] == "failed" and status["error"] != "interrupted":
        lines = str(status["error"]).splitlines() or ["unknown error"]
        return Run(row, fraction, seed, "failed", error=lines[0])
    return Run(row, fraction, seed, "stopped")


def read_runs(study: Study, folder: Path) -> list[Run]:
    """All runs that the study asks for, in the order of its rows."""
    return [
        read_run(folder, row.name, fraction, seed)
        for fraction in study.fractions
        for row in study.rows
        for seed in study.seeds
    ]


def check_configuration(directory: Path, plain: dict[str, Any]) -> None:
    """Refuses a run that is there with another configuration.

    Raises:
        UserError: Naming the keys that differ.
    """
    changed = [key for key in changed_keys(read_config(directory), plain) if not is_under(key, FREE)]
    if changed:
        raise UserError(
            f"{directory}: is there with another configuration ({', '.join(changed[:5])} differ); "
            "remove it, or use another --output"
        )


def plan(study: Study, folder: Path, compose: Any, *, retry_failed: bool) -> tuple[list[Job], list[Run]]:
    """Decides what to launch.

    Runs that are done are skipped. Stopped ones go on from their last checkpoint, or start again without one.
    Failed ones are left alone unless they are to be tried again, then they are treated like stopped ones.

    Args:
        study: What is asked for.
        folder: The study's folder.
        compose: Composes overrides into a configuration, as Hydra's `compose`.
        retry_failed: Whether failed runs are tried again.

    Returns:
        The jobs, and the failed runs that are left alone.

    Raises:
        UserError: If a row cannot be run as it is asked for, or a run is there with another configuration.
    """
    from ekd_lightning.config.config import to_settings  # noqa: PLC0415

    ordered: list[tuple[tuple[float, int, int], Job]] = []
    left: list[Run] = []
    checked: set[tuple[str, float]] = set()
    for row, fraction, seed in every(study):
        run, words = read_run(folder, row.name, fraction, seed), study.words(row, fraction, seed)
        directory = folder / RUNS / run.name
        cfg = compose(overrides=words)
        to_settings(cfg).check()
        checkpoint = (directory / "checkpoints" / "last.ckpt").is_file()
        keeps = run.state in ("done", "partial", "stopped") or (run.state == "failed" and checkpoint)
        if keeps and (directory / CONFIG_FILE).is_file():
            check_configuration(directory, to_plain(cfg))
        if run.state in ("done", "partial"):
            continue
        if run.state == "failed" and not retry_failed:
            left.append(run)
            continue
        resumed = checkpoint and (directory / ".hydra" / "overrides.yaml").is_file()
        if (row.name, fraction) not in checked:
            _check_row(row, to_settings(cfg))
            checked.add((row.name, fraction))
        free = [word for word in study.common if is_under(key_of(word), FREE)]
        job = Job(directory, tuple(_resumed_words(directory, free) if resumed else words), resumed)
        ordered.append(((fraction, seed, -len(cfg.method.terms)), job))
    # Within a seed the methods of many terms come first: they ask most of the teachers, and fill the tables that the
    # others then read.
    return [job for _, job in sorted(ordered, key=lambda pair: pair[0])], left


def _check_row(row: RowPlan, settings: Settings) -> None:
    """Makes all checks that a run makes before it trains, so that no other row trains before one is refused."""
    from ekd_lightning.pipeline.prepare import prepare  # noqa: PLC0415 (slow; --help needs none)

    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))  # what is to be said, the run says
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            prepare(settings, str(settings.trainer.get("accelerator", "auto")))
    except UserError as error:
        raise UserError(f"row {row.name}: {error}") from None
    finally:
        logging.disable(before)


def _resumed_words(directory: Path, free: Sequence[str]) -> list[str]:
    """The overrides that a run was started with, but for places and the like, which may have changed since."""
    words: Any = OmegaConf.to_container(OmegaConf.load(directory / ".hydra" / "overrides.yaml"))
    given = {key_of(word) for word in free}
    first = [str(word) for word in words if key_of(str(word)) not in given]
    return [*(word for word in first if not word.startswith("resume=")), *free]


def commands(jobs: Sequence[Job]) -> list[str]:
    """The jobs as commands for a shell, for launchers that Hydra does not know."""
    import shlex  # noqa: PLC0415

    return [
        shlex.join(
            ["ekd-train", f"resume={job.directory}", *(w for w in job.words if is_under(key_of(w), FREE))]
        )
        if job.resumed
        else shlex.join(["ekd-train", *job.words, f"hydra.run.dir={job.directory}"])
        for job in jobs
    ]


def _json(path: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except ValueError:
        raise UserError(f"{path}: damaged") from None
