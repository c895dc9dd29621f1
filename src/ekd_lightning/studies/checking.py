"""Checks of jobs before the first of them starts: what their runs would be refused for, and folders in use."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf, open_dict

from ekd_lightning.config import internals
from ekd_lightning.config.config import as_running, build_callbacks, import_user_modules, to_settings
from ekd_lightning.config.mistakes import line_of
from ekd_lightning.errors import UserError, quiet
from ekd_lightning.progress import importing, part, phase, session, track
from ekd_lightning.runs.directory import RunState
from ekd_lightning.runs.lock import DirectoryLock, LockedError, holder
from ekd_lightning.runs.writer import RunWriter
from ekd_lightning.settings import Settings
from ekd_lightning.studies.launching import is_queued, multirun_config, resume_words
from ekd_lightning.studies.sweep import Job, JobState, Sweep, job_states, read_sweep, varied_keys, varied_values

if TYPE_CHECKING:
    from ekd_lightning.pipeline.prepare import Prepared

log = logging.getLogger(__name__)

SEED = re.compile(r"seed=\d{1,18}")
"""An override of the seed alone."""
_BY_JOB = re.compile(r"\$\{[^}]*(\bseed\b|\bhydra:)")
"""An interpolation whose value differs between jobs that differ in their seed alone."""
_ALONE = ("seed", "tags", "metric", "logger", "resume", "overwrite")
_ALONE_IN_RECIPE = (
    *("optimizer", "optimizer_options", "lr", "momentum", "nesterov", "weight_decay"),
    *("schedule", "milestones", "gamma", "warmup_epochs", "ema"),
)
"""Settings that `check_settings` checks by themselves, and no other check reads."""


def check_job(settings: Settings) -> Prepared:
    """Checks a job as its run would be, silently: the run itself logs its warnings.

    Raises:
        UserError: What the run would be refused for.
    """
    from ekd_lightning.pipeline.run import check_run  # noqa: PLC0415 (slow; a report needs none)
    from ekd_lightning.teachers.hardware import threads_as_before  # noqa: PLC0415

    callbacks = build_callbacks(settings)
    names = (None, "ekd_lightning", "pytorch_lightning", "lightning_fabric")
    with threads_as_before(), quiet(*names), tempfile.TemporaryDirectory() as nowhere:
        return check_run(settings, Path(nowhere), "sweep", callbacks)[0]


def read_teachers(settings: Settings, prepared: Prepared, known: set[str]) -> None:
    """Reads the weights of a job's teachers that need no training, or downloads them, so that no run has to.

    Teachers that are `known` are not read again; the others are added.

    Raises:
        UserError: If weights are missing, damaged or do not fit.
    """
    from ekd_lightning.training.pool import check_teachers  # noqa: PLC0415 (slow; --help needs none)

    others = {name: value for name, value in asdict(settings.teachers).items() if name not in ("pool", "count")}
    for plan, entry in zip(prepared.pool, settings.teachers.pool, strict=False):
        key = _text([entry, others, asdict(settings.data)])
        if key not in known:
            with part(f"teacher {plan.id}"):
                check_teachers([plan])
            known.add(key)


class JobChecks:
    """Checks the jobs of a multirun as their runs would be checked, each combination of settings once.

    Jobs of a cluster get only the checks that need neither images nor devices, which may be others there. `settings`
    holds the different settings that were composed.
    """

    def __init__(self, config: DictConfig) -> None:
        with importing("PyTorch and Lightning"):
            import ekd_lightning.pipeline.run  # noqa: F401, PLC0415 (slow; --help needs none)
        self._config, self._queued = config, is_queued(config)
        self.settings: list[Settings] = []
        self._lines: dict[tuple[str, ...], str | None] = {}
        self._refused: dict[str, Exception | None] = {}
        self._read: set[str] = set()

    def mistakes(self, jobs: Sequence[Job]) -> dict[int, str]:
        """Checks jobs; returns the line on the mistake of each that has one, by its position.

        A bug, e.g. in the user's own modules, keeps its traceback.
        """
        found = {
            number: self._line(number, job.overrides) for number, job in enumerate(track(jobs, "checking", "jobs"))
        }
        return {number: line for number, line in found.items() if line is not None}

    def _line(self, number: int, words: tuple[str, ...]) -> str | None:
        key, by_job = tuple(word for word in words if not SEED.fullmatch(word)), False
        if key in self._lines:
            return self._lines[key]
        line = None
        try:
            with composed(self._config, words, number) as job:
                by_job = differs_by_job(job)
                settings = to_settings(job)
            self._check(settings)
        except Exception as error:
            line = line_of(error, words)
            if line is None:
                raise
        if not by_job:
            self._lines[key] = line
        return line

    def _check(self, settings: Settings) -> None:
        from ekd_lightning.pipeline.prepare import check_settings  # noqa: PLC0415 (slow; --help needs none)

        import_user_modules(settings.imports)
        check_settings(settings)
        self.settings.append(settings)
        if self._queued:
            return
        plain = {name: value for name, value in asdict(settings).items() if name not in _ALONE}
        plain["recipe"] = {name: value for name, value in plain["recipe"].items() if name not in _ALONE_IN_RECIPE}
        if (key := _text(plain)) not in self._refused:
            self._refused[key] = None
            try:
                read_teachers(settings, check_job(settings), self._read)
            except Exception as error:
                self._refused[key] = error
        if (refused := self._refused[key]) is not None:
            raise refused


@contextlib.contextmanager
def composed(config: DictConfig, words: Sequence[str], number: int) -> Iterator[DictConfig]:
    """A job of a multirun as the launcher composes it, without the node `hydra`, whose values it can resolve."""
    job = internals.job_config(config, words, number)
    with as_running(job), open_dict(job):
        del job["hydra"]
        yield job


def differs_by_job(job: DictConfig) -> bool:
    """Whether the settings of jobs that differ in their seed alone differ otherwise, too."""
    return _BY_JOB.search(str(OmegaConf.to_container(job, resolve=False))) is not None


def _text(plain: Any) -> str:
    return json.dumps(plain, sort_keys=True, default=str)


def refuse_mistakes(found: Mapping[int, str], jobs: Sequence[Job], sweep: Sweep, advice: str = "") -> None:
    """Refuses jobs with mistakes, in one line with the varying overrides of the first one, then `advice`."""
    if not found:
        return
    counts, (first, line) = Counter(found.values()), next(iter(found.items()))
    if counts[line] == len(jobs):  # what all jobs share
        raise UserError(line + advice)
    same, others = counts[line] - 1, len(found) - counts[line]
    name = named(jobs[first], sweep) + (f" and {same} more" if same else "")
    raise UserError(f"{name}: {line}{f'; {others} more with other mistakes' if others else ''}{advice}")


def named(job: Job, sweep: Sweep) -> str:
    """A job by its directory and by what varies in the sweep."""
    values = varied_values(job, varied_keys(sweep.jobs))
    words = " ".join(f"{key}={value}" for key, value in values.items())
    return f"job {job.directory.relative_to(sweep.folder)}" + (f" ({words})" if words else "")


def without_mistakes(
    jobs: Sequence[Job], states: Sequence[JobState], sweep: Sweep, hydra_words: Sequence[str]
) -> list[Job]:
    """The jobs of a resumed sweep that can be run.

    A sweep keeps its settings, so a job that can never run must not keep the others from it for ever: a job that failed
    or stopped before is left out with a warning, and one that never started is recorded as failed when the sweep is
    refused.

    Raises:
        UserError: If a job that never started would be refused, or all jobs would.
    """
    if not jobs:
        return []
    config = multirun_config(sweep, hydra_words)
    with session("plan", keep=False), phase("plan"):
        checked = [replace(job, overrides=(*job.overrides, *resume_words(job))) for job in jobs]
        found = JobChecks(config).mistakes(checked)
    started = (RunState.FAILED, RunState.STOPPED)
    new = {number: line for number, line in found.items() if states[number].run.state not in started}
    if len(found) == len(jobs):
        refuse_mistakes(found, jobs, sweep)
    if new:
        recorded = [_record(jobs[number].directory, line) for number, line in new.items()]
        refuse_mistakes(new, jobs, sweep, "; the same command runs the other jobs" if all(recorded) else "")
    for number, line in found.items():
        state = states[number].run.state.value
        log.warning("job %s %s before and is left out: %s", jobs[number].directory.name, state, line)
    return [job for number, job in enumerate(jobs) if number not in found]


def _record(directory: Path, line: str) -> bool:
    """Records that a job was refused, unless its directory holds a run; returns whether it is on record as failed."""
    directory.mkdir(parents=True, exist_ok=True)
    with DirectoryLock(directory):
        run = RunWriter(directory)
        if not run.holds_run():
            run.fail(line)
        return run.recorded().state is RunState.FAILED


def refuse_used(sweep: Sweep, config: DictConfig) -> None:
    """Refuses a new sweep that would share or replace the directory of a run.

    Raises:
        UserError: For a directory that is in use, or of two jobs, or that holds a run which may not be overwritten.
    """
    counts = Counter(job.directory for job in sweep.jobs)
    for job in sweep.jobs:
        if counts[job.directory] > 1:
            raise UserError(
                f"hydra.sweep.subdir: {counts[job.directory]} jobs would share the directory {job.directory}; name all "
                "that varies in it, or leave it out"
            )
        if (other := holder(job.directory)) is not None:
            raise LockedError(f"{job.directory}: in use by {other}; give this sweep another hydra.sweep.dir")
        overwrite = "overwrite=true" in job.overrides or bool(config.get("overwrite"))
        run = RunWriter(job.directory)
        try:
            run.refuse_used(overwrite=overwrite, key="hydra.sweep.dir")
        except UserError:
            if run.was_started():
                _refuse_earlier(sweep.folder, job.directory)
            raise


def _refuse_earlier(folder: Path, directory: Path) -> None:
    """Refuses a folder by its earlier sweep, if that is on record and has a run in the directory."""
    earlier = None
    with contextlib.suppress(UserError):
        earlier = read_sweep(folder)
    if earlier is None or directory not in (job.directory for job in earlier.jobs):
        return
    done, number = sum(state.run.is_over for state in job_states(earlier)), len(earlier.jobs)
    again = "" if done == number else f"resume={folder} continues it; "
    raise UserError(
        f"{folder}: holds an earlier sweep, {done} of {number} runs done; {again}give another hydra.sweep.dir, or "
        "overwrite=true to replace its runs"
    )
